"""Composition of node gains into a Lipschitz bound, and of rounding errors into an allowance."""

import dataclasses
import json
import math

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.restoring import leaves_unchanged
from tf_lyapunov.program.validation import validate_on_probes
from tf_lyapunov.progress import reports_progress, stage

# The recursions below take a few float64 operations per node; far fewer than 10¹¹ in all.
_RECURSION_SLACK = 1 + 1e-5


@dataclasses.dataclass(frozen=True)
class Contribution:
    """One layer's part in a gain bound.

    Attributes:
        name: of the layer, with the path of nested models.
        kind: `"linear"`, `"activation"`, `"pooling"`, …
        gain_upper_bound: float, upper bound on the layer's own l2 gain.
        lipschitz_upper_bound: float, bound on the gain from the model's input to this layer's
            output.
        method: how the gain was found.
        assumption: what the user declared by `register_gain`, or None.
        inputs: names of the contributions that it reads.
    """

    name: str
    kind: str
    gain_upper_bound: float
    lipschitz_upper_bound: float
    method: str
    assumption: str | None = None
    inputs: tuple = ()


@dataclasses.dataclass(frozen=True)
class GainBound:
    """An upper bound on a model's l2 gain, with every layer's contribution.

    Attributes:
        gain_upper_bound: float; ‖f(u) - f(v)‖ ≤ gain·‖u - v‖ for all inputs u, v.
        contributions: tuple of `Contribution`, in the order of the graph.
        assumptions: tuple of sentences under which the bound holds.
        model_digest: SHA-256 of the model's layers and weights.
    """

    gain_upper_bound: float
    contributions: tuple
    assumptions: tuple
    model_digest: str

    def explain(self):
        """Plain-text table of every layer's contribution, and the assumptions."""
        title = f"No change of the input is amplified by more than {self.gain_upper_bound:.6g} (l2)"
        return "\n".join([title, "", *table(self.contributions), "", *numbered(self.assumptions)])

    def __str__(self):
        return self.explain()

    def to_json(self):
        """JSON text with all fields."""
        return json.dumps(encode(dataclasses.asdict(self)), allow_nan=False)


@reports_progress
@leaves_unchanged
def lipschitz_upper_bound(model, *, outputs="logits", input_shapes=None, progress=None):
    """Upper bound on the l2 Lipschitz constant of a Keras model at inference.

    Over the graph, L(input) = 1 and, for a layer of gain g that reads the nodes k,

        L = g·L_k,   L = Σ w_k L_k (Add, Subtract),   L = √Σ L_k² (Concatenate, Maximum, Minimum),

    so that a residual block x + f(x) has 1 + L_f. Sufficient, and valid for all inputs; not the
    smallest such constant. With several inputs the distance is that of their concatenation.

    Args:
        model: a built Keras model of supported layers (see `read_network`).
        outputs: `"logits"` stops before a final softmax or sigmoid, `"model"` includes it.
        input_shapes: list of shapes with the batch axis, to fix sizes that the model leaves open.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook.

    Returns:
        `GainBound`.

    Raises:
        UnsupportedLayerError: naming a layer without a proven gain.
        UnfaithfulReading: naming the first step at which the model contradicts its reading.
        ValueError: if the model is not built, or `outputs` is unknown.

    Example:

    >>> import keras
    >>> dense = keras.layers.Dense(1, kernel_initializer="ones")
    >>> model = keras.Sequential([keras.Input((4,)), dense])
    >>> round(lipschitz_upper_bound(model).gain_upper_bound, 9)
    2.0

    Reference: composition rules, sound form (theory of the product bound: Szegedy et al., 2014).
    """
    if outputs not in ("logits", "model"):
        raise ValueError(f"`outputs` must be 'logits' or 'model'. Received: outputs={outputs!r}.")
    network = read_network(model, input_shapes)
    name = network.logits if outputs == "logits" else network.output
    with stage("comparing the model with its reading"):
        validation = validate_on_probes(network)
    constants = lipschitz_constants(network)
    return GainBound(
        constants[name],
        contributions(network, constants, name),
        (*model_assumptions(network), validation.sentence()),
        network.digest(),
    )


def lipschitz_constants(network, source=None):
    """Upper bound on the gain from the model's input to every node, by name, rounded up.

    With the name of a `source`, the gain from that node's output, all other inputs held fixed.
    """
    constants = {}
    for node in network.nodes:
        if node.name == source or node.kind == "input":
            constants[node.name] = 1.0 if source in (None, node.name) else 0.0
            continue
        read = [
            rounding.product_up(w, constants[name])
            for w, name in zip(node.weights, node.inputs, strict=True)
        ]
        combine = (
            rounding.root_sum_squares_up if node.rule == "root_sum_squares" else (rounding.sum_up)
        )
        constants[node.name] = rounding.product_up(node.gain_upper_bound, combine(*read))
    return constants


def contributions(network, constants, output):
    """`Contribution` of every node that `output` depends on, except the inputs."""
    needed = {output}
    for node in reversed(network.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return tuple(
        Contribution(
            node.name,
            node.kind,
            node.gain_upper_bound,
            constants[node.name],
            node.method,
            node.assumption,
            tuple(node.inputs),
        )
        for node in network.nodes
        if node.name in needed and node.kind != "input"
    )


def model_assumptions(network):
    """Sentences under which the gain bound of a network holds."""
    sentences = [
        "The model is the exact real-valued function of its settings and of its stored weights, "
        "cast as layers cast them at inference (no dropout or noise, moving statistics in batch "
        "normalization).",
        "Changes of the input are measured in the l2 norm of the tensor that the model receives, "
        "over all of real space.",
    ]
    if network.graph.traced:
        sentences.append(
            "A subclassed model computes what its `call` did in one symbolic run with "
            "training=False."
        )
    declared = dict.fromkeys(n.assumption for n in network.nodes if n.assumption)
    return sentences + [f"Declared by the user, not checked: {text}" for text in declared]


def rounding_errors(network, input_norms, name, precision="model"):
    """Bounds on ‖computed - exact‖ of node `name`, per input, by recursion over the graph.

    With N the norm of the exact signal and E the error of the computed one, and slope, constant
    of `Affine` for the operation's own rounding,

        E = L-rule(E of the inputs) + slope·Σ w_k(N_k + E_k) + constant,
        N = L-rule(N of the inputs) + ‖f(0)‖.

    Valid for any order of summation: each layer's rounding is bounded by γ_K·‖|W|‖·‖u‖.

    Args:
        network: `Network` with known sizes.
        input_norms: float64 (n,), l2 norms of the inputs.
        name: node name.
        precision: `"model"`, or `"float64"` for an evaluation of the same weights in float64.

    Returns:
        float64 (n,); infinite where a layer has no rounding model or a sum is too long.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.5.
    """
    norms, errors = {}, {}
    input_norms = np.asarray(input_norms, dtype=np.float64)
    formats = _formats(network, precision)
    for node in network.nodes:
        if node.kind == "input":
            norms[node.name], errors[node.name] = input_norms, np.zeros_like(input_norms)
            continue
        weighted_norms = [w * norms[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        weighted_errors = [w * errors[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        reading = sum(weighted_norms) + sum(weighted_errors)
        gain = node.gain_upper_bound
        affine = node.affine64 if precision == "float64" else node.affine
        own = _times(affine.slope, reading) + affine.constant
        own = own + _lost(network, node, formats, gain * reading + affine.offset)
        errors[node.name] = _times(gain, _combine(node.rule, weighted_errors)) + own
        norms[node.name] = _times(gain, _combine(node.rule, weighted_norms)) + affine.offset
        if node.name == name:
            break
    return errors[name] * _RECURSION_SLACK


def stays_finite(network, input_norms, name):
    """Whether no value on the way to node `name` can overflow in the model's own formats.

    Every entry and every partial sum is bounded by the gains, ‖f(u)‖ ≤ gain·‖u‖ + ‖f(0)‖, and a
    factor of 2 is left for rounding.

    Args:
        network: `Network` with known sizes.
        input_norms: float64 (n,), bounds on the l2 norms of the inputs.
        name: node name.

    Returns:
        bool (n,).
    """
    norms, fits = {}, np.ones(np.shape(input_norms), dtype=bool)
    formats = {t.producer: t.dtype for t in network.graph.inputs} | _formats(network, "model")
    for node in network.nodes:
        if node.kind == "input":
            norms[node.name] = np.asarray(input_norms, dtype=np.float64)
            continue
        weighted = [w * norms[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        reading = sum(weighted)
        size = _times(node.gain_upper_bound, reading) + node.affine.offset
        form = formats.get(node.call)
        largest = rounding.LARGEST.get(form, math.inf)
        if any(formats.get(network[k].call) != form for k in node.inputs):
            fits &= reading <= largest  # what is cast to this format
        # The only function here that squares its input.
        squared = size * size if node.method.startswith("squareplus") else size
        fits &= np.maximum(size, squared) <= largest / 2
        norms[node.name] = (
            _times(node.gain_upper_bound, _combine(node.rule, weighted)) + node.affine.offset
        )
        if node.name == name:
            break
    return fits


def _formats(network, precision):
    """dtype that every node is computed in, by its call."""
    if precision == "float64":
        return {call.name: "float64" for call in network.graph.calls}
    return {
        call.name: getattr(call.operation, "compute_dtype", None) or call.outputs[0].dtype
        for call in network.graph.calls
    }


def _lost(network, node, formats, size):
    """What underflow may add to a node's error; infinite where it may overflow.

    Every product loses at most `underflow`·(1 + |w| + |x|): no entry of a map exceeds its gain, no
    partial sum of a row exceeds the gain times the norm of the signal.
    """
    dtype = formats.get(node.call)
    if dtype not in rounding.UNIT_ROUNDOFF:
        return np.zeros_like(size)
    reads = sum(_entries(network[name].output_shape) for name in node.inputs)
    if node.kind != "linear":
        reads = 4
    writes = math.sqrt(_entries(node.output_shape) * node.copies)
    each = rounding.underflow(dtype) * (reads + 4)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = each * writes * (1 + node.gain_upper_bound + size)
        lost = np.where(np.isnan(lost), np.inf, lost)
    return np.where(size <= rounding.LARGEST[dtype], lost, np.inf)


def _entries(shape):
    return math.prod(math.inf if n is None else n for n in shape[1:])


def _combine(rule, terms):
    if rule == "root_sum_squares" and len(terms) > 1:
        # Scaled, so that no square over- or underflows.
        largest = np.max(terms, axis=0)
        safe = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        return np.sqrt(sum((t / safe) ** 2 for t in terms)) * safe
    return sum(terms)


def _times(factor, values):
    """factor·values with 0·∞ = 0."""
    return np.zeros_like(values) if factor == 0 else factor * values


# Text and JSON ----------------------------------------------------------------------------------


def table(rows):
    """Lines of a plain-text table of contributions."""
    header = ("layer", "kind", "gain ≤", "from the input ≤", "how")
    cells = [header] + [
        (
            c.name,
            c.kind,
            f"{c.gain_upper_bound:.6g}",
            f"{c.lipschitz_upper_bound:.6g}",
            c.method + (" [declared]" if c.assumption else ""),
        )
        for c in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = []
    for row in cells:
        left = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        right = [row[2].rjust(widths[2]), row[3].rjust(widths[3])]
        lines.append("  ".join([*left, *right, row[4]]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def numbered(sentences, title="This holds under these assumptions:"):
    """Lines of a numbered list."""
    return [title] + [f"  {i}. {text}" for i, text in enumerate(sentences, 1)]


def encode(value):
    """JSON-safe copy: arrays become lists, infinities and NaN become strings."""
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, np.ndarray):
        return encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
