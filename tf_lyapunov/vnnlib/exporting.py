"""A certificate's claim as an ONNX file and VNN-LIB properties, for other verifiers to decide."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np

from tf_lyapunov.program.network import read_network
from tf_lyapunov.vnnlib.answers import decimal
from tf_lyapunov.writing import writable_target, write_text

NETWORK, LIST = "network.onnx", "instances.csv"
_TIMEOUT = 116
# Functions of the last step that keep the strict order of real numbers.
_MONOTONE = (None, "softmax", "log_softmax", "sigmoid", "log_sigmoid")


@dataclasses.dataclass(frozen=True)
class ExportedClaim:
    """What `export_vnnlib` wrote.

    Attributes:
        network: path of the ONNX file.
        properties: tuple of paths, one per input that something is claimed of.
        positions: tuple of int, of these inputs among all.
        instances: path of the list of both, as the VNN-COMP has it.
    """

    network: Path
    properties: tuple
    positions: tuple
    instances: Path


def export_vnnlib(model, x, folder, *, certificate=None, labels=None, radius=None, norm="linf",
                  bounds=None, overwrite=False):  # fmt: skip
    """Writes the claim that inputs keep their class as `network.onnx` and a property per input.

    The property of an input x_i states what would break the claim,

        ‖x - x_i‖∞ ≤ radius_i, and y_j ≥ y_label for some other class j,

    so that `unsat` is the claim, ties counting as broken; of a single output y ≤ 0 breaks class 1
    and y ≥ 0 class 0 (1/2 instead of 0 behind a sigmoid). All numbers are exact decimals: the box
    is that of the claim, rounded nowhere. Other norms than l∞ are refused: their balls are no
    boxes, and the boxes around them make another, harder question.

    Args:
        model: a built Keras model with one input that `export_onnx` can write.
        x: array (n, *shape), in the model's input dtype.
        folder: directory to write to; it is made if it is missing.
        certificate: `Certificate` of this model and these inputs; gives labels and radii.
        labels: int (n,), instead of a certificate.
        radius: number or array (n,), instead of a certificate.
        norm: of `radius`; `"linf"` is the only one that can be stated.
        bounds: `(low, high)` of valid inputs, numbers or arrays, which changes stay within; needed
            where the certificate is limited to them.
        overwrite: whether files that are there are replaced.

    Returns:
        `ExportedClaim`.

    Raises:
        ValueError: for another norm, another model's certificate, labels or radii that do not fit,
            a claim about nothing, or files that are there; nothing is written then.
        ImportError: without the extra `onnx`.

    Example:

    >>> import keras, tempfile
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> x = np.array([[3.0, 1.0]], "float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = export_vnnlib(model, x, folder, labels=[0], radius=0.5)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['input-0.vnnlib', 'instances.csv', 'network.onnx']
    """
    network = read_network(model)
    x, labels, radii = _claimed(network, x, certificate, labels, radius, norm, bounds)
    outputs = int(np.prod(network.model.outputs[0].shape[1:]))
    _check_outputs(network, labels, outputs)
    positions = [i for i, r in enumerate(radii) if r > 0]
    if not positions:
        raise ValueError(
            "A claim needs a positive radius. Received: radii of 0, which stand for nothing proved."
        )
    folder = Path(folder)
    paths = [folder / f"input-{i}.vnnlib" for i in positions]
    there = [str(p) for p in (folder / NETWORK, folder / LIST, *paths) if p.exists()]
    if there and not overwrite:
        raise ValueError(
            f"Files are not replaced without `overwrite`. Received: {', '.join(there[:3])}, which "
            "exist."
        )
    limits = (None, None) if bounds is None else _limits(bounds, x.shape[1:])
    threshold = Fraction(1, 2) if network.decision == "sigmoid" and outputs == 1 else Fraction(0)
    texts = [
        f"; {network.digest()}\n; input {i}, class {labels[i]}, l-infinity radius {radii[i]!r}\n"
        + property_text(x[i], int(labels[i]), float(radii[i]), outputs, limits, threshold)
        for i in positions
    ]
    from tf_lyapunov.onnx.export import export_onnx

    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        writable_target(path)
    export_onnx(model, folder / NETWORK)
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    rows = "".join(f"{NETWORK},{path.name},{_TIMEOUT}\n" for path in paths)
    write_text(folder / LIST, rows)
    return ExportedClaim(folder / NETWORK, tuple(paths), tuple(positions), folder / LIST)


def property_text(x, label, radius, outputs, limits=(None, None), threshold=0):
    """VNN-LIB 1.0 text of what breaks "class `label` on the l∞ ball around x".

    Args:
        x: array, one input, whose entries are taken exactly.
        label: class.
        radius: positive number, taken exactly.
        outputs: number of the network's outputs.
        limits: `(low, high)`, arrays of x' shape or None, that x' stays within.
        threshold: of a single output, above which its class is 1.

    Example:

    >>> print(property_text(np.array([0.5]), 1, 0.25, 2))
    (declare-const X_0 Real)
    <BLANKLINE>
    (declare-const Y_0 Real)
    (declare-const Y_1 Real)
    <BLANKLINE>
    (assert (<= X_0 0.75))
    (assert (>= X_0 0.25))
    <BLANKLINE>
    (assert (>= Y_0 Y_1))
    <BLANKLINE>
    """
    flat = np.asarray(x).ravel()
    low, high = (None if v is None else np.asarray(v).ravel() for v in limits)
    reach = Fraction(float(radius))
    lines = [f"(declare-const X_{i} Real)" for i in range(len(flat))] + [""]
    lines += [f"(declare-const Y_{j} Real)" for j in range(outputs)] + [""]
    for i, value in enumerate(flat):
        least, largest = Fraction(float(value)) - reach, Fraction(float(value)) + reach
        if low is not None and np.isfinite(low[i]):
            least = max(least, Fraction(float(low[i])))
        if high is not None and np.isfinite(high[i]):
            largest = min(largest, Fraction(float(high[i])))
        lines += [
            f"(assert (<= X_{i} {decimal(largest)}))",
            f"(assert (>= X_{i} {decimal(least)}))",
        ]
    lines.append("")
    if outputs == 1:
        lines.append(f"(assert ({'<=' if label == 1 else '>='} Y_0 {decimal(threshold)}))")
    else:
        rows = [f"(>= Y_{j} Y_{label})" for j in range(outputs) if j != label]
        if len(rows) == 1:
            lines.append(f"(assert {rows[0]})")
        else:
            lines += ["(assert (or", *(f"    (and {row})" for row in rows), "))"]
    return "\n".join(lines) + "\n"


def _claimed(network, x, certificate, labels, radius, norm, bounds):
    """`(x, labels, radii)`, checked."""
    if (certificate is None) == (labels is None or radius is None):
        raise ValueError(
            "Pass `certificate`, or `labels` and `radius`. Received: "
            + ("neither." if certificate is None else "both.")
        )
    if certificate is not None:
        labels, radius, norm = certificate.labels, certificate.radius, certificate.norm
        if certificate.model_digest != network.digest():
            raise ValueError(
                "`certificate` must be this model's. Received: a certificate of model "
                f"{certificate.model_digest[:23]}…, not {network.digest()[:23]}…."
            )
        if certificate.within is not None and bounds is None:
            raise ValueError(
                "The certificate is about changes that stay within bounds, "
                f"{certificate.within}. Received: bounds=None. Pass the same `bounds`."
            )
    if norm != "linf":
        raise ValueError(
            "VNN-LIB states boxes exactly, which are the balls of l∞ alone. Received: "
            f"norm={norm!r}. Certify with norm='linf'."
        )
    if len(network.graph.inputs) != 1:
        raise ValueError(
            "A property is about a model with one input. Received: "
            f"{len(network.graph.inputs)} inputs."
        )
    x = np.asarray(x).astype(network.graph.inputs[0].dtype)
    shape = tuple(network.model.inputs[0].shape[1:])
    if x.shape[1:] != shape or not len(x) or not np.all(np.isfinite(np.float64(x))):
        raise ValueError(
            f"`x` must be finite numbers of shape (n, *{shape}). Received: shape {x.shape}."
        )
    labels = np.asarray(labels)
    try:
        radii = np.broadcast_to(np.asarray(radius, np.float64), (len(x),))
    except ValueError:
        radii = np.zeros(0)
    if labels.shape != (len(x),) or radii.shape != (len(x),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"There must be a whole label and a radius for each of {len(x)} inputs. Received: "
            f"labels of shape {labels.shape} and type {labels.dtype}, radii of shape "
            f"{np.shape(radius)}."
        )
    if not np.all(np.isfinite(radii)) or np.any(radii < 0):
        raise ValueError(f"`radius` must be finite numbers ≥ 0. Received: {radius!r}.")
    return x, labels, radii


def _check_outputs(network, labels, outputs):
    allowed = (None, "sigmoid") if outputs == 1 else _MONOTONE
    if network.decision not in allowed:
        raise ValueError(
            "A claim about classes is stated of logits, or behind a softmax or sigmoid. Received: "
            f"a model that ends in {network.decision}. Leave that out."
        )
    if np.any(labels < 0) or np.any(labels >= max(outputs, 2)):
        raise ValueError(
            f"Labels must be classes of a model with {outputs} outputs. Received: "
            f"{int(labels.min())} to {int(labels.max())}."
        )


def _limits(bounds, shape):
    low, high = (np.broadcast_to(np.asarray(v, np.float64), shape) for v in bounds)
    if np.any(np.isnan(low)) or np.any(np.isnan(high)) or np.any(low > high):
        raise ValueError(
            f"`bounds` must be a pair (low, high) with low ≤ high. Received: {bounds!r}."
        )
    return low, high
