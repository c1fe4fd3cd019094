"""`import_mat`: records of a `.mat` file, read as a network's weights, a design, a certificate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tf_lyapunov.design import Design
from tf_lyapunov.matlab.container import load, refuse
from tf_lyapunov.matlab.content import (
    CERTIFICATE_NUMBERS,
    CERTIFICATE_TEXTS,
    CONTRIBUTION_NUMBERS,
    CONTRIBUTION_TEXTS,
    FORMAT,
    VERSION,
    MatFile,
)
from tf_lyapunov.theory.sectors import Indices, Sector


def import_mat(path):
    """Reads a `.mat` file written by `export_mat`, or by save_design.m in MATLAB or Octave.

    A design's verdict is computed again from its numbers; a certificate's is not, since that
    needs the model (`certify`, or check_certificate.m for its gain).

    Args:
        path: a .mat file in MATLAB's v7 format (or older), as `save(..., '-v7')` writes it.

    Returns:
        `MatFile`.

    Raises:
        ModelFileError: the file is missing, corrupt, in another format, or holds NaN weights or
            an impossible design.
    """
    path = Path(path)
    content = load(path)
    header = content.get("tf_lyapunov")
    try:
        header = _struct(header)
        found = (_text(header["format"]), _number(header["version"]))
    except (KeyError, TypeError, ValueError):
        found = None
    if found != (FORMAT, VERSION):
        refuse(path, f"it is not a {FORMAT} file in version {VERSION} (found {found})")
    try:
        parts = {}
        if "network" in content:
            network = _struct(content["network"])
            parts["weights"] = _weights(network)
            parts["model_digest"] = _text(network["digest"])
        if "design" in content:
            parts["design"] = _design(_struct(content["design"]))
        if "certificate" in content:
            parts["certificate"] = _certificate(_struct(content["certificate"]))
        return MatFile(**parts)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        refuse(path, reason.rstrip("."), error)


def _struct(value):
    """A 1 × 1 MATLAB struct as a dict of its raw fields."""
    if not isinstance(value, np.ndarray) or value.dtype.names is None or value.size != 1:
        raise ValueError("a field that must be a struct is not one")
    record = value.reshape(-1)[0]
    return {name: record[name] for name in value.dtype.names}


def _items(value):
    """Entries of a MATLAB cell array, as a list."""
    if not isinstance(value, np.ndarray) or (value.dtype != object and value.size):
        raise ValueError("a field that must be a cell array is not one")
    return list(value.reshape(-1, order="F"))


def _text(value):
    """A MATLAB char row as a string; '' for an empty array."""
    value = np.asarray(value)
    if value.size == 0:
        return ""
    if value.size != 1 or value.dtype.kind != "U":
        raise ValueError("a field that must be text is not")
    return json.loads(f'"{value.reshape(-1)[0]}"')


def _array(value):
    value = np.asarray(value)
    if value.dtype.kind not in "fiub":
        raise ValueError("a field that must be numeric is not")
    return value.astype(np.float64)


def _row(value):
    """A MATLAB row, column or scalar as floats; an empty array as `()`."""
    array = _array(value)
    if array.size != max(array.shape, default=1) and array.size:
        raise ValueError(f"a field that must be a vector has shape {array.shape}")
    return tuple(float(v) for v in array.reshape(-1))


def _number(value):
    [number] = _row(value)
    return number


def _shaped(value, shape):
    """MATLAB drops trailing axes of length one; `shape` restores them."""
    shape = tuple(int(n) for n in _row(shape))
    array = _array(value)
    if int(np.prod(shape)) != array.size:
        raise ValueError(f"a value of shape {array.shape} must have shape {shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError("a weight is NaN or infinite")
    return array.reshape(shape)


def _weights(network):
    found = {}
    for item in map(_struct, _items(network["variables"])):
        found[_text(item["path"])] = _shaped(item["value"], item["shape"])
    for item in map(_struct, _items(network["maps"])):
        path, kernel = _text(item["variable"]), _shaped(item["kernel"], item["shape"])
        if path in found and not np.array_equal(found[path], kernel):
            raise ValueError(f"the shared kernel {path!r} has two different values")
        found[path] = kernel
    return found


def _design(record):
    centers, radii = _row(record["centers"]), _row(record["radii"])
    claim = Indices(_number(record["delta"]), _number(record["nu"]))
    sectors = zip(_row(record["k1"]), _row(record["k2"]), strict=True)
    layers = zip(_row(record["delta_vec"]), _row(record["nu_vec"]), strict=True)
    target = _row(record["target_gain"])
    return Design(
        claim=claim,
        sectors=tuple(Sector(*slopes) for slopes in sectors),
        rule=_text(record["rule"]),
        budgets=_row(record["sn_vec"]),
        indices=tuple(Indices(*layer) for layer in layers),
        variant=_text(record["variant"]) or None,
        balls=tuple(zip(centers, radii, strict=True)) or None,
        smallest_singular_values=_row(record["smallest_singular_values"]) or None,
        target_gain=target[0] if target else None,
        scaling=_row(record["p_vec"]) or None,
    )


def _certificate(record):
    from tf_lyapunov.bounds.composition import Contribution
    from tf_lyapunov.certification.certificate import Certificate

    contributions = []
    for row in map(_struct, _items(record["contributions"])):
        texts = {name: _text(row[name]) for name in CONTRIBUTION_TEXTS}
        texts["assumption"] = texts["assumption"] or None
        numbers = {name: _number(row[name]) for name in CONTRIBUTION_NUMBERS}
        inputs = tuple(map(_text, _items(row["inputs"])))
        contributions.append(Contribution(**texts, **numbers, inputs=inputs))
    return Certificate(
        radius=np.array(_row(record["radius"])),
        predictions=_integers(record["predictions"]),
        labels=_integers(record["labels"]),
        margins=np.array(_row(record["margins"])),
        **{name: _number(record[name]) for name in CERTIFICATE_NUMBERS},
        **{name: _text(record[name]) for name in CERTIFICATE_TEXTS},
        assumptions=tuple(map(_text, _items(record["assumptions"]))),
        contributions=tuple(contributions),
    )


def _integers(value):
    numbers = np.array(_row(value))
    if not np.all(np.mod(numbers, 1) == 0):
        raise ValueError("classes must be integers")
    return numbers.astype(np.int64)
