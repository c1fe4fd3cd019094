"""Accuracy under attack by radius, and how much attacks really move the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tf_lyapunov.attacks.inputs import packed_inputs
from tf_lyapunov.attacks.logits import logits_view
from tf_lyapunov.evaluation.exactness import confirmed
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program.inputs import Inputs


@dataclass(frozen=True)
class MeasuredGain:
    """Output change of a model over pairs of inputs; a lower estimate of its gain.

    Attributes:
        maximum: max ‖f(x')-f(x)‖/‖x'-x‖ over the pairs with x' ≠ x; NaN without such a pair.
        mean: their mean.
        change_maximum: max ‖f(x')-f(x)‖ over the same pairs.
        change_mean: their mean.
        count: number of pairs with x' ≠ x.
    """

    maximum: float
    mean: float
    change_maximum: float
    change_mean: float
    count: int


def measured_gain(model, x, x_adv, *, batch_size: int = 256) -> MeasuredGain:
    """How far a model's logits move when its inputs move, measured in l2.

    The model runs in its own precision; differences and norms are float64. The ratio of a pair at
    distance d therefore carries an error of about 1e-6·‖f‖/d for a float32 model.

    Args:
        model: built Keras model; softmax and sigmoid heads are looked through.
        x: array `(n, ...)`.
        x_adv: array of the same shape.
        batch_size: inputs per evaluation.

    Returns:
        A `MeasuredGain`; pairs that do not differ are left out.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
        >>> model.set_weights([np.diag([3.0, 1.0])])
        >>> measured_gain(model, [[0.0, 0.0]], [[2.0, 0.0]]).maximum
        3.0
    """
    x, x_adv = (np.asarray(a, np.float32) for a in (x, x_adv))
    if x.shape != x_adv.shape or x.ndim < 2:
        raise ValueError(
            "`x` and `x_adv` must have the same shape, (n, ...). Received: shapes "
            f"{x.shape} and {x_adv.shape}."
        )
    distance = _norms(x_adv.astype(np.float64) - x)
    moved = np.flatnonzero(distance > 0)
    if not len(moved):
        return MeasuredGain(math.nan, math.nan, math.nan, math.nan, 0)
    before = logits(model, x[moved], batch_size=batch_size)
    after = logits(model, x_adv[moved], batch_size=batch_size)
    change = _norms(after - before)
    ratio = change / distance[moved]
    return MeasuredGain(
        float(ratio.max()),
        float(ratio.mean()),
        float(change.max()),
        float(change.mean()),
        len(moved),
    )


def logits(model, x, *, batch_size: int = 256) -> np.ndarray:
    """The model's logits at `x`, softmax and sigmoid heads looked through.

    Args:
        model: built Keras model.
        x: array `(n, ...)`; for a model with several inputs a list, tuple or dict of arrays.
        batch_size: inputs per evaluation.

    Returns:
        float64 array `(n, outputs)`.

    Example:

    >>> import keras
    >>> identity = keras.layers.Dense(2, "softmax", kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> logits(model, np.array([[3.0, 1.0]])).tolist()
    [[3.0, 1.0]]
    """
    if Inputs.of(model).several:
        rows, packing = packed_inputs(model, x)
        called, view = packing.called, logits_view(model, packing)
    else:
        rows, view = np.asarray(x, np.float32), logits_view(model)

        def called(batch):
            return batch

    parts = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        whole = view.head is None
        output = model.predict_on_batch(called(batch)) if whole else view.function(batch)
        output = keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
        parts.append(output.reshape(len(batch), -1))
    return np.concatenate(parts).astype(np.float64)


def accuracy_under_attack(
    model,
    x,
    y,
    attacks: Mapping[str, Callable[[float], Any]],
    radii: Sequence[float],
    *,
    certificate=None,
    cumulative: bool = True,
    by_class: bool = False,
    batch_size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Clean, certified and attacked accuracy at each radius, all on the same inputs.

    Clean and attacked accuracy are measurements, and attacked accuracy is an upper bound of the
    true robust accuracy; certified accuracy is a proved lower bound of it. So
    certified ≤ attacked ≤ clean, or the certificate is wrong: "broken" counts inputs whose
    certified radius is at least the radius at which an attack succeeded, and must be 0. Where the
    model's own rounding alone decides, which a certificate of exact arithmetic is not about, an
    input counts as attacked but not as broken.

    Args:
        model: built Keras classifier.
        x: array `(n, ...)`.
        y: labels `(n,)`, or one-hot; of a single output 0 and 1, or -1 and 1.
        attacks: name -> function from a radius to an attack, e.g.
            `{"PGD-40": lambda radius: PGD(L2(radius), steps=40)}`.
        radii: radii, not negative; at 0 nothing is attacked.
        certificate: `Certificate` of the same inputs, in the same order, or None.
        cumulative: an input broken at a smaller radius counts as broken, since the perturbation
            found there is allowed here. False reports every attack alone, as papers do.
        by_class: adds "by_class" to every row: counts by class "certified" (None without a
            certificate) and "attacked", right under every attack (None without any), as
            `classes.class_summary` wants them.
        batch_size: inputs per evaluation.
        progress: called with a line of text before each attack.

    Returns:
        One dict a radius, in increasing order, as `results.Results.rows` wants them: "radius",
        "count", "clean", "certified", "attacked", "output_change", "gain", "broken".

    Raises:
        TypeError: if `attacks` does not map names to functions of a radius.
        ValueError: for radii that are negative or not finite, no inputs, labels out of range, or a
            certificate of another number of inputs.

    Example:

    >>> import keras
    >>> from tf_lyapunov import L2
    >>> from tf_lyapunov.attacks import FGM
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> x, y = np.array([[3.0, 1.0], [1.2, 1.0]]), np.array([0, 0])
    >>> attacks = {"FGM": lambda radius: FGM(L2(radius))}
    >>> [row] = accuracy_under_attack(model, x, y, attacks, [0.5])
    >>> row["clean"], row["attacked"]
    (1.0, {'FGM': 0.5})
    """
    x, labels = _checked(x, y, certificate)
    check_is_l2(certificate)
    radii = _checked_radii(radii)
    if not isinstance(attacks, Mapping) or not all(callable(make) for make in attacks.values()):
        raise TypeError(
            "`attacks` must map names to functions of a radius, such as "
            "{'PGD-40': lambda radius: PGD(L2(radius), steps=40)}. "
            f"Received: attacks={attacks!r}."
        )
    outputs = logits(model, x, batch_size=batch_size)
    labels = class_numbers(labels, len(x), outputs.shape[1])
    if outputs.shape[1] == 1:
        predictions = (outputs[:, 0] > 0).astype(np.int64)
    else:
        predictions = outputs.argmax(axis=1)
    correct = predictions == labels
    certified = None if certificate is None else np.asarray(certificate.radius, np.float64)
    broken_before = {name: np.zeros(len(x), bool) for name in attacks}
    rows = []
    for radius in radii:
        row: dict[str, Any] = {
            "radius": radius,
            "count": len(x),
            "clean": float(correct.mean()),
            "certified": None
            if certificate is None
            else float(certificate.certified_accuracy(radius)),
        }
        row.update(attacked={}, output_change={}, gain={}, broken={})
        standing = correct.copy()
        for name, make in attacks.items():
            if radius == 0:
                row["attacked"][name] = row["clean"]
                continue
            if progress is not None:
                progress(f"{name} at radius {radius:g} on {len(x)} inputs")
            result = make(radius)(model, x, labels)
            success = np.asarray(result.success, bool) & correct
            if certified is not None:
                inside = np.flatnonzero(success & (certified >= radius))
                parts = (x[inside], np.asarray(result.x_adv)[inside], labels[inside])
                really = confirmed(model, *parts, certified[inside], batch_size)
                row["broken"][name] = int(np.sum(really))
            if cumulative:
                success |= broken_before[name]
                broken_before[name] = success
            standing &= ~success
            row["attacked"][name] = float(np.mean(correct & ~success))
            moved = measured_gain(model, x, result.x_adv, batch_size=batch_size)
            if moved.count:
                row["output_change"][name] = {
                    "mean": moved.change_mean,
                    "max": moved.change_maximum,
                }
                row["gain"][name] = {"mean": moved.mean, "max": moved.maximum}
        if by_class:
            held = None if certified is None else (certified >= radius) & (certified > 0)
            size = max(2, outputs.shape[1], int(labels.max()) + 1)
            row["by_class"] = {
                key: None if kept is None else np.bincount(labels[kept], minlength=size).tolist()
                for key, kept in (("certified", held), ("attacked", standing if attacks else None))
            }
        rows.append(row)
    return rows


def largest_measured_gain(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest measured gain in the rows, as `results.Results.gain` wants it.

    Args:
        rows: what `accuracy_under_attack` returned.

    Returns:
        A dict with keys "measured_max", "measured_mean" (at the same radius and attack) and
        "measured_by"; empty if nothing was measured.

    Example:
        >>> rows = [{"radius": 0.5, "gain": {"PGD": {"mean": 1.0, "max": 2.0}}}]
        >>> largest_measured_gain(rows)["measured_by"]
        'PGD at radius 0.5'
    """
    found = [
        (gain["max"], gain["mean"], f"{name} at radius {row['radius']:g}")
        for row in rows
        for name, gain in (row.get("gain") or {}).items()
    ]
    if not found:
        return {}
    maximum, mean, by = max(found)
    return {"measured_max": maximum, "measured_mean": mean, "measured_by": by}


def check_is_l2(certificate):
    """Refuses certificates whose radii are not about whole l2 balls.

    Raises:
        ValueError: for another norm, or bounds of valid inputs.
    """
    norm, within = (getattr(certificate, k, v) for k, v in (("norm", "l2"), ("within", None)))
    if norm != "l2" or within is not None:
        raise ValueError(
            "A certificate must be about l2 balls in all of real space here. Received: "
            f"norm={norm!r}, inputs within {within}. Certify with norm='l2' and without `bounds`."
        )


def _checked(x, y, certificate):
    x = np.asarray(x, np.float32)
    labels = np.asarray(y)
    if len(x) == 0 or len(labels) != len(x):
        raise ValueError(
            "`x` must hold at least one input, with one label each. Received: "
            f"{len(x)} inputs and {len(labels)} labels."
        )
    if certificate is not None and len(np.asarray(certificate.radius)) != len(x):
        raise ValueError(
            f"`certificate` must be of the same {len(x)} inputs. Received: a certificate of "
            f"{len(np.asarray(certificate.radius))} inputs. Certify the inputs that are attacked."
        )
    return x, labels


def _checked_radii(radii) -> list[float]:
    try:
        values = sorted({float(radius) for radius in radii})
    except TypeError:
        raise TypeError(f"`radii` must be numbers. Received: radii={radii!r}.") from None
    if not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(
            f"`radii` must be finite and not negative, at least one. Received: radii={radii!r}."
        )
    return values


def _norms(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))
