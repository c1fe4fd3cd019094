#!/usr/bin/env python
"""Rebuilds Meunier et al. (2022): Tables 2-5, Figures 1-5, and the MNIST networks beside them.

    python scripts/potential/rebuild.py --data-dir DIR --cifar DIR --quick       # minutes
    python scripts/potential/rebuild.py --data-dir DIR --cifar DIR --only PARTS  # CPU, an hour
    python scripts/potential/rebuild.py --data-dir DIR --cifar DIR               # GPU, days

PARTS is mnist,families,equal_time,depth,cifar_small,epoch_time; `--cifar` names a copy of CIFAR-10
made of JPEG files. Any backend: `KERAS_BACKEND=jax` on a machine with a GPU and no TensorFlow,
whose data sets are then read from a cache that `--prepare` writes elsewhere. Runs are checkpointed
every epoch, finished ones are kept: the same command continues after an interruption. Results go
to `scripts/results/potential` (`potential_quick`). Exit code 1 if an attack broke a certificate.

    python scripts/potential/rebuild.py --data-dir DIR --cifar DIR --only cpu_hour

is the equal-time table, days of two cores: every family at 10 minutes of CPU, the best three at 60
(see `cpu_hour.py`). It goes to the folder `cpu_hour` there, with `--device-minutes`, on one
accelerator, to `device_minutes`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

from benchmarks.machine import machine
from potential.jobs import (
    PUBLISHED_EPOCHS,
    cifar_jobs,
    equal_time_jobs,
    family_jobs,
    mnist_jobs,
    small_cifar_jobs,
)
from potential.training import prepare, run
from tf_lyapunov.evaluation.wording import percent, percent_down
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
CIFAR = ("table_2", "table_3", "table_4", "table_5", "figure_3", "figures_4_5", "relaxed")
PARTS = ("mnist", "families", "equal_time", "depth", "cifar_small", "epoch_time", *CIFAR)
# Asked for by its name alone.
APART = ("cpu_hour",)


def main(argv=None) -> int:
    options = _options(argv)
    quick, out = options.quick, options.out
    out = out or ROOT / "results" / ("potential_quick" if quick else "potential")
    directories = {"mnist": options.data_dir, "cifar10": options.cifar or options.data_dir}
    directories["cifar100"] = directories["fashion_mnist"] = options.data_dir
    if options.prepare:
        for name in options.prepare.split(","):
            print(f"{name}: {prepare(name, directories[name], options.data_dir)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    records, loaded, broken = {}, {}, 0

    def do(jobs):
        for job in jobs:
            record = run(job, directories, out, loaded)
            if record is not None:
                records[job.name] = record
                clean, certified = record["clean"], record["certified"]
                proved = "/".join(percent_down(v) for v in certified)
                seconds = record["seconds"]["cpu"]
                print(f"{job.name}: {percent(clean)}, {proved}, {seconds:.0f} CPU s", flush=True)

    for part in options.only:
        if part == "mnist":
            do(mnist_jobs(quick))
        elif part == "families":
            do(family_jobs(quick))
        elif part == "equal_time":
            do(family_jobs(quick))  # their times; kept if they are there
            do(equal_time_jobs(quick, records))
        elif part == "cifar_small":
            do(small_cifar_jobs(quick))
        elif part == "epoch_time":
            from potential.speed import measure_speed

            for row in measure_speed(out / "epoch_time.json", machine(), quick)["rows"]:
                print(f"{row['network']}: {row['wall_ratio']:.2f} of the ResNet's wall time")
        elif part == "cpu_hour":
            from potential import cpu_hour

            facts = {"date": datetime.date.today().isoformat(), "machine": machine()}
            folder = out / ("device_minutes" if options.device_minutes else "cpu_hour")
            broken += cpu_hour.measure(
                directories, _plan(options), folder, facts, options.datasets.split(","),
                2000 if quick else None,
            )  # fmt: skip
        elif part == "depth":
            from potential.depth import measure_depth

            measure_depth(out / "depth.json", quick)
        else:
            do(cifar_jobs(part, quick, options.epochs))
    if set(options.only) <= set(APART):
        # What they wrote stands apart, and says itself when and where it was measured.
        print(f"Written to {out}")
        return 1 if broken else 0
    facts = {"date": datetime.date.today().isoformat(), "machine": machine(), "quick": quick}
    facts["cifar"] = (
        "CIFAR-10 read from JPEG files, not comparable to the last digit" if options.cifar else ""
    )
    write_text(out / "run.json", json.dumps(facts, indent=1) + "\n")
    from potential.tables import write_results

    broken += write_results(out)
    print(f"Written to {out}")
    return 1 if broken else 0


def _plan(options):
    """The `cpu_hour.Plan` that is asked for."""
    from potential import cpu_hour

    asked = cpu_hour.Plan(
        minutes=options.minutes,
        long_minutes=options.long_minutes,
        trial_minutes=options.trial_minutes,
        trials=options.trials,
        seeds=tuple(int(seed) for seed in options.seeds.split(",")),
        clock="wall" if options.device_minutes else "cpu",
        entries=tuple(options.families.split(",")) if options.families else cpu_hour.ENTRIES,
        aim=options.aim,
        losses_apart=not options.losses_together,
    )
    if options.quick:
        short = {"minutes": 0.02, "trial_minutes": 0.02, "long_minutes": 0.04, "trials": 2}
        asked = dataclasses.replace(asked, **short, validation=400, attacked=50)
    return asked


def _check_plan(parser, options):
    from potential import cpu_hour

    if min(options.minutes, options.trial_minutes) <= 0 or options.trials < 1:
        parser.error("--trials, --minutes and --trial-minutes must be positive")
    if options.long_minutes < 0 or not options.seeds.replace(",", "").isdigit():
        parser.error("--long-minutes must not be negative, --seeds numbers with commas")
    if options.aim is not None and not 0 < options.aim < math.inf:
        parser.error("--aim must be a positive radius")
    families = options.families.split(",") if options.families else []
    for what, given, known in (
        ("families", families, cpu_hour.ENTRIES),
        ("datasets", options.datasets.split(","), tuple(cpu_hour.RADII)),
    ):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory")
    parser.add_argument("--cifar", help="TFDS directory of a CIFAR-10 copy made of JPEG files")
    parser.add_argument("--prepare", help="names of data sets to cache as arrays for --data-dir")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="subsets and single epochs")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--epochs", type=int, default=PUBLISHED_EPOCHS, help="of CIFAR runs")
    hour = parser.add_argument_group("the equal-time table, cpu_hour")
    hour.add_argument("--minutes", type=float, default=10.0, help="of every training")
    hour.add_argument("--long-minutes", type=float, default=60.0, help="of the best three; or 0")
    hour.add_argument("--trials", type=int, default=4, help="settings of every family")
    hour.add_argument("--trial-minutes", type=float, default=2.0, help="of each")
    hour.add_argument("--seeds", default="0,1,2", help="of the trainings, with commas")
    hour.add_argument("--aim", type=float, help="l2 radius that settings are chosen for")
    hour.add_argument(
        "--losses-together", action="store_true", help="leave out the best family with each alone"
    )
    hour.add_argument("--families", help="some of them, with commas")
    hour.add_argument("--datasets", default="mnist,fashion_mnist,cifar10", help="with commas")
    hour.add_argument(
        "--device-minutes", action="store_true", help="minutes that pass, for one accelerator"
    )
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    unknown = sorted(set(options.only) - {*PARTS, *APART})
    if unknown:
        known = ", ".join((*PARTS, *APART))
        parser.error(f"unknown parts {', '.join(unknown)}; choose from {known}")
    if "cpu_hour" in options.only:
        _check_plan(parser, options)
    if options.prepare and not options.data_dir:
        parser.error("--prepare writes into --data-dir, which is not given")
    return options


if __name__ == "__main__":
    sys.exit(main())
