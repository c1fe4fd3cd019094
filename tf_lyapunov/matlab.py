"""Exchange with MATLAB and GNU Octave: networks, designs and certificates as `.mat` files.

The functions in `matlab_compat/` read what `export_mat` writes: `check_certificate.m` recomputes
the norms of the weights and proves the claims again. What `save_design.m` writes, `import_mat`
reads.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np

from tf_lyapunov.design import Design
from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.theory.operators import convolution_axes
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.writing import write_bytes

FORMAT, VERSION = "tf_lyapunov.mat", 1
# In place of scipy's header, which holds the date: equal contents give equal files.
_HEADER = b"MATLAB 5.0 MAT-file, written by tf_lyapunov"
# Weights seldom shrink tenfold; files beyond both limits exist to exhaust memory.
_LARGEST_CONTENT, _LARGEST_RATIO = 2**28, 100
_NOTHING = np.zeros((0, 0))


@dataclasses.dataclass(frozen=True)
class MatFile:
    """What a `.mat` file of this library holds; parts that it lacks are `None`.

    Attributes:
        design: `Design`, proved again from its numbers when it was read.
        certificate: `Certificate`, as written: it concerns the model of its `model_digest` only.
        weights: dict from Keras variable paths to float64 arrays in Keras' layout, or `None`.
        model_digest: SHA-256 of the exported model's layers and weights, or `None`.
    """

    design: Design | None = None
    certificate: object | None = None
    weights: dict | None = None
    model_digest: str | None = None

    def assign_to(self, model):
        """Writes the file's weights into a Keras model of the same architecture.

        Weights edited in MATLAB void every certificate of the exported model: certify again.

        Args:
            model: built Keras model with the same variables (paths and shapes).

        Returns:
            The same model.

        Raises:
            ValueError: if the file holds no weights, or a variable is missing or has another
                shape. No weight is changed then.
        """
        if self.weights is None:
            raise ValueError("This file holds no weights. Export it with `model=`.")
        variables = {v.path: v for v in model.weights if _is_float(v)}
        wrong = sorted(set(variables) ^ set(self.weights))
        if wrong:
            raise ValueError(
                "The model and the file must have the same variables. "
                f"Received: {wrong[:4]} in one of them only. Load the model that was exported."
            )
        for path, variable in variables.items():
            if tuple(variable.shape) != self.weights[path].shape:
                raise ValueError(
                    f"The file's {path!r} must have shape {tuple(variable.shape)}. "
                    f"Received: {self.weights[path].shape}."
                )
        for path, variable in variables.items():
            variable.assign(self.weights[path])
        return model


def export_mat(path, *, model=None, design=None, certificate=None, input_shapes=None):
    """Writes a network, a design and a certificate (any of them) for MATLAB and GNU Octave.

    The file holds `network` (the graph, and every linear map's kernel as used at inference with
    its geometry), `design` (under the names of get_indexes.m: nu, delta, k1, k2, nu_vec,
    delta_vec, sn_vec, kc, p_vec) and `certificate` (its fields). Equal contents give equal bytes.

    Args:
        path: file name, ending in .mat; written whole or not at all.
        model: a built Keras model that `read_network` can read, or a `Network`.
        design: `Design`.
        certificate: `Certificate`; of this model, if one is given.
        input_shapes: shapes with the batch axis, to fix sizes that the model leaves open.

    Raises:
        ValueError: if there is nothing to write, the certificate is another model's, or a
            convolution's input size is open.
        UnsupportedLayerError: naming a layer without a proven gain.

    Example:
        >>> import tempfile
        >>> from tf_lyapunov.design import spectral_design
        >>> design = spectral_design(Indices(0.4, -2.0), [Sector(0.1, 1.0), Sector.linear()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_mat(folder + "/design.mat", design=design)
        ...     import_mat(folder + "/design.mat").design == design
        True
    """
    from scipy.io import savemat

    path = Path(path)
    if path.suffix != ".mat":
        raise ValueError(f"`path` must end in .mat. Received: path={str(path)!r}.")
    if model is None and design is None and certificate is None:
        raise ValueError("Pass `model`, `design` or `certificate`: there is nothing to write.")
    content = {"tf_lyapunov": {"format": FORMAT, "version": float(VERSION), "writer": "Python"}}
    if model is not None:
        content["network"] = _network_record(model, input_shapes)
    if design is not None:
        content["design"] = _design_record(design)
    if certificate is not None:
        content["certificate"] = _certificate_record(certificate)
        if model is not None and content["network"]["digest"] != certificate.model_digest:
            raise ValueError(
                "`certificate` must be this model's. Received: a certificate of model "
                f"{certificate.model_digest[:23]}…, not {content['network']['digest'][:23]}…. "
                "Certify the model again, or export the two into different files."
            )
    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=True, oned_as="row", long_field_names=True)
    data = _HEADER.ljust(116) + buffer.getvalue()[116:]
    write_bytes(path, data)


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
    content = _load(path)
    header = content.get("tf_lyapunov")
    try:
        header = _struct(header)
        found = (_text(header["format"]), _number(header["version"]))
    except (KeyError, TypeError, ValueError):
        found = None
    if found != (FORMAT, VERSION):
        _refuse(path, f"it is not a {FORMAT} file in version {VERSION} (found {found})")
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
        _refuse(path, reason.rstrip("."), error)


# Writing ----------------------------------------------------------------------------------------


def _network_record(model, input_shapes):
    from tf_lyapunov.certification.linear import BatchNormScale, inference_value
    from tf_lyapunov.certification.network import Network, read_network
    from tf_lyapunov.spectral.reading import linear_maps

    network = model if isinstance(model, Network) else read_network(model, input_shapes)
    numbers = {node.name: k for k, node in enumerate(network.nodes, 1)}
    shapes = {node.name: node.output_shape for node in network.nodes}
    nodes, maps, kernels, entry = [], [], set(), {}
    for node in network.nodes:
        index = 0
        if node.kind == "linear":
            first = entry.setdefault(node.call, node)
            held = linear_maps(node.layer, input_shape=shapes[first.inputs[0]])
            variable, linear_map = held[0 if first is node else 1]
            scale = _NOTHING
            if node.batch_norms:
                scale = BatchNormScale.of(node.batch_norms[0]).scale
            kernel = inference_value(variable, node.layer.compute_dtype)
            maps.append(map_record(node.name, variable.path, kernel, linear_map, scale))
            kernels.add(variable.path)
            index = len(maps)
        sector = _NOTHING if node.sector is None else [node.sector.alpha, node.sector.beta]
        nodes.append(
            {
                "name": _ascii(node.name),
                "kind": node.kind,
                "call": _ascii(node.call),
                "inputs": np.array([numbers[name] for name in node.inputs], dtype=np.float64),
                "rule": node.rule,
                "weights": np.array(node.weights if node.inputs else [1.0], dtype=np.float64),
                "gain": float(node.gain_upper_bound),
                "map": float(index),
                "sector": np.asarray(sector, dtype=np.float64),
                "assumption": _plain(node.assumption or ""),
                "method": _plain(node.method),
            }
        )
    others = [v for v in network.model.weights if _is_float(v) and v.path not in kernels]
    return {
        "nodes": _cell(nodes),
        "maps": _cell(maps),
        "variables": _cell([_variable_record(v) for v in others]),
        "logits": float(numbers[network.logits]),
        "digest": network.digest(),
    }


def map_record(name, path, kernel, linear_map, scale=_NOTHING):
    """Fields of a linear map as layer_matrix.m and norm_upper_bound.m read them.

    Args:
        name: for messages.
        path: of the Keras variable that holds the kernel.
        kernel: float64, in Keras' layout.
        linear_map: `LinearMap` with a known input size.
        scale: factors of the output channels (a folded batch normalization), or empty.

    Returns:
        Dict of strings and float64 arrays.

    Raises:
        ValueError: if the input size of a convolution is open.
    """
    axes = _NOTHING
    if linear_map.kind != "dense":
        geometry = convolution_axes(kernel.shape, linear_map)
        if any(axis.size is None for axis in geometry):
            raise ValueError(
                "A convolution can be exported only at a known input size. Received: layer "
                f"{name!r} with an open size. Pass `input_shapes`, e.g. [(None, 28, 28, 1)]."
            )
        axes = np.array(
            [[a.taps, a.stride, a.dilation, a.size, a.output, a.left] for a in geometry],
            dtype=np.float64,
        )
    return {
        "name": _ascii(name),
        "variable": _ascii(path),
        "kind": linear_map.kind,
        "kernel": kernel,
        "shape": np.array(kernel.shape, dtype=np.float64),
        "axes": axes,
        "groups": float(linear_map.groups),
        "scale": np.asarray(scale, dtype=np.float64),
    }


def _is_float(variable):
    return "float" in str(variable.dtype)


def _variable_record(variable):
    import keras

    value = np.asarray(keras.ops.convert_to_numpy(variable.value)).astype(np.float64)
    return {
        "path": _ascii(variable.path),
        "value": value,
        "shape": np.array(value.shape, dtype=np.float64),
    }


def _design_record(design):
    balls = design.balls or ()
    return {
        "rule": design.rule,
        "variant": design.variant or "",
        "delta": design.claim.delta,
        "nu": design.claim.nu,
        "k1": np.array([s.alpha for s in design.sectors]),
        "k2": np.array([s.beta for s in design.sectors]),
        "nu_vec": np.array([i.nu for i in design.indices]),
        "delta_vec": np.array([i.delta for i in design.indices]),
        "sn_vec": np.array(design.budgets),
        "p_vec": _optional(design.scaling),
        "kc": np.array(design.claim.slopes),
        "centers": np.array([c for c, _ in balls]) if balls else _NOTHING,
        "radii": np.array([r for _, r in balls]) if balls else _NOTHING,
        "smallest_singular_values": _optional(design.smallest_singular_values),
        "target_gain": _NOTHING if design.target_gain is None else design.target_gain,
        "verdict": design.verdict,
    }


def _optional(values):
    return _NOTHING if values is None else np.array(values, dtype=np.float64)


def _certificate_record(certificate):
    rows = []
    for c in certificate.contributions:
        row = {name: _ascii(getattr(c, name) or "") for name in _CONTRIBUTION_TEXTS}
        row |= {name: float(getattr(c, name)) for name in _CONTRIBUTION_NUMBERS}
        row["inputs"] = _cell([_ascii(name) for name in c.inputs])
        rows.append(row)
    return {
        **{
            name: np.asarray(getattr(certificate, name), dtype=np.float64)
            for name in ("radius", "predictions", "labels", "margins")
        },
        **{name: float(getattr(certificate, name)) for name in _CERTIFICATE_NUMBERS},
        **{name: _ascii(getattr(certificate, name)) for name in _CERTIFICATE_TEXTS},
        "assumptions": _cell([_ascii(text) for text in certificate.assumptions]),
        "contributions": _cell(rows),
    }


_CERTIFICATE_NUMBERS = ("gain_upper_bound", "float_allowance")
_CERTIFICATE_TEXTS = ("method", "verdict", "model_digest")
_CONTRIBUTION_NUMBERS = ("gain_upper_bound", "lipschitz_upper_bound")
_CONTRIBUTION_TEXTS = ("name", "kind", "method", "assumption")


def _ascii(text):
    """Text in ASCII with JSON's escapes: Octave cuts other characters, MATLAB shows them as is."""
    return json.dumps(text)[1:-1]


def _plain(text):
    """Readable ASCII for text that is only shown."""
    for symbol, word in (("γ", "gamma"), ("√", "sqrt"), ("≤", "<="), ("·", "*"), ("×", "x")):
        text = text.replace(symbol, word)
    return text.encode("ascii", "replace").decode()


def _cell(items):
    """A list as a MATLAB cell array, 1 × n."""
    cell = np.empty((1, len(items)), dtype=object)
    for k, item in enumerate(items):
        cell[0, k] = item
    return cell


# Reading ----------------------------------------------------------------------------------------


def _refuse(path, reason, error=None):
    raise ModelFileError(f"The MATLAB file is refused: {reason}. Received: {path}.") from error


def _load(path):
    from scipy.io import loadmat

    if not path.is_file():
        _refuse(path, "there is no such file")
    _check_container(path)
    try:
        return loadmat(path, mat_dtype=True, squeeze_me=False, struct_as_record=True)
    except MemoryError as error:
        _refuse(path, "it needs more memory than there is", error)
    except Exception as error:  # scipy raises many kinds for a malformed file
        _refuse(path, f"it is corrupt ({type(error).__name__}: {error})", error)


def _check_container(path):
    """Refuses other formats, truncated or damaged elements, and decompression bombs."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(128)
        if header.startswith((b"# Created by Octave", b"Octave-1-")):
            _refuse(path, "it is in Octave's own format; write it with save('-v7', ...)")
        if header.startswith((b"MATLAB 7.3", b"\x89HDF")):
            _refuse(path, "it is in MATLAB's v7.3 (HDF5) format; write it with save(..., '-v7')")
        orders = {b"IM": "little", b"MI": "big"}
        if len(header) < 128 or header[126:] not in orders:
            _refuse(path, "it is not a MATLAB v7 file, or a truncated one")
        order = orders[header[126:]]
        total = 0
        while tag := file.read(8):
            kind = int.from_bytes(tag[:4], order)
            length = int.from_bytes(tag[4:], order)
            if len(tag) < 8 or file.tell() + length > size:
                _refuse(path, "it is truncated")
            total += _content_size(path, file, length) if kind == 15 else length
            if total > max(_LARGEST_CONTENT, _LARGEST_RATIO * size):
                _refuse(path, f"it unpacks to more than {_LARGEST_RATIO} times its size")
            if kind != 15:
                file.seek(length, os.SEEK_CUR)


def _content_size(path, file, length):
    """Size of one compressed element, whose checksum is verified on the way."""
    stream, total, limit = zlib.decompressobj(), 0, max(_LARGEST_CONTENT, _LARGEST_RATIO * length)
    try:
        while length > 0 and not stream.eof:
            data = file.read(min(length, 2**16))
            length -= len(data)
            while data and total <= limit:
                total += len(stream.decompress(data, 2**20))
                data = stream.unconsumed_tail
            if total > limit:
                return total
    except zlib.error as error:
        _refuse(path, f"it is corrupt ({error})", error)
    if not stream.eof:
        _refuse(path, "it is truncated")
    file.seek(length, os.SEEK_CUR)
    return total


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
    from tf_lyapunov.certification.certificate import Certificate
    from tf_lyapunov.certification.composition import Contribution

    contributions = []
    for row in map(_struct, _items(record["contributions"])):
        texts = {name: _text(row[name]) for name in _CONTRIBUTION_TEXTS}
        texts["assumption"] = texts["assumption"] or None
        numbers = {name: _number(row[name]) for name in _CONTRIBUTION_NUMBERS}
        inputs = tuple(map(_text, _items(row["inputs"])))
        contributions.append(Contribution(**texts, **numbers, inputs=inputs))
    return Certificate(
        radius=np.array(_row(record["radius"])),
        predictions=_integers(record["predictions"]),
        labels=_integers(record["labels"]),
        margins=np.array(_row(record["margins"])),
        **{name: _number(record[name]) for name in _CERTIFICATE_NUMBERS},
        **{name: _text(record[name]) for name in _CERTIFICATE_TEXTS},
        assumptions=tuple(map(_text, _items(record["assumptions"]))),
        contributions=tuple(contributions),
    )


def _integers(value):
    numbers = np.array(_row(value))
    if not np.all(np.mod(numbers, 1) == 0):
        raise ValueError("classes must be integers")
    return numbers.astype(np.int64)
