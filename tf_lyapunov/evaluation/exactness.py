"""Where exact arithmetic decides otherwise, on the way out of a point where rounding may have."""

from __future__ import annotations

import math

import numpy as np

from tf_lyapunov.bounds.composition import rounding_errors
from tf_lyapunov.certification.inputs import checked_inputs, input_shapes
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.logits import (
    Float64Logits,
    with_rounded_settings,
)
from tf_lyapunov.program.network import read_network

# How far past a found point exact arithmetic is asked where it disagrees with the model's own.
_OUTWARDS = 1 + 2.0 ** np.arange(-24, 6, 2)


class ExactDecisions:
    """The network in float64, whose decisions count only beyond a bound on their rounding."""

    def __init__(self, model, inputs, arrays, batch_size):
        self.inputs = inputs
        shapes = input_shapes(inputs, arrays)
        self.network = with_rounded_settings(read_network(model, shapes))
        self.model, self.batch_size = Float64Logits(self.network), batch_size

    def crossing(self, x, change, label, box):
        """`(norm, point, class)` of the first x + t·change, t ≥ 1, surely of another class.

        `x` and `change` hold one array per input. Points are moved into the box (low, high);
        without any, (∞, None, label).
        """
        scales = np.concatenate([[1.0], _OUTWARDS])
        moved = []
        for own, step, name in zip(x, change, self.inputs.names, strict=True):
            along = scales.reshape(-1, *[1] * step.ndim) * step
            place = own.astype(np.float64) + along
            if box is not None and np.any(step):
                low, high = (b.get(name, e) if isinstance(b, dict) else b
                             for b, e in zip(box, (-np.inf, np.inf), strict=True))  # fmt: skip
                place = np.clip(place, low, high)
            moved.append(place)
        points, norms, _ = checked_inputs(moved, self.network, self.inputs)
        logits = self.model.predict(points, self.batch_size)
        errors = math.sqrt(2) * rounding_errors(self.network, norms, self.network.logits, "float64")
        sizes = norms_up(
            [
                point.astype(np.float64) - own.astype(np.float64) if np.any(step) else 0.0 * place
                for point, own, step, place in zip(points, x, change, moved, strict=True)
            ]
        )
        if logits.shape[1] == 1:
            lead = -logits[:, 0] if label else logits[:, 0]
        else:
            lead = np.delete(logits, label, axis=1).max(axis=1) - logits[:, label]
        changed = np.flatnonzero(lead > errors)
        if not len(changed):
            return np.inf, None, label
        first = changed[0]
        single = logits.shape[1] == 1
        decision = int(logits[first, 0] > 0) if single else int(np.argmax(logits[first]))
        return sizes[first], [p[first] for p in points], decision


def confirmed(model, x, x_adv, labels, radii, batch_size=256):
    """Which changes of a decision are ones of exact arithmetic within a radius, bool (n,).

    A radius is about exact arithmetic, where the model's own rounding decides nothing; of a model
    that is not read, its own decision counts.

    Args:
        x, x_adv: inputs and what was found, arrays (n, …) or one per input of the model.
        labels: int (n,), decisions at x.
        radii: float64 (n,), radii within which no decision changes.
    """
    if not len(labels):
        return np.zeros(0, bool)
    inputs = Inputs.of(model)
    arrays, moved = inputs.flat(x), inputs.flat(x_adv)
    try:
        exact = ExactDecisions(model, inputs, arrays, batch_size)
    except UnsupportedLayerError:
        return np.ones(len(labels), bool)
    found = []
    for i, label in enumerate(labels):
        here = [a[i] for a in arrays]
        step = [a[i].astype(np.float64) - b for a, b in zip(moved, here, strict=True)]
        found.append(exact.crossing(here, step, label, None)[0] <= radii[i])
    return np.array(found)


def norms_up(arrays):
    """Upper bounds on the norms of the rows of several arrays together."""
    if len(arrays) == 1:
        return rounding.euclidean_norms_up(arrays[0])
    return rounding.euclidean_norms_up(
        np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)
    )
