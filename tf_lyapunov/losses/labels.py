"""Arguments, labels and margins that the losses share."""

from __future__ import annotations

import math

import numpy as np
from keras import ops

# What rows of probabilities may lack of 1 by rounding to half precision.
_LARGEST_LACK = 1e-2


def positive(name: str, value: float, hint: str) -> float:
    """`value` as a positive finite float."""
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(
            f"`{name}` must be positive and finite. Received: {name}={value!r}. {hint}"
        )
    return number


def not_negative(name: str, value: float, hint: str) -> float:
    """`value` as a non-negative finite float."""
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"`{name}` must be non-negative and finite. Received: {name}={value!r}. {hint}"
        )
    return number


def one_hot(y_true, y_pred):
    """One-hot labels in the shape and dtype of the logits.

    From integers, one-hot rows, rows of probabilities, or rows of -1 and a single 1, which mean 0
    and 1. Other labels are refused; compiled code cannot raise, and gets NaN for them.

    Raises:
        ValueError: if the labels name no class, or have another shape.
    """
    return _checked(unchecked_one_hot(y_true, y_pred), *_of_one_class(y_true, y_pred))


def labelled(losses, y_true, y_pred):
    """Per-sample losses, refused or NaN as by `one_hot` where a label is none.

    At the end of a loss: compiled maxima of NaN may be numbers.
    """
    if y_pred.shape[-1] == 1:
        return _checked(losses, *_of_memberships(y_true, y_pred))
    return _checked(losses, *_of_one_class(y_true, y_pred))


def labelled_by_memberships(losses, y_true, y_pred):
    """As `labelled`, where a sample may be in several classes or in none."""
    return _checked(losses, *_of_memberships(y_true, y_pred))


def unchecked_one_hot(y_true, y_pred):
    """As `one_hot` for labels that are checked elsewhere; any class for those that name none."""
    classes = y_pred.shape[-1]
    if classes is None or classes < 2:
        raise ValueError(
            "The loss needs at least two logits per sample, one for each class. "
            f"Received: y_pred.shape={tuple(y_pred.shape)}."
        )
    if len(y_true.shape) == len(y_pred.shape):
        if y_true.shape[-1] == classes:
            return ops.maximum(ops.cast(y_true, y_pred.dtype), 0)
        if y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, axis=-1)
        else:
            raise ValueError(
                "Labels must be integers of shape (batch,) or (batch, 1), or one-hot rows as wide "
                f"as the logits. Received: y_true.shape={tuple(y_true.shape)}, "
                f"y_pred.shape={tuple(y_pred.shape)}."
            )
    # PyTorch raises an error of its own for a class that is none.
    number = ops.clip(ops.cast(y_true, "int32"), 0, classes - 1)
    return ops.one_hot(number, classes, dtype=y_pred.dtype)


def memberships(y_true, y_pred):
    """1 where a sample belongs to an output's class, else 0, in the shape and dtype of the logits.

    For a single logit the labels are 0 and 1, or -1 and 1; for several they are integers, or rows
    of 0 and 1 or of -1 and 1. `labelled_by_memberships` refuses others.
    """
    if y_pred.shape[-1] == 1:
        positive_class = ops.cast(y_true > 0, y_pred.dtype)
        return ops.reshape(positive_class, ops.shape(y_pred))
    return ops.cast(unchecked_one_hot(y_true, y_pred) > 0, y_pred.dtype)


def _of_one_class(y_true, y_pred):
    """Which labels name a class, the labels as numbers, and what they must be."""
    classes, given = y_pred.shape[-1], ops.cast(y_true, "float32")
    if _are_rows(y_true, y_pred):
        is_label = ops.all((given >= 0) & (given <= 1), axis=-1)
        is_label &= ops.abs(ops.sum(given, axis=-1) - 1) <= _LARGEST_LACK
        single = ops.sum(ops.cast(given > 0, "int32"), axis=-1) == 1
        is_label |= _rows_are_coded(given) & single
    else:
        given = ops.reshape(given, ops.shape(y_pred)[:-1])
        is_label = (given >= 0) & (given < classes) & (given == ops.floor(given))
    hint = (
        f"Labels must be class numbers from 0 to {classes - 1}, rows of {classes} probabilities "
        "that sum to 1, or rows of -1 and a single 1."
    )
    return is_label, given, hint


def _of_memberships(y_true, y_pred):
    """As `_of_one_class`."""
    if y_pred.shape[-1] == 1:
        hint = "Labels of a single output must be 0 and 1, or -1 and 1."
    elif _are_rows(y_true, y_pred):
        hint = "Rows of labels must hold 0 and 1, or -1 and 1."
    else:
        return _of_one_class(y_true, y_pred)
    given = ops.reshape(ops.cast(y_true, "float32"), ops.shape(y_pred))
    if y_pred.shape[-1] == 1:
        # One code for all samples: 0 beside -1 is a third class.
        mixed = ops.logical_and(ops.any(given == 0), ops.any(given == -1))
        return ops.all(_is_coded(given), axis=-1) & ops.logical_not(mixed), given, hint
    return _rows_are_coded(given), given, hint


def _are_rows(y_true, y_pred):
    return len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == y_pred.shape[-1]


def _is_coded(given):
    return (given == 0) | (given == 1) | (given == -1)


def _rows_are_coded(given):
    """Per row, whether it holds 0 and 1 alone, or -1 and 1 alone."""
    one = given == 1
    return ops.all(one | (given == 0), axis=-1) | ops.all(one | (given == -1), axis=-1)


def class_of_sign(y_true, y_pred):
    """Labels of a single output with 0 for -1; those of several as they are."""
    if y_pred.shape[-1] != 1:
        return y_true
    y_true = ops.convert_to_tensor(y_true)
    return ops.where(ops.equal(y_true, -1), ops.zeros_like(y_true), y_true)


def _checked(values, is_label, given, hint):
    """The values; an error where a label is wrong, or NaN for it while a function is traced."""
    known = value(is_label)
    if known is None:
        if len(values.shape) > len(is_label.shape):
            is_label = is_label[..., None]
        return ops.where(is_label, values, math.nan)
    if not np.all(known):
        wrong = value(given)[~known][0]
        raise ValueError(f"{hint} Received: {wrong.tolist()}, in {np.sum(~known)} samples.")
    return values


def value(tensor):
    """The tensor's values, or None while a function is traced."""
    if getattr(getattr(tensor, "device", None), "type", None) == "meta":
        return None  # PyTorch's stand-in for a tensor, which reads as zeros
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError):
        return None


def margins(target, y_pred):
    """f_y - max_{j≠y} f_j per sample, from one-hot targets."""
    correct = ops.sum(target * y_pred, axis=-1)
    lowest = ops.full_like(y_pred, -math.inf)
    return correct - ops.max(ops.where(target > 0, lowest, y_pred), axis=-1)


def names_one_class(y_true, y_pred):
    """Per sample, whether its label names one class of the outputs.

    That is 0, 1 or -1 for a single output, else a class number, or a row with a single 1 beside
    zeros or beside -1.
    """
    classes = y_pred.shape[-1]
    y_true = ops.cast(y_true, "float32")
    if classes > 1 and len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == classes:
        return _rows_are_coded(y_true) & (ops.sum(ops.cast(y_true > 0, "int32"), axis=-1) == 1)
    y_true = ops.reshape(y_true, (-1,))
    if classes == 1:
        mixed = ops.logical_and(ops.any(y_true == 0), ops.any(y_true == -1))
        return _is_coded(y_true) & ops.logical_not(mixed)
    return (y_true >= 0) & (y_true < classes) & (y_true == ops.floor(y_true))
