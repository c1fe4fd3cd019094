"""LipLT for layers too large to be written out: products as operators, bounded by their short side.

For layers a … b of a chain and the mean slopes m between them,

    P = W_b m_{b-1} W_{b-1} … m_a W_a

is applied to the unit vectors of its shorter side, its input or, by adjoints, its output, where
that has a few thousand entries; ‖P‖ then comes from the eigenvalues of a Gram matrix of that side,
with the rounding of all products: an application of W to s rows errs, in the Frobenius norm, by

    γ_t·‖|W|‖·‖P‖_F,   ‖|W|‖² ≤ (largest row sum)·(largest column sum)   (Schur).

Where both sides are large, ‖P‖ ≤ ‖W_b … W_{c+1}‖·|m_c|·‖W_c … W_a‖ for the best c, down to the
norms of single layers. As in `liplt`,

    k_b = ‖W_b m … W_1‖ + Σ_{a ≤ b} ‖W_b m … W_a‖·r_{a-1}·k_{a-1},

never above the product of norms. Power iteration enters nowhere.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.bounds.chains import norm_up
from tf_lyapunov.bounds.tails import followed, run_before
from tf_lyapunov.program import rounding
from tf_lyapunov.theory.operators import convolution_taps
from tf_lyapunov.theory.sectors import Sector

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Longest short side, and entries of a product that are held at once.
_SIDE, _HELD = 4096, 2**25
# Absolute loss by underflow, of products of layers divided by powers of two near their norms.
_TINY = 1e-250
# Products of sparse matrices are slower than those of full ones by this factor.
_SPARSE = 40.0


def applied(node, rows):
    """W x for samples x.

    Args:
        node: `tails.LinearNode`.
        rows: float64 (n, inputs).

    Returns:
        float64 (n, outputs).
    """
    if not _by_taps(node):
        return np.ascontiguousarray((node.matrix @ rows.T).T)
    found = _convolved(node, rows, forwards=True)
    return found if node.scale is None else found * node.scale


def adjoint(node, rows):
    """Wᵀc for rows c, float64 (n, outputs), as (n, inputs)."""
    if not _by_taps(node):
        return np.ascontiguousarray((node.matrix.T @ rows.T).T)
    return _convolved(node, rows if node.scale is None else rows * node.scale, forwards=False)


def _by_taps(node):
    known = node.linear_map is not None and node.linear_map.kind in ("conv", "conv_transpose")
    return known and node.linear_map.groups == 1


def _convolved(node, rows, forwards):
    """One product of matrices per tap of the kernel."""
    linear_map, kernel = node.linear_map, node.kernel
    turned = linear_map.kind == "conv_transpose"
    inputs, outputs = linear_map.input_shape, linear_map.output_shape(kernel.shape)
    reads, writes = (inputs, outputs) if forwards else (outputs, inputs)
    x = rows.reshape(len(rows), *reads)
    y = np.zeros((len(rows), *writes))
    for tap, narrow, wide in convolution_taps(kernel.shape, linear_map):
        # A transposed convolution writes the wide grid, and its kernel is (…, outputs, inputs).
        to_narrow = forwards != turned
        source, target = (wide, narrow) if to_narrow else (narrow, wide)
        y[target] += x[source] @ (kernel[tap] if to_narrow else kernel[tap].T)
    return y.reshape(len(rows), -1)


def absolute_norm(node):
    """Upper bound on the norm of |W|, entries as large as they may be, by Schur's test."""
    if node.kernel is not None and _by_taps(node):
        size = np.abs(node.kernel).sum(axis=tuple(range(node.kernel.ndim - 2)))
        largest = 1.0 if node.scale is None else float(np.max(np.abs(node.scale)))
        rows, columns = size.sum(axis=0).max() * largest, size.sum(axis=1).max() * largest
    else:
        size = abs(node.matrix)
        rows, columns = np.max(size.sum(axis=1)), np.max(size.sum(axis=0))
    return math.sqrt(float(rows) * float(columns)) * (1 + node.spread) * (1 + 1e-6)


def _terms(node):
    """Products per entry of an application, at most."""
    if node.kernel is not None and _by_taps(node):
        return math.prod(node.kernel.shape[:-2]) * max(node.kernel.shape[-2:]) + 2
    return max(node.shape)


def flops(node):
    """Flops of one application to one sample, at the rate of products of full matrices."""
    if node.kernel is not None and _by_taps(node):
        grids = node.linear_map.input_shape[:-1], node.linear_map.output_shape(node.kernel.shape)
        return 4.0 * min(math.prod(grids[0]), math.prod(grids[1][:-1])) * node.kernel.size
    if isinstance(node.matrix, np.ndarray):
        return 2.0 * node.matrix.size
    return 2.0 * _SPARSE * node.matrix.nnz


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorChain:
    """Linear nodes with elementwise functions between them, nothing written out.

    Attributes:
        nodes: `tails.LinearNode` of every layer, from the input on.
        norms: bound on the norm of each.
        sectors: between them, and of the functions after the last, or None.
        start: name of the node that the chain reads.
        names: per layer, the nodes that hold its output, or that of the function after it.
    """

    nodes: tuple
    norms: tuple
    sectors: tuple
    start: str
    names: tuple

    @classmethod
    def before(cls, reader, name):
        """The longest one that ends at a node, or None.

        Args:
            reader: `tails.Reader`.
            name: of the node.
        """
        run = run_before(reader, name, materialised=False)
        nodes, norms, sectors, names, pending = [], [], [], [], None
        for node in run:
            if node.kind == "activation":
                pending, _ = followed(pending, node)
                names[-1].append((node.name, pending))
            elif reader.is_linear(node):
                if nodes:
                    sectors.append(pending or Sector.linear())
                nodes.append(reader.linear(node))
                norms.append(node.gain_upper_bound)
                names.append([(node.name, None)])
                pending = None
            else:
                names[-1].append((node.name, pending))
        if not nodes:
            return None
        sectors.append(pending)
        return cls(tuple(nodes), tuple(norms), tuple(sectors), run[0].inputs[0], tuple(names))


class OperatorProducts:
    """The bounds above for a chain.

    Args:
        chain: `OperatorChain`.
        budget: `Budget`; products that do not fit it are bounded by those of their parts.

    Attributes:
        gains: k of every layer's output.
        norms: dict (a, b) -> bound on ‖W_b m … W_a‖.
        parts: `(a, product, error, exponent)` of those that end at the outputs, or None where they
            were not formed.
    """

    def __init__(self, chain, budget):
        self.chain, self.count = chain, len(chain.nodes)
        self.norms = {(k, k): norm for k, norm in enumerate(chain.norms)}
        self.parts, self.gains = None, []
        self._absolute = [absolute_norm(node) for node in chain.nodes]
        self._form(budget)
        self._combine()

    def gain(self):
        """Bound on the gain of the whole chain, the function at its end included."""
        sector = self.chain.sectors[-1]
        slope = 1.0 if sector is None else sector.magnitude
        return rounding.product_up(self.gains[-1], slope)

    def reach(self):
        """Bound on the gain from the chain's input to every node in it, by name."""
        found = {}
        for gain, held in zip(self.gains, self.chain.names, strict=True):
            for name, sector in held:
                slope = 1.0 if sector is None else sector.magnitude
                found[name] = rounding.product_up(gain, slope)
        return found

    def pair_gains(self):
        """Bounds for the differences of outputs, float64 (K, K), or None."""
        if self.parts is None or self.chain.sectors[-1] is not None:
            return None
        count = self.chain.nodes[-1].shape[0]
        found = np.zeros((count, count))
        for i in range(count):
            for k in range(i):
                terms = []
                for first, rows, error, exponent in self.parts:
                    size = rounding.euclidean_norms_up((rows[i] - rows[k])[None])[0]
                    own = rounding.sum_up(float(size) * (1 + 4 * UNIT), 1.5 * error)
                    factor = self._before(first)
                    terms.append(rounding.product_up(rounding.ldexp_up(own, exponent), factor))
                found[i, k] = found[k, i] = rounding.sum_up(*terms, *self._rest())
        return found

    def _before(self, first):
        """r·k of the signal before layer `first`."""
        if first == 0:
            return 1.0
        sector = self.chain.sectors[first - 1]
        radius = float(rounding.up((sector.beta - sector.alpha) / 2))
        return rounding.product_up(radius, self.gains[first - 1])

    def _rest(self):
        """Terms of the products that end at the outputs and were not formed: none, if all were."""
        formed = {first for first, *_ in self.parts}
        last = self.count - 1
        lowest = min(formed)
        if lowest == 0 or self._mean(lowest - 1) == 0.0:
            return ()
        return tuple(
            rounding.product_up(math.sqrt(2.0) * (1 + 4 * UNIT), self.norms[first, last],
                                self._before(first))
            for first in range(lowest)
        )  # fmt: skip

    def _mean(self, k):
        return self.chain.sectors[k].m

    def _form(self, budget):
        """Norms of the products that have a short side, the cheapest sweep first."""
        sweeps = []
        for k, node in enumerate(self.chain.nodes):
            for forwards in (False, True):
                sweep = _Sweep(self, k, forwards)
                if node.shape[1 if forwards else 0] <= _SIDE:
                    sweeps.append((sweep.flops(), k, sweep))
        last = self.count - 1
        sweeps.sort(key=lambda s: (s[1] != last or s[2].forwards, *s[:2]))
        for cost, _, sweep in sweeps:
            if budget.fits(cost):
                for pair, norm in sweep.norms().items():
                    self.norms[pair] = min(norm, self.norms.get(pair, math.inf))
                if sweep.ends_at_outputs and sweep.is_whole:
                    self.parts = sweep.kept

    def _combine(self):
        """Norms of products that were not formed, and k of every layer."""
        for length in range(1, self.count):
            for first in range(self.count - length):
                last = first + length
                best = self.norms.get((first, last), math.inf)
                for cut in range(first, last):
                    mean = abs(self._mean(cut)) * (1 + 4 * UNIT)
                    split = rounding.product_up(
                        self.norms[first, cut], mean, self.norms[cut + 1, last]
                    )
                    best = min(best, split)
                self.norms[first, last] = best
        for last in range(self.count):
            terms = [
                rounding.product_up(self.norms[first, last], self._before(first))
                for first in range(last + 1)
            ]
            gain = rounding.sum_up(*terms)
            if last:
                slope = self.chain.sectors[last - 1].magnitude
                gain = min(gain, rounding.product_up(self.gains[-1], slope, self.chain.norms[last]))
            self.gains.append(gain)


class _Sweep:
    """All products that begin at a layer (forwards), or end at one, from its short side.

    Rows are unit vectors, all of them or, where products would be too large, so many at a time.
    Then the product itself is not kept, but its Gram matrix, row by row: PᵀP e_i, there and back.
    """

    def __init__(self, products, start, forwards):
        chain = products.chain
        self.nodes, self.sizes, self.forwards = chain.nodes, products._absolute, forwards
        self.start, self.sectors = start, chain.sectors
        self.order = range(start, len(self.nodes)) if forwards else range(start, -1, -1)
        self.side = self.nodes[start].shape[1 if forwards else 0]
        self.widths = [self.nodes[k].shape[0 if forwards else 1] for k in self.order]
        # Products of moderate size: a power of two per layer is exact.
        self.powers = [math.frexp(chain.norms[k])[1] if chain.norms[k] > 0 else 0
                       for k in self.order]  # fmt: skip
        self.rows = max(min(_HELD // max(self.widths), self.side), 1)
        self.ends_at_outputs = not forwards and start == len(self.nodes) - 1
        self.kept = []

    @property
    def is_whole(self):
        """Whether all unit vectors are taken at once."""
        return self.rows == self.side

    def flops(self):
        """Flops of the sweep, roughly."""
        total, there = 0.0, 0.0
        for k, width in zip(self.order, self.widths, strict=True):
            own = flops(self.nodes[k])
            there += own
            if self._fits(width):
                total += self.side * own + 2.0 * self.side * min(self.side, width) * width
                total += 15.0 * min(self.side, width) ** 3
            else:
                total += self.side * (own + there) + 15.0 * self.side**3
        return total

    def _fits(self, width):
        return self.side * width <= _HELD

    def norms(self):
        """Dict (a, b) -> bound on ‖W_b m … W_a‖."""
        shapes = [(self.side, w if self._fits(w) else self.side) for w in self.widths]
        levels, squares = [None] * len(self.order), [0.0] * len(self.order)
        for begin in range(0, self.side, self.rows):
            block = slice(begin, min(begin + self.rows, self.side))
            rows = np.zeros((block.stop - begin, self.side))
            rows[np.arange(len(rows)), np.arange(begin, block.stop)] = 1.0
            error = 0.0
            for level in range(len(self.order)):
                rows, error = self._step(level, rows, error, self.forwards)
                found, own = rows, error
                if not self._fits(self.widths[level]):
                    for back in range(level, -1, -1):
                        if back < level:
                            found, own = self._mean(back, found, own)
                        found, own = self._step(back, found, own, not self.forwards)
                if levels[level] is None:
                    levels[level] = np.empty(shapes[level]) if not self.is_whole else found
                if not self.is_whole:
                    levels[level][block] = found
                squares[level] = rounding.sum_up(squares[level], rounding.product_up(own, own))
                if level + 1 == len(self.order) or self._slope(level) == 0.0:
                    break
                rows, error = self._mean(level, rows, error)
        return dict(self._levels(levels, squares))

    def _levels(self, levels, squares):
        exponent = 0
        for level, (matrix, square) in enumerate(zip(levels, squares, strict=True)):
            if matrix is None:
                return
            exponent += self.powers[level]
            error, k = rounding.sqrt_up(square), self.order[level]
            if not (np.all(np.isfinite(matrix)) and math.isfinite(error)):
                return
            if self._fits(self.widths[level]):
                norm = rounding.sum_up(norm_up(matrix), error)
                self.kept.append((k, matrix, error, exponent))
            else:
                values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
                largest = max(abs(float(values[0])), abs(float(values[-1])))
                largest *= 1 + 16 * len(matrix) * UNIT
                norm = rounding.sqrt_up(rounding.sum_up(largest, error))
            pair = (self.start, k) if self.forwards else (k, self.start)
            yield pair, rounding.ldexp_up(norm, exponent)

    def _slope(self, level):
        """Mean slope between the layers of a level and of the next one."""
        border = self.order[level] if self.forwards else self.order[level] - 1
        return self.sectors[border].m

    def _mean(self, level, rows, error):
        mean = self._slope(level)
        rows = mean * rows
        return rows, abs(mean) * error + 2 * UNIT * float(np.linalg.norm(rows)) * (1 + 1e-9)

    def _step(self, level, rows, error, forwards):
        """Rows through the layer of a level, and a bound on their error in the Frobenius norm."""
        k = self.order[level]
        node, size = self.nodes[k], float(np.linalg.norm(rows)) * (1 + 1e-9)
        rows = applied(node, rows) if forwards else adjoint(node, rows)
        own = rounding.gamma(_terms(node) + 4, UNIT) + node.spread
        error = (error + own * (size + error)) * self.sizes[k] * (1 + 1e-9) + _TINY
        power = self.powers[level]
        return np.ldexp(rows, -power), math.ldexp(error, -power)
