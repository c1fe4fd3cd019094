"""Epoch times of convex potential networks beside plain ResNets of as many parameters."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import keras
import numpy as np

from potential.jobs import MULTI_MARGIN, SMALL_POTENTIAL
from potential.training import LOSSES
from tf_lyapunov import models
from tf_lyapunov.writing import write_text

IMAGE, CLASSES, IMAGES = (32, 32, 3), 10, 50_000
BATCH, ROUNDS, SECONDS = 256, 3, 2.0
RESNET = {"name": "preact_resnet18", "width": 64}


def measure_speed(path: Path, machine: dict, quick: bool) -> dict:
    """Seconds of an epoch of 50,000 images, each network's against the ResNet's beside it.

    Random images: how long a step takes does not depend on them. Networks take turns. What `path`
    holds is kept.
    """
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    potentials = {"CPL, 8 layers of 30 channels": SMALL_POTENTIAL}
    if not quick:
        potentials["CPL-S"] = {"name": "convex_potential", "size": "S", "head": "truncated"}
    rows = []
    for label, spec in potentials.items():
        potential = _compiled(spec)
        goal = _parameters(potential)
        width = _width(goal)
        networks = {
            f"{label}": potential,
            f"{label}, fixed step without norms": _compiled({**spec, "norm": None}),
            f"PreActResNet18 of width {width}": _compiled({**RESNET, "width": width}),
        }
        rows += _timed(networks, 32 if quick else BATCH)
    found = {"machine": machine, "batch": 32 if quick else BATCH, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _compiled(spec):
    model = models.build(spec, IMAGE, CLASSES, seed=0)
    loss = dict(MULTI_MARGIN)
    model.compile(keras.optimizers.Adam(1e-3), LOSSES[loss.pop("name")](**loss))
    return model


def _parameters(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def _width(goal):
    """Width of the ResNet with about as many parameters, which grow with its square."""
    return max(1, round(RESNET["width"] * math.sqrt(goal / _parameters(_compiled(RESNET)))))


def _timed(networks, batch):
    """A row for each network; the last one is what the others are divided by."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.5, 0.5, (batch, *IMAGE)).astype("float32")
    y = rng.integers(0, CLASSES, batch)
    steps, wall, cpu = {}, {n: [] for n in networks}, {n: [] for n in networks}
    for name, model in networks.items():
        model.train_on_batch(x, y)  # compiles
        started = time.perf_counter()
        model.train_on_batch(x, y)
        steps[name] = max(1, math.ceil(SECONDS / (time.perf_counter() - started)))
    for _ in range(ROUNDS):
        for name, model in networks.items():
            started = time.perf_counter(), time.process_time()
            for _ in range(steps[name]):
                model.train_on_batch(x, y)
            wall[name].append((time.perf_counter() - started[0]) / steps[name])
            cpu[name].append((time.process_time() - started[1]) / steps[name])
    plain = list(networks)[-1]
    return [
        {
            "network": name,
            "parameters": _parameters(model),
            "wall_per_epoch": statistics.median(wall[name]) * IMAGES / batch,
            "cpu_per_epoch": statistics.median(cpu[name]) * IMAGES / batch,
            "wall_ratio": statistics.median(wall[name]) / statistics.median(wall[plain]),
            "cpu_ratio": statistics.median(cpu[name]) / statistics.median(cpu[plain]),
        }
        for name, model in networks.items()
    ]
