"""Radii by bounds around each input, for `certify`."""

import dataclasses
import functools
import itertools
import time

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.findings import Finding, every
from tf_lyapunov.local.flow import Whole, flow_of, needs_model, portable, trace
from tf_lyapunov.local.maps import is_linear
from tf_lyapunov.local.radii import Prover, margin_rows
from tf_lyapunov.local.recording import record
from tf_lyapunov.local.relaxed import is_relaxed

# Bytes of multipliers that a certificate keeps, so that its radii can be re-checked.
LARGEST_RECORDS = 2**29


def linear_radii(network, x, labels, classes, radius, allowance, *, norm="l2", bounds=None,
                 deadline=np.inf, jobs=1, kept=None, keep=True, known=None, told=None):  # fmt: skip
    """Radii at which every margin stays above its allowance, by bounds around each input.

    Args:
        network: `Network`.
        x: inputs (n, …) as the model receives them.
        labels: int64 (n,).
        classes: number of logits.
        radius: float64 (n,), radii that are proved already, in `norm`.
        allowance: function of an input's index and a radius: what its margins must exceed.
            Several jobs pickle it.
        norm, bounds: see `certify`.
        deadline: `time.monotonic()` at which the search stops.
        jobs, kept: see `findings.every`.
        keep: whether multipliers are recorded.
        known: see `findings.every`.
        told: function of the number and `Finding` of every input, or None.

    Returns:
        `(radius, sentences, records)`: radii at least those given, and a dict from numbers of
        inputs that they enlarged to `recording.Record`, None if these are too large, or unwanted.

    Raises:
        UnsupportedLayerError: if the model has several inputs.
    """
    flow, x = flow_of(network), np.asarray(x)
    search = Search(Prover(portable(flow), norm, bounds), allowance, classes, keep)
    found = np.array(radius, dtype=np.float64)
    by_model = needs_model(flow)

    begin, given = time.monotonic(), itertools.count(1)

    def task(i):
        now = time.monotonic()
        if now > deadline:
            return None
        # Splits of units must not take the time of inputs that have no bound yet.
        share = begin + (deadline - begin) * next(given) / len(x)
        seconds = deadline - now, share - now
        point = x[i].astype(np.float64)
        traced = trace(flow, point) if by_model else None
        return Task(i, point, int(labels[i]), float(radius[i]), seconds, traced)

    begun, records, held = 0, {} if keep else None, 0
    for i, finding in every(search, task, radius, "inputs", jobs=jobs, kept=kept, known=known):
        begun += 1
        if told is not None:
            told(i, finding)
        if not finding.radius > radius[i]:
            continue
        found[i] = finding.radius
        if records is None or finding.record is None:
            records = None
            continue
        records[i] = finding.record
        held += finding.record.nbytes
        if held > LARGEST_RECORDS:
            records = None
            if kept is not None:
                kept.drop_records()
    records = None if records is None else {i: records[i] for i in sorted(records)}
    wider = found > radius
    sentences = [
        f"Bounds around each input (linear relaxations that join balls and boxes) enlarged the "
        f"radius of {np.mean(wider):.1%} of them; proved in float64 with a bound on the rounding."
    ]
    if begun < len(x):
        sentences.append(
            f"Time was up after {begun} of {len(x)} inputs; the others keep their radius by gains."
        )
    by_gain = passed(flow)
    if by_gain:
        sentences.append(f"Steps that pass balls by their gain alone: {', '.join(by_gain)}.")
    return found, sentences, records


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What the search around one input is told.

    Attributes:
        number: of the input.
        point: float64, the input as the model receives it.
        label: int.
        start: float, radius that is proved already.
        seconds: that the search may take, and until splits of units end, possibly infinite.
        traced: `Trace` at the input, None where the flow can be traced without the model.
    """

    number: int
    point: np.ndarray
    label: int
    start: float
    seconds: tuple
    traced: object = None


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """The search around one input, by NumPy alone, here or in another process.

    Attributes:
        prover: `Prover` of a portable flow.
        allowance: function of an input's number and a radius.
        classes: number of logits.
        keep: whether multipliers are recorded.
    """

    prover: Prover
    allowance: object
    classes: int
    keep: bool = True

    def __call__(self, task):
        """`Finding` of a `Task`."""
        deadline, split_deadline = (time.monotonic() + seconds for seconds in task.seconds)
        answer = self.prover.radius(
            task.point,
            margin_rows(self.classes, task.label),
            functools.partial(self.allowance, task.number),
            start=task.start,
            deadline=deadline,
            split_deadline=split_deadline,
            traced=task.traced,
        )
        is_final = time.monotonic() <= min(deadline, split_deadline)
        if not answer.radius > task.start:
            return Finding(task.start, task.start, is_final=is_final)
        held = record(self.prover.flow, answer.trace, answer) if self.keep else None
        return Finding(task.start, answer.radius, held, is_final)


def passed(flow):
    """Names of the steps without a relaxation."""
    names = [
        link.name
        for link in flow.links
        if isinstance(link.operation, Whole)
        or not (is_linear(link.operation) or is_relaxed(link.operation))
    ]
    return list(dict.fromkeys(names))


def check_applies(network):
    """Refuses models that bounds around an input do not apply to, before anything is computed.

    Raises:
        UnsupportedLayerError: if the model has several inputs.
    """
    if len(network.inputs) != 1:
        raise UnsupportedLayerError(
            "method='linear' needs a model with one input. Received: "
            f"{len(network.inputs)} inputs. Concatenate them inside the model."
        )
