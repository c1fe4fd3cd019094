#!/usr/bin/env python
"""MNIST, l∞ 0.1, by training through bounds: a search on validation images, then the test set once.

    python scripts/potential/boxes.py --data-dir DIR --quick              # a minute or two
    python scripts/potential/boxes.py --data-dir DIR                      # 8·5 + 60 CPU minutes
    python scripts/potential/boxes.py --data-dir DIR --seeds 0,1,2

Settings are drawn at random and trained for `--trial-minutes` of CPU time each; the one with the
largest share of validation images (the last 5,000 of the training set) that boxes prove is trained
for `--minutes` on all training images. `--trials 0` takes the defaults of `Settings`, near
published ones, which no image chose. The test set is read when that is done. Both proofs are
printed: by boxes (IBP) of the whole test set, and by linear bounds of its first images. CPU time is
that of the process, all its threads, in training epochs alone. Checkpoints of every epoch and
finished trials are kept: the same command continues after an interruption. Results go to
`scripts/results/potential/boxes` (`boxes_quick`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

import keras
import numpy as np

from benchmarks.machine import machine
from potential.training import Clock, fit_to_end, load, start_over
from tf_lyapunov import datasets
from tf_lyapunov.certification import certify
from tf_lyapunov.evaluation.wording import percent, percent_down
from tf_lyapunov.theory.balls import Linf
from tf_lyapunov.training import BoundTraining, initialize_for_bounds
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
RADIUS = 0.1
LIMITS = (-0.5, 0.5)  # of pixels, x/255 - 0.5
VALIDATION = 5000
BATCH = 128
# Steps of the clock's trial, the first of which compile.
_TIMED = (10, 20)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the search chooses.

    Attributes:
        method: of `BoundTraining`.
        width: of the network: channels 16 and 32 times this, 100 hidden units times this.
        learning_rate: of Adam; divided by five after 70 and 90% of the steps.
        wider: radius of training relative to that certified.
        clean: κ at the end of the warm-up.
        warm: share of the steps that the warm-up takes.
        small: of small boxes.
    """

    method: str = "ibp"
    width: int = 2
    learning_rate: float = 1e-3
    wider: float = 1.2
    clean: float = 0.2
    warm: float = 0.4
    small: float = 0.6


def drawn(rng) -> Settings:
    """Settings at random."""
    return Settings(
        method=str(rng.choice(["ibp", "ibp", "crown_ibp", "small_box"])),
        width=int(rng.choice([1, 2, 4])),
        learning_rate=float(np.round(10 ** rng.uniform(-3.3, -2.5), 5)),
        wider=float(rng.choice([1.0, 1.2, 1.5])),
        clean=float(rng.choice([0.0, 0.2, 0.5])),
        warm=float(rng.choice([0.25, 0.5])),
        small=float(rng.choice([0.4, 0.7])),
    )


def network(settings: Settings, shape) -> keras.Model:
    """ConvSmall, wider; with names by which a checkpoint knows it in every process."""
    wide, relu = settings.width, {"activation": "relu", "padding": "same"}
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16 * wide, 4, strides=2, name="first", **relu),
            keras.layers.Conv2D(32 * wide, 4, strides=2, name="second", **relu),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(100 * wide, "relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ],
        name="network",
    )


def built(settings: Settings, shape, steps: int, seed: int) -> BoundTraining:
    """The compiled training of so many steps."""
    keras.utils.set_random_seed(seed)
    model = initialize_for_bounds(network(settings, shape), seed=seed)
    robust = BoundTraining(
        model,
        Linf(RADIUS * settings.wider),
        settings.method,
        bounds=LIMITS,
        warmup=(round(0.02 * steps), max(round(settings.warm * steps), 1)),
        clean_share=(1.0, settings.clean),
        small_share=settings.small,
        seed=seed,
    )
    falls = [max(round(share * steps), i) for i, share in enumerate((0.7, 0.9), 1)]
    rates = [settings.learning_rate / 5**i for i in range(3)]
    rate = keras.optimizers.schedules.PiecewiseConstantDecay(falls, rates)
    robust.compile(
        keras.optimizers.Adam(rate, clipnorm=10.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        # XLA would compile anew for the last batch of an epoch, and for evaluation.
        jit_compile=keras.backend.backend() == "jax",
    )
    return robust


def seconds_per_step(settings: Settings, x, y) -> float:
    """CPU seconds of one training step, compilation aside."""
    robust, rows = built(settings, x.shape[1:], 1000, 0), BATCH * max(_TIMED)
    times = []
    for steps in _TIMED:
        count = min(BATCH * steps, rows, len(x))
        started = time.process_time()
        robust.fit(x[:count], y[:count], batch_size=BATCH, verbose=0)
        times.append((time.process_time() - started) / -(-count // BATCH))
    return times[-1]


def trained(settings: Settings, x, y, minutes: float, seed: int, folder: Path) -> keras.Model:
    """The network after so many CPU minutes; continues where an interrupted run stopped."""
    mark, final = folder / "settings.json", folder / "final.weights.h5"
    asked = {"settings": dataclasses.asdict(settings), "minutes": minutes, "seed": seed}
    asked["images"] = len(x)
    plan = json.loads(mark.read_text()) if mark.exists() else {}
    if {k: plan.get(k) for k in asked} != asked:
        start_over(folder, mark)
        # How many epochs fit is measured once: a run that continues has the same schedule.
        epoch = seconds_per_step(settings, x, y) * -(-len(x) // BATCH)
        plan = {**asked, "epochs": max(round(60 * minutes / epoch), 1)}
        write_text(mark, json.dumps(plan, indent=1) + "\n")
    batches = datasets.Batches(x, y, batch_size=BATCH, seed=seed)
    robust = built(settings, x.shape[1:], plan["epochs"] * len(batches), seed)
    if final.exists():
        robust.plain.load_weights(final)
        return robust.plain
    fit_to_end(
        robust, batches, plan["epochs"], [Clock(folder / "epochs.jsonl")], folder / "checkpoints",
        final, robust.plain,
    )  # fmt: skip
    return robust.plain


def spent(folder: Path) -> float:
    """CPU seconds of all epochs."""
    return sum(line["cpu"] for line in Clock(folder / "epochs.jsonl").lines)


def proved(model, x, y, method: str, time_budget: float = 3600.0) -> dict:
    """Accuracy and what a method proves at `RADIUS`."""
    started = time.process_time()
    proof = certify(model, x, y, method=method, norm="linf", bounds=LIMITS, time_budget=time_budget)
    return {
        "method": method,
        "inputs": len(x),
        "accuracy": proof.accuracy,
        "certified": proof.certified_accuracy(RADIUS),
        "seconds": time.process_time() - started,
    }


def search(x, y, options, out: Path) -> Settings:
    """The settings that prove most validation images; every trial is one line of a file."""
    if not options.trials:
        return Settings()
    log = out / "search.jsonl"
    lines = [json.loads(s) for s in log.read_text().splitlines()] if log.exists() else []
    rng, best = np.random.default_rng(0), None
    split = len(x) - options.validation
    for number in range(options.trials):
        settings = drawn(rng) if number else Settings()
        asked = {"settings": dataclasses.asdict(settings), "minutes": options.trial_minutes}
        known = [line for line in lines if {k: line.get(k) for k in asked} == asked]
        if not known:
            folder = out / "cache" / f"trial_{number}"
            model = trained(settings, x[:split], y[:split], options.trial_minutes, 0, folder)
            found = proved(model, x[split:], y[split:], "box")
            known = [{**asked, "validation": found, "cpu": spent(folder)}]
            lines += known
            write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
        share = known[0]["validation"]["certified"]
        print(f"trial {number}: {settings}: {percent_down(share)} of validation", flush=True)
        if best is None or share > best[0]:
            best = share, settings
    return best[1]


def main(argv=None) -> int:
    options = _options(argv)
    out = options.out or ROOT / "results" / "potential" / (
        "boxes_quick" if options.quick else "boxes"
    )
    (out / "cache").mkdir(parents=True, exist_ok=True)
    write_text(out / "cache" / ".gitignore", "*\n")
    x, y, x_test, y_test = load("mnist", options.data_dir)
    if options.quick:
        x, y, x_test, y_test = x[:2000], y[:2000], x_test[:200], y_test[:200]
    settings = search(x, y, options, out)
    records = []
    for seed in options.seeds:
        folder = out / "cache" / f"final_{seed}"
        model = trained(settings, x, y, options.minutes, seed, folder)
        rows = [proved(model, x_test, y_test, "box")]
        count = options.linear
        rows.append(proved(model, x_test[:count], y_test[:count], "linear", options.linear_seconds))
        records.append({"seed": seed, "cpu": spent(folder), "test": rows})
        for row in rows:
            print(
                f"seed {seed}, {row['method']}: {percent(row['accuracy'])} right, "
                f"{percent_down(row['certified'])} proved at {RADIUS} of {row['inputs']}",
                flush=True,
            )
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "quick": options.quick,
        "radius": RADIUS,
        "minutes": options.minutes,
        "settings": dataclasses.asdict(settings),
        "trials": options.trials,
        "chosen_on": _chosen_on(options),
        "search_cpu": _search_seconds(out / "search.jsonl") if options.trials else 0.0,
        "runs": records,
    }
    write_text(out / "run.json", json.dumps(facts, indent=1) + "\n")
    print(f"Written to {out}")
    return 0


def _chosen_on(options):
    if not options.trials:
        return "nothing: set beforehand, after published recipes"
    return f"the last {options.validation} training images"


def _search_seconds(log):
    return sum(json.loads(line)["cpu"] for line in log.read_text().splitlines())


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="subsets, seconds of training")
    parser.add_argument("--minutes", type=float, default=60.0, help="of CPU time, of each seed")
    parser.add_argument("--trials", type=int, default=8, help="settings that are tried; or 0")
    parser.add_argument("--trial-minutes", type=float, default=5.0, help="of CPU time each")
    parser.add_argument("--seeds", default="0", help="of the final runs, with commas")
    parser.add_argument("--linear", type=int, default=50, help="images for linear bounds")
    parser.add_argument("--linear-seconds", type=float, default=1800.0, help="for all of them")
    options = parser.parse_args(argv)
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.validation = VALIDATION
    if options.quick:
        options.minutes = options.trial_minutes = 0.1
        options.trials = min(options.trials, 2)
        options.linear, options.linear_seconds = 2, 20.0
        options.validation = 500
    if options.trials < 0 or min(options.minutes, options.trial_minutes) <= 0:
        parser.error("--minutes and --trial-minutes must be positive, --trials at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
