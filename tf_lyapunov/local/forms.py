"""Balls of hidden steps as quadratic forms of the input, and one problem for all of them.

(L) of `relaxation` pays λρ²/2 for every step with a ball, and the pass r‖g‖ for the input: the sum
of maxima that no single d = x - x⁰ attains. Here both are one problem. For the weights w of a step,
with (t) of `localgains`, z - z⁰ = Jd + Σ_j J_jψ_j and T ≥ Σ_j τ_j the sum there, τ_0 = ‖w^½J‖r and
τ_j = ‖w^½J_j s_j^½‖t_j,

    Σ w_i (z_i - z⁰_i)²  ≤  q_w(d) = (T/τ_0)‖w^½Jd‖² + Σ_j (Tτ_j/t_j²) q_{s_j}(d) + constant

by Cauchy's inequality, as ‖w^½J_jψ_j‖² ≤ (τ_j/t_j)²·Σ s_j(z_j - z_j⁰)² and the shares τ_j/T add up
to 1 at most; what values are off by is a constant of its own. With Q = Σ_k λ_k∇²q_k/2 over all
steps, the bound of a pass has, in place of r‖g‖ + Σλ_kρ_k²/2, the constants and, for any μ > q̄,
q̄ ≥ ‖Q‖, any y and s = g - (μ - Q)y,

    max_{‖d‖≤r} -gᵀd + dᵀQd/2  ≤  ½[gᵀy + yᵀs + ‖s‖²/(μ - q̄) + μr²].                            (Q)

Proof. For ‖d‖ ≤ r it is at most max_d -gᵀd - dᵀ(μ-Q)d/2 + μr²/2 = ½[gᵀ(μ-Q)⁻¹g + μr²], μ - Q being
definite, and gᵀ(μ-Q)⁻¹g = gᵀy + yᵀs + sᵀ(μ-Q)⁻¹s. With y = g/(μ - q̄) and ‖Q‖ for Q it is the sum of
maxima again. y is from a few Lanczos steps; only (Q) counts.

Rounding. Q is applied by passes forwards and backwards of the linearised flow, which err by at most
γ·Σ(sizes)²‖y‖, as `localgains` has sizes.
"""

import copy
import dataclasses

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.around import UNIT, Around
from tf_lyapunov.local.maxima import WindowMaximum
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.scaling import Scaled

# μ that are compared, between these multiples of q̄ beyond it.
_TRIED, _NEAR, _FAR = 40, 1e-3, 20.0
_UP = 1 + 1e-12
_TINY = 1e-30


class Forms:
    """q of every step with a ball, of one `Around` whose gains are known.

    Args:
        around: `Around` from `boxes.surround`, over an l2 ball.

    Attributes:
        steps: positions of the steps whose balls are forms here.
    """

    def __init__(self, around):
        self.around, gains = around, around.gains
        self.own, self.spreads, self.steps = {}, {}, []
        for k, (weights, term) in gains.weighed.items():
            # Others have a ball too, but do not pay λρ²/2 for it.
            if not isinstance(around.steps.get(k), (Elementwise, WindowMaximum)):
                continue
            self.own[k] = weights, term
            self.steps.append(k)
        self.steps.sort()
        # Steps behind what is no linear map or slope have balls of their own.
        self.bare = {}
        last = max((self._source(k) for k in self.steps), default=0)
        for k in range(1, last + 1):
            self.bare[k] = self._linearised(k)
        if any(b is None for b in self.bare.values()):
            self.steps = []
        self.last = last

    @staticmethod
    def apply_to(around):
        """Whether there is anything to gain: an l2 ball alone, and gains of hidden steps."""
        region = around.region
        alone = np.isfinite(region.radius) and not region.is_cut
        return bool(alone and around.gains is not None and around.gains.weighed)

    def _source(self, k):
        return self.around.flow.links[k - 1].inputs[0]

    def _linearised(self, k):
        """An operation without offset, slopes, or None."""
        around, gains = self.around, self.around.gains
        operation = around.flow.links[k - 1].operation
        if k in gains.middles:
            middle = gains.middles[k]
            return middle.astype(around.dtype) if isinstance(middle, np.ndarray) else None
        if not around._linear(around.flow.links[k - 1]):
            return None
        if maps.offset(operation) is None:
            return operation
        if isinstance(operation, Linear):
            return dataclasses.replace(operation, bias=None)
        if isinstance(operation, Scaled):
            return dataclasses.replace(operation, shift=np.zeros_like(operation.shift))
        return None

    def coefficients(self, lam):
        """What all q together are made of, for λ of every step, float64 (rows,) each.

        Returns:
            `(weights, constant, most, sizes)`: dict from positions to weights (rows, units) there,
            and (rows,) each: the constants, q̄, and bounds on what rounding is relative to.
        """
        gains = self.around.gains
        rows = len(next(iter(lam.values())))
        found, constant, most, sizes = {}, np.zeros(rows), np.zeros(rows), np.zeros(rows)
        share = {}

        def add(k, weights, term, factor):
            nonlocal constant, most, sizes
            total, off, parts = term
            constant = constant + factor * total * off
            for j, norm, size, signal in parts:
                tau = norm * signal
                if tau <= 0:
                    continue
                if j == 0:
                    own = factor * (total / tau) * _UP
                    source = self._source(k)
                    part = own[:, None] * weights[None]
                    found[source] = found[source] + part if source in found else part
                    most = most + own * norm**2
                    sizes = sizes + own * size**2
                elif gains.spread.get(j) is None:
                    constant = constant + factor * total * tau
                else:
                    share[j] = share.get(j, 0.0) + factor * (total * norm / signal) * _UP

        for k in self.steps:
            add(k, *self.own[k], lam[k])
        for j in sorted(gains.spread, reverse=True):
            if j in share:
                add(j, *gains.spread[j], share[j])
        return found, constant, most * (1 + 1e-9), sizes

    def costs(self, y):
        """Per step, derivative by λ of the constants, of yᵀQy and of q̄: lists of (rows,) each."""
        passed, gains = self._forward(y), self.around.gains
        known = {}

        def of(k, weights, term):
            total, off, parts = term
            z = passed[self._source(k)].reshape(len(y), -1)
            constant, form, most = total * off, 0.0, 0.0
            for j, norm, _, signal in parts:
                tau = norm * signal
                if tau <= 0:
                    continue
                if j == 0:
                    form = form + (total / tau) * ((z * z) @ weights.astype(z.dtype))
                    most += (total / tau) * norm**2
                elif gains.spread.get(j) is None:
                    constant += total * tau
                else:
                    if j not in known:
                        known[j] = of(j, *gains.spread[j])
                    factor = total * norm / signal
                    constant += factor * known[j][0]
                    form, most = form + factor * known[j][1], most + factor * known[j][2]
            return constant, form, most

        return {k: of(k, *self.own[k]) for k in self.steps}

    def _forward(self, y):
        around = self.around
        held = {0: y.reshape(-1, *around.trace.shape(0))}
        for k in range(1, self.last + 1):
            link, bare = around.flow.links[k - 1], self.bare[k]
            if isinstance(bare, np.ndarray):
                z = held[link.inputs[0]]
                held[k] = z * bare.reshape(z.shape[1:])
            else:
                held[k] = maps.applied(bare, [held[i] for i in link.inputs])
        return held

    def apply(self, weights, y):
        """Qy, (rows, inputs)."""
        around, passed, held = self.around, self._forward(y), {}
        for k in range(self.last, 0, -1):
            if k in weights:
                z = passed[k]
                own = z * weights[k].reshape(-1, *z.shape[1:]).astype(z.dtype, copy=False)
                held[k] = held[k] + own if k in held else own
            if k not in held:
                continue
            c, link, bare = held.pop(k), around.flow.links[k - 1], self.bare[k]
            if isinstance(bare, np.ndarray):
                found = [c * bare.reshape(c.shape[1:])]
            else:
                found = maps.adjoint(bare, c, around._shapes(link))
            for i, part in zip(link.inputs, found, strict=True):
                held[i] = held[i] + part if i in held else part
        found = held.get(0)
        if 0 in weights:
            z = passed[0]
            own = z * weights[0].reshape(-1, *z.shape[1:]).astype(z.dtype, copy=False)
            found = own if found is None else found + own
        return np.zeros_like(y) if found is None else found.reshape(len(y), -1)

    def solve(self, g, lam, steps, is_proof):
        """`(value, y, active)` of (Q) with the constants: (rows,), (rows, inputs), and whether
        μ is held by q̄.

        Args:
            g: (rows, inputs).
            lam: dict from `steps` to λ, float64 (rows,).
            steps: of Lanczos.
            is_proof: whether the value counts, with all rounding.
        """
        weights, constant, most, sizes = self.coefficients(lam)
        radius = self.around.region.radius
        norm = np.linalg.norm(g, axis=1)
        basis, alphas, betas = self._lanczos(weights, g, norm, steps)
        count = len(basis)
        matrix = np.zeros((len(g), count, count))
        index = np.arange(count)
        matrix[:, index, index] = np.stack(alphas, axis=1)
        matrix[:, index[1:], index[:-1]] = matrix[:, index[:-1], index[1:]] = (
            np.stack(betas[:-1], axis=1) if count > 1 else 0.0
        )
        theta, vectors = np.linalg.eigh(matrix)
        level = np.maximum(most, np.maximum(theta[:, -1], 0.0)) + _TINY
        plain = norm / radius + _TINY
        # Multiples of q̄ beyond it, and what is best where Q is nothing.
        beyond = np.geomspace(_NEAR, _FAR, _TRIED)[None] * level[:, None]
        beyond = np.concatenate([beyond, np.geomspace(0.1, 1, 8)[None] * plain[:, None]], axis=1)
        away = level[:, None] + beyond
        first = vectors[:, 0, :]
        inverse = 1 / (away[:, :, None] - theta[:, None, :])
        inner = np.einsum("rt,rmt->rm", first**2, inverse) * (norm**2)[:, None]
        end = np.einsum("rt,rt,rmt->rm", vectors[:, -1, :], first, inverse) * norm[:, None]
        rest = (betas[-1][:, None] * end) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):  # of no use, and proves nothing
            value = 0.5 * (inner + rest / (away - most[:, None]) + away * radius**2)
        best = np.argmin(value, axis=1)
        rows = np.arange(len(g))
        mu, inverse = away[rows, best], inverse[rows, best]
        share = np.einsum("rst,rt,rt->rs", vectors, inverse, first) * norm[:, None]
        y = np.einsum("rs,srn->rn", share.astype(g.dtype), np.stack(basis))
        active = beyond[rows, best] < 0.5 * level
        if not is_proof:
            return value[rows, best] + constant / 2, y, active
        s = g - mu[:, None] * y + self.apply(weights, y)
        length = rounding.euclidean_norms_up(y)
        off = 8 * rounding.gamma(2 * self.around.sum_length, UNIT) * sizes * length
        off = off + 1e-15 * (norm + mu * length) + 1e-290
        rest = rounding.euclidean_norms_up(s) + off
        gap = mu * (1 - 1e-12) - most
        first, second = np.einsum("ij,ij->i", g, y), np.einsum("ij,ij->i", y, s)
        room = rounding.gamma(g.shape[1] + 64, UNIT) * length * (norm + rest)
        value = 0.5 * (first + second + rest**2 / gap + mu * radius**2 + constant)
        value = value + room + length * off + 1e-12 * (mu * radius**2 + constant + rest**2 / gap)
        return np.where(gap > 0, value, np.inf), y, active

    def _lanczos(self, weights, g, norm, steps):
        """`(basis, diagonal, off-diagonal)` of Q from g; the last entry leads out of the space."""
        basis = [g / np.maximum(norm, _TINY)[:, None].astype(g.dtype)]
        alphas, betas = [], []
        for i in range(steps):
            image = self.apply(weights, basis[i])
            alphas.append(np.einsum("ij,ij->i", image, basis[i]).astype(np.float64))
            for _ in range(2):
                for v in basis:
                    image = image - np.einsum("ij,ij->i", image, v)[:, None] * v
            size = np.linalg.norm(image, axis=1)
            betas.append(size.astype(np.float64))
            if i + 1 < steps:
                basis.append(image / np.maximum(size, _TINY)[:, None])
        return basis, alphas, betas


class JointAround(Around):
    """An `Around` whose balls and whose input are one problem in passes from the output.

    Args:
        around: `Around` to which `Forms.apply_to`.
        steps: of Lanczos.
        is_proof: see `Forms.solve`.
    """

    def __init__(self, around, steps=3, is_proof=False):
        self.__dict__.update(around.__dict__)
        self.forms, self.lanczos, self.is_proof = Forms(around), steps, is_proof
        self.region, self.whole = _Joint(self, around.region), around.region
        self.multipliers = self.solved = None
        # (Q) pays for these balls: steps that do so too would have to be given back what they paid.
        self.steps = dict(around.steps)
        for k in self.forms.steps:
            self.steps[k] = copy.copy(around.steps[k])
            self.steps[k].radius = 0.0

    def lam(self):
        """λ of every step that is a form here."""
        return {
            k: np.exp(self.multipliers[k].log_lam.astype(np.float64))
            for k in self.forms.steps
            if k in self.multipliers
        }

    def backward(self, c, target, multipliers, record=False, measure=False, split=None):
        """As `Around.backward`, with (Q); not of splits, whose balls are others."""
        if split is not None:
            raise ValueError("Balls and input are one problem of whole boxes alone.")
        self.multipliers = multipliers
        return super().backward(c, target, multipliers, record, measure, split)

    def derivatives(self, target, memory, multipliers, split=None):
        """As `Around.derivatives`, with those of (Q) by λ."""
        found = super().derivatives(target, memory, multipliers, split)
        y, active = self.solved
        inside = np.sum(y * y, axis=1) - self.whole.radius**2
        costs = self.forms.costs(y)
        for k, lam in self.lam().items():
            constant, form, most = costs[k]
            cost = 0.5 * (constant + form - np.where(active, np.minimum(inside, 0.0), 0.0) * most)
            found[k][1] = found[k][1] - lam * cost
        return found


class _Joint:
    """The region of a `JointAround`."""

    def __init__(self, joint, region):
        self.joint, self.whole = joint, region
        self.center = region.center

    def minimum(self, c):
        """Minus (Q) and its constants, and -y."""
        joint = self.joint
        lam = joint.lam()
        if not lam:
            value, step = self.whole.minimum(c)
            return value, step
        lam = {k: lam.get(k, np.zeros(len(c))) for k in joint.forms.steps}
        flat = c.reshape(len(c), -1)
        value, y, active = joint.forms.solve(flat, lam, joint.lanczos, joint.is_proof)
        joint.solved = y, active
        return (-value).astype(c.dtype), -y.reshape(c.shape)

    def slack(self, c):
        """As of the region itself."""
        return self.whole.slack(c)

    def l2_radius(self):
        """As of the region itself."""
        return self.whole.l2_radius()
