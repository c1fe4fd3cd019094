"""How far apart two logits can move: through the dense layers that make them."""

import numpy as np

from tf_lyapunov.bounds.composition import lipschitz_constants, moving_entries
from tf_lyapunov.program import rounding

# Float64 entries held at once in blocks of features × classes.
_BLOCK = 2**22
_SQRT2_UP = float(rounding.up(np.sqrt(2.0)))


def heads(network, constants, sources=None):
    """Ways in which dense layers bound differences of logits, for `pair_distances`.

    The logits are Σ_t W_t h_t + b over the parts of a concatenation or the terms of a sum. With
    w_t the difference of two columns and ℓ_ti the gain from input i alone to h_t, a change of norms
    d_i moves the difference of logits by at most

        Σ_i d_i Σ_t ℓ_ti ‖w_t‖  ≤  ‖d‖·√(Σ_i (Σ_t ℓ_ti ‖w_t‖)²).

    Args:
        network: `Network`.
        constants: `lipschitz_constants(network, sources)`.
        sources: names of the inputs that change, None for all.

    Returns:
        Tuple of ways, each a tuple of terms `(ℓ_t, W_t, u_t)`: gains float64 (sources,), or (1,) of
        all together; float64 (features, classes); relative error of an entry. Empty if the logits
        are no such sum.
    """
    node = _behind_identities(network, network[network.logits])
    sources = network.inputs if sources is None else sources
    found = []
    if node.matrix is not None and len(node.output_shape) == 2:
        entries = moving_entries(network, node.inputs[0], constants, sources)
        matrix = node.matrix if entries is None else node.matrix[entries]
        found.append(((np.array([constants[node.inputs[0]]]), matrix, _entry_error(node)),))
    alone = [constants]
    if len(sources) > 1:
        alone = [lipschitz_constants(network, one) for one in sources]
    terms = _terms(network, node, alone) if len(network.inputs) > 1 else []
    if len(terms) > 1:
        found.append(tuple(terms))
    return tuple(found)


def _terms(network, node, alone):
    """Terms `(ℓ_t, W_t)` of a sum of dense layers, () where it is none."""
    node = _behind_identities(network, node)
    if node.matrix is not None and len(node.output_shape) == 2:
        return _parts(network, network[node.inputs[0]], node.matrix, _entry_error(node), alone)
    kind = type(node.layer).__name__
    adds = node.kind == "merge" and kind in ("Add", "Subtract") and node.rule == "sum"
    if not adds or set(node.weights) != {1.0}:
        return []
    found = [_terms(network, network[name], alone) for name in node.inputs]
    return [term for terms in found for term in terms] if all(found) else []


def _parts(network, read, matrix, error, alone):
    """Terms of one dense layer: one for each part of the concatenation that it reads."""
    read = _behind_identities(network, read)
    rank, kind = len(read.output_shape), type(read.layer).__name__
    joins = read.kind == "merge" and kind == "Concatenate" and read.rule == "root_sum_squares"
    if joins and rank == 2 and read.layer.axis % rank == 1:
        sizes = [network[name].output_shape[-1] for name in read.inputs]
        if None not in sizes and sum(sizes) == len(matrix):
            blocks = np.split(matrix, np.cumsum(sizes)[:-1])
            return [
                term
                for name, block in zip(read.inputs, blocks, strict=True)
                for term in _parts(network, network[name], block, error, alone)
            ]
    return [(np.array([each[read.name] for each in alone]), matrix, error)]


def _entry_error(node):
    """A folded batch normalization rounds every entry three times."""
    return 4 * rounding.UNIT_ROUNDOFF["float64"] if node.batch_norms else 0.0


def _behind_identities(network, node):
    while node.kind == "identity":
        node = network[node.inputs[0]]
    return node


def pair_distances(label, classes, gain, head):
    """Bounds on the gain of f_label - f_j, for every j; of f_0 itself for one class.

    Args:
        label: class number.
        classes: number of logits.
        gain: upper bound on the gain of all logits.
        head: ways as `heads` gives them, or None.

    Returns:
        float64 (classes,).
    """
    own = gain if classes == 1 else rounding.product_up(_SQRT2_UP, gain)
    distances = np.full(classes, own)
    for terms in head or ():
        sizes = [_column_distances(label, *of) for _, *of in terms]
        total = np.zeros(classes)
        if all(len(gains) == 1 for gains, *_ in terms):
            for (gains, *_), norms in zip(terms, sizes, strict=True):
                total = _sum_up(total, _times_up(gains[0], norms))
        else:
            reach = []
            for i in range(len(terms[0][0])):
                one = np.zeros(classes)
                for (gains, *_), norms in zip(terms, sizes, strict=True):
                    one = _sum_up(one, _times_up(gains[i], norms))
                reach.append(one)
            total = rounding.euclidean_norms_up(np.stack(reach, axis=1))
        distances = np.minimum(distances, np.where(np.isnan(total), np.inf, total))
    return distances


def _column_distances(label, matrix, error):
    """Upper bounds on ‖w_label - w_j‖ for every column j, or on ‖w_0‖ of the only one."""
    columns = matrix.T
    if len(columns) == 1:
        return rounding.euclidean_norms_up(columns) * (1 + 2 * error)
    found = np.empty(len(columns))
    step = max(_BLOCK // max(matrix.shape[0], 1), 1)
    for start in range(0, len(columns), step):
        block = columns[start : start + step]
        # One more rounding, of the difference, than in the norm itself.
        norms = rounding.euclidean_norms_up(columns[label] - block) * (1 + 2.0**-51)
        found[start : start + step] = norms
    if error:
        sizes = rounding.euclidean_norms_up(columns)
        found = np.where(sizes + sizes[label] > 0, rounding.up(
            found + error * (sizes + sizes[label]) * (1 + 1e-9)), 0.0)  # fmt: skip
    return found


def _times_up(gain, norms):
    with np.errstate(invalid="ignore"):  # 0·∞ counts as 0
        return np.where((norms == 0) | (gain == 0), 0.0, rounding.up(gain * norms))


def _sum_up(first, second):
    return np.where(first == 0, second, np.where(second == 0, first, rounding.up(first + second)))
