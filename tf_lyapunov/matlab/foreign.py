"""Networks in `.mat` files of others: matrices and biases of a chain of dense layers, in order."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from tf_lyapunov.matlab.container import load, refuse

ORIENTATIONS = ("out-in", "in-out")
# MATLAB's names of its transfer functions.
_MATLAB_NAMES = {"poslin": "relu", "tansig": "tanh", "logsig": "sigmoid", "purelin": "linear"}
# Numbers of all matrices at most: 2 GB in float64.
_MOST_NUMBERS = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignNetwork:
    """A chain of dense layers that was read.

    Attributes:
        model: Keras model in float32, y = φ(xW + b) layer by layer.
        names: of the matrices in the file, in order.
        orientation: `"out-in"` for matrices that multiply columns from the left (y = Wx + b), as
            MATLAB's toolboxes keep them, `"in-out"` for their transposes.
        rounding: largest |float32(w) - w| / |w| of all weights and biases, 0 if float32 holds them.
    """

    model: object
    names: tuple
    orientation: str
    rounding: float

    def explain(self):
        """Plain text: the layers, and what was done to their numbers."""
        lines = [
            f"{name}: {layer.kernel.shape[0]} to {layer.kernel.shape[1]}, "
            f"{layer.activation.__name__}."
            for name, layer in zip(self.names, self.model.layers, strict=True)
        ]
        lines.append(f"Matrices are read as {self.orientation}.")
        if self.rounding:
            lines.append(
                f"Numbers were rounded to float32, by {self.rounding:.2g} of their size at most: "
                "certificates are about the rounded ones."
            )
        return "\n".join(lines)


def import_network(path, *, weights, biases=None, activation="relu", output_activation="linear",
                   orientation=None):  # fmt: skip
    """Reads a chain of dense layers from a `.mat` file that another tool wrote.

    Where the matrices are: a variable that is a cell array of them, or a struct whose fields are
    (in the order of its fields, which must be that of their numbers: W1, W2, …, W10); a field of
    these (`"net.W"`, of every element where `net` is a struct array); or several such names in
    order, each a matrix (`"W1,W2,W3"`).

    Args:
        path: a .mat file in MATLAB's v7 format or older.
        weights: name of the matrices, see above.
        biases: name of the vectors, or None for layers without.
        activation: name of the hidden layers' activation, Keras' or MATLAB's, or several with
            commas between, one per hidden layer.
        output_activation: of the last layer.
        orientation: `"out-in"`, `"in-out"`, or None for what the shapes say.

    Returns:
        `ForeignNetwork`.

    Raises:
        ModelFileError: the file is missing, corrupt or in another format, or what was named is not
            there, not numeric, not finite, or no chain.
        ValueError: for an unknown activation, or shapes that fit both orientations where none is
            stated.
    """
    if orientation is not None and orientation not in ORIENTATIONS:
        raise ValueError(
            f"`orientation` must be one of {ORIENTATIONS}, or None. Received: {orientation!r}."
        )
    path = Path(path)
    roots = [name.split(".")[0] for text in (weights, biases) if text for name in _names(text)]
    content = load(path, roots)
    found = _arrays(path, content, weights)
    names = tuple(name for name, _ in found)
    matrices = [_matrix(path, *item) for item in found]
    vectors = None
    if biases is not None:
        vectors = [_vector(path, *item) for item in _arrays(path, content, biases)]
        if len(vectors) != len(matrices):
            refuse(path, f"it has {len(matrices)} matrices and {len(vectors)} biases")
    if sum(m.size for m in matrices) > _MOST_NUMBERS:
        refuse(path, f"its matrices have more than {_MOST_NUMBERS} numbers")
    orientation = _orientation(path, matrices, vectors, orientation)
    if orientation == "out-in":
        matrices = [m.T for m in matrices]
    functions = _activations(activation, output_activation, len(matrices))
    return _built(names, matrices, vectors, functions, orientation)


def _built(names, matrices, vectors, functions, orientation):
    import keras

    layers = [
        keras.layers.Dense(
            m.shape[1], activation=f, use_bias=vectors is not None, name=f"dense_{k}",
            dtype="float32",
        )
        for k, (m, f) in enumerate(zip(matrices, functions, strict=True), 1)
    ]  # fmt: skip
    model = keras.Sequential([keras.Input((matrices[0].shape[0],)), *layers])
    rounding = 0.0
    for k, layer in enumerate(layers):
        held = [matrices[k]] if vectors is None else [matrices[k], vectors[k]]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            cast = [v.astype(np.float32) for v in held]
            away = [np.abs(c.astype(np.float64) - v) / np.abs(v) for c, v in
                    zip(cast, held, strict=True)]  # fmt: skip
        if not all(np.all(np.isfinite(c)) for c in cast):
            raise ValueError(
                f"Weights must be numbers that float32 holds. Received: larger ones, in {names[k]}."
            )
        rounding = max([rounding, *(float(np.nanmax(a, initial=0.0)) for a in away)])
        layer.set_weights(cast)
    return ForeignNetwork(model, names, orientation, rounding)


def _names(text):
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", name, re.ASCII) for name in names):
        raise ValueError(
            "Names are variables, or fields of them (net.W), with commas between several. "
            f"Received: {text!r}."
        )
    return names


def _arrays(path, content, text):
    """`(name, value)` of the arrays that a text names, in order."""
    names = _names(text)
    found = [_values(path, content, name) for name in names]
    if len(names) == 1:
        return found[0]
    for name, held in zip(names, found, strict=True):
        if len(held) != 1:
            refuse(path, f"{name} must be one array where several names are given")
    return [item for held in found for item in held]


def _values(path, content, name):
    """`(name, value)` of what lies under one name: itself, or what it is made of."""
    variable, *fields = name.split(".")
    if variable not in content:
        refuse(path, f"there is no variable {variable}")
    held = [(variable, content[variable])]
    for field in fields:
        held = [item for own, value in held for item in _field(path, own, value, field)]
    return [item for own, value in held for item in _spread(path, own, value)]


def _field(path, name, value, field):
    if not isinstance(value, np.ndarray) or value.dtype.names is None:
        refuse(path, f"{name} is no struct")
    if field not in value.dtype.names:
        refuse(path, f"{name} has no field {field}; it has {', '.join(value.dtype.names)}")
    elements = value.reshape(-1, order="F")
    if len(elements) == 1:
        return [(f"{name}.{field}", elements[0][field])]
    return [(f"{name}({k}).{field}", e[field]) for k, e in enumerate(elements, 1)]


def _spread(path, name, value):
    """An array itself, or the entries of a cell array or struct in their order."""
    if hasattr(value, "toarray"):
        if value.shape[0] * value.shape[1] > _MOST_NUMBERS:
            refuse(path, f"{name} has more than {_MOST_NUMBERS} numbers")
        return [(name, value.toarray())]
    if value.dtype == object:
        return [(f"{name}{{{k}}}", v) for k, v in enumerate(value.reshape(-1, order="F"), 1)]
    if value.dtype.names is None:
        return [(name, value)]
    if value.size != 1:
        refuse(path, f"{name} is a struct array: name one of its fields, as {name}.FIELD")
    fields = list(value.dtype.names)
    if fields != sorted(fields, key=_natural):
        refuse(
            path,
            f"the order of the fields of {name} is not that of their names: name them in order, as "
            + ",".join(f"{name}.{f}" for f in sorted(fields, key=_natural)[:3]),
        )
    record = value.reshape(-1)[0]
    return [(f"{name}.{f}", record[f]) for f in fields]


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _numeric(path, name, value):
    if hasattr(value, "toarray"):
        return _numeric(path, *_spread(path, name, value)[0])
    value = np.asarray(value)
    if value.dtype.kind not in "fiub":
        refuse(path, f"{name} is no array of real numbers")
    value = value.astype(np.float64)
    if not value.size:
        refuse(path, f"{name} is empty")
    if not np.all(np.isfinite(value)):
        refuse(path, f"{name} has entries that are NaN or infinite")
    return value


def _matrix(path, name, value):
    value = _numeric(path, name, value)
    if value.ndim != 2:
        refuse(path, f"{name} must be a matrix; its shape is {value.shape}")
    return value


def _vector(path, name, value):
    value = _numeric(path, name, value)
    if value.size != max(value.shape):
        refuse(path, f"{name} must be a vector; its shape is {value.shape}")
    return value.reshape(-1)


def _orientation(path, matrices, vectors, stated):
    fitting = []
    for name in ORIENTATIONS:
        shapes = [m.shape[::-1] if name == "out-in" else m.shape for m in matrices]
        chained = all(a[1] == b[0] for a, b in zip(shapes, shapes[1:], strict=False))
        biased = vectors is None or all(
            s[1] == len(v) for s, v in zip(shapes, vectors, strict=True)
        )
        if chained and biased:
            fitting.append(name)
    shown = ", ".join("×".join(map(str, m.shape)) for m in matrices)
    if not fitting or (stated is not None and stated not in fitting):
        as_stated = "" if stated is None else f" as {stated}"
        refuse(path, f"matrices of {shown} and their biases are no chain{as_stated}")
    if stated is None and len(fitting) > 1:
        raise ValueError(
            "The shapes fit both orientations. State `orientation`: 'out-in' if the file means "
            f"y = Wx + b, 'in-out' if y = xW + b. Received: matrices of {shown}, in {path}."
        )
    return fitting[0] if stated is None else stated


def _activations(hidden, last, count):
    import keras

    names = [name.strip() for name in hidden.split(",")]
    if len(names) == 1:
        names *= count - 1
    if len(names) != count - 1:
        raise ValueError(
            f"`activation` is one name, or one per hidden layer, {count - 1}. Received: {hidden!r}."
        )
    found = []
    for name in [*names, last]:
        try:
            found.append(keras.activations.get(_MATLAB_NAMES.get(name, name)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Activations are Keras' or MATLAB's. Received: {name!r}. Known are relu, tanh, "
                f"sigmoid, linear, {', '.join(_MATLAB_NAMES)} and others of Keras."
            ) from error
    return found
