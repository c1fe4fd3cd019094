#!/usr/bin/env python
"""Rebuilds the certificates' pictures and anchors on MNIST, and the cost by depth.

    OPENBLAS_NUM_THREADS=1 python scripts/dissipativity/rebuild.py --data-dir DIR    # 5 minutes
    python scripts/dissipativity/rebuild.py --data-dir DIR --quick                   # a smoke test

`bounds.svg`: every method's bound on networks trained in the ordinary way, by width and by depth,
above the largest gain that ascent found. `depth.svg`: CPU time by depth. The anchor: how many of
the first 100 test images a 784-16-10 network keeps within 0.3, by the product of norms, by LipSDP
for every pair of classes, by linear bounds around each image, and under PGD; and beside every
network's gains those that hold on balls around test images. Results go to
`scripts/results/certificates`. Exit code 1 if a measurement contradicts a proof.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

import keras
import numpy as np

from benchmarks.machine import machine
from benchmarks.sdp import bounds, depth_cost
from tf_lyapunov import datasets, models
from tf_lyapunov.attacks import PGD
from tf_lyapunov.bounds.chains import product_gain
from tf_lyapunov.bounds.tails import dense_tail
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.evaluation.drawing import new_figure, save, style
from tf_lyapunov.local.outputs import gain_on
from tf_lyapunov.theory.balls import L2
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
RADIUS = 0.3
WIDTHS, DEPTHS, DEPTH_WIDTH = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), 64
METHODS = ("product of norms", "LipLT", "closed form", "ECLipsE", "LipSDP-layer", "LipSDP-neuron")
MARKERS = "osD^vP"
# Balls on which gains are proved around the first test images, and seconds for linear bounds.
LOCAL_RADIUS, LOCAL_IMAGES, LINEAR_SECONDS = 0.1, 8, 120.0


def trained(data, widths, epochs, seed=0):
    """A ReLU network trained with cross-entropy and Adam, and its dense chain."""
    keras.utils.set_random_seed(seed)
    model = models.mlp(data.input_shape, 10, widths=list(widths), activation="relu", seed=seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(data.x_train, data.y_train, batch_size=128, epochs=epochs, verbose=0)
    return model, dense_tail(read_network(model)).chain


def ascended_gain(chain, points, rounds, seed=0):
    """Largest norm of a Jacobian found from points along its leading direction: a lower bound."""
    rng = np.random.default_rng(seed)
    largest = 0.0
    for point in points:
        for _ in range(rounds):
            signal, patterns = point, []
            for weight, bias in zip(chain.weights[:-1], chain.biases, strict=False):
                signal = weight @ signal + bias
                patterns.append(signal > 0)
                signal = np.maximum(signal, 0)
            jacobian = chain.weights[-1]
            layers = zip(chain.weights[:-1], patterns, strict=True)
            for weight, pattern in reversed(list(layers)):
                jacobian = (jacobian * pattern) @ weight
            values, directions = np.linalg.eigh(jacobian @ jacobian.T)
            largest = max(largest, math.sqrt(max(values[-1], 0.0)))
            direction = directions[:, -1] @ jacobian
            size = np.linalg.norm(direction)
            if size == 0:
                break
            point = point + abs(rng.normal()) * direction / size
    return largest


def sweep(data, nets, epochs, points, rounds, seconds):
    """Bounds and found gains of one trained network per tuple of hidden widths."""
    found = []
    for widths in nets:
        model, chain = trained(data, widths, epochs)
        accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)[1]
        lower = ascended_gain(chain, points, rounds)
        rows = bounds(chain, seconds=seconds)
        local = np.sort(gain_on(model, data.x_test[:LOCAL_IMAGES], LOCAL_RADIUS))
        found.append(
            {
                "widths": widths,
                "accuracy": accuracy,
                "found": lower,
                "methods": rows,
                "on balls": {
                    "radius": LOCAL_RADIUS,
                    "images": LOCAL_IMAGES,
                    "median": float(np.median(local)),
                    "largest": float(local[-1]),
                },
            }
        )
        shown = ", ".join(f"{row['method']} {row['bound']:.4g}" for row in rows)
        shown += f", on balls {np.median(local):.4g}"
        print(f"{widths}: {accuracy:.1%}, found {lower:.4g}, {shown}", flush=True)
        keras.backend.clear_session()
    return found


def anchor(data, epochs, steps):
    """How many of the first 100 test images are certified within `RADIUS`, and survive PGD."""
    model, chain = trained(data, (16,), epochs)
    x, y = data.x_test[:100], data.y_test[:100]
    logits = np.asarray(model.predict(x, verbose=0), dtype=np.float64)
    right = np.argmax(logits, axis=1) == y
    top = np.sort(logits, axis=1)
    product = product_gain(chain)
    counts = {
        # The margin that a gain L of all logits together certifies: √2·L·radius.
        "product": int(np.sum(right & (top[:, -1] - top[:, -2] > math.sqrt(2) * product * RADIUS))),
        "product, margins per class": int(np.sum(certify(model, x, y).radius >= RADIUS)),
    }
    begin = time.perf_counter()
    proof = certify(model, x, y, method="lipsdp")
    seconds = time.perf_counter() - begin
    counts["LipSDP per pair"] = int(np.sum(proof.radius >= RADIUS))
    begin = time.perf_counter()
    around = certify(model, x, y, method="linear", time_budget=LINEAR_SECONDS)
    linear_seconds = time.perf_counter() - begin
    counts["linear, around each image"] = int(np.sum(around.radius >= RADIUS))
    attack = PGD(radius=L2(RADIUS), steps=steps)(model, x, y)
    survives = right & ~np.asarray(attack.success, dtype=bool)
    counts["left by PGD"] = int(np.sum(survives))
    proved = np.maximum(proof.radius, around.radius) >= RADIUS
    broken = int(np.sum(proved & ~survives))
    return {
        "net": "784-16-10 ReLU", "epochs": epochs, "radius": RADIUS, "images": 100,
        "clean": int(np.sum(right)), "product of norms": product,
        "gain by LipSDP": float(proof.gain_upper_bound), "seconds, LipSDP": seconds,
        "seconds, linear": linear_seconds,
        "PGD steps": steps, "counts": counts, "certified and broken": broken,
    }  # fmt: skip


def contradictions(results):
    """Measurements above a proof; there must be none."""
    found = [
        f"{net['widths']}: found {net['found']} above {row['method']} {row['bound']}"
        for part in ("by width", "by depth")
        for net in results[part]
        for row in net["methods"]
        if net["found"] > row["bound"] * (1 + 1e-9)
    ]
    if results["anchor"]["certified and broken"]:
        found.append(f"PGD broke {results['anchor']['certified and broken']} certified images")
    return found


def bounds_figure(results):
    """Bounds by width and by depth, with the found gains below them."""
    panels = (
        ("by width", "width of two hidden layers", lambda net: net["widths"][0]),
        ("by depth", f"hidden layers of {DEPTH_WIDTH}", lambda net: len(net["widths"])),
    )
    with style("light") as colours:
        figure, axes = new_figure(9, 3.8, columns=2)
        for axis, (part, label, place) in zip(axes, panels, strict=True):
            nets = results[part]
            x = [place(net) for net in nets]
            for index, method in enumerate(METHODS):
                y = [r["bound"] for net in nets for r in net["methods"] if r["method"] == method]
                colour = colours["others"][index % len(colours["others"])]
                line = ("-", "--")[index // len(colours["others"])] + MARKERS[index]
                axis.plot(x, y, line, color=colour, label=method, markersize=4)
            found = [net["found"] for net in nets]
            axis.plot(x, found, ":x", color=colours["text"], label="found by ascent")
            y = [net["on balls"]["median"] for net in nets]
            own = f"on balls of radius {LOCAL_RADIUS}, median"
            axis.plot(x, y, "-.+", color=colours["text"], label=own)
            axis.set(xlabel=label, xscale="log", yscale="log")
            axis.set_xticks(x, [str(v) for v in x])
            axis.xaxis.minorticks_off()
        axes[0].set_ylabel("gain of the logits (l2)")
        axes[1].legend(fontsize=8)
    return figure


def depth_figure(cost):
    """CPU seconds by depth, with lines of slope one."""
    with style("light") as colours:
        figure, (axis,) = new_figure(5.2, 3.6)
        x = np.array(cost["depths"], dtype=float)
        for index, (name, part) in enumerate(cost["methods"].items()):
            colour, y = colours["others"][index], part["CPU seconds"]
            label = f"{name}: depth^{part['exponent']:.2f}"
            axis.plot(x, y, MARKERS[index], color=colour, label=label)
            axis.plot(x, y[-1] * x / x[-1], ":", color=colour)
        axis.set(xscale="log", yscale="log", xlabel=f"hidden layers of {cost['width']}")
        axis.set(ylabel="CPU seconds (dotted: linear)")
        axis.set_xticks(x, [str(int(v)) for v in x])
        axis.xaxis.minorticks_off()
        axis.legend(fontsize=8)
    return figure


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test, a minute")
    options = parser.parse_args(argv)
    quick = options.quick
    out = options.out or ROOT / "results" / ("certificates_quick" if quick else "certificates")
    try:
        data = datasets.load("mnist", options.data_dir)
    except ValueError as error:  # DatasetNotFound
        print(f"error: {error}", file=sys.stderr)
        return 2
    points = data.x_test[: 4 if quick else 32].reshape(-1, 784).astype(np.float64)
    widths, depths = (WIDTHS[:2], DEPTHS[:2]) if quick else (WIDTHS, DEPTHS)
    settings = (1, points, 5, 20.0) if quick else (3, points, 20, 60.0)
    digest = hashlib.sha256(data.x_test.tobytes() + data.y_test.tobytes()).hexdigest()[:16]
    results = {
        "command": "python scripts/dissipativity/rebuild.py --data-dir DIR"
        + (" --quick" if quick else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {**machine(), "system": platform.system()},
        "data": f"TFDS mnist, {len(data.x_train)} training images, {data.preprocessing}, SHA-256 "
        f"of the test split {digest}",
        "training": f"Adam 1e-3, batch 128, {settings[0]} epochs for the pictures",
        "anchor": anchor(data, 3 if quick else 100, 20 if quick else 100),
    }
    print(json.dumps(results["anchor"], indent=1), flush=True)
    results["by width"] = sweep(data, [(w, w) for w in widths], *settings)
    results["by depth"] = sweep(data, [(DEPTH_WIDTH,) * d for d in depths], *settings)
    results["cost by depth"] = depth_cost(quick)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(results, indent=1, default=float) + "\n")
    save(bounds_figure(results), out / "bounds.svg")
    save(depth_figure(results["cost by depth"]), out / "depth.svg")
    found = contradictions(results)
    print("\n".join(found) or f"No contradiction. Written to {out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
