"""What attacks are given, checked: inputs, labels, boxes, numbers and seeds."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks.packing import Packing
from tf_lyapunov.program.inputs import Inputs


def positive_int(name: str, value) -> int:
    """`value` as an int, refused unless it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
    return int(value)


def _to_numpy(values):
    if ops.is_tensor(values):
        return ops.convert_to_numpy(values)
    return np.asarray(values)


def packed_inputs(model, x, perturbed=None):
    """`(x, packing)`: rows of several inputs and how they hold them, or one array and None.

    Args:
        model: Keras model.
        x: array (n, …), or a list, tuple or dict of arrays, one per input of the model.
        perturbed: None for all inputs, the name or the position of one, or a list of them.

    Raises:
        TypeError, ValueError: as `checked_inputs`, `Inputs.flat` and `Inputs.chosen` do, and for
            whole numbers that are to be perturbed.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}.")
    inputs = Inputs.of(model)
    chosen = inputs.chosen(perturbed)
    if not inputs.several:
        return checked_inputs(model, inputs.flat(x)[0] if isinstance(x, Mapping) else x), None
    arrays = inputs.flat(x)
    checks = zip(arrays, inputs.names, inputs.shapes, inputs.dtypes, chosen, strict=True)
    for array, name, shape, dtype, moves in checks:
        _check_one(array, f"`x[{name!r}]`", shape, dtype, moves)
    packing = Packing.of(inputs, chosen, arrays)
    return packing.rows(arrays), packing


def _check_one(array, name, shape, dtype, moves):
    if array.dtype.kind not in "iufb" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold numbers. Received: dtype {array.dtype}.")
    fits = len(shape) == array.ndim and all(
        e is None or e == s for e, s in zip(shape[1:], array.shape[1:], strict=False)
    )
    if not fits or array.size == 0:
        raise ValueError(
            f"{name} must have the shape of the model's input, {shape}, with at least one row. "
            f"Received: shape {array.shape}."
        )
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if not np.all(np.isfinite(single)):
        raise ValueError(
            f"{name} must be finite. Received: {int(np.sum(~np.isfinite(single)))} NaN or infinite "
            "values."
        )
    whole = "int" in dtype or dtype == "bool"
    if whole and moves:
        raise ValueError(
            f"Attacks change real numbers. Received: {name}, an input of dtype {dtype}. Hold it "
            "fixed: name another input in `perturbed`."
        )
    if whole and not (np.array_equal(array.astype(dtype), array) and np.array_equal(single, array)):
        raise ValueError(
            f"{name} must hold whole numbers that {dtype} and float32 can hold. Received: values "
            f"from {array.min()} to {array.max()} of dtype {array.dtype}."
        )


def checked_inputs(model, x) -> np.ndarray:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}.")
    try:
        x = _to_numpy(x)
        with np.errstate(over="ignore"):
            # A copy: results must not change the caller's data.
            x = np.array(x, dtype=np.float32, order="C")
    except (TypeError, ValueError):
        raise TypeError(
            f"`x` must be an array of numbers, (n, ...). Received: {type(x).__name__}."
        ) from None
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"`x` must hold at least one input, (n, ...). Received: x of shape {x.shape}."
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(
            f"`x` must be finite. Received: {int(np.sum(~np.isfinite(x)))} NaN or infinite values."
        )
    expected = model.input_shape if model.built and hasattr(model, "inputs") else None
    if isinstance(expected, tuple) and all(e is None or isinstance(e, int) for e in expected):
        if len(expected) != x.ndim or any(
            e is not None and e != s for e, s in zip(expected[1:], x.shape[1:], strict=False)
        ):
            raise ValueError(
                f"`x` must have the shape of the model's input, {expected}. "
                f"Received: x of shape {x.shape}."
            )
    return x


def checked_bounds(bounds):
    if bounds is None:
        return None
    if isinstance(bounds, (tuple, list)) and any(isinstance(bound, dict) for bound in bounds):
        return _bounds_by_input(bounds)
    try:
        low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
    except (TypeError, ValueError):
        raise TypeError(
            f"`bounds` must be None or a pair (low, high). Received: bounds={bounds!r}."
        ) from None
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low < high)):
        raise ValueError(
            f"`bounds` must be finite with low < high. Received: bounds=({low}, {high})."
        )
    return low, high


def _bounds_by_input(bounds):
    """A pair of dicts from the names of inputs to numbers or arrays; a number stands for all."""
    keys = {key for bound in bounds if isinstance(bound, dict) for key in bound}
    if len(bounds) != 2 or any(isinstance(b, dict) and set(b) != keys for b in bounds):
        raise ValueError(
            "`bounds` by input must be a pair (low, high) of dicts with the same names. "
            f"Received: bounds={bounds!r}."
        )
    low, high = (bound if isinstance(bound, dict) else dict.fromkeys(keys, bound)
                 for bound in bounds)  # fmt: skip
    pairs = {key: checked_bounds((low[key], high[key])) for key in keys}
    return tuple({key: pair[i] for key, pair in pairs.items()} for i in (0, 1))


def positive_number(name: str, value) -> float:
    """`value` as a float, refused unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}.")
    if not 0 < value < np.inf:
        raise ValueError(f"`{name}` must be positive and finite. Received: {name}={value}.")
    return float(value)


def checked_seed(seed) -> int:
    """`seed` as an int, refused unless it is a non-negative whole number."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}.")
    return int(seed)


def generator(seed: int, index: int, run: int) -> np.random.Generator:
    """Random numbers of one sample in one run, whatever the batching."""
    return np.random.Generator(np.random.Philox(key=[seed, (int(index) << 24) + run]))


def one_of(name: str, value, allowed):
    """`value`, refused unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}.")
    return value
