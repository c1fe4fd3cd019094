"""Arguments, labels and margins that the losses share."""

from __future__ import annotations

import math

from keras import ops


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

    From integers, one-hot rows, soft rows, or rows of -1 and 1, which mean 0 and 1.
    """
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
    return ops.one_hot(ops.cast(y_true, "int32"), classes, dtype=y_pred.dtype)


def memberships(y_true, y_pred):
    """1 where a sample belongs to an output's class, else 0, in the shape and dtype of the logits.

    For a single logit the labels are 0 and 1, or -1 and 1; for several they are integers, one-hot
    rows, or rows of -1 and 1.
    """
    if y_pred.shape[-1] == 1:
        positive_class = ops.cast(y_true > 0, y_pred.dtype)
        return ops.reshape(positive_class, ops.shape(y_pred))
    return ops.cast(one_hot(y_true, y_pred) > 0, y_pred.dtype)


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
        coded = (y_true == 0) | (y_true == 1) | (y_true == -1)
        return ops.all(coded, axis=-1) & (ops.sum(ops.cast(y_true > 0, "int32"), axis=-1) == 1)
    y_true = ops.reshape(y_true, (-1,))
    if classes == 1:
        return (y_true == 0) | (y_true == 1) | (y_true == -1)
    return (y_true >= 0) & (y_true < classes) & (y_true == ops.floor(y_true))
