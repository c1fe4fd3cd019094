#!/usr/bin/env python
"""Rebuilds paper 1's Table 3: ResNet50 on ImageNet under FGM and PGD, one run per row.

    python scripts/lyapunov/imagenet.py --data-dir DIR --strategy mirrored --scaling linear
    python scripts/lyapunov/imagenet.py --quick      # narrow networks on generated JPEG files

`--data-dir` holds imagenet2012 as TFDS prepares it (the error message says how). Runs are kept in
OUT/runs: the same command continues after an interruption. Exit code 1 if a measurement
contradicts a proof.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

from lyapunov.runs import parser, rebuild

ROOT = Path(__file__).resolve().parents[1]
RADII = (0.1, 0.2, 0.3, 0.4)
# Rahnama, Nguyen, Raff (CVPR 2020), Table 3 as printed: top-1 accuracy under FGM by radius.
TABLE_3 = {
    "imagenet_100_024_fgm": (0.69, 0.68, 0.68, 0.68),
    "imagenet_089_026_fgm": (0.67, 0.65, 0.63, 0.61),
    "imagenet_095_026": (0.61, 0.51, 0.44, 0.38),
    "imagenet_086_029": (0.60, 0.51, 0.43, 0.37),
    "imagenet_074_033": (0.60, 0.50, 0.42, 0.36),
    "imagenet_baseline": (0.57, 0.45, 0.40, 0.34),
    "imagenet_weight_decay": (0.58, 0.46, 0.39, 0.32),
}
PARTS = {"table_3": [f"lyapunov/{name}" for name in TABLE_3]}
HEADINGS = {"table_3": "Paper 1 (Rahnama, Nguyen, Raff), Table 3: ImageNet, ResNet50"}
QUICK = ("imagenet_baseline", "imagenet_074_033", "imagenet_089_026_fgm")


def printed() -> dict:
    """(run, radius) -> the paper's accuracy."""
    return {
        (f"lyapunov-{name}", radius): value
        for name, values in TABLE_3.items()
        for radius, value in zip(RADII, values, strict=True)
    }


def quick_overrides(name: str) -> list[str]:
    """Settings of the smoke test."""
    attacks = "attacks=[{name: fgm}, {name: pgd, steps: 3, relative_step: 0.5}]"
    data = ["dataset.crop=48", "dataset.validation=16", "training.batch_size=16"]
    model = ["model.width=2", "model.blocks=[1, 1]"]
    return [*data, *model, attacks, "training.epochs=1", "samples=16", "radii=[0.1, 0.4]"]


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    found = parser(__doc__.splitlines()[0], PARTS)
    found.add_argument(
        "--on-damage",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with damaged shards and images; both name them",
    )
    found.add_argument("--cache", help="'memory', or a path prefix, for the undecoded images")
    options = found.parse_args(argv)
    options.out = options.out or ROOT / "results" / (
        "imagenet_quick" if options.quick else "imagenet"
    )
    note = "imagenet2012 as prepared by TFDS"
    if options.quick:
        options.only = options.only or list(QUICK)
        if options.data_dir is None:
            from lyapunov.imagenet_sample import write

            options.data_dir = str(options.out / "sample")
            write(options.data_dir, train=80, validation=24, side=(64, 120))
            (options.out / "sample" / ".gitignore").write_text("*\n")
            note = "generated JPEG files in TFDS' format"
    reading = [f"dataset.on_damage={options.on_damage}"]
    reading += [f"dataset.cache={options.cache}"] if options.cache else []
    return rebuild(
        "lyapunov/imagenet.py",
        "ImageNet: accuracy under attack and what is proved",
        PARTS,
        HEADINGS,
        options,
        argv,
        overrides=lambda name: [*reading, *(quick_overrides(name) if options.quick else [])],
        data_for=lambda config: None,
        note=note,
        papers=printed(),
    )


if __name__ == "__main__":
    sys.exit(main())
