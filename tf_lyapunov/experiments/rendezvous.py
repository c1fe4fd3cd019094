"""Where the processes of one run meet before any of them starts a framework's collectives.

TensorFlow and JAX wait for a missing worker without end, or abort the process. Here the chief
listens at its own address until everyone has called, then frees the address for the framework.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass

from ..errors import DistributionError

_GO, _OTHER = b"go\n", b"other cluster\n"
_EXAMPLE = (
    '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, and which of them this one is.

    Attributes:
        addresses: "host:port" of every worker; the first is the chief's.
        index: position of this process.
    """

    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's files."""
        return self.index == 0

    @property
    def digest(self) -> str:
        """Short digest of the addresses: equal on all workers that were started alike."""
        return hashlib.sha256(json.dumps(self.addresses).encode()).hexdigest()[:16]

    @classmethod
    def from_environment(cls) -> Cluster:
        """The cluster that the variable TF_CONFIG describes, on every backend.

        Raises:
            ValueError: TF_CONFIG is missing, is no JSON, or describes something else than workers.

        Example:

        >>> import os
        >>> os.environ["TF_CONFIG"] = (
        ...     '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}')
        >>> Cluster.from_environment()
        Cluster(addresses=('a:1', 'b:1'), index=1)
        >>> del os.environ["TF_CONFIG"]
        """
        text = os.environ.get("TF_CONFIG", "")
        problem = f"Received: TF_CONFIG={text!r}. Set it on every worker, for example: {_EXAMPLE}"
        try:
            config = json.loads(text)
            cluster, task = config["cluster"], config["task"]
            kinds, kind, index = set(cluster), task["type"], int(task["index"])
            addresses = tuple(
                str(a) for a in [*cluster.get("chief", []), *cluster.get("worker", [])]
            )
            ports = [int(address.rpartition(":")[2]) for address in addresses]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"Several workers are described by TF_CONFIG. {problem}") from None
        if not kinds <= {"chief", "worker"} or kind not in kinds or kind == "evaluator":
            raise ValueError(f"TF_CONFIG may hold a chief and workers only. {problem}")
        index += len(cluster.get("chief", [])) if kind == "worker" else 0
        named = all(address.rpartition(":")[0] for address in addresses)
        if not 0 <= index < len(addresses) or not named or any(not 0 < p < 65536 for p in ports):
            raise ValueError(
                f"TF_CONFIG must hold an address host:port per worker, and a task that is one of "
                f"them. {problem}"
            )
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"Two workers of TF_CONFIG have one address. {problem}")
        return cls(addresses, index)

    def _address(self, index: int) -> tuple[str, int]:
        host, _, port = self.addresses[index].rpartition(":")
        return host.strip("[]"), int(port)


def meet(cluster: Cluster, timeout: float = 60.0) -> None:
    """Wait until every process of a cluster has come, or fail with the names of those missing.

    Args:
        cluster: the processes, and which of them calls.
        timeout: seconds to wait.

    Raises:
        ValueError: `timeout` is not positive.
        DistributionError: somebody did not come in time, or was started with another cluster.
    """
    if not timeout > 0:
        raise ValueError(f"The time-out must be positive. Received: timeout={timeout!r} seconds.")
    if len(cluster.addresses) > 1:
        deadline = time.monotonic() + timeout
        (_receive if cluster.is_chief else _call)(cluster, deadline, timeout)


def _receive(cluster: Cluster, deadline: float, timeout: float) -> None:
    """The chief's side: collect a call from everyone, then let all of them go at once."""
    calls: dict[int, socket.socket] = {}
    expected = set(range(1, len(cluster.addresses)))
    host, port = cluster._address(0)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(128)
            while set(calls) < expected or _forget_the_dead(calls):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                listener.settimeout(left)
                call, _ = listener.accept()
                index = _caller(call, cluster, expected)
                if index is None:
                    call.close()
                    continue
                if index in calls:  # it was restarted while it waited
                    calls[index].close()
                calls[index] = call
            for call in calls.values():
                call.sendall(_GO)
            for call in calls.values():  # who closes first keeps the port busy: let it be them
                call.settimeout(5.0)
                call.recv(1)
        except TimeoutError:
            missing = sorted(expected - set(calls))
            if not missing:
                return  # everyone has come; one is slow to hang up
            names = ", ".join(f"{i} ({cluster.addresses[i]})" for i in missing)
            raise DistributionError(
                f"Not every worker came within {timeout:g} s. Missing: worker {names} of "
                f"{len(cluster.addresses)}. Start each with its own TF_CONFIG, check that it "
                f"reaches {cluster.addresses[0]}, or wait longer with --worker-timeout."
            ) from None
        except OSError as error:
            raise DistributionError(
                f"The chief cannot listen at its own address ({error.strerror or error}). "
                f"Received: {cluster.addresses[0]}. Another process may hold the port."
            ) from error
        finally:
            for call in calls.values():
                call.close()


def _forget_the_dead(calls: dict[int, socket.socket]) -> bool:
    """Whether somebody hung up while it waited; its restart will call again."""
    dead = [index for index, call in calls.items() if _hung_up(call)]
    for index in dead:
        calls.pop(index).close()
    return bool(dead)


def _hung_up(call: socket.socket) -> bool:
    call.setblocking(False)
    try:
        return call.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        call.settimeout(2.0)


def _caller(call: socket.socket, cluster: Cluster, expected: set[int]) -> int | None:
    """Number of the worker that called, or None for a stranger."""
    try:
        call.settimeout(2.0)
        words = call.recv(256).decode("ascii", "replace").split()
        if len(words) != 3 or words[0] != "tf-lyapunov":
            return None
        if words[2] != cluster.digest or int(words[1]) not in expected:
            call.sendall(_OTHER)
            return None
        return int(words[1])
    except (OSError, ValueError):
        return None


def _call(cluster: Cluster, deadline: float, timeout: float) -> None:
    """A worker's side: call the chief until it answers; a server of an older run does not."""
    reached = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(cluster._address(0), timeout=min(left, 5.0)) as call:
                call.sendall(f"tf-lyapunov {cluster.index} {cluster.digest}\n".encode())
                reached = True
                call.settimeout(max(deadline - time.monotonic(), 0.01))
                answer = call.recv(64)
        except OSError:
            answer = b""
        if answer == _GO:
            return
        if answer == _OTHER:
            raise DistributionError(
                f"Worker {cluster.index} was started with other addresses than the chief "
                f"{cluster.addresses[0]}. Received: {', '.join(cluster.addresses)}. Give the "
                "same cluster in TF_CONFIG everywhere."
            )
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0.0)))
    found = (
        "answers, but others are missing or it still runs an older attempt"
        if reached
        else ("does not answer")
    )
    raise DistributionError(
        f"The run did not start within {timeout:g} s: the chief, worker 0 "
        f"({cluster.addresses[0]}), {found}. Start every worker with its own TF_CONFIG, or wait "
        "longer with --worker-timeout."
    )
