"""Kills and damaged files: what the commands leave behind.

    python scripts/benchmarks/chaos.py --kills 100 --files 10000 --state chaos.json

Every command is killed (SIGKILL, SIGTERM or SIGINT by turns) at a random moment, and run again: it
must end well, with the results of a run that nobody disturbed, and leave no temporary file. Files
that a run left are damaged at random and given to the commands that read them: these must end with
0, 1 or 2 within a minute, without a traceback, without starting a program, and no damaged proof may
verify more than the whole one. With `--state` the counts are kept, and the same command goes on.

Commands are forks of one process that has imported everything and computed nothing, so that a kill
takes the second that the command takes, and not the ten of an import. One fork reads several
damaged files, one after the other.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if __name__ == "__main__":  # its folder's modules have the names of others
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks.chaos_files import READERS, damaged, outcome, watch

CONFIG = """
name: tiny
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
claim: {gain: 2.0}
training:
  epochs: 3
  batch_size: 16
  optimizer: {learning_rate: 0.05}
  loss: {name: cross_entropy, temperature: 0.2}
radii: [0.1, 0.3]
attacks: [{name: pgd, steps: 3}]
"""
# Command: (arguments, those of the second try, whether it starts from a finished run).
COMMANDS = {
    "train": (["train", "tiny.yaml", "--run-dir", "r"], ["--resume"], False),
    "run": (["run", "tiny.yaml", "--run-dir", "r"], ["--resume"], False),
    "certify": (
        ["certify", "r", "--samples", "20", "--proof", "p.npz", "--out", "c.json"], [], True
    ),
    "certify --state": (
        ["certify", "r", "--samples", "4", "--method", "linear", "--state", "s"], [], True
    ),
    "verify": (["verify", "q.npz", "r/model.keras"], [], True),
    "attack": (["attack", "r", "--samples", "50", "--out", "a.json"], [], True),
    "bracket": (["bracket", "r", "--samples", "3", "--state", "b"], [], True),
    "evaluate": (["evaluate", "r", "--out", "e.json"], [], True),
    "report": (["report", "r"], [], True),
    "export-mat": (["export-mat", "r", "x.mat", "--overwrite"], [], True),
    "import-mat": (
        ["import-mat", "y.mat", "--model", "r/model.keras", "--out", "n.keras", "--overwrite"], [],
        True,
    ),
    "plan": (["plan", "tiny.yaml"], [], True),
    "design": (["design", "--gain", "2", "--layers", "3"], [], True),
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What differs from run to run in what a command prints.
VOLATILE = ("seconds", "time", "date", "epoch_seconds", "gflops", "overhead", "least_every",
            "resumed_from")  # fmt: skip
LIMIT = 60.0
# Damaged files that one fork reads.
TOGETHER = 20
# Exit codes of our own: no end within LIMIT, an error that the command let through.
HANGS, BROKEN, INTERRUPTED = -1000, 99, 130


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of every command")
    parser.add_argument("--files", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=pathlib.Path)
    options = parser.parse_args()
    state = {"kills": {}, "files": {}, "faults": []}
    if options.state and options.state.exists():
        state = json.loads(options.state.read_text())
    import keras  # noqa: F401
    import tensorflow  # noqa: F401

    import tf_lyapunov.cli
    import tf_lyapunov.library  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        base = _base(pathlib.Path(folder))

        def save():
            if options.state:
                options.state.write_text(json.dumps(state, indent=1))

        for name in COMMANDS:
            _kill(name, base, options, state, save)
        _damage(base, options, state, save)
    for kind in ("kills", "files"):
        for name, count in state[kind].items():
            print(f"{kind:5} {name:20} {count}")
    print(f"faults {len(state['faults'])}")
    for fault in state["faults"]:
        print(" ", fault)
    return 1 if state["faults"] else 0


def _base(folder):
    """A folder with a finished run and everything that commands read."""
    base = folder / "base"
    base.mkdir()
    (base / "tiny.yaml").write_text(CONFIG)
    for arguments in (
        ["run", "tiny.yaml", "--run-dir", "r"],
        ["certify", "r", "--samples", "20", "--proof", "q.npz", "--out", "c0.json"],
        ["certify", "r", "--samples", "4", "--method", "linear", "--state", "s0"],
        ["bracket", "r", "--samples", "3", "--state", "b0"],
        ["export-mat", "r", "y.mat"],
    ):
        code, text = run(arguments, base)
        assert code == 0, text
    return base


def run(arguments, folder, kill=None):
    """`(exit code, output)` of a command in a fork.

    Args:
        arguments: list of str.
        folder: where it runs.
        kill: `(seconds, signal)`, or None.
    """
    child = _forked([(arguments, folder)])
    status = None
    if kill is not None:
        status = _waited(child, kill[0])
        if status is None:
            os.kill(child, kill[1])
    if status is None:
        status = _waited(child, LIMIT)
    if status is None:
        _end(child)
    return HANGS if status is None else os.waitstatus_to_exitcode(status), _output(folder)


def run_watched(tasks):
    """`(exit code, output)` of each `(arguments, folder)`: of as many in one fork as it survives.

    A file "started" stays in a folder where a program was started.
    """
    found = []
    while len(found) < len(tasks):
        child, status = _forked(tasks[len(found) :], watched=True), None
        while len(found) < len(tasks):
            folder = tasks[len(found)][1]
            mark = folder / ".code"
            if status is None:
                status = _waited(child, LIMIT, mark)
            if mark.exists():
                found.append((int(mark.read_text()), _output(folder)))
                continue
            if status is None:
                _end(child)
            code = HANGS if status is None else os.waitstatus_to_exitcode(status)
            found.append((code, _output(folder)))
            break
        else:
            if status is None and _waited(child, LIMIT) is None:
                _end(child)
    return found


def _forked(tasks, watched=False):
    sys.stdout.flush()
    # Until the command has begun, signals wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[1:])
    child = os.fork()
    if child == 0:
        _be(tasks, watched)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[1:])
    return child


def _end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _output(folder):
    path = folder / ".output"
    return path.read_text(errors="replace") if path.exists() else ""


def _waited(child, seconds, mark=None):
    """The status of a child that ends within so many seconds, or None; None once `mark` exists."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if mark is not None and mark.exists():
            return None
        time.sleep(0.002)
    return None


def _be(tasks, watched):
    """The child: the commands, and nothing after them."""
    from tf_lyapunov.cli import main as command

    code = BROKEN
    try:
        if watched:
            watch("started")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[1:])
        for arguments, folder in tasks:
            os.chdir(folder)
            output = os.open(".output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            code = _code(command, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            if watched:
                pathlib.Path(".begun").write_text(str(code))
                os.replace(".begun", ".code")
    finally:
        os._exit(code)


def _code(command, arguments):
    try:
        return command([*arguments, "--json"])
    except KeyboardInterrupt:  # before the command has begun, or after its end
        return INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return BROKEN


def _kill(name, base, options, state, save):
    arguments, again, finished = COMMANDS[name]
    rng = random.Random(f"{options.seed} {name}")

    def fresh():
        work = pathlib.Path(tempfile.mkdtemp(dir=base.parent))
        for path in base.iterdir():
            if path.name == "r" and not finished:
                continue
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, work / path.name)
        return work

    work = fresh()
    begin = time.monotonic()
    code, text = run(arguments, work)
    seconds, expected, left = time.monotonic() - begin, result(text), files(work)
    assert code == 0, text
    shutil.rmtree(work)
    moments = [rng.uniform(0, 1.1 * seconds) for _ in range(options.kills)]
    for number in range(state["kills"].get(name, 0), options.kills):
        work, chosen = fresh(), SIGNALS[number % len(SIGNALS)]
        killed = run(arguments, work, (moments[number], chosen))
        begun = again if not finished and (work / "r").exists() else []
        code, text = run([*arguments, *begun], work)
        said = f"{name}, {chosen.name} after {moments[number]:.3f} s of {seconds:.1f}"
        if "Traceback" in killed[1] + text:
            state["faults"].append(f"{said}: a traceback")
        if code != 0:
            state["faults"].append(f"{said}: then exit code {code}: {text[-300:]}")
        elif result(text) != expected:
            state["faults"].append(f"{said}: then another result")
        elif files(work) != left:
            state["faults"].append(f"{said}: other files: {sorted(files(work) ^ left)}")
        shutil.rmtree(work)
        state["kills"][name] = number + 1
        if number % 10 == 9:
            save()
            print(f"{name}: {number + 1} kills, {len(state['faults'])} faults", flush=True)
    save()


def result(text):
    """What a command printed as JSON, without what differs from run to run."""
    start = text.find("{")
    try:
        found = json.loads(text[start : text.rindex("}") + 1])
    except ValueError:
        return text
    return _steady(found)


def _steady(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in VOLATILE)}
        return {k: _steady(v) for k, v in kept.items()}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def files(work):
    return {str(p.relative_to(work)) for p in work.rglob("*") if "checkpoints/" not in str(p)}


def _damage(base, options, state, save):
    names = list(READERS)
    done = sum(state["files"].values())
    whole = {name: result(run(READERS[name][1], base)[1]) for name in names}
    for first in range(done, options.files, TOGETHER):
        numbers, tasks, what = range(first, min(first + TOGETHER, options.files)), [], []
        for number in numbers:
            path, arguments = READERS[names[number % len(names)]]
            work = pathlib.Path(tempfile.mkdtemp(dir=base.parent))
            shutil.copytree(base, work, dirs_exist_ok=True)
            what.append(damaged(work / path, random.Random(f"{options.seed} {number}")))
            tasks.append((arguments, work))
        for number, way, (_, work), (code, text) in zip(
            numbers, what, tasks, run_watched(tasks), strict=True
        ):
            name = names[number % len(names)]
            fault = outcome(name, code, text, result(text), whole[name])
            if (work / "started").exists():
                fault = f"a program was started: {(work / 'started').read_text()}"
            if fault:
                state["faults"].append(f"{READERS[name][0]}, {way} (number {number}): {fault}")
            shutil.rmtree(work)
            state["files"][name] = state["files"].get(name, 0) + 1
        if first % 100 == 0 or numbers[-1] + 1 == options.files:
            save()
            print(f"{numbers[-1] + 1} files, {len(state['faults'])} faults", flush=True)
    save()


if __name__ == "__main__":
    raise SystemExit(main())
