"""Labels as class numbers, by one rule for certificates, attacks and evaluations.

The losses and metrics (`losses.labels`) take the same labels, batch by batch and in compiled code.
"""

import numpy as np
from keras import ops


def class_numbers(y, n, outputs):
    """Labels as class numbers, int64 (n,).

    Args:
        y: for several outputs whole numbers (n,) or (n, 1) from 0 to outputs - 1, or rows
            (n, outputs) with a single 1 beside zeros or beside -1; for one output 0 and 1, or -1
            and 1 (as networks with a hinge have them), where 1 is class 1, or rows (n, 2).
        n: number of inputs.
        outputs: number of logits.

    Raises:
        ValueError: for anything else.

    Example:

    >>> class_numbers([-1, 1, 1], 3, 1).tolist(), class_numbers([[-1, -1, 1]], 1, 3).tolist()
    ([0, 1, 1], [2])
    """
    y = ops.convert_to_numpy(y) if ops.is_tensor(y) else np.asarray(y)
    classes = max(2, outputs)
    if y.dtype.kind not in "iufb" or not np.all(np.isfinite(y.astype(np.float64))):
        raise ValueError(
            f"`y` must hold class numbers or one-hot rows. Received: dtype {y.dtype}, or NaN."
        )
    if y.ndim == 2 and y.shape[1] == classes:
        return _of_rows(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (n,):
        raise ValueError(
            f"`y` must have shape ({n},), or ({n}, {classes}) if one-hot. "
            f"Received: shape {y.shape}."
        )
    if y.dtype.kind == "b":
        y = y.astype(np.int64)
    if outputs == 1 and np.any(y < 0):
        if not np.all((y == -1) | (y == 1)):
            raise ValueError(
                f"`y` of a single output must hold 0 and 1, or -1 and 1. Received: {_listed(y)}."
            )
        return (y == 1).astype(np.int64)
    if np.any(y != np.floor(y)) or np.any(y < 0) or np.any(y >= classes):
        signs = ", or -1 and 1" if outputs == 1 else ""
        raise ValueError(
            f"`y` must hold whole numbers from 0 to {classes - 1}{signs}, one class per input. "
            f"Received: values from {y.min()} to {y.max()}."
        )
    return y.astype(np.int64)


def _of_rows(y):
    y = y.astype(np.float64)
    coded = np.all((y == 0) | (y == 1), axis=1) | np.all((y == -1) | (y == 1), axis=1)
    if not (np.all(coded) and np.all(np.sum(y == 1, axis=1) == 1)):
        raise ValueError(
            "One-hot rows of `y` must hold a single 1 beside zeros, or beside -1. "
            "Received: rows with other numbers. Pass class numbers instead."
        )
    return np.argmax(y, axis=1).astype(np.int64)


def _listed(y):
    values = np.unique(y)
    shown = ", ".join(f"{v:g}" for v in values[:5])
    return shown + (", …" if len(values) > 5 else "")
