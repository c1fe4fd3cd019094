"""The dissipation inequality of one step, and its proof in float64.

With z = (Δx, Δw, Δu), X = [A B₁ B₂], N = [C₁ D₁₁ D₁₂], Y = [C₂ D₂₁ D₂₂], and W, U that pick Δw, Δu,

    M = diag(P, 0, 0) - XᵀPX - T + YᵀQY + YᵀSᵀU + UᵀSY + Uᵀ(R + θI)U,
    T = (α+β)(WᵀΛN + NᵀΛW) - 2WᵀΛW - 2αβNᵀΛN.                                               (1)

zᵀTz = 2(Δw - αΔv)ᵀΛ(βΔv - Δw) ≥ 0 for slopes of φ in [α, β] and Λ ≥ 0. So if M ⪰ 0 and P ⪰ 0, then

    V(Δx⁺) - V(Δx) ≤ ΔyᵀQΔy + 2ΔyᵀSᵀΔu + Δuᵀ(R + θI)Δu   with V(Δx) = ΔxᵀPΔx ≥ 0,

and, summed, every supply of a trajectory is at least -V(Δx₀). Contraction at rate a has a²P in
place of P and (Δx, Δw) alone. Any P and Λ prove what they prove, wherever they come from.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import UNIT, is_semidefinite, sqrt_up, times


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Slopes of φ lie in [alpha, beta]."""

    alpha: float
    beta: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """X, N and Y of (1) as `step`, `neurons` and `output`, and the slopes of φ as `sector`."""

    step: np.ndarray
    neurons: np.ndarray
    output: np.ndarray
    sector: Slopes

    @property
    def states(self):
        return len(self.step)

    @property
    def units(self):
        return len(self.neurons)

    @property
    def inputs(self):
        return self.step.shape[1] - self.states - self.units

    @property
    def outputs(self):
        return len(self.output)


class _Sum:
    """A matrix and a bound on each entry's distance to the one meant."""

    def __init__(self, side):
        self.value, self.error = np.zeros((side, side)), np.zeros((side, side))

    def add(self, term, error, factor=1.0):
        """Adds factor·term; the factor may be off by a few units in its last place."""
        term = factor * term
        self.value = self.value + term
        # The rounding of the factor, of the product and of the sum.
        self.error = self.error + abs(factor) * error * (1 + 8 * UNIT)
        self.error = self.error + 8 * UNIT * (np.abs(term) + np.abs(self.value))

    def symmetric(self):
        value, error = (self.value + self.value.T) / 2, (self.error + self.error.T) / 2
        return value, (error + 2 * UNIT * np.abs(value)) * (1 + 2.0**-20)


def _congruent(rows, middle):
    """`(rowsᵀ·middle·rows, error)`."""
    inner, error = times(middle, rows)
    return times(rows.T, inner, b_error=error)


def _picked(system, signal):
    """W or U of (1)."""
    n, q, m = system.states, system.units, system.inputs
    start, size = {"w": (n, q), "u": (n + q, m)}[signal]
    return np.eye(n + q + m)[start : start + size]


def form(system, storage, multipliers, supply=None, theta=0.0, squared_rate=1.0):
    """`(M, error)` of (1), entry by entry.

    Args:
        system: `Recurrence`, or another object with its attributes.
        storage: P, symmetric.
        multipliers: Λ ≥ 0, a vector.
        supply: `(Q, S, R)`, or None for contraction.
        theta: θ.
        squared_rate: a², 1 but for contraction.
    """
    n, q = system.states, system.units
    total = _Sum(n + q + system.inputs)
    block = np.zeros_like(total.value)
    block[:n, :n] = storage
    total.add(block, 0.0, squared_rate)
    total.add(*_congruent(system.step, storage), -1.0)
    if q:
        alpha, beta = system.sector.alpha, system.sector.beta
        lam, w = np.diag(multipliers), _picked(system, "w")
        # W has one entry a row: these products are exact but for Λ's factor.
        cross, error = times(w.T, multipliers[:, None] * system.neurons)
        error = error + 2 * UNIT * np.abs(cross)
        total.add(cross + cross.T, error + error.T, -(alpha + beta))
        total.add(w.T @ lam @ w, 0.0, 2.0)
        if alpha * beta:
            total.add(*_congruent(system.neurons, lam), 2.0 * alpha * beta)
    if supply is None:
        value, error = total.symmetric()
        return value[: n + q, : n + q], error[: n + q, : n + q]
    q_matrix, s_matrix, r_matrix = supply
    u = _picked(system, "u")
    total.add(*_congruent(system.output, q_matrix))
    if np.any(s_matrix):
        crossed, error = times(s_matrix, system.output)
        crossed, error = u.T @ crossed, u.T @ error
        total.add(crossed + crossed.T, error + error.T)
    total.add(u.T @ r_matrix @ u, 0.0)
    total.add(u.T @ u, 0.0, theta)
    return total.symmetric()


def is_storage(storage, multipliers):
    """Whether P ⪰ 0 is proved, and Λ ≥ 0."""
    symmetric = np.array_equal(storage, storage.T)
    finite = np.all(np.isfinite(storage)) and np.all(np.isfinite(multipliers))
    return bool(symmetric and finite and np.all(multipliers >= 0) and is_semidefinite(storage))


def proves(system, storage, multipliers, supply=None, theta=0.0, squared_rate=1.0):
    """Whether M ⪰ 0 is proved, with P ⪰ 0 and Λ ≥ 0; False means "not proved".

    Example:

    >>> step, none, output = np.array([[0.5, 1.0]]), np.zeros((0, 2)), np.array([[1.0, 0.0]])
    >>> lag = Recurrence(step, none, output, Slopes(0.0, 1.0))  # its gain is 1/(1 - 0.5)
    >>> rate = -np.eye(1), np.zeros((1, 1)), np.zeros((1, 1))
    >>> proves(lag, np.array([[2.0]]), np.zeros(0), rate, theta=4.01)
    True
    >>> proves(lag, np.array([[2.0]]), np.zeros(0), rate, theta=3.9)
    False
    """
    if not is_storage(storage, multipliers):
        return False
    matrix, error = form(system, storage, multipliers, supply, theta, squared_rate)
    return is_semidefinite(matrix, error)


def smallest_theta(system, storage, multipliers, supply):
    """Estimate of the smallest θ with M ⪰ 0 for given P and Λ; infinity where there is none.

    M is [[K, b], [bᵀ, c + θI]] with blocks (Δx, Δw) and Δu: θ ≥ λ(bᵀK⁻¹b - c) if K ≻ 0.
    """
    matrix, _ = form(system, storage, multipliers, supply)
    side = system.states + system.units
    try:
        root = np.linalg.cholesky(matrix[:side, :side])
    except np.linalg.LinAlgError:
        return math.inf
    part = np.linalg.solve(root, matrix[:side, side:])
    found = float(np.linalg.eigvalsh(part.T @ part - matrix[side:, side:])[-1])
    return found if math.isfinite(found) else math.inf


def is_explicit(system):
    """Whether D₁₁ is strictly lower triangular, so that w is computed, not solved for."""
    n, q = system.states, system.units
    return not np.any(np.triu(system.neurons[:, n : n + q]))


def is_well_posed(system, multipliers):
    """Whether w = φ(D₁₁w + b) is proved to have one solution for every b.

    It has where D₁₁ is strictly lower triangular, and for slopes in [0, 1] where
    2Λ - ΛD₁₁ - D₁₁ᵀΛ ≻ 0, Λ > 0: then I - D₁₁ is strongly monotone in the metric Λ, and φ is the
    resolvent of a maximal monotone map in it.
    """
    return is_explicit(system) or monotone(system, multipliers) is not None


def monotone(system, multipliers):
    """m > 0 with 2Λ - ΛD₁₁ - D₁₁ᵀΛ ⪰ mΛ proved, for slopes in [0, 1]; or None.

    Example:

    >>> loop = Recurrence(np.zeros((0, 2)), np.array([[-1.0, 1.0]]), np.zeros((0, 2)), Slopes(0, 1))
    >>> monotone(loop, np.ones(1)) > 3
    True
    """
    n, q = system.states, system.units
    alpha, beta = system.sector.alpha, system.sector.beta
    if not (alpha >= 0 and beta <= 1 and np.all(multipliers > 0)):
        return None
    cross, error = times(np.diag(multipliers), system.neurons[:, n : n + q])
    lam = np.diag(multipliers)
    for share in (3.2, 1.6, 0.8, 0.4, 0.2, 0.1, 0.05, 0.01, 1e-3, 1e-5):
        value = (2 - share) * lam - cross - cross.T
        bound = error + error.T + 8 * UNIT * (np.abs(cross) + np.abs(cross.T) + 2 * lam)
        if is_semidefinite((value + value.T) / 2, bound):
            return share
    return None


def residual_gain(system, storage, multipliers):
    """γ_r with ‖Δy‖ ≤ γ_r‖r‖ for equal inputs and states, w = φ(v + r) in one of the two.

    If, with Q = -I, the blocks (Δx, Δw) of (1) exceed mWᵀΛW, then, for 2ΔwᵀΛ(Δv + r - Δw) ≥ 0 with
    slopes in [0, 1], V⁺ - V ≤ -‖Δy‖² + 2ΔwᵀΛr - mΔwᵀΛΔw ≤ -‖Δy‖² + rᵀΛr/m: γ_r² = max Λ/m.

    Returns:
        γ_r rounded up, infinite where no m > 0 is proved.
    """
    n, q = system.states, system.units
    p, m = system.outputs, system.inputs
    alpha, beta = system.sector.alpha, system.sector.beta
    if not q:
        return 0.0
    if not (alpha >= 0 and beta <= 1 and is_storage(storage, multipliers)):
        return math.inf
    wide = Recurrence(system.step, system.neurons, system.output, Slopes(0.0, 1.0))
    rate = -np.eye(p), np.zeros((m, p)), np.zeros((m, m))
    value, error = (part[: n + q, : n + q] for part in form(wide, storage, multipliers, rate))
    lam = np.zeros_like(value)
    lam[n:, n:] = np.diag(multipliers)
    for power in range(0, 60, 2):
        share = 2.0**-power  # of two: the product is exact
        rest = value - share * lam
        if is_semidefinite(rest, error + 2 * UNIT * np.abs(rest)):
            return sqrt_up(float(np.max(multipliers)) / share)
    return math.inf
