"""What `localized/rebuild.py` measures: robustness, suites, geometry, closed forms, costs."""

from __future__ import annotations

import math

import keras
import numpy as np

from benchmarks.pairs import counted
from tf_lyapunov.attacks import PGD
from tf_lyapunov.certification import certify
from tf_lyapunov.evaluation.corruptions import corrupt
from tf_lyapunov.evaluation.incompatibility import ceiling_rows, incompatibility_rows
from tf_lyapunov.evaluation.layerwise import layerwise_robustness
from tf_lyapunov.evaluation.localized import localized_robustness
from tf_lyapunov.evaluation.suite import evaluate_suite
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.theory.localized import compatibility_thresholds

SLOPES = tuple(float(f"{a:.4g}") for a in np.geomspace(0.125, 8, 49))
SLOPES_LINF = tuple(float(f"{a:.4g}") for a in np.geomspace(1.05, 16, 33))
LINEAR_DIMENSIONS = (2, 8, 32, 128, 512, 2048)


def number(value):
    """A float for JSON: infinity as a string."""
    return float(value) if math.isfinite(value) else str(float(value))


# ------------------------------------------------------------------------------------ robustness


def curves(model, x, settings, every_norm):
    """α_lim curves of a model: the published one in full, the other three on fewer points."""
    kinds = [("softmax", 2, settings.radii, settings.points, settings.directions)]
    fewer = (settings.other_points, settings.other_directions)
    if every_norm:
        kinds += [
            ("logits", 2, settings.shown, *fewer),
            ("softmax", math.inf, settings.radii_linf, *fewer),
            ("logits", math.inf, settings.radii_linf, *fewer),
        ]
    found = []
    for outputs, norm, radii, points, directions in kinds:
        curve = localized_robustness(
            model,
            x[:points],
            radii,
            norm=norm,
            outputs=outputs,
            directions=directions,
            steps=settings.steps,
            batch_size=points,
            method="composition",
            seed=settings.seed,
        )
        tol = 1e-9 * curve.certified_by_point + 2 * curve.noise
        value, radius = curve.saturation
        found.append(
            {
                "outputs": outputs,
                "norm": "l2" if norm == 2 else "linf",
                "points": points,
                "directions": directions,
                "rows": [{k: number(v) for k, v in row.items()} for row in curve.rows()],
                "saturation": {"value": value, "radius": radius},
                "ordered": bool(
                    np.all(curve.monte_carlo_by_point <= curve.gradient_by_point)
                    and np.all(curve.gradient_by_point <= curve.certified_by_point + tol)
                ),
            }
        )
    return found


class Corruptions:
    """Corrupted test images, made once for all models, in 8 bits as in the released arrays."""

    def __init__(self, x, y, seed):
        self.x, self.y, self.seed, self.made = x, y, seed, {}

    def __call__(self, name, severity):
        if (name, severity) not in self.made:
            images = corrupt(self.x, name, severity, seed=self.seed)
            self.made[name, severity] = np.rint(255 * images).astype(np.uint8)
        return self.made[name, severity].astype(np.float32) / 255, self.y


def measure(model, data, corruptions, settings, path, *, chain=False, every_norm=True):
    """All numbers of one trained network."""
    x, y = data.x_test, data.y_test
    proof = certify(model, x, y)
    found = {
        "clean": proof.accuracy,
        "gain_upper_bound": number(proof.gain_upper_bound),
        "certified": {f"{r:.4g}": proof.certified_accuracy(r) for r in settings.certified},
        "broken": 0,
    }
    # No attack may change a decision inside its certified radius.
    radius = settings.certified[0]
    attack = PGD(
        L2(radius), steps=settings.pgd_steps, step=2.5 * radius / settings.pgd_steps, keep="nearest"
    )
    result = attack(model, x, y)
    held = np.asarray(proof.radius) >= radius
    right = np.asarray(proof.predictions) == y
    found["broken"] = int(np.sum(np.asarray(result.success) & held & right))
    found["attacked_l2"] = 1 - float(np.mean(result.success))
    found["curves"] = curves(model, data.x_train, settings, every_norm)
    if chain:
        radius = settings.shown[1]
        layers = layerwise_robustness(
            model, data.x_train[: settings.other_points], radius, directions=settings.directions
        )
        found["layerwise"] = {
            "radius": radius,
            "names": list(layers.names),
            "radii": layers.radii.tolist(),
            "estimates": layers.estimates.tolist(),
            "product": layers.product,
            "network": layers.network,
            "contracts": layers.contracts,
            "is_consistent": layers.is_consistent,
        }
        return found
    level = settings.adversary[0]
    pgd = PGD(
        Linf(level),
        steps=settings.pgd_steps,
        step=2.5 * level / settings.pgd_steps,
        random_start=True,
        bounds=(0.0, 1.0),
    )
    suite = evaluate_suite(
        model,
        x,
        y,
        include=("noise", "fgsm", "pgd", "corruption"),
        snrs=settings.snrs,
        fgsm_snrs=settings.fgsm_snrs,
        pgd=[pgd],
        severities=settings.severities,
        released=corruptions,
        seed=settings.seed,
        path=path,
        overwrite=True,
    )
    found["cells"] = suite.rows
    return found


# ------------------------------------------------------------------------------------- geometry


def geometry(x, y, norm, settings):
    """Figures 1 and 3 of one data set and norm, exact over all pairs of the samples given."""
    slopes = SLOPES if norm == 2 else SLOPES_LINF
    distances = settings.distances if norm == 2 else settings.distances_linf
    thresholds = compatibility_thresholds(slopes, distances, norm=norm)
    found, took = counted(x, y, thresholds, norm)
    positive = found.nearest[found.nearest > 0]
    top = 2**0.5 if norm == 2 else 1.0
    return {
        "norm": "l2" if norm == 2 else "linf",
        "samples": len(x),
        "pairs": found.pairs,
        "opposite_pairs": found.opposite_pairs,
        "duplicates": found.duplicates,
        "nearest": {
            "smallest": float(positive.min()),
            "median": float(np.median(found.nearest)),
            "largest": float(found.nearest.max()),
        },
        "needed_slope": top / float(positive.min()),
        "within": {f"{d:g}": int(found.closer[found.thresholds == d][0]) for d in distances},
        "rows": [
            {**row, "within": number(row["within"]), "norm": str(row["norm"])}
            for row in incompatibility_rows(found, slopes, distances)
        ],
        "ceiling": [{**row, "norm": str(row["norm"])} for row in ceiling_rows(found)],
        "took": took,
    }


# ---------------------------------------------------------------------------------- closed forms


def sigmoid_exact(radii, centre=10.0):
    """α_lim of the logistic function around ±centre: its chords' largest slope, closed form.

    The chord from -centre grows until it touches the curve at e*, which solves
    σ'(e - c)·e = σ(e - c) - σ(-c); beyond e* nothing is steeper.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    def excess(e):
        s = expit(e - centre)
        return s * (1 - s) * e - (s - expit(-centre))

    touch = brentq(excess, centre, 2 * centre)
    e = np.minimum(np.asarray(radii, np.float64), touch)
    return (expit(e - centre) - expit(-centre)) / e, touch


def sigmoid():
    """Figure 2: estimates and bound against the closed form."""
    unit = keras.layers.Dense(1, kernel_initializer="ones", activation="sigmoid")
    model = keras.Sequential([keras.Input((1,)), unit])
    radii = np.array([0.5, 1, 2, 4, 6, 8, 9, 10, 11, 12, 14, 16, 18, 20])
    curve = localized_robustness(model, [[-10.0], [10.0]], radii, directions=16, steps=60)
    exact, touch = sigmoid_exact(radii)
    return {
        "touch": touch,
        "rows": [{**row, "exact": float(e)} for row, e in zip(curve.rows(), exact, strict=True)],
        "error": float(np.max(np.abs(curve.gradient / exact - 1))),
    }


def linear(dimensions=LINEAR_DIMENSIONS):
    """Linear maps: ascent and proof agree, sampling falls behind with the dimension."""
    rows = []
    for norm in (2, math.inf):
        for d in dimensions:
            keras.utils.set_random_seed(d)
            model = keras.Sequential([keras.Input((d,)), keras.layers.Dense(10)])
            x = np.random.default_rng(d).normal(size=(2, d))
            curve = localized_robustness(
                model, x, [0.1], norm=norm, outputs="logits", directions=1000, steps=600
            )
            m, g, c = (float(v[0]) for v in (curve.monte_carlo, curve.gradient, curve.certified))
            rows.append(
                {
                    "norm": "l2" if norm == 2 else "linf",
                    "dimension": d,
                    "monte_carlo": m,
                    "gradient": g,
                    "certified": c,
                    "monte_carlo_share": m / c,
                    "disagreement": abs(c - g) / c,
                }
            )
    return {"rows": rows}


def problems(record):
    """Measurements of one record that contradict a proof, in words."""
    found = []
    name = record["name"]
    for curve in record.get("curves", ()):
        if not curve["ordered"]:
            found.append(
                f"{name}: α_lim estimates out of order, {curve['outputs']} {curve['norm']}"
            )
    if record.get("broken"):
        found.append(f"{name}: {record['broken']} certificates broken by an attack")
    if name == "linear":
        for row in record["rows"]:
            if row["disagreement"] > 1e-5 or row["monte_carlo"] > row["gradient"]:
                found.append(f"linear map, dimension {row['dimension']} {row['norm']}: {row}")
    if name == "sigmoid":
        bad = any(r["gradient"] > r["certified"] * (1 + 1e-9) for r in record["rows"])
        if bad or record["error"] > 1e-6:
            found.append(f"sigmoid of Figure 2: off its closed form by {record['error']:.1e}")
    return found
