"""Results that hold everything, with text that is hostile wherever a user may write."""

import types

import numpy as np

from tf_lyapunov.evaluation import pictures, summaries
from tf_lyapunov.evaluation.classes import class_summary
from tf_lyapunov.evaluation.results import Results

HOSTILE = "<script>alert('x')</script> \"&' $x_1$ {{ 7*7 }} [red]"


class FakeCertificate:
    """Anything with a certificate's attributes will do."""

    def __init__(self, radius):
        self.radius = np.asarray(radius)
        self.verdict = "PROVED" if np.any(self.radius > 0) else "NOT_PROVED"
        self.method, self.gain_upper_bound = "composition", 1.3
        self.float_allowance, self.model_digest = 1e-6, "sha256:0"
        self.assumptions = (HOSTILE,)
        part = {"kind": "dense", "gain_upper_bound": 1.3, "method": "SVD", "assumption": HOSTILE}
        self.contributions = (types.SimpleNamespace(name=HOSTILE, **part),)

    def certified_accuracy(self, radius):
        return float(np.mean((self.radius >= radius) & (self.radius > 0)))


def example(**part):
    return {
        "role": "weakest",
        "index": 17,
        "label": 0,
        "radius": 0.123456,
        "distance": 0.234561,
        "prediction_adv": 1,
        "attack": HOSTILE,
        "inputs": [{"name": HOSTILE, **part}],
    }


def full_results():
    grey, coloured = np.zeros((4, 5, 1)), np.linspace(0, 1, 48).reshape(4, 4, 3)
    change = {"feature": "3", "index": 1, "from": 1.5, "to": 1.75}
    history = [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "accuracy": 0.9,
            "val_accuracy": 0.8,
            f"sigma/{HOSTILE}": 1.0,
            f"budget/{HOSTILE}": 1.1,
            "cascade_margin": 0.01,
            "gain_upper_bound": 1.2,
        }
        for epoch in (1, 2, 3)
    ]
    rows = [
        {
            "radius": radius,
            "count": 4,
            "clean": 1.0,
            "certified": certified,
            "attacked": {HOSTILE: 0.75},
            "output_change": {HOSTILE: {"mean": 0.1, "max": 0.2}},
            "gain": {HOSTILE: {"mean": 0.1, "max": 0.2}},
            "broken": {HOSTILE: 0},
        }
        for radius, certified in ((0.1, 0.75), (0.2, 0.5))
    ]
    return Results(
        title=HOSTILE,
        date=HOSTILE,
        command=HOSTILE,
        config={"model": {"name": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        dataset={
            "name": HOSTILE,
            "num_classes": 3,
            "input_shape": [4],
            "test": 4,
            "class_names": [HOSTILE, "b", "c"],
            "feature_names": ["f", HOSTILE],
        },
        model={"name": HOSTILE, "parameters": 10, "digest": HOSTILE},
        design={
            "rule": HOSTILE,
            "claim": {"delta": 0.4, "nu": -2.0},
            "verdict": "PROVED",
            "gain": 1.31,
            "cascade_matrix": [[1.0, -0.5], [-0.5, 1.0]],
            "cascade_margin": 0.5,
            "explanation": HOSTILE,
            "check": {"holds": True, "margin": 0.1, "gain_upper_bound": 1.3},
        },
        layers=summaries.layer_rows([HOSTILE], [1.0], [1.1], kinds=[HOSTILE], gains=[1.0]),
        history=history,
        certificate=summaries.certificate_summary(FakeCertificate([0.0, 0.15, 0.3, 0.25])),
        rows=rows,
        gain={"upper_bound": 1.3, "claimed": 1.31, "measured_max": 1.1, "measured_by": HOSTILE},
        examples=[
            example(picture=pictures.encode(grey, grey + 0.5)),
            example(picture=pictures.encode(coloured, 1 - coloured)),
            example(features=9, changed=9, changes=[change]),
        ],
        classes=class_summary(
            [0, 0, 1, 2],
            [0, 1, 1, 2],
            [{"radius": 0.1, "certified": [1, 0, 1], "attacked": [1, 1, 1]}],
            attacks=[HOSTILE],
        ),
        attacks=[{"name": HOSTILE, "norm": "l2", "steps": 40, HOSTILE: HOSTILE, "none": None}],
        notes=[HOSTILE],
        seconds={"training": 1.5},
    )
