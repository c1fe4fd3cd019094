"""Inputs and outputs of a graph: which of their axes counts samples, and sizes left open."""

import re

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.onnx.foreign import Port
from tf_lyapunov.onnx.signals import BATCH

_DTYPES = (
    *("float32", "float64"),
    *("uint8", "int8", "uint16", "int16", "int32", "int64"),
)


def legal_name(name, taken):
    """A name of a Keras input, made of the file's, that no other has."""
    text = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")
    if not re.match(r"[A-Za-z0-9]", text):
        text = f"input_{text}"
    candidate, count = text, 1
    while candidate in taken:
        count += 1
        candidate = f"{text}_{count}"
    taken.add(candidate)
    return candidate


def read_ports(graph, batch_axis, input_shapes):
    """`(ports, batch)`: the inputs and the number of samples that the file fixes."""
    if not graph.inputs:
        raise ValueError("A network needs an input. Received: a graph of constants.")
    given = dict(input_shapes or {})
    unknown = set(given) - {v.name for v in graph.inputs}
    if unknown:
        raise ValueError(
            f"`input_shapes` must name inputs of the graph. Received: {sorted(unknown)}. The "
            f"inputs are {', '.join(repr(v.name) for v in graph.inputs)}."
        )
    ports, batches = [], set()
    for value in graph.inputs:
        if value.dtype not in _DTYPES:
            raise UnsupportedLayerError(
                "A network is read in float32 or float64, or with integer inputs that it casts. "
                f"Received: input {value.name!r} of type {value.dtype}. Convert the file first."
            )
        shape = value.shape
        if value.name in given:
            shape = _agreed(value, tuple(given[value.name]), batch_axis)
        if shape is None:
            raise ValueError(
                f"The shape of input {value.name!r} is not stated in the file. Received: "
                "input_shapes without it. Pass `input_shapes={" + repr(value.name) + ": (…)}`, the "
                "batch axis first as None."
            )
        axis = _batch_axis(value.name, shape, batch_axis)
        sizes_ = list(shape)
        if axis is not None:
            first = sizes_[axis]
            batches.add(first if isinstance(first, int) else BATCH)
            sizes_[axis] = None
        open_ = [n for i, n in enumerate(sizes_) if not isinstance(n, int) and i != axis]
        if open_:
            raise ValueError(
                f"Sizes beside the number of samples must be fixed. Received: input {value.name!r} "
                f"of shape {shape}. Pass `input_shapes={{{value.name!r}: (None, …)}}`."
            )
        if any(isinstance(n, int) and n < 1 for n in sizes_):
            raise ValueError(f"Sizes must be positive. Received: input {value.name!r} of {shape}.")
        ports.append(Port(value.name, tuple(sizes_), value.dtype, axis))
    if len(batches) > 1:
        raise ValueError(
            "All inputs must hold equally many samples. Received: inputs with "
            f"{', '.join(str(b) for b in sorted(batches))}."
        )
    return tuple(ports), batches.pop() if batches else 1


def _agreed(value, given, batch_axis):
    """A shape of the user's, which must not contradict the file."""
    if value.shape is not None:
        fits = len(value.shape) == len(given) and all(
            not isinstance(n, int) or g is None or n == g
            for n, g in zip(value.shape, given, strict=True)
        )
        if not fits:
            raise ValueError(
                f"`input_shapes` must agree with the file. Received: {given} for input "
                f"{value.name!r}, whose shape there is {value.shape}."
            )
        return tuple(
            n if isinstance(n, int) else g for n, g in zip(value.shape, given, strict=True)
        )
    return given


def _batch_axis(name, shape, asked):
    if asked is None:
        return None
    if asked != "auto":
        if not isinstance(asked, int) or isinstance(asked, bool) or not 0 <= asked < len(shape):
            raise ValueError(
                f"`batch_axis` must be 'auto', None or an axis of the input. Received: {asked!r} "
                f"for input {name!r} of shape {shape}."
            )
        return asked
    if not shape or (len(shape) == 1 and isinstance(shape[0], int)):
        return None  # one vector
    if isinstance(shape[0], int) and shape[0] != 1:
        raise ValueError(
            "Whether the first axis counts samples is not clear. Received: input "
            f"{name!r} of shape {shape}. Pass `batch_axis=0` if it does, `batch_axis=None` if it "
            "is a part of one sample."
        )
    return 0


def chosen_output(graph, output):
    names = [v.name for v in graph.outputs]
    if output is None:
        if len(names) > 1:
            raise ValueError(
                f"A program has one output. Received: a graph with {', '.join(map(repr, names))}. "
                f"Pass `output={names[-1]!r}` or another."
            )
        return names[0]
    if output not in names:
        raise ValueError(
            f"`output` must be one of the graph's, {', '.join(map(repr, names))}. Received: "
            f"{output!r}."
        )
    return output
