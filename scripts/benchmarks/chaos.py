"""Kills and damaged files: what the commands leave behind.

    python scripts/benchmarks/chaos.py --kills 100 --files 10000 --state chaos.json

Every command is killed (SIGKILL, SIGTERM or SIGINT by turns) at a random moment, and run again: it
must end well, with the results of a run that nobody disturbed, and leave no temporary file. Files
that a run left are damaged at random and given to the commands that read them: these must end with
0, 1 or 2 within a minute, without a traceback, without starting a program, and no damaged proof may
verify more than the whole one. With `--state` the counts are kept, and the same command goes on.

Commands are forks of one process that has imported everything and computed nothing, so that a kill
takes the second that the command takes, and not the ten of an import.
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
VOLATILE = ("seconds", "time", "date", "epoch_seconds", "gflops", "overhead", "least_every")
LIMIT = 60.0
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


def run(arguments, folder, kill=None, sentinel=None):
    """`(exit code, output)` of a command in a fork.

    Args:
        arguments: list of str.
        folder: where it runs.
        kill: `(seconds, signal)`, or None.
        sentinel: file to be made where it starts a program, or None.
    """
    sys.stdout.flush()
    # Until the command has begun, signals wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[1:])
    child = os.fork()
    if child == 0:
        _be(arguments, folder, sentinel)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[1:])
    status = None
    if kill is not None:
        status = _waited(child, kill[0])
        if status is None:
            os.kill(child, kill[1])
    if status is None:
        status = _waited(child, LIMIT)
    text = (folder / ".output").read_text(errors="replace") if (folder / ".output").exists() else ""
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return HANGS, text
    return os.waitstatus_to_exitcode(status), text


def _waited(child, seconds):
    """The status of a child that ends within so many seconds, or None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def _be(arguments, folder, sentinel):
    """The child: the command, and nothing after it."""
    from tf_lyapunov.cli import main as command

    code = BROKEN
    try:
        os.chdir(folder)
        output = os.open(".output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if sentinel is not None:
            watch(sentinel)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[1:])
        code = command([*arguments, "--json"])
    except KeyboardInterrupt:  # before the command has begun, or after its end
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    for number in range(done, options.files):
        rng = random.Random(f"{options.seed} {number}")
        name = names[number % len(names)]
        path, arguments = READERS[name]
        work = pathlib.Path(tempfile.mkdtemp(dir=base.parent))
        shutil.copytree(base, work, dirs_exist_ok=True)
        what = damaged(work / path, rng)
        code, text = run(arguments, work, sentinel=work / "started")
        fault = outcome(name, code, text, result(text), whole[name])
        if (work / "started").exists():
            fault = f"a program was started: {(work / 'started').read_text()}"
        if fault:
            state["faults"].append(f"{path}, {what} (number {number}): {fault}")
        shutil.rmtree(work)
        state["files"][name] = state["files"].get(name, 0) + 1
        if number % 100 == 99:
            save()
            print(f"{number + 1} files, {len(state['faults'])} faults", flush=True)
    save()


if __name__ == "__main__":
    raise SystemExit(main())
