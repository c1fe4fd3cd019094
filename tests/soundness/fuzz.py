"""Soundness fuzzer: random legal models, every claim against independent oracles.

    python tests/soundness/fuzz.py --models 2000 --seed 0 --resume state.json

The backend is KERAS_BACKEND's. One table is printed; the exit status is 1 if a claim was false.
With `--resume` the state is kept in a file, from which the same command goes on.
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
from soundness import claims, generator

CLEAR_EVERY = 25


def fuzz(models, seed=0, kinds=None, state=None, save=None, known=()):
    """Checks the seeds `seed` … `seed + models - 1`; returns the state, a dict of numbers."""
    state = state or {
        "seed": seed,
        "done": 0,
        "models": 0,
        "refused": 0,
        "claims": 0,
        "seconds": 0.0,
        "violations": [],
    }
    while state["done"] < models:
        begin = time.perf_counter()
        number = state["seed"] + state["done"]
        try:
            case = generator.build(number)
        except ValueError:
            case = None
        if case is not None:
            made, refused, found = claims.check(case, kinds)
            state["models"] += 1
            state["claims"] += made
            state["refused"] += refused
            for violation in found:
                if (violation.kind, violation.seed) not in known:
                    text = f"{violation.text} [{case.described}]"
                    state["violations"].append([violation.kind, violation.seed, text])
        state["done"] += 1
        if state["done"] % CLEAR_EVERY == 0:
            keras.backend.clear_session()
            if save is not None:
                save(state)
        state["seconds"] += time.perf_counter() - begin
    if save is not None:
        save(state)
    return state


def table(state):
    """The state as one table, and a line per violation."""
    kinds = collections.Counter(kind for kind, _, _ in state["violations"])
    rows = [
        ("backend", keras.backend.backend()),
        ("models", state["models"]),
        ("refused", state["refused"]),
        ("claims", state["claims"]),
        ("seconds", f"{state['seconds']:.0f}"),
        ("violations", sum(kinds.values())),
        *((f"  {kind}", count) for kind, count in sorted(kinds.items())),
    ]
    lines = [f"| {name:<24} | {value!s:>10} |" for name, value in rows]
    return "\n".join(lines + [f"{k} seed {s}: {t}" for k, s, t in state["violations"]])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path)
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
    print(table(state))
    return int(bool(state["violations"]))


if __name__ == "__main__":
    sys.exit(main())
