"""Balls of hidden steps and the input as one problem.

(L) of `relaxation` and (M) of `maxima` pay λρ²/2 for every step with a ball, and the pass r‖g‖ for
the input, which no single d = x - x⁰ attains at once. But (T) of `balls` says more of every d: for
its terms b_j(d) ≤ τ_j, T ≥ Σ τ_j, with b_0 = ‖w^½Jd‖ and b_j = ‖w^½J_j s_j^½‖·v_j(d), Cauchy's
inequality (Σ b_j)² ≤ T Σ b_j²/τ_j gives, as v_j² ≤ q_{s_j}, for Σ w_i (z_i - z⁰_i)² no more than

    q_w(d) = (T/τ_0)‖w^½Jd‖² + Σ_j (T/τ_j)‖w^½J_j s_j^½‖² q_{s_j}(d) + T·l,                  (J)

where a term that is known as a whole counts Tτ_j, and l is for what rounding misses. With dᵀQd + k
= Σ λq(d) over the steps, what is paid is at most

    max_{‖d‖≤r} [-gᵀd + dᵀQd/2] + k/2  ≤  ½[gᵀy + yᵀs + ‖s‖²/(μ - q̄) + μr² + k]              (Q)

for every μ > q̄ ≥ ‖Q‖, every y, and s = g - (μ - Q)y: the left is at most max_d -gᵀd - dᵀ(μ-Q)d/2
+ μr²/2 = ½[gᵀ(μ-Q)⁻¹g + μr²], and gᵀ(μ-Q)⁻¹g = gᵀy + yᵀs + sᵀ(μ-Q)⁻¹s. y and μ come from a few
steps of Lanczos, and need no proof.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK, TINY, UNIT, gamma, product_up, row_norms_up
from tf_lyapunov.verification.around.relaxation import usable

# Steps of Lanczos; μ that are compared, as multiples of q̄ beyond it and of ‖g‖/r.
_STEPS, _BEYOND, _SHARES = 8, np.geomspace(1e-3, 20.0, 40), np.geomspace(0.1, 1.0, 8)


@dataclasses.dataclass(eq=False)
class _Form:
    """Σ_i weights_i (rows_i·d)², with weights (claims, units) for several claims."""

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray


class Joint:
    """(Q) in the place of a region's minimum, for the multipliers of one pass.

    Args:
        around: `Surroundings`.
        multipliers: dict from names of steps to `Multipliers` of the pass.
        count: rows of the pass.

    Attributes:
        names: of the steps whose balls (Q) pays for; their own radii count as 0.
    """

    def __init__(self, around, multipliers, count):
        self.around, self.balls = around, around.balls
        self.radius = around.region.radius
        self.names = {k for k, term in self.balls.weighed.items() if term is not None}
        self.constant, self.most, self.size = np.zeros((3, count))
        self.forms, self.shares = {}, {}
        for name in self.names:
            own = multipliers.get(name)
            lam = np.zeros(count) if own is None else usable(own.lam)
            self._add(self.balls.weighed[name], lam)
        for name in reversed(around.order):
            if name in self.shares:
                self._add(self.balls.terms[name], self.shares.pop(name))

    @staticmethod
    def applies(around):
        """Whether the region is an l2 ball alone, and balls of steps are known by their terms."""
        region = around.region
        return (
            region.norm == "l2"
            and not region.is_cut
            and any(term is not None for term in around.balls.weighed.values())
        )

    def _add(self, term, factor):
        """Adds factor·q of a signal, factor float64 (rows,) ≥ 0."""
        self.constant += factor * (term.total * term.off) * SLACK
        for part, norm in zip(term.parts, term.norms, strict=True):
            tau = product_up(norm, part.moved)  # as T adds it up
            if tau == 0:  # nothing moves
                continue
            if part.name is None:
                own = factor * (term.total / tau) * SLACK
                self._form(part, own, term.roots)
                self.most += own * norm * norm * SLACK
            elif self.balls.terms.get(part.name) is None:
                self.constant += factor * (term.total * tau) * SLACK
            else:
                share = factor * (term.total * norm / part.moved) * SLACK
                self.shares[part.name] = self.shares.get(part.name, 0.0) + share

    def _form(self, part, factor, roots):
        weights = factor[:, None] * (roots * roots)
        sizes = np.sum(part.rows * part.rows, axis=1)
        self.size += weights @ sizes * SLACK
        held = self.forms.get(id(part.rows))
        if held is None:
            self.forms[id(part.rows)] = _Form(part.rows, part.columns, weights)
        else:
            held.weights = held.weights + weights

    def apply(self, y):
        """Qy, (rows, inputs)."""
        found = np.zeros_like(y)
        for form in self.forms.values():
            image = y[:, form.columns] @ form.rows.T
            found[:, form.columns] += (form.weights * image) @ form.rows
        return found

    def minimum(self, c):
        """`(value, size)` as of `region.Region`: minus (Q), with all its rounding."""
        shape = self.around.region.center.shape
        g = c.whole(shape).rows.reshape(len(c.rows), -1)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            mu, y = self._guess(g)
            s = g - mu[:, None] * y + self.apply(y)
            terms = g.shape[1] + max((sum(f.rows.shape) for f in self.forms.values()), default=0)
            unit = gamma(terms + 8 * len(self.forms) + 64)
            length, norm = row_norms_up(y), row_norms_up(g)
            # Of the products of Q with y, and of the sum.
            off = (unit * self.size * length + 8 * UNIT * (norm + mu * length)) * SLACK + TINY
            rest = (row_norms_up(s) + off) * SLACK
            gap = mu * (1 - 8 * UNIT) - self.most * SLACK
            first, second = np.einsum("ij,ij->i", g, y), np.einsum("ij,ij->i", y, s)
            room = (unit * length * (norm + rest) + length * off) * SLACK
            paid = (rest * rest / gap + mu * self.radius**2 + self.constant) * SLACK
            value = 0.5 * (first + second + room + paid)
            value = value + 8 * UNIT * (np.abs(first) + np.abs(second) + room + paid) + TINY
            value = np.where((gap > 0) & np.isfinite(value), value, np.inf)
        return -value, np.zeros(len(g))

    def _guess(self, g):
        """`(μ, y)` about the least of (Q), of Krylov's space of Q and g."""
        norm = np.linalg.norm(g, axis=1)
        safe = np.maximum(norm, 1e-30)
        basis, diagonal, beside = [g / safe[:, None]], [], []
        for _ in range(_STEPS):
            image = self.apply(basis[-1])
            diagonal.append(np.einsum("ij,ij->i", image, basis[-1]))
            for _ in range(2):
                for v in basis:
                    image = image - np.einsum("ij,ij->i", image, v)[:, None] * v
            beside.append(np.linalg.norm(image, axis=1))
            basis.append(image / np.maximum(beside[-1], 1e-30)[:, None])
        index = np.arange(_STEPS)
        matrix = np.zeros((len(g), _STEPS, _STEPS))
        matrix[:, index, index] = np.stack(diagonal, axis=1)
        matrix[:, index[1:], index[:-1]] = matrix[:, index[:-1], index[1:]] = np.stack(
            beside[:-1], axis=1
        )
        theta, vectors = np.linalg.eigh(np.nan_to_num(matrix, posinf=0.0, neginf=0.0))
        level = np.maximum(self.most * (1 + 1e-9), theta[:, -1]) + 1e-30
        away = np.concatenate(
            [_BEYOND * level[:, None], _SHARES * (norm / self.radius)[:, None]], axis=1
        )
        mu = level[:, None] + away
        first, last = vectors[:, 0, :], vectors[:, -1, :]
        inverse = 1 / (mu[:, :, None] - theta[:, None, :])
        inner = np.einsum("rt,rmt->rm", first**2, inverse) * (norm**2)[:, None]
        end = np.einsum("rt,rt,rmt->rm", last, first, inverse) * norm[:, None]
        rest = (beside[-1][:, None] * end) ** 2 / (mu - self.most[:, None])
        best = np.argmin(inner + rest + mu * self.radius**2, axis=1)
        rows = np.arange(len(g))
        share = np.einsum("rst,rt,rt->rs", vectors, inverse[rows, best], first) * norm[:, None]
        return mu[rows, best], np.einsum("rs,srn->rn", share, np.stack(basis[:-1]))
