"""Radii from slopes on the ball around each input: units that cannot switch there are linear."""

import contextlib
import dataclasses

import numpy as np

from tf_lyapunov.bounds.chains import gram_factor
from tf_lyapunov.bounds.dissipativity import chain_from_input
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.findings import Finding, every
from tf_lyapunov.program import rounding

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Relative to the product of Frobenius norms: covers γ of sums of up to 10⁴ terms in every layer.
_SLACK = 1e-11
_BISECTIONS = 16


class LocalGains:
    """Gains of differences of logits on l2 balls, for a dense chain of piecewise linear functions.

    On ‖u - x‖ ≤ r unit i of layer l has its input in z_i ± r·g_i, hence slopes in [α_i, β_i] ⊂
    [α, β]. With m = (α_i+β_i)/2 and s = (β_i-α_i)/2,

        v_l = A_l u + Σ_j B_lj s_j ψ_j(v_j),   A_l = W_l m_{l-1}W_{l-1} … W_1,
        B_lj = W_l m_{l-1} … m_{j+1}W_{j+1},   ψ_j of slope at most one,

    whose rows and norms bound every g and the gain of w·v_n, w a difference of logits.

    Args:
        network: `Network` whose logits depend on its input through dense layers (or small
            convolutions), flattening and activations alone.

    Raises:
        UnsupportedLayerError: if it is not such a chain, or its first activation is not ReLU or
            leaky ReLU.
    """

    def __init__(self, network):
        chain = chain_from_input(network, "method='local' needs")
        if chain.depth < 2 or chain.biases is None or chain.slopes[0] is None:
            raise UnsupportedLayerError(
                "method='local' needs hidden layers with ReLU or leaky ReLU, without folded batch "
                f"normalizations. Received: layer {chain.names[0]!r} without them after it. Use "
                "method='auto'."
            )
        self.chain = chain
        weights = list(chain.weights)
        if weights[0].shape[1] > weights[0].shape[0]:
            # Any R with RRᵀ ⪰ W_1W_1ᵀ gives the same or larger norms of aᵀW_1.
            with contextlib.suppress(np.linalg.LinAlgError):
                weights[0] = gram_factor(weights[0], chain.errors[0])
        self.reduced = weights
        sizes = [float(np.linalg.norm(w)) for w in weights]
        slopes = [1.0, *(s.magnitude for s in chain.sectors)]
        self.slack = _SLACK * np.cumprod(np.array(sizes) * np.array(slopes))

    def centers(self, x):
        """Inputs z_l of the activations at x with bounds on their rounding; stops where unknown."""
        signal = np.asarray(x, dtype=np.float64).reshape(-1)
        error = np.zeros_like(signal)
        found = []
        chain = self.chain
        for weight, bias, slopes in zip(
            chain.weights[:-1], chain.biases, chain.slopes, strict=False
        ):
            if slopes is None:
                break
            size = np.abs(weight)
            z = weight @ signal + bias
            error = size @ error + rounding.gamma(weight.shape[1] + 4, UNIT) * (
                size @ (np.abs(signal) + error) + np.abs(bias)
            )
            error = error * (1 + 1e-9)
            found.append((z, error))
            low, high = slopes(z, z)
            value = np.where(z > 0, high, low) * z
            below, above = slopes(z - error, z + error)
            steepest = np.maximum(np.abs(below), np.abs(above))
            error = steepest * error * (1 + 1e-9) + 2 * UNIT * np.abs(value)
            signal = value
        return found

    def pair_gains(self, centers, radius, differences):
        """Upper bounds on the gains of `differences @ logits` on the ball, (pairs,).

        Args:
            centers: from `centers`.
            radius: r.
            differences: float64 (pairs, logits).
        """
        weights = self.reduced
        products = []  # [B_l0 … ] of the layer at hand, B_l,-1 = A_l first
        gains, spreads, masses = [], [], []
        for layer, weight in enumerate(weights):
            is_last = layer == len(weights) - 1
            rows = differences @ weight if is_last else weight
            through = [rows]
            for index in range(layer - 1, -1, -1):
                mean = products[index]
                through.append((through[-1] * mean) @ weights[index])
            through.reverse()  # through[0] = A, through[j+1] reads layer j's activation
            slack = self.slack[layer] * (2.0 if is_last else 1.0)
            own = np.sqrt(np.einsum("ij,ij->i", through[0], through[0])) + slack
            for j in range(layer):
                block = through[j + 1] * spreads[j]
                by_unit = np.abs(block) @ gains[j]
                by_norm = np.sqrt(np.einsum("ij,ij->i", block, block)) * masses[j]
                own = own + np.minimum(by_unit, by_norm) + slack
            own = own * (1 + 1e-9)
            if is_last:
                return own
            low, high = self._slopes(layer, centers, own, radius)
            mean, spread = (low + high) / 2, (high - low) / 2 * (1 + 4 * UNIT)
            products.append(mean)
            spreads.append(spread)
            gains.append(own)
            masses.append(self._mass(through, spreads, masses, own, spread, slack))
        raise RuntimeError("a chain ends with a linear layer")

    def _slopes(self, layer, centers, gains, radius):
        sector = self.chain.sectors[layer]
        if layer >= len(centers):
            size = len(gains)
            return np.full(size, sector.alpha), np.full(size, sector.beta)
        z, error = centers[layer]
        reach = (radius * gains + error) * (1 + 1e-9)
        low, high = rounding.down(z - reach), rounding.up(z + reach)
        return self.chain.slopes[layer](low, high)

    @staticmethod
    def _mass(through, spreads, masses, gains, spread, slack):
        """Gain of the inputs of those units that may switch."""
        unstable = spread > 0
        if not np.any(unstable):
            return 0.0
        by_units = float(np.linalg.norm(gains[unstable]))
        total = _norm(through[0][unstable]) + slack
        for j in range(len(masses)):
            total += _norm(through[j + 1][unstable] * spreads[j]) * masses[j] + slack
        return min(by_units, total) * (1 + 1e-9)


def _norm(matrix):
    return float(np.linalg.norm(matrix, 2)) * (1 + 1e-9)


def local_radii(gains, x, logits, labels, errors, radius, *, jobs=1, kept=None):
    """Radii on which no class overtakes the label, by gains on the ball itself, rounded down.

    r is certified if (f_c - f_j)(x) > r·(gain of f_c - f_j on ‖u - x‖ ≤ r) for all j. The largest
    such r is bracketed by bisection, from the global radius on.

    Args:
        gains: `LocalGains`.
        x: inputs (n, …) as the model receives them.
        logits: float64 (n, K) as computed.
        labels: int64 (n,).
        errors: float64 (n,), bounds on the l2 error of the computed logits.
        radius: float64 (n,), radii already proved.
        jobs, kept: see `findings.every`.

    Returns:
        float64 (n,), at least `radius`.
    """
    proved = np.array(radius, dtype=np.float64)

    def task(i):
        return x[i], logits[i], int(labels[i]), float(errors[i]), float(radius[i])

    found = every(Slopes(gains), task, radius, "slopes around inputs", jobs=jobs, kept=kept)
    for i, finding in found:
        proved[i] = max(proved[i], finding.radius)
    return proved


@dataclasses.dataclass(frozen=True, eq=False)
class Slopes:
    """The search around one input.

    Attributes:
        gains: `LocalGains`.
    """

    gains: LocalGains

    def __call__(self, task):
        """`Finding` of `(x, logits, label, error, radius)`."""
        x, logits, label, error, proved = task
        if len(logits) == 1:
            sign = 1.0 if label == 1 else -1.0
            differences, gaps = np.array([[sign]]), sign * logits
            wins = (logits[0] > 0) == (label == 1)
            lower = rounding.down(gaps - error) if wins else np.array([-1.0])
        else:
            others = np.delete(np.arange(len(logits)), label)
            differences = -np.eye(len(logits))[others]
            differences[:, label] = 1.0
            gaps = rounding.down(logits[label] - logits[others])
            lower = rounding.down(gaps - rounding.up(np.sqrt(2.0) * error * (1 + 1e-15)))
        if np.min(lower) <= 0 or not np.isfinite(proved):
            return Finding(proved, proved)
        centers = self.gains.centers(x)

        def reach(r):
            """Largest radius that the gains on the ball of radius r allow."""
            found = self.gains.pair_gains(centers, r, differences)
            with np.errstate(divide="ignore"):
                return float(np.min(np.where(found > 0, lower / found, np.inf))) * (1 - 1e-12)

        low, high = proved, reach(0.0)
        if not np.isfinite(high):
            high = max(2 * low, 1.0)
        for _ in range(_BISECTIONS):
            if high <= low * (1 + 1e-6):
                break
            middle = (low + high) / 2
            allowed = reach(middle)
            if allowed > middle:
                low = middle
            else:
                high = middle
        return Finding(proved, max(proved, low))
