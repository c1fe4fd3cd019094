"""The joint problem (`joint`) of the last part of a network in which branches meet."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.bounds.composition import lipschitz_constants
from tf_lyapunov.bounds.joint import FormBuilder, JointForm, bounded, narrow_start
from tf_lyapunov.bounds.tails import keeps_order
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.merging import Joined, Weighted
from tf_lyapunov.program.vocabulary import operations_of
from tf_lyapunov.progress import steps
from tf_lyapunov.verification.inequalities import Multipliers

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Entries of all signals together: proofs take their cube.
LARGEST_SIGNALS = 2500


@dataclasses.dataclass(frozen=True, eq=False)
class JointPart:
    """The part of a network that is bounded as one problem.

    Attributes:
        start: name of the node that it reads.
        before: name of the node that its last linear layer reads.
        form: scaled `JointForm` whose outputs are that node.
        weight, spread: of the last layer, (outputs, entries of that node), and its entries' error.
        merges: number of sums and concatenations in it.
    """

    start: str
    before: str
    form: JointForm
    weight: np.ndarray
    spread: object
    merges: int


def joint_part(reader, end):
    """The longest `JointPart` that ends at a node; None if no branches meet in it.

    It begins at a node through which everything after it passes, and reads dense layers, small
    convolutions, pools and what moves entries, elementwise functions, weighted sums and
    concatenations.

    Args:
        reader: `tails.Reader`.
        end: name of the node that makes the logits.
    """
    last = reader.nodes[end]
    while last.kind == "identity" or keeps_order(last):
        last = reader.nodes[last.inputs[0]]
    if not reader.is_linear(last) or reader.linear(last) is None:
        return None
    for start in reader.network.nodes:
        inside = _between(reader, start.name, last.name)
        if inside is None:
            continue
        merges = sum(len(node.inputs) > 1 for node in inside)
        if merges and _signals(inside, start) <= LARGEST_SIGNALS:
            return _read(reader, start, inside, last, merges)
    return None


def _between(reader, start, end):
    """Nodes after `start` that `end` depends on, in order; None if one is not read."""
    found, stack = set(), [end]
    while stack:
        name = stack.pop()
        if name == start or name in found:
            continue
        node = reader.nodes[name]
        if node.kind == "input" or not (reader.is_readable(node) or _merging(reader, node)):
            return None
        found.add(name)
        stack.extend(node.inputs)
    if start in found or start == end:
        return None
    return [node for node in reader.network.nodes if node.name in found]


def _merging(reader, node):
    """`Weighted` or `Joined` of a node that merges signals without broadcasting, or None."""
    if len(node.inputs) < 2 or node.kind != "merge":
        return None
    call = reader.calls.get(node.call)
    shapes = [reader.nodes[name].output_shape for name in node.inputs]
    if call is None or any(None in s[1:] for s in shapes):
        return None
    try:
        operations = operations_of(call)
    except UnsupportedLayerError:
        return None
    if len(operations) != 1 or tuple(t.producer for t in call.inputs) != tuple(
        reader.nodes[name].call for name in node.inputs
    ):
        return None
    (operation,) = operations
    if isinstance(operation, Weighted):
        return operation if len(set(shapes)) == 1 and shapes[0] == node.output_shape else None
    return operation if isinstance(operation, Joined) else None


def _signals(inside, start):
    sizes = [math.prod(n.output_shape[1:]) for n in inside if n.kind == "activation"]
    first = start.output_shape[1:]
    if None in first:
        return math.inf
    # A wide start is as narrow as the one linear layer that reads it.
    readers = [n for n in inside if start.name in n.inputs]
    entries = math.prod(first)
    if len(readers) == 1 and readers[0].kind != "activation" and len(readers[0].inputs) == 1:
        entries = min(entries, math.prod(readers[0].output_shape[1:]))
    return sum(sizes) + entries


def _read(reader, start, inside, last, merges):
    """`JointPart`, or None where a matrix is beyond float64."""
    readers = [node for node in inside if start.name in node.inputs]
    stem, size, forms = None, math.prod(start.output_shape[1:]), {}
    if len(readers) == 1 and reader.is_linear(readers[0]) and readers[0] is not last:
        (stem,) = readers
        weight, spread = narrow_start(*_weight(reader, stem))
        builder = FormBuilder(weight.shape[1])
        forms[stem.name] = builder.times(weight, spread, builder.signal(0))
    else:
        builder = FormBuilder(size)
        forms[start.name] = builder.signal(0)
    for node in inside:
        if node is stem or node is last:
            continue
        read = [forms[name] for name in node.inputs]
        if node.kind == "activation":
            forms[node.name] = builder.activated(read[0], node.sector, node.name)
        elif len(read) > 1:
            forms[node.name] = _merged(reader, node, read, builder)
        elif node.kind == "identity" or keeps_order(node):
            forms[node.name] = read[0]
        else:
            forms[node.name] = builder.times(*_weight(reader, node), read[0])
    form = builder.finish(forms[last.inputs[0]])
    if not all(np.all(np.isfinite(m)) for m in (form.weights, form.outputs, form.weight_errors)):
        return None
    return JointPart(
        start.name, last.inputs[0], form.scaled(), *_weight(reader, last), merges
    )  # fmt: skip


def _weight(reader, node):
    """`(W, entrywise error)` of a linear node."""
    found = reader.linear(node)
    return found.dense, found.spread * np.abs(found.dense) if found.spread else 0.0


def _merged(reader, node, read, builder):
    operation = _merging(reader, node)
    if isinstance(operation, Weighted):
        parts = [
            form if abs(w) == 1 else builder.times_number(abs(w), form)
            for w, form in zip(operation.weights, read, strict=True)
        ]
        return builder.total(parts, [math.copysign(1.0, w) for w in operation.weights])
    shapes = [reader.nodes[name].output_shape[1:] for name in node.inputs]
    ends = np.cumsum([0, *map(math.prod, shapes)])
    places = [
        np.arange(a, b).reshape(shape)
        for a, b, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
    ]
    axis = operation.axis % (len(shapes[0]) + 1) - 1
    return builder.stacked(read, np.concatenate(places, axis=axis).ravel())


@dataclasses.dataclass(frozen=True, eq=False)
class JointGains:
    """Gains of a `JointPart`, from its start to the outputs.

    Attributes:
        gain_upper_bound: float, of all outputs; infinite if nothing was proved.
        pairs: float64 (K, K) of their differences, infinite where nothing was proved, or None.
        searched: pairs (i, j), i > j, that had a search of their own.
        multipliers: `records.Multipliers` of all outputs, or None.
        pair_multipliers: dict (i, j), i > j -> those of a difference.
    """

    gain_upper_bound: float
    pairs: np.ndarray | None
    searched: tuple = ()
    multipliers: Multipliers | None = None
    pair_multipliers: dict = dataclasses.field(default_factory=dict)


def joint_gains(part, network, budget, *, with_pairs=True):
    """`JointGains` of a part of a network.

    As for chains (`pairs`), the multipliers of all outputs leave a matrix V with ‖Vh‖ ≤ √ρ‖z_0‖ for
    the signal h that the last layer reads, proved once, which bounds every row of that layer;
    while the time lasts, pairs then get multipliers of their own.

    Args:
        part: `JointPart`.
        network: `Network` of which it is a part.
        budget: `Budget`.
        with_pairs: whether differences of outputs are bounded, too.
    """
    if not budget.fits(60.0 * part.form.total**3):
        return JointGains(math.inf, None)
    power = _power_of(part.weight)
    weight, spread = np.ldexp(part.weight, -power), np.ldexp(part.spread, -power)
    form = dataclasses.replace(part.form, exponent=part.form.exponent + power)
    whole = bounded(_ended(form, weight, spread), budget=budget.part(0.5))
    kept = _kept(whole)
    if not with_pairs or len(weight) < 2:
        return JointGains(whole.gain_upper_bound, None, multipliers=kept)
    count = len(weight)
    found, pairs = np.where(np.eye(count, dtype=bool), 0.0, math.inf), {}
    if math.isfinite(whole.squared) and whole.multipliers and budget.fits(40.0 * form.total**3):
        reach = lipschitz_constants(network, (part.start,))[part.before]
        found, pairs = _shared(form, weight, spread, whole, reach, part.form.exponent)
    searched, lasted = [], 0.0
    order = sorted(zip(*np.tril_indices(count, -1), strict=True), key=lambda p: -found[p])
    for i, j in steps(order, "pairs of classes"):
        begin = budget.left()
        if begin <= lasted or not budget.fits(60.0 * form.total**3):
            break
        row = weight[i : i + 1] - weight[j : j + 1]
        drift = _difference_error(weight, spread, [i], [j])
        alone = bounded(_ended(form, row, drift), budget=budget)
        lasted = max(lasted, begin - budget.left())
        if alone.gain_upper_bound < found[i, j]:
            found[i, j] = found[j, i] = alone.gain_upper_bound
            pairs[int(i), int(j)] = _kept(alone)
        searched.append((int(i), int(j)))
    pairs = {pair: own for pair, own in pairs.items() if own is not None}
    return JointGains(whole.gain_upper_bound, found, tuple(searched), kept, pairs)


def _kept(bound):
    """`Multipliers` of a `JointBound`, or None without."""
    if not 0 < bound.squared < math.inf or len(bound.multipliers) != len(bound.form.alphas):
        return None
    return bound.form.unscaled(bound.squared, bound.multipliers)


def _power_of(matrix):
    largest = float(np.max(np.abs(matrix), initial=0.0))
    return 0 if largest == 0 else round(math.log2(largest))


def _ended(form, weight, spread):
    """The form followed by a linear layer."""
    size = np.abs(weight)
    errors = rounding.gamma(weight.shape[1] + 4, UNIT) * (size @ np.abs(form.outputs))
    errors = errors + size @ form.output_errors
    if np.ndim(spread):
        errors = errors + spread @ (np.abs(form.outputs) + form.output_errors)
    return form.with_outputs(weight @ form.outputs, errors * (1 + 1e-9))


def _difference_error(weight, spread, left, right):
    """Entrywise error of differences of rows."""
    rows = np.abs(weight[left] - weight[right])
    spread = np.broadcast_to(spread, weight.shape)
    return (spread[left] + spread[right] + 2 * UNIT * rows) * (1 + 4 * UNIT)


def _shared(form, weight, spread, whole, reach, exponent):
    """Gains of differences of outputs by the multipliers of all of them, (K, K), and these."""
    from scipy.linalg import solve_triangular

    count = len(weight)
    found = np.where(np.eye(count, dtype=bool), 0.0, math.inf)
    empty = form.with_outputs(np.zeros((1, form.total)), np.zeros((1, form.total)))
    matrix = empty.matrix(whole.squared * (1 + 1e-9), whole.multipliers)
    try:
        factor = np.linalg.cholesky(matrix)
        left = solve_triangular(factor, form.outputs.T, lower=True, check_finite=False)
        lower = np.linalg.cholesky(left.T @ left)
        root = solve_triangular(lower, np.eye(len(lower)), lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        return found, {}
    multipliers = [lam / whole.squared for lam in whole.multipliers]
    root = root / math.sqrt(whole.squared)
    proof = bounded(_ended(form, root, 0.0), multipliers=multipliers)
    if not math.isfinite(proof.squared):
        return found, {}
    first, second = np.tril_indices(count, -1)
    rows = weight[first] - weight[second]
    drift = _difference_error(weight, spread, first, second)
    z = np.linalg.solve(root.T, rows.T).T
    rest = np.abs(rows - z @ root)
    rest += rounding.gamma(len(root) + 4, UNIT) * (np.abs(z) @ np.abs(root) + np.abs(rows))
    off = rounding.euclidean_norms_up(rest * (1 + 1e-9) + drift)
    size = rounding.euclidean_norms_up(z) * (1 + 4 * UNIT)
    # `reach` is in the units of the network, the form's outputs in those of 2^exponent.
    reach = rounding.ldexp_up(reach, -exponent)
    pairs = {}
    for i, j, own, rest in zip(first.tolist(), second.tolist(), size, off, strict=True):
        through = rounding.product_up(own, rounding.sqrt_up(proof.squared))
        total = rounding.sum_up(through, rounding.product_up(rest, reach))
        found[i, j] = found[j, i] = rounding.ldexp_up(total, form.exponent)
        # ‖z‖² times them: VᵀV is at least zzᵀ/‖z‖² there.
        share = float(own) ** 2 * (1 + 8 * UNIT)
        squared = rounding.product_up(total, total)
        pairs[i, j] = form.unscaled(squared, [share * lam for lam in proof.multipliers])
    return found, pairs
