"""The script that kills and damages sees what it looks for."""

import json
import os
import pathlib
import random
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in [n for n in sys.modules if n == "benchmarks" or n.startswith("benchmarks.")]:
        monkeypatch.delitem(sys.modules, name)


def test_damage_changes_the_file_and_says_how_and_is_the_same_again(tmp_path):
    from benchmarks.chaos_files import damaged

    whole = json.dumps({"numbers": list(range(500))}).encode()
    path, ways, changed = tmp_path / "file.json", set(), 0
    for seed in range(200):
        path.write_bytes(whole)
        way = damaged(path, random.Random(seed))
        found = path.read_bytes()
        path.write_bytes(whole)
        assert damaged(path, random.Random(seed)) == way and path.read_bytes() == found
        ways.add(way)
        changed += found != whole
    assert ways >= {"bits", "bytes", "cut", "hole", "doubled", "removed", "number"}
    assert changed > 180  # a digit may be replaced by itself


@pytest.mark.parametrize(
    "name, code, text, found, fault",
    [
        ("configuration", 0, "", {}, None),
        ("configuration", 2, "Received: something", "", None),
        ("configuration", 1, "Traceback (most recent call last)", "", "traceback"),
        ("configuration", 99, "", "", "exit code 99"),
        ("configuration", -9, "", "", "exit code -9"),
        ("proof", 0, "", {"holds": True, "examples": 20, "gain_upper_bound": 2.0}, None),
        ("proof", 0, "", {"holds": True, "examples": 20, "gain_upper_bound": 1.9}, "smaller gain"),
        ("proof", 0, "", {"holds": True, "examples": 21, "gain_upper_bound": 2.0}, "more examples"),
        ("proof", 1, "", {"holds": False, "examples": 20, "gain_upper_bound": 1.0}, None),
    ],
)
def test_faults_are_seen(name, code, text, found, fault):
    from benchmarks.chaos_files import outcome

    seen = outcome(name, code, text, found, {"examples": 20, "gain_upper_bound": 2.0})
    assert seen is None if fault is None else fault in seen


def test_results_are_compared_without_what_differs_from_run_to_run():
    from benchmarks.chaos import result

    one = 'Warning: something\n{"radius": [1.0, 2.0], "training_seconds": 1.0}\n'
    other = '{"radius": [1.0, 2.0], "training_seconds": 3.0}'
    assert result(one) == result(other) != result(other.replace("2.0", "2.5"))


def test_a_program_that_is_started_is_seen(tmp_path):
    from benchmarks.chaos import _waited

    sentinel = tmp_path / "started"
    child = os.fork()
    if child == 0:
        try:
            from benchmarks.chaos_files import watch

            watch(sentinel)
            os.system("true")
        finally:
            os._exit(0)
    assert _waited(child, 60) == 0
    assert "os.system" in sentinel.read_text()


def test_one_fork_reads_several_files_and_a_dead_or_hanging_one_ends_none_but_its_own(
    tmp_path, monkeypatch
):
    from benchmarks import chaos

    def command(arguments):
        if arguments[0] == "die":
            os._exit(7)
        if arguments[0] == "hang":
            time.sleep(600)
        if arguments[0] == "raise":
            raise ValueError("let through")
        if arguments[0] == "start":
            os.system("true")
        os.write(1, arguments[0].encode())  # not to what pytest calls stdout
        return len(arguments)

    monkeypatch.setattr("tf_lyapunov.cli.main", command)
    monkeypatch.setattr(chaos, "LIMIT", 3.0)
    names = ["one", "die", "two", "hang", "raise", "start", "three"]
    tasks = []
    for name in names:
        (tmp_path / name).mkdir()
        tasks.append(([name], tmp_path / name))
    found = chaos.run_watched(tasks)
    assert [code for code, _ in found] == [2, 7, 2, chaos.HANGS, chaos.BROKEN, 2, 2]
    assert [text for _, text in found] == ["one", "", "two", "", "", "start", "three"]
    assert [(tmp_path / name / "started").exists() for name in names] == [
        name == "start" for name in names
    ]
