"""Soundness fuzzer: random legal models, every claim against independent oracles.

    python tests/soundness/fuzz.py --models 10000 --resume state.json --report

The backend is KERAS_BACKEND's. One table is printed; the exit status is 1 if a claim was false.
With `--resume` the state is kept in a file, from which the same command goes on; a model that ends
the process is passed over then. With `--report` old faults are put back too, and mistakes made in
readings, and the table says how many were found.
"""

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
from soundness import claims, generator, mutations, power

CLEAR_EVERY = 50
MISTAKES = 1000


def fuzz(models, seed=0, kinds=None, state=None, save=None):
    """Checks the seeds `seed` … `seed + models - 1`; returns the state, a dict of numbers."""
    fresh = {"seed": seed, "done": 0, "models": 0, "refused": 0, "misread": [], "claims": {}}
    state = state or {**fresh, "seconds": 0.0, "violations": []}
    counts = collections.Counter(state["claims"])
    while state["done"] < models:
        begin = time.process_time()
        number = state["seed"] + state["done"]
        state["done"] += 1
        try:
            case = generator.build(number)
        except ValueError:
            case = None
        if case is not None:
            found = claims.check(case, kinds)
            state["models"] += 1
            state["refused"] += found.refused
            state["misread"] += [number] * found.misread
            counts.update(found.claims)
            for violation in found.violations:
                text = f"{violation.text} [{case.described}]"
                state["violations"].append([violation.kind, violation.seed, text])
        state["claims"] = dict(counts)
        state["seconds"] += time.process_time() - begin
        if state["done"] % CLEAR_EVERY == 0:
            keras.backend.clear_session()
            if save is not None:
                save(state)
    if save is not None:
        save(state)
    return state


def table(state):
    """The state as rows, `(name, number)`."""
    kinds = collections.Counter(kind for kind, _, _ in state["violations"])
    return [
        ("backend", keras.backend.backend()),
        ("models", state["models"]),
        ("without a radius", state["refused"]),
        ("misread, and refused by validation", len(state["misread"])),
        ("claims", sum(state["claims"].values())),
        *((f"  {kind}", count) for kind, count in sorted(state["claims"].items())),
        ("seconds of one core", f"{state['seconds']:.0f}"),
        ("violations", sum(kinds.values())),
        *((f"  {kind}", count) for kind, count in sorted(kinds.items())),
    ]


def detection():
    """Rows on old faults that were put back, and on mistakes in readings."""
    faults = [mutations.FAULTS[n].found_by <= mutations.finders(n)[0] for n in mutations.FAULTS]
    found = power.measure(MISTAKES)
    return [
        ("old faults put back, found", f"{sum(faults)} of {len(faults)}"),
        ("mistakes in a reading, found", f"{found.caught} of {found.count}"),
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--kinds", nargs="*", choices=sorted(claims.CHECKERS))
    options = parser.parse_args(arguments)
    state = save = None
    if options.resume is not None:
        if options.resume.is_file():
            state = json.loads(options.resume.read_text())
            if state["seed"] != options.seed:
                parser.error(f"{options.resume} is of seed {state['seed']}")

        def save(state):
            fresh = options.resume.with_suffix(".new")
            fresh.write_text(json.dumps(state))
            fresh.replace(options.resume)

    state = fuzz(options.models, options.seed, options.kinds, state, save)
    rows = table(state) + (detection() if options.report else [])
    print("\n".join(f"| {name:<36} | {value!s:>12} |" for name, value in rows))
    for kind, seed, text in state["violations"]:
        print(f"{kind} seed {seed}: {text}")
    return int(bool(state["violations"]))


if __name__ == "__main__":
    sys.exit(main())
