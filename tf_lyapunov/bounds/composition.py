"""Composition of node gains into a Lipschitz bound, and of rounding errors into an allowance."""

import dataclasses
import hashlib
import math

import numpy as np

from tf_lyapunov.bounds.chains import norm_up
from tf_lyapunov.digits import at_most
from tf_lyapunov.program import rounding
from tf_lyapunov.showing import Table

UNIT = rounding.UNIT_ROUNDOFF["float64"]

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


def lipschitz_constants(network, source=None):
    """Upper bound on the gain from the model's input to every node, by name, rounded up.

    With ℓ_i the gain from input i alone, the others held fixed, and L that from all together,

        L ≤ √Σ ℓ_i²,        L ≤ ‖M‖₂ for a concatenation, M_ki = ℓ_i of the k-th part,

    besides the composition rules: disjoint signals of norms d_i reach no more than ‖M d‖. A dense
    layer is bounded by the columns of those entries that may change.

    Args:
        network: `Network`.
        source: names of the nodes whose outputs change, all other inputs held fixed (a name or a
            tuple); None for all inputs.

    Returns:
        Dict from names to floats.
    """
    if source is None:
        source = network.inputs
    sources = (source,) if isinstance(source, str) else tuple(source)
    alone = [_composed(network, (one,)) for one in sources] if len(sources) > 1 else []
    return _composed(network, sources, alone)


def _composed(network, sources, alone=()):
    """Constants of `sources` together, given those of each of them alone."""
    constants = {}
    for node in network.nodes:
        if node.name in sources or node.kind == "input":
            constants[node.name] = 1.0 if node.name in sources else 0.0
            continue
        read = [
            rounding.product_up(w, constants[name])
            for w, name in zip(node.weights, node.inputs, strict=True)
        ]
        if node.rule == "root_sum_squares":
            reach = rounding.root_sum_squares_up(*read)
            if alone:
                parts = list(zip(node.weights, node.inputs, strict=True))
                table = [[rounding.product_up(w, each[k]) for each in alone] for w, k in parts]
                reach = min(reach, _table_norm(table))
        else:
            reach = rounding.sum_up(*read)
        gain = node.gain_upper_bound
        if reach > 0 and node.matrix is not None and math.isfinite(gain):
            gain = min(gain, _gain_of_moving(network, node, constants, sources))
        constants[node.name] = rounding.product_up(gain, reach)
        if alone:
            apart = rounding.root_sum_squares_up(*(each[node.name] for each in alone))
            constants[node.name] = min(constants[node.name], apart)
    return constants


def _table_norm(table):
    """Upper bound on the norm of a small matrix of numbers ≥ 0, by Schur's test."""
    rows = max(rounding.sum_up(*row) for row in table)
    columns = max(rounding.sum_up(*column) for column in zip(*table, strict=True))
    product = rounding.product_up(rows, columns)
    return rows if rows == columns else rounding.sqrt_up(product)


def moving_entries(network, name, constants, sources):
    """Which features of a node can change, bool (features,), or None where all may.

    Features are held fixed where they come, through concatenations along the last axis and through
    functions that act entry by entry, from nodes that no source reaches.

    Args:
        network: `Network`.
        name: of the node.
        constants: of `lipschitz_constants`; what has gain 0 does not change.
        sources: names of the nodes that change, whatever they read.
    """
    node = network[name]
    size = node.output_shape[-1]
    if size is None or name in sources:
        return None
    if constants[name] == 0:
        return np.zeros(size, bool)
    kind = type(node.layer).__name__
    by_entry = node.kind in ("identity", "batch normalization") or node.sector is not None
    if by_entry and len(node.inputs) == 1:
        if network[node.inputs[0]].output_shape == node.output_shape:
            return moving_entries(network, node.inputs[0], constants, sources)
    rank = len(node.output_shape)
    joins = node.kind == "merge" and kind == "Concatenate" and node.rule == "root_sum_squares"
    if joins and node.layer.axis % rank == rank - 1:
        parts = [moving_entries(network, k, constants, sources) for k in node.inputs]
        sizes = [network[k].output_shape[-1] for k in node.inputs]
        parts = [np.ones(n, bool) if p is None else p for p, n in zip(parts, sizes, strict=True)]
        found = np.concatenate(parts)
        return found if len(found) == size and not np.all(found) else None
    return None


def _gain_of_moving(network, node, constants, sources):
    """Gain of a dense layer on those entries of its input that may change."""
    entries = moving_entries(network, node.inputs[0], constants, sources)
    if entries is None or len(entries) != len(node.matrix):
        return math.inf
    return norm_of_rows(node, entries)


def norm_of_rows(node, entries):
    """Upper bound on the norm of a node's matrix restricted to some of its inputs."""
    rows = node.matrix[entries]
    if not rows.size or not np.any(rows):
        return 0.0
    bound = norm_up(rows)
    if node.batch_norms:
        # Three roundings per folded entry, as for the whole matrix.
        bound = rounding.sum_up(bound, 4 * UNIT * float(np.linalg.norm(rows)) * (1 + 1e-9))
    return bound


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


def claim_digest(network, chosen):
    """Digest of what a claim is about: the network, and which inputs may change if not all.

    Args:
        network: `Network`.
        chosen: bool per input.
    """
    digest = network.digest()
    if all(chosen):
        return digest
    text = f"{digest} perturbed {[i for i, moves in enumerate(chosen) if moves]}"
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def model_assumptions(network, perturbed=None):
    """Sentences under which the gain bound of a network holds.

    Args:
        network: `Network`.
        perturbed: names of the inputs that change, or None for all.
    """
    what = "the tensor that the model receives"
    if perturbed is not None:
        names = ", ".join(map(repr, perturbed))
        plural = "inputs" if len(perturbed) > 1 else "input"
        what = f"the {plural} {names} as the model receives it, the other inputs held fixed"
        what = what.replace(" it,", " them together,") if len(perturbed) > 1 else what
    elif len(network.inputs) > 1:
        what = f"the concatenation of all {len(network.inputs)} inputs as the model receives them"
    sentences = [
        "The model is the exact real-valued function of its settings and of its stored weights, "
        "cast as layers cast them at inference (no dropout or noise, moving statistics in batch "
        "normalization).",
        f"Changes of the input are measured in the l2 norm of {what}, over all of real space.",
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
        input_norms: float64 (n,), l2 norms of the inputs; a dict with those of every input, by
            the names of their nodes, where there are several.
        name: node name.
        precision: `"model"`, or `"float64"` for an evaluation of the same weights in float64.

    Returns:
        float64 (n,); infinite where a layer has no rounding model or a sum is too long.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.5.
    """
    return _errors(network, input_norms, name, precision, rounding.underflow)


def underflow_errors(network, input_norms, name):
    """Upper bounds on ‖f̂(u) - f(u)‖ where f̂ is f but for numbers that a device sets to zero.

    As `rounding_errors`, of flushed operands and results in the model's own formats alone: in
    ordinary networks far below any rounding, yet all that counts where small and large numbers
    meet in a product.

    Args:
        network, input_norms, name: as for `rounding_errors`.

    Returns:
        float64 (n,).
    """
    return _errors(network, input_norms, name, None, rounding.flushed)


@dataclasses.dataclass(frozen=True, eq=False)
class Allowance:
    """Bounds on the error of the computed logits of everything near given inputs.

    Attributes:
        network: `Network`, or its `Bare`, which other processes can read.
        logits: name of the node.
        norms: dict from input nodes to float64 (n,), the inputs' own l2 norms.
        sources: names of the input nodes that move.
        precision: see `rounding_errors`.
    """

    network: object
    logits: str
    norms: dict
    sources: tuple
    precision: str

    def __call__(self, i, extra):
        """For input i and everything within the l2 distance `extra`, a float."""
        return float(self.of(slice(i, i + 1), extra)[0])

    def of(self, rows, extra):
        """The same for several inputs, float64."""
        reached = {
            k: v[rows] + (extra if k in self.sources else 0.0) for k, v in self.norms.items()
        }
        own = rounding_errors(self.network, reached, self.logits, self.precision)
        return own + underflow_errors(self.network, reached, self.logits)


def _errors(network, input_norms, name, precision, underflow):
    """Errors of node `name`; `precision` is None for those of underflow alone."""
    norms, errors = {}, {}
    if not isinstance(input_norms, dict):
        input_norms = dict.fromkeys(network.inputs, input_norms)
    formats = _formats(network, precision)
    for node in network.nodes:
        if node.kind == "input":
            norms[node.name] = np.asarray(input_norms[node.name], dtype=np.float64)
            errors[node.name] = np.zeros_like(norms[node.name])
            continue
        weighted_norms = [w * norms[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        weighted_errors = [w * errors[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        reading = sum(weighted_norms) + sum(weighted_errors)
        gain = node.gain_upper_bound
        affine = node.affine64 if precision == "float64" else node.affine
        size = _times(gain, reading) + affine.offset
        own = _lost(network, node, formats, reading, size, underflow)
        if precision is not None:
            own = own + _times(affine.slope, reading) + affine.constant
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
        input_norms: float64 (n,), bounds on the l2 norms of the inputs; a dict with those of every
            input, by the names of their nodes, where there are several.
        name: node name.

    Returns:
        bool (n,).
    """
    if not isinstance(input_norms, dict):
        input_norms = dict.fromkeys(network.inputs, input_norms)
    norms = {}
    fits = np.ones(np.shape(input_norms[network.inputs[0]]), dtype=bool)
    formats = {t.producer: t.dtype for t in network.graph.inputs} | _formats(network, "model")
    for node in network.nodes:
        if node.kind == "input":
            norms[node.name] = np.asarray(input_norms[node.name], dtype=np.float64)
            continue
        weighted = [w * norms[k] for w, k in zip(node.weights, node.inputs, strict=True)]
        reading = sum(weighted)
        size = _times(node.gain_upper_bound, reading) + node.affine.offset
        form = formats.get(node.call)
        largest = rounding.LARGEST.get(form, math.inf)
        if any(formats.get(network[k].call) != form for k in node.inputs):
            fits &= reading <= largest  # what is cast to this format
        fits &= size <= largest / 2
        if node.peak.wide and form in ("float16", "bfloat16"):
            largest = rounding.LARGEST["float32"]
        fits &= node.peak.of(reading) <= largest / 2
        norms[node.name] = (
            _times(node.gain_upper_bound, _combine(node.rule, weighted)) + node.affine.offset
        )
        if node.name == name:
            break
    return fits


def _formats(network, precision):
    """dtype that every node is computed in, by its call."""
    dtypes = network.dtypes
    return dict.fromkeys(dtypes, "float64") if precision == "float64" else dtypes


def _lost(network, node, formats, reading, size, underflow):
    """What underflow may add to a node's error; infinite where it may overflow.

    Every product loses at most `underflow`·(1 + |w| + |x|), as a device may flush each operand: no
    entry of a map exceeds its gain, none of the signal its norm `reading`; no partial sum of a row
    exceeds the gain times that norm, which is within `size`. Squares under a root or in a divisor
    lose what `Gain.flushed` says.
    """
    dtype = formats.get(node.call)
    if dtype not in rounding.UNIT_ROUNDOFF:
        return np.zeros_like(size)
    reads = sum(_entries(network[name].output_shape) for name in node.inputs)
    if node.kind != "linear":
        reads = 4
    writes = math.sqrt(_entries(node.output_shape) * node.copies)
    each = underflow(dtype) * (reads + 4)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = each * writes * (1 + node.gain_upper_bound + reading + size)
        if node.gain_upper_bound == 0:
            lost = each * writes * (1 + size)  # products with zeros lose nothing
        lost = lost + _times(node.flushed[0], reading) + node.flushed[1]
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
            at_most(c.gain_upper_bound, 6),
            at_most(c.lipschitz_upper_bound, 6),
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


def layer_table(rows):
    """`showing.Table` of contributions."""
    cells = [
        (
            c.name,
            c.kind,
            f"≤ {at_most(c.gain_upper_bound, 4)}",
            f"≤ {at_most(c.lipschitz_upper_bound, 4)}",
        )
        for c in rows
    ]
    return Table(("layer", "kind", "gain", "from the input"), cells)


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
