"""`export_mat`: records of a network, a design and a certificate, written as one `.mat` file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from tf_lyapunov.matlab.content import (
    CERTIFICATE_NUMBERS,
    CERTIFICATE_TEXTS,
    CONTRIBUTION_NUMBERS,
    CONTRIBUTION_TEXTS,
    FORMAT,
    VERSION,
    is_float,
)
from tf_lyapunov.theory.operators import convolution_axes
from tf_lyapunov.writing import write_bytes

# In place of scipy's header, which holds the date: equal contents give equal files.
_HEADER = b"MATLAB 5.0 MAT-file, written by tf_lyapunov"
_NOTHING = np.zeros((0, 0))


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
        >>> from tf_lyapunov.matlab import import_mat
        >>> from tf_lyapunov.theory.sectors import Indices, Sector
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
    if getattr(certificate, "perturbed", None) is not None:
        raise ValueError(
            "A .mat file holds certificates about all inputs of a model. Received: one about "
            f"{', '.join(map(repr, certificate.perturbed))} alone. Save it as .json."
        )
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


def _network_record(model, input_shapes):
    from tf_lyapunov.program.families.scaling import BatchNormScale
    from tf_lyapunov.program.network import Network, read_network
    from tf_lyapunov.program.weights import inference_value, kernel_maps

    network = model if isinstance(model, Network) else read_network(model, input_shapes)
    numbers = {node.name: k for k, node in enumerate(network.nodes, 1)}
    shapes = {node.name: node.output_shape for node in network.nodes}
    nodes, maps, kernels, entry = [], [], set(), {}
    for node in network.nodes:
        index = 0
        if node.kind == "linear":
            first = entry.setdefault(node.call, node)
            held = kernel_maps(node.layer, shapes[first.inputs[0]])
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
    others = [v for v in network.model.variables if is_float(v) and v.path not in kernels]
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
        row = {name: _ascii(getattr(c, name) or "") for name in CONTRIBUTION_TEXTS}
        row |= {name: float(getattr(c, name)) for name in CONTRIBUTION_NUMBERS}
        row["inputs"] = _cell([_ascii(name) for name in c.inputs])
        rows.append(row)
    return {
        **{
            name: np.asarray(getattr(certificate, name), dtype=np.float64)
            for name in ("radius", "predictions", "labels", "margins")
        },
        **{name: float(getattr(certificate, name)) for name in CERTIFICATE_NUMBERS},
        **{name: _ascii(getattr(certificate, name)) for name in CERTIFICATE_TEXTS},
        "assumptions": _cell([_ascii(text) for text in certificate.assumptions]),
        "contributions": _cell(rows),
    }


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
