"""What `certify` is given, checked: shapes, dtypes and sizes of the arrays for every input."""

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.verification.arithmetic import rounded

# Float64 entries held at once.
_BLOCK = 2**22


def input_shapes(inputs, arrays):
    """Shapes of the first batch with the model's batch axis, checked against the model.

    Args:
        inputs: `program.inputs.Inputs` of the model.
        arrays: list with one array for each.

    Returns:
        List of shapes.

    Raises:
        ValueError: for a shape that the model does not take, or no rows.
    """
    found = []
    for i, (x, name) in enumerate(zip(arrays, labels_of(inputs), strict=True)):
        declared = None if inputs.shapes is None else inputs.shapes[i]
        if x.ndim < 1 or len(x) == 0:
            raise ValueError(f"{name} must hold at least one input. Received: shape {x.shape}.")
        if declared is not None and (
            len(declared) != x.ndim
            or any(
                d is not None and d != s for d, s in zip(declared[1:], x.shape[1:], strict=False)
            )
        ):
            raise ValueError(
                f"{name} must have the model's input shape {declared}. Received: shape {x.shape}. "
                "The first axis counts the inputs."
            )
        found.append((declared[0] if declared else None, *x.shape[1:]))
    return found


def labels_of(inputs):
    """How messages name every input: `x`, or `x['name']` where there are several."""
    if not inputs.several:
        return ["`x`"]
    return [f"`x[{name!r}]`" for name in inputs.names]


def checked_inputs(arrays, network, inputs, chosen=None):
    """Inputs cast to the model's dtypes, their norms, and how far the casts moved them.

    Args:
        arrays: list with one array (n, …) for each input.
        network: `Network` with known sizes.
        inputs: `program.inputs.Inputs` of the model.
        chosen: bool per input, those that may change; None for all.

    Returns:
        `(cast, norms, moved)`: list of arrays, dict of float64 (n,) by the inputs' node names, and
        float64 (n,), the distance of the chosen inputs from those given. What is held fixed is
        held at the cast value.

    Raises:
        ValueError: for NaN, infinity, numbers that a dtype cannot hold, and other shapes.
    """
    chosen = (True,) * len(arrays) if chosen is None else chosen
    cast, norms, shifts = [], {}, []
    for x, tensor, name, moves in zip(
        arrays, network.graph.inputs, labels_of(inputs), chosen, strict=True
    ):
        held, size, shift = _checked(x, tensor, name)
        cast.append(held)
        norms[tensor.producer] = size
        if moves:
            shifts.append(shift)
    moved = shifts[0]
    if len(shifts) > 1:
        moved = rounding.euclidean_norms_up(np.stack(shifts, axis=1))
    return cast, norms, moved


def _checked(x, tensor, name):
    if x.dtype.kind not in "iufb" and x.dtype.name != "bfloat16":
        raise ValueError(
            f"{name} must hold real numbers. Received: dtype {x.dtype}. Convert it first."
        )
    if x.shape[1:] != tensor.shape[1:] or len(x) == 0:
        raise ValueError(
            f"All batches of {name} must have the shape (n, {str(tensor.shape[1:])[1:]} with "
            f"n ≥ 1. Received: shape {x.shape}."
        )
    half = tensor.dtype == "bfloat16"
    dtype = np.dtype(np.float32 if half else tensor.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        # NumPy has no bfloat16: its numbers, in float32.
        cast = rounded(x, "bfloat16").astype(dtype) if half else x.astype(dtype, copy=False)
    norms, moved = np.zeros(len(x)), np.zeros(len(x))
    rows = max(_BLOCK // max(cast[0].size, 1), 1)
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        if not (np.all(np.isfinite(cast[block])) and np.all(np.isfinite(x[block]))):
            raise ValueError(
                f"{name} must be finite in the model's input dtype {tensor.dtype}. "
                "Received: NaN or infinity. Remove these inputs first."
            )
        norms[block] = rounding.euclidean_norms_up(cast[block])
        if half or cast.dtype != x.dtype:
            difference = x[block].astype(np.float64) - cast[block].astype(np.float64)
            moved[block] = rounding.euclidean_norms_up(difference)
    if dtype.kind in "iub" and np.any(moved > 0):
        raise ValueError(
            f"{name} must hold numbers that the model's input dtype {tensor.dtype} can hold; "
            f"others would be truncated or wrap around. Received: values from {x.min()} to "
            f"{x.max()} of dtype {x.dtype}. Scale and round them first, or give the model a float "
            "`Input`."
        )
    return cast, norms, moved
