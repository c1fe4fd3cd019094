#!/usr/bin/env python
"""Rebuilds the CIFAR and SVHN experiments of papers 1 and 2, one run per row of each table.

    python scripts/lyapunov/cifar.py --data-dir DIR                        # all, days on CPUs
    python scripts/lyapunov/cifar.py --data-dir DIR --only figure_2 --strategy mirrored
    python scripts/lyapunov/cifar.py --quick                               # a smoke test, minutes

Runs are kept in OUT/runs: the same command continues after an interruption. Exit code 1 if a
measurement contradicts a proof.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

import numpy as np

from lyapunov.runs import parser, rebuild
from tf_lyapunov import datasets

ROOT = Path(__file__).resolve().parents[1]
DESIGNS = ("released", "090_027", "107_022")


def rows(data, designs):
    """Configurations of one data set without and with adversarial training."""
    names = [f"lyapunov/{data}_{kind}" for kind in ("baseline", "weight_decay", *designs)]
    return names, [f"{name}_fgm" for name in names]


CIFAR, CIFAR_FGM = rows("cifar10", DESIGNS)
SVHN, SVHN_FGM = rows("svhn", DESIGNS[:1])
PARTS = {
    "figure_2": [
        f"dissipativity/cifar10_{kind}" for kind in ("vanilla", "weight_decay", "spectral", "sound")
    ],
    "figure_3": [*CIFAR, "lyapunov/cifar10"],
    "figure_3_fgm": [*CIFAR_FGM, "lyapunov/cifar10_sound_fgm"],
    "resnet": ["lyapunov/cifar10_resnet_baseline", "lyapunov/cifar10_resnet_released"],
    "svhn": [*SVHN, "lyapunov/svhn"],
    "svhn_fgm": SVHN_FGM,
    "cifar100": ["lyapunov/cifar100"],
}
HEADINGS = {
    "figure_2": "Paper 2 (Aquino et al.), Figure 2: CIFAR-10, AlexNet",
    "figure_3": "Paper 1 (Rahnama, Nguyen, Raff), Figure 3: CIFAR-10, AlexNet (printed: under PGD "
    "at least 73% at ε = 0.1 and 63% at ε = 0.4)",
    "figure_3_fgm": "The same with FGM adversarial training",
    "resnet": "CIFAR-10, the released code's pre-activation ResNet",
    "svhn": "SVHN, AlexNet",
    "svhn_fgm": "SVHN with FGM adversarial training",
    "cifar100": "CIFAR-100, AlexNet with a proved gain of 4",
}
QUICK = ("figure_2", "cifar10_released_fgm", "cifar10_resnet_released")


def synthetic(config) -> datasets.Dataset:
    """A few noisy images whose colours tell the class, of the size of CIFAR's after cropping."""
    rng, arrays, classes = np.random.default_rng(0), {}, 100 if "100" in config.dataset.name else 10
    centres = rng.uniform(-0.3, 0.3, (classes, 1, 1, 3))
    for part, count in (("train", 96), ("val", 16), ("test", 32)):
        y = rng.integers(0, classes, count)
        x = centres[y] + rng.normal(0, 0.1, (count, 28, 28, 3))
        arrays |= {f"x_{part}": np.clip(x, -0.5, 0.5).astype("float32"), f"y_{part}": y}
    return datasets.Dataset(
        "synthetic",
        num_classes=classes,
        preprocessing="none",
        pixel_range=(-0.5, 0.5),
        **arrays,
    )


def quick_overrides(name: str) -> list[str]:
    """Settings of the smoke test."""
    small = ["training.epochs=1", "training.batch_size=32", "radii=[0.1, 0.4]", "samples=16"]
    attacks = "attacks=[{name: fgm}, {name: pgd, steps: 3, relative_step: 0.5}]"
    return [*small, attacks, *(["model.width=4"] if "resnet" in name else [])]


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    found = parser(__doc__.splitlines()[0], PARTS)
    found.add_argument(
        "--cifar",
        metavar="DIR",
        help="TensorFlow Datasets directory with a copy of CIFAR-10 made of JPEG files; says so in "
        "the results, because accuracies on it do not compare with published ones",
    )
    options = found.parse_args(argv)
    if options.cifar and options.data_dir:
        found.error("--cifar and --data-dir name the same thing: give one")
    options.data_dir = options.cifar or options.data_dir
    options.out = options.out or ROOT / "results" / ("cifar_quick" if options.quick else "cifar")
    if options.quick:
        options.only = options.only or list(QUICK)
    made_up = options.quick and options.data_dir is None
    note = "the prepared TFDS data sets that the configurations name"
    if options.cifar:
        note = (
            "CIFAR-10 re-encoded as JPEG by a third party: lossy, so these accuracies do not "
            "compare with published figures"
        )
    if made_up:
        note = "synthetic noise"
    return rebuild(
        "lyapunov/cifar.py",
        "CIFAR and SVHN: accuracy under attack and what is proved",
        PARTS,
        HEADINGS,
        options,
        argv,
        overrides=quick_overrides if options.quick else lambda name: [],
        data_for=synthetic if made_up else lambda config: None,
        note=note,
        papers=None,
    )


if __name__ == "__main__":
    sys.exit(main())
