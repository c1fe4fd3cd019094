#!/usr/bin/env python
"""Rebuilds the tables and figures of Peck et al.: lower bounds beside perturbations found.

    OPENBLAS_NUM_THREADS=1 python scripts/perturbation/rebuild.py \
        --spambase CSV --data-dir DIR                              # an hour
    python scripts/perturbation/rebuild.py --quick                 # a smoke test, a minute

Tables 3.1, 4.2 and 4.3, Figures 2.5, 3.2, 4.1 to 4.3; with `--spambase` (57 numbers and a class per
line) its part of them; with `--data-dir` (TensorFlow Datasets, MNIST) Tables 5.1 to 5.3 and Figures
5.8 and 5.10 to 5.13; with `--cifar` as well CIFAR-NIN's part of them (two CPU cores: 250 s per
epoch of all images; an interrupted training continues after its last epoch). Results go to
`scripts/results/perturbation`; parts that are there already, made with the same options, are kept.
Exit code 1 if an attack found a perturbation below a proven bound.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

import numpy as np

from benchmarks.machine import machine
from perturbation import tables
from perturbation.text import results_text
from tf_lyapunov.attacks import IterativePerturbation, MinimalFGS
from tf_lyapunov.errors import DatasetNotFound
from tf_lyapunov.evaluation import perturbation_plots as plots
from tf_lyapunov.evaluation.drawing import save
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)


def linear_part(quick, out):
    """Table 3.1 and Figure 3.2."""
    rows, boxes = [], {}
    for number, (inputs, classes, interval, parameters, published) in enumerate(tables.LINEAR, 1):
        row, deviations = tables.random_classifiers(
            (inputs, classes), 10 if quick else 100, 10, interval, parameters, 20, seed=number
        )
        settings = {"inputs each": inputs, "classes": classes, "interval": interval}
        rows.append({**settings, "parameters": parameters, "published": published, **row})
        boxes[str(number)] = deviations
    save(plots.boxplots(boxes, log=True, ylabel="FGS or FGV - exact bound"), out / "figure_3_2.svg")
    return rows


def mlp_part(quick, out):
    """Table 4.2 and Figure 4.1."""
    rows, boxes = [], {}
    for number, setting in enumerate(tables.MLPS, 1):
        samples, inputs, count, layers, units, classes, interval, parameters, published = setting
        row, deviations = tables.random_classifiers(
            (inputs, *[units] * layers, classes),
            min(count, 5) if quick else count,
            samples, interval, parameters, 20 if quick else 50, seed=number,
        )  # fmt: skip
        settings = {"inputs each": inputs, "layers": layers, "units": units, "classes": classes}
        ranges = {"interval": interval, "parameters": parameters}
        rows.append({**settings, **ranges, "published": published, **row})
        boxes[str(number)] = deviations[deviations > 0]
    boxes = {name: v for name, v in boxes.items() if np.any(np.isfinite(v))}
    label = "FGS or FGV - published bound"
    save(plots.boxplots(boxes, log=True, ylabel=label), out / "figure_4_1.svg")
    return rows


def trained_part(quick, out, spambase):
    """Table 4.3 and Figure 4.2; the bracket of Wine is drawn."""
    rows, boxes = {}, {}
    for name, (_, published) in tables.TRAINED.items():
        if name == "Spambase" and spambase is None:
            continue
        epochs = {"Spambase": 2 if quick else 30}.get(name, 20 if quick else 150)
        row, deviations, found = tables.trained_row(
            name, spambase, epochs, 20 if quick else 100, 50 if quick else 1000
        )
        rows[name], boxes[name] = {**row, "published": published}, deviations
        print(f"{name}\n{found.table()}", flush=True)
        if name == "Wine":
            save(plots.bracket_figure(found), out / "bracket.svg")
            save(plots.distance_histogram(found), out / "histogram.svg")
    save(plots.boxplots(boxes, ylabel="FGS or FGV - published bound"), out / "figure_4_2.svg")
    return rows


def curve_part(quick, out, spambase):
    """Figure 4.3: regularising the output layer, as published and with the true class."""
    found = {}
    for name in tables.TRAINED:
        if name == "Spambase" and (spambase is None or quick):
            continue
        for kind, decided in (("as published", True), ("true class", False)):
            epochs = 5 if quick else {"Spambase": 8}.get(name, 60)
            weights = WEIGHTS[::4] if quick else WEIGHTS
            points = tables.curve(name, spambase, weights, epochs, 30, decided)
            found.setdefault(name, {})[kind] = points
    return found


def summary_figures(results, out):
    """Figures 4.3, 5.10 and 5.11, from the numbers alone."""
    for name, kinds in results["Figure 4.3"].items():
        panels = {
            f"{key}, {kind}": [point[key] for point in points]
            for kind, points in kinds.items()
            for key in ("accuracy", "error rate", "found", "sound bound")
        }
        weights = [point["weight"] for point in next(iter(kinds.values()))]
        figure = plots.regularization_curves(weights, panels)
        save(figure, out / f"figure_4_3_{name.lower()}.svg")
    for name, suffix in (("LeNet-5", "a"), ("CIFAR-NIN", "b")):
        if name in results:
            figure = plots.class_changes(results[name]["class changes"])
            save(figure, out / f"figure_5_10{suffix}.png")
    images = (*tables.LENETS, "CIFAR-NIN")
    boxes = {name: results[name]["epsilons"] for name in images if name in results}
    if boxes:
        figure = plots.boxplots(boxes, ylabel="ε of FGS, grey levels of 255")
        save(figure, out / "figure_5_11.svg")


def lenet_part(quick, out, data, name):
    """Tables 5.1 to 5.3 for one network; Figures 2.5, 5.8, 5.10, 5.12 and 5.13 for LeNet-5."""
    model = tables.lenet_fitted(name, data(), 1 if quick else 3)
    row, found, x, epsilon, fgs = tables.image_row(
        model, data(), 20 if quick else 300, 20 if quick else 50
    )
    row |= {"published": tables.LENETS[name][1], **_details(epsilon, fgs)}
    print(f"{name}\n{found.table()}", flush=True)
    if name == "LeNet-5":
        given = (x, found.labels, found, 2, 1.0) if quick else (x, found.labels, found, 20, 60.0)
        row["around"] = tables.around(model, *given)
        row["kernels scaled"] = tables.scaled_kernels(model, x[: 20 if quick else 100])
        _lenet_figures(out, model, found, x, epsilon, fgs, row["kernels scaled"])
    return row


def _details(epsilon, fgs):
    """What Figures 5.10 and 5.11 show."""
    ok = fgs.success
    counts = plots.change_counts(fgs.labels[ok], fgs.predictions_adv[ok], 10)
    return {"epsilons": epsilon[ok].round(3).tolist(), "class changes": counts.tolist()}


def nin_part(quick, out, options):
    """Tables 5.1 and 5.2 for CIFAR-NIN, Figures 5.9, 5.10b and 5.11b."""
    limit = 64 if quick else options.cifar_images
    data = tables.datasets.load("cifar10", options.cifar, crop=32, limit=limit)
    identity = {"images": len(data.x_train), "epochs": options.cifar_epochs}
    model = tables.fitted_by_epochs(
        tables.nin(),
        data.x_train,
        data.y_train,
        options.cifar_epochs,
        out / "runs" / "nin",
        identity,
    )
    row, found, x, epsilon, fgs = tables.image_row(
        model, data, 4 if quick else options.cifar_tested, 5 if quick else 50
    )
    row |= {"options": _nin_options(options), "epochs": options.cifar_epochs}
    row |= {"published": tables.NIN, "date": machine()["date"], **_details(epsilon, fgs)}
    print(f"CIFAR-NIN\n{found.table()}", flush=True)
    some = np.flatnonzero(fgs.success)[:4]
    if len(some):
        save(plots.gallery(x[some], fgs.x_adv[some]), out / "figure_5_9.png")
    return row


def _lenet_figures(out, model, found, x, epsilon, fgs, scaled):
    save(plots.bracket_figure(found, title="LeNet-5 on MNIST, [0, 1]"), out / "bracket_lenet.svg")
    some = np.flatnonzero(fgs.success)[:4]
    texts = [f"{fgs.labels[i]} as {fgs.predictions_adv[i]}, ε = {epsilon[i]:.1f}" for i in some]
    # PNG: pixels as SVG would be large.
    save(plots.gallery(x[some], fgs.x_adv[some], texts), out / "figure_5_8.png")
    path = IterativePerturbation(MinimalFGS(), steps=4)(model, x[:2])
    save(plots.gallery(x[:2], [step.x_adv for step in path]), out / "figure_2_5.png")
    layers = range(1, 11)
    curves = {
        "claimed, 0.9 to the -n": [0.9**-n for n in layers],
        "sound bound of LeNet-5": [None if n > 2 else scaled[n]["sound bound"] for n in layers],
        "smallest found for LeNet-5": [None if n > 2 else scaled[n]["found"] for n in layers],
    }
    label = "number of kernels scaled by 0.9"
    save(plots.relative_curves(layers, curves, xlabel=label), out / "figure_5_12.svg")
    claimed = [1 + 0.1 / 2 * sum(0.01**-k for k in range(n)) for n in layers]
    figure = plots.relative_curves(layers, {"claimed": claimed}, xlabel="layers", log=True)
    save(figure, out / "figure_5_13.svg")


def contradictions(results):
    """Perturbations found below a proven bound; there must be none.

    Brackets raise by themselves; here are the random classifiers.
    """
    return [
        f"{table}, setting {number}: {row['below sound']} found below the sound bound"
        for table in ("Table 3.1", "Table 4.2")
        for number, row in enumerate(results[table], 1)
        if row["below sound"]
    ]


def _nin_options(options):
    """CIFAR-NIN's part of the command; None without it."""
    if not options.cifar:
        return None
    found = f"--cifar DIR --cifar-epochs {options.cifar_epochs}"
    found += f" --cifar-images {options.cifar_images}" if options.cifar_images else ""
    return f"{found} --cifar-tested {options.cifar_tested}"


def _kept(path, command):
    """Results of finished parts that the same command made, or none."""
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("command") == command:
            return results
    return {"command": command, "machine": machine(), "CPU seconds": {}}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spambase", type=Path, help="the data set as CSV, UCI's or with a header")
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory, with MNIST")
    parser.add_argument("--cifar", help="prepared TensorFlow Datasets directory, with CIFAR-10")
    parser.add_argument("--cifar-epochs", type=int, default=30, help="epochs of CIFAR-NIN")
    parser.add_argument("--cifar-images", type=int, help="training images of it (default: all)")
    parser.add_argument("--cifar-tested", type=int, default=300, help="test images it attacks")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test, a minute")
    options = parser.parse_args(argv)
    quick, spambase = options.quick, options.spambase
    out = options.out or ROOT / "results" / ("perturbation_quick" if quick else "perturbation")
    if options.cifar and not options.data_dir:
        parser.error("`--cifar` needs `--data-dir`: its rows join those of LeNet-5.")
    if spambase is not None and not spambase.is_file():
        print(f"error: no such file: {spambase}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    command = "python scripts/perturbation/rebuild.py"
    command += " --spambase CSV" if spambase else ""
    command += " --data-dir DIR" if options.data_dir else ""
    command += " --quick" if quick else ""
    results = _kept(out / "results.json", command)
    if results.get("CIFAR-NIN", {}).get("options", _nin_options(options)) != _nin_options(options):
        del results["CIFAR-NIN"]
    parts = {
        "Table 3.1": lambda: linear_part(quick, out),
        "Table 4.2": lambda: mlp_part(quick, out),
        "Table 4.3": lambda: trained_part(quick, out, spambase),
        "Figure 4.3": lambda: curve_part(quick, out, spambase),
    }
    if options.data_dir:
        data = functools.cache(lambda: tables.mnist(options.data_dir, 1000 if quick else 20000))
        for name in list(tables.LENETS)[: 1 if quick else None]:
            parts[name] = functools.partial(lenet_part, quick, out, data, name)
    if options.cifar:
        parts["CIFAR-NIN"] = lambda: nin_part(quick, out, options)
    for name, part in parts.items():
        if name in results:
            continue
        begin = time.process_time()
        try:
            results[name] = part()
        except DatasetNotFound as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        results["CPU seconds"][name] = round(time.process_time() - begin, 1)
        print(f"{name}: {results['CPU seconds'][name]} CPU seconds", flush=True)
        write_text(out / "results.json", json.dumps(results, indent=1, default=float) + "\n")
    results = json.loads((out / "results.json").read_text())
    summary_figures(results, out)
    write_text(out / "RESULTS.md", results_text(results))
    found = contradictions(results)
    print("\n".join(found) or f"No contradiction. Written to {out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
