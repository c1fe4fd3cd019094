"""Workers meet before they start, or learn who is missing."""

import json
import socket
import threading
import time

import pytest

from tf_lyapunov.errors import DistributionError
from tf_lyapunov.experiments.rendezvous import Cluster, meet


def addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    names = tuple(f"localhost:{one.getsockname()[1]}" for one in sockets)
    for one in sockets:
        one.close()
    return names


def meeting(clusters, timeout=10.0):
    """Everyone's error, or None, by position."""
    errors = [None] * len(clusters)

    def run(position):
        try:
            meet(clusters[position], timeout)
        except DistributionError as error:
            errors[position] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_all_who_were_started_alike_meet_and_leave_the_address_free():
    names = addresses(3)
    started = time.monotonic()
    assert meeting([Cluster(names, i) for i in range(3)]) == [None] * 3
    assert time.monotonic() - started < 5
    with socket.socket() as again:  # as the framework does next
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", int(names[0].split(":")[1])))


def test_the_missing_worker_is_named_and_the_others_stop_too():
    names = addresses(3)
    chief, other = meeting([Cluster(names, 0), Cluster(names, 2)], timeout=1.0)
    assert f"Missing: worker 1 ({names[1]}) of 3" in chief and "--worker-timeout" in chief
    assert "others are missing" in other


def test_a_missing_chief_is_named():
    names = addresses(2)
    (error,) = meeting([Cluster(names, 1)], timeout=0.5)
    assert f"worker 0 ({names[0]}), does not answer" in error


def test_a_worker_of_another_cluster_is_told_so_and_not_taken_in():
    names = addresses(2)
    errors = meeting([Cluster(names, 0), Cluster((names[0], "elsewhere:1"), 1)], timeout=1.0)
    assert "Missing: worker 1" in errors[0] and "other addresses than the chief" in errors[1]


def test_strangers_and_a_restarted_worker_do_no_harm():
    names = addresses(3)
    errors = []

    def chief():
        try:
            meet(Cluster(names, 0), 10.0)
        except DistributionError as error:
            errors.append(error)

    thread = threading.Thread(target=chief)
    thread.start()
    host, port = names[0].split(":")
    dead = None
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"tf-lyapunov 9 x\n"):
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as stranger:
                    stranger.sendall(greeting)
                break
            except OSError:
                time.sleep(0.02)
    dead = socket.create_connection((host, int(port)))  # worker 1, before its restart
    dead.sendall(f"tf-lyapunov 1 {Cluster(names, 1).digest}\n".encode())
    restarted = threading.Thread(target=meet, args=(Cluster(names, 1), 10.0))
    restarted.start()
    dead.settimeout(10)
    assert dead.recv(1) == b""  # the chief has hung up on the first attempt
    dead.close()
    assert meeting([Cluster(names, 2)]) == [None]
    restarted.join()
    thread.join()
    assert errors == []


def test_a_worker_that_died_while_it_waited_is_not_counted():
    names = addresses(3)
    chief = threading.Thread(target=meet, args=(Cluster(names, 0), 10.0))
    chief.start()
    host, port = names[0].split(":")
    for _ in range(100):
        try:
            dead = socket.create_connection((host, int(port)))
            break
        except OSError:
            time.sleep(0.02)
    dead.sendall(f"tf-lyapunov 1 {Cluster(names, 1).digest}\n".encode())
    dead.close()
    other = threading.Thread(target=meet, args=(Cluster(names, 2), 10.0))
    other.start()
    time.sleep(0.3)
    assert meeting([Cluster(names, 1)]) == [None]
    other.join()
    chief.join()


def test_a_server_of_an_older_run_is_not_taken_for_the_chief():
    """A survivor's server accepts connections, and never says go."""
    names = addresses(2)
    with socket.socket() as older:
        older.bind(("localhost", int(names[0].split(":")[1])))
        older.listen()
        (error,) = meeting([Cluster(names, 1)], timeout=0.7)
    assert "older attempt" in error


def test_a_port_that_is_taken_is_named():
    names = addresses(2)
    with socket.socket() as taken:
        taken.bind(("", int(names[0].split(":")[1])))
        taken.listen()
        (error,) = meeting([Cluster(names, 0)], timeout=1.0)
    assert "cannot listen" in error and names[0] in error


def test_a_time_out_must_be_positive():
    with pytest.raises(ValueError, match=r"positive. Received: timeout=0"):
        meet(Cluster(addresses(2), 0), 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:99999"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_what_is_no_cluster_is_refused_with_an_example(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=r'Received: TF_CONFIG.*"cluster": {"worker"'):
        Cluster.from_environment()


def test_a_chief_of_its_own_kind_comes_before_the_workers(monkeypatch):
    config = {"cluster": {"chief": ["c:1"], "worker": ["a:1", "b:1"]}}
    for task, index in ((("chief", 0), 0), (("worker", 1), 2)):
        config["task"] = dict(zip(("type", "index"), task, strict=True))
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        cluster = Cluster.from_environment()
        assert cluster.addresses[0] == "c:1" and cluster.index == index
        assert cluster.is_chief == (index == 0)
