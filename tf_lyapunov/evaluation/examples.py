"""The inputs that a classifier decides most narrowly, and the nearest ones it decides otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lyapunov.attacks import DDN, DeepFool, Ensemble
from tf_lyapunov.certification.margins import decisions
from tf_lyapunov.evaluation import pictures
from tf_lyapunov.evaluation.accuracy import check_is_l2, logits
from tf_lyapunov.evaluation.exactness import ExactDecisions, norms_up
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs

_MOST_FEATURES = 6


@takes_networks
def weakest_examples(
    model,
    x,
    y,
    *,
    certificate=None,
    count: int = 6,
    bounds: tuple[float, float] | None = None,
    perturbed=None,
    shape: Sequence[int] | None = None,
    outputs=None,
    batch_size: int = 256,
) -> list[dict[str, Any]]:
    """Correctly decided inputs with the smallest certified radii, and what attacks make of them.

    The last two are, to compare, the input with the median and the one with the largest radius.
    Without a certificate, or where radii are equal, the margin of the scores decides which are the
    weakest. DeepFool and DDN search for the smallest l2 perturbation of each; the nearer is kept.
    Radii are proved; distances are of perturbations found, so that the smallest there is lies
    between the two. Where the model's own rounding decides otherwise within a radius, which is
    about exact arithmetic, the perturbation is enlarged until exact arithmetic agrees.

    Args:
        model: built Keras classifier; softmax and sigmoid heads are looked through.
        x: array (n, …), or a list, tuple or dict of arrays for several inputs.
        y: labels (n,) or one-hot.
        certificate: l2 `Certificate` of the same inputs, in the same order, or None.
        count: how many; fewer than three are the weakest only.
        bounds: None, or `(low, high)`: a box that the attacks stay in.
        perturbed: which input of several may change, as for `certify`.
        shape: shape of one input as a picture, where the model takes it flattened.
        outputs: the scores at `x`, as `logits` gives them, if they are known.
        batch_size: inputs per evaluation.

    Returns:
        One JSON-ready dict an input, the weakest first, of at most a few kilobytes, as
        `results.Results.examples` wants them: "role" ("weakest", "typical" or "strongest"),
        "index", "label", "radius" (None without certificate), "distance" and "prediction_adv" and
        "attack" (None where no attack changed the decision), "inputs". Of an input that
        is an image, "picture" by `pictures.encode`; of others "features" and the "changes"
        ("feature", "from", "to") of those that changed most.

    Raises:
        ValueError: for another number of radii or labels, or a certificate of another norm.

    Example:

    >>> import keras, numpy as np
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> found = weakest_examples(model, np.array([[3.0, 1.0], [3.0, 2.5]]), [0, 0], count=1)
    >>> found[0]["index"], round(found[0]["distance"], 3), found[0]["prediction_adv"]
    (1, 0.354, 1)
    """
    inputs = Inputs.of(model)
    arrays = inputs.flat(x)
    outputs = logits(model, x, batch_size=batch_size) if outputs is None else np.asarray(outputs)
    labels = class_numbers(y, len(outputs), outputs.shape[1])
    radii = None
    if certificate is not None:
        check_is_l2(certificate)
        radii = np.asarray(certificate.radius, np.float64)
        if len(radii) != len(labels):
            raise ValueError(
                f"`certificate` must be of the same {len(labels)} inputs. Received: a certificate "
                f"of {len(radii)} inputs."
            )
    right = np.flatnonzero(decisions(outputs) == labels)
    first = np.zeros(len(right)) if radii is None else radii[right]
    order = right[np.lexsort((_margins(outputs, labels)[right], first))]
    if not len(order):
        return []
    places, roles = _selected(len(order), count)
    chosen = order[places]
    some = [a[chosen] for a in arrays]
    common = dict(bounds=bounds, batch_size=batch_size)
    attacks = Ensemble({"DeepFool": DeepFool(**common), "DDN": DDN(**common)})
    result = attacks(model, inputs.like(x, some), labels[chosen], perturbed=perturbed)
    other = [np.array(a) for a in inputs.flat(result.x_adv)]
    moves = inputs.chosen(perturbed)
    # Inputs that are held fixed are the same, whatever dtype the attack holds them in.
    change = [
        b.astype(np.float64) - a.astype(np.float64) if moved else np.zeros(a.shape)
        for a, b, moved in zip(some, other, moves, strict=True)
    ]
    distances = np.where(result.success & (result.distance > 0), norms_up(change), np.inf)
    decided = result.predictions_adv.copy()
    proved = None if radii is None else radii[chosen]
    doubtful = [] if proved is None else np.flatnonzero(distances < proved)
    if len(doubtful):
        # Radii are about exact arithmetic, in which the model's own rounding decides nothing.
        exact = ExactDecisions(model, inputs, arrays, batch_size)
        for i in doubtful:
            here, step = ([a[i] for a in part] for part in (some, change))
            distances[i], point, decided[i] = exact.crossing(here, step, labels[chosen[i]], bounds)
            for array, at in zip(other, point or here, strict=True):
                array[i] = at
    names = inputs.names if inputs.several else ("",)
    return _records(
        roles, names, some, other, distances, chosen, labels[chosen], proved, decided,
        result.found_by, shape,
    )  # fmt: skip


def bracket_examples(found, x, count: int = 6) -> list[dict[str, Any]]:
    """The inputs of a `Bracket` whose smallest perturbations found are the smallest.

    Args:
        found: `Bracket`.
        x: its inputs: an array, or a list, tuple or dict of arrays.
        count: how many.

    Returns:
        As `weakest_examples`; "radius" is the bracket's lower bound.
    """
    rows = np.flatnonzero(found.found)
    if not len(rows):
        return []
    places, roles = _selected(len(rows), count)
    rows = rows[np.argsort(found.upper[rows], kind="stable")][places]
    several = isinstance(x, (list, tuple, dict))
    keys = list(x) if isinstance(x, dict) else range(len(x)) if several else None
    clean = [np.asarray(x[k])[rows] for k in keys] if several else [np.asarray(x)[rows]]
    other = found.x_adv
    other = [np.asarray(other[k])[rows] for k in keys] if several else [np.asarray(other)[rows]]
    names = [k if isinstance(k, str) else f"input {k + 1}" for k in keys] if several else [""]
    return _records(
        roles, names, clean, other, found.upper[rows], rows, found.labels[rows],
        found.lower[rows], found.predictions_adv[rows], found.attack[rows], None,
    )  # fmt: skip


def _selected(available, count):
    """Places in an order of strength, and their roles."""
    if available <= count or count < 3:
        places = list(range(min(available, count)))
        return places, ["weakest"] * len(places)
    places = [*range(count - 2), max(available // 2, count - 2), available - 1]
    return places, ["weakest"] * (count - 2) + ["typical", "strongest"]


def _records(
    roles, names, clean, other, distances, index, labels, radii, decided, attacks, shape
):  # fmt: skip
    success = np.isfinite(distances)
    return [
        {
            "role": roles[i],
            "index": int(index[i]),
            "label": int(labels[i]),
            "radius": None if radii is None else _finite(radii[i]),
            "distance": _finite(distances[i]),
            "prediction_adv": int(decided[i]) if success[i] else None,
            "attack": str(attacks[i]) if success[i] else None,
            "inputs": [
                {"name": str(name), **_shown(a[i], b[i] if success[i] else None, shape)}
                for name, a, b in zip(names, clean, other, strict=True)
            ],
        }
        for i in range(len(index))
    ]


def _shown(clean, other, shape):
    if shape is not None and pictures.is_picture(shape) and math.prod(shape) == clean.size:
        clean = clean.reshape(shape)
        other = None if other is None else other.reshape(shape)
    if pictures.is_picture(clean.shape):
        return {"picture": pictures.encode(clean, other)}
    before = np.asarray(clean, np.float64).reshape(-1)
    after = before if other is None else np.asarray(other, np.float64).reshape(-1)
    size = np.abs(after - before)
    most = [i for i in np.argsort(-size, kind="stable")[:_MOST_FEATURES] if size[i] > 0]
    positions = [np.unravel_index(i, clean.shape) for i in most]
    return {
        "features": before.size,
        "changed": int(np.count_nonzero(size)),
        "changes": [
            {
                "feature": ", ".join(str(int(p) + 1) for p in place),
                "index": int(i),
                "from": float(before[i]),
                "to": float(after[i]),
            }
            for i, place in zip(most, positions, strict=True)
        ],
    }


def _margins(outputs, labels):
    """The label's score minus the best other one, which for correct decisions is not negative."""
    if outputs.shape[1] == 1:
        return np.where(labels == 1, outputs[:, 0], -outputs[:, 0])
    rows = np.arange(len(labels))
    others = outputs.copy()
    others[rows, labels] = -np.inf
    return outputs[rows, labels] - others.max(axis=1)


def _finite(value):
    return float(value) if math.isfinite(value) else None
