"""Passivity indices of linear plants, and loops of two systems with indices."""

import dataclasses
import math
import warnings
from fractions import Fraction

import numpy as np
from scipy.linalg import solve_discrete_lyapunov

from tf_lyapunov.control import search
from tf_lyapunov.control.plants import _matrix
from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.showing import Page, Shown
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.verification.arithmetic import SLACK, TINY, UNIT, is_semidefinite, times

# What is taken off a computed ν, relative to its size, until a proof succeeds.
_BACK = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# Strictness that is asked of the solver, more where the proof of what it found fails.
_MARGINS = (1e-8, 1e-7, 1e-6, 1e-5)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PlantIndices(Shown):
    """Indices of a linear plant, from `linear_indices`.

    Attributes:
        verdict: `"PROVED"` or `"NOT_PROVED"`.
        indices: `Indices`, or None.
        storage: P (n, n) of the storage xᵀPx, or None.
        reason: why nothing is proved, or "".
        nearest: where nothing is proved, `Indices` that are: the largest δ = ν; None if not found.
    """

    verdict: str
    indices: Indices | None
    storage: np.ndarray | None
    reason: str = ""
    nearest: Indices | None = None

    def __bool__(self):
        return self.verdict == "PROVED"

    def _page(self):
        facts = ()
        if self.indices is not None:
            facts = (("δ", f"{self.indices.delta:.6g}"), ("ν", at_least(self.indices.nu, 6)))
        return Page(
            f"PlantIndices {self.verdict}", facts, notes=(self.reason,) if self.reason else ()
        )


def linear_indices(state, input, output, feedthrough=None, *, delta=0.0, solver="clarabel"):
    """Largest ν for which x⁺ = Ax + Bu, y = Cx + Du is proved to have the indices (δ, ν).

    With V = xᵀPx, P ⪰ 0, the plant has V⁺ - V ≤ uᵀy - δ‖y‖² - ν‖u‖² along all trajectories if

        ⎡ P - AᵀPA - δCᵀC       Cᵀ/2 - AᵀPB - δCᵀD           ⎤
        ⎣ C/2 - BᵀPA - δDᵀC     (D+Dᵀ)/2 - BᵀPB - δDᵀD - νI  ⎦ ⪰ 0,

    the difference of both sides as a form in (x, u); by linearity the same holds for differences of
    two trajectories. A plant with D = 0 has ν ≤ -λ_max(BᵀPB) ≤ 0: in discrete time it is never
    passive by itself, and -ν is its shortage. P is found by cvxpy (extra `sdp`), and the
    inequality proved in float64 with every rounding bounded.

    Args:
        state, input, output: A (n, n), B (n, m), C (m, n).
        feedthrough: D (m, m), or None for 0.
        delta: δ. Negative ones allow for unstable plants, which have no indices with δ ≥ 0.
        solver: `"clarabel"`, `"scs"` or `"mosek"`.

    Returns:
        `PlantIndices`.

    Raises:
        ValueError: if shapes do not fit or numbers are not finite.
        ImportError: if cvxpy or the solver is not installed.

    Example: the delay y = u⁻ has the shortage 1: with V = y²/2,
    V⁺ - V = (u² - y²)/2 = uy + u² - (u + y)²/2 ≤ uy + u²:

    >>> found = linear_indices([[0.0]], [[1.0]], [[1.0]])
    >>> found.verdict, round(found.indices.nu, 4)
    ('PROVED', -1.0)

    Reference: the Kalman-Yakubovich-Popov lemma in discrete time; sufficient as proved here.
    """
    search.ready(solver)
    a = _matrix("state", state)
    n = len(a)
    b, c = _matrix("input", input, n), np.atleast_2d(_matrix("output", output))
    m = b.shape[1]
    d = np.zeros((m, m)) if feedthrough is None else _matrix("feedthrough", feedthrough, m)
    if a.shape != (n, n) or c.shape != (m, n) or d.shape != (m, m):
        raise ValueError(
            "Indices need as many outputs as inputs: A (n, n), B (n, m), C (m, n), D (m, m). "
            f"Received: A {a.shape}, B {b.shape}, C {c.shape}, D {d.shape}."
        )
    delta = finite_float("delta", delta)
    indices, storage, is_found = _proved(a, b, c, d, delta, solver)
    if indices is None and is_found:
        return PlantIndices(
            "NOT_PROVED", None, None, "The solver's storage could not be verified in float64."
        )
    if indices is None:
        radius = float(np.max(np.abs(np.linalg.eigvals(a))))
        reason = f"The solver found no storage for δ = {delta:g}."
        if radius >= 1 and delta >= 0:
            reason = (
                f"The plant is not stable (spectral radius {radius:.6g}), so no storage has "
                f"δ = {delta:g} ≥ 0. Ask for a negative δ, its shortage of output passivity."
            )
        nearest, _, _ = _proved(a, b, c, d, None, solver)
        if nearest is not None:
            reason += (
                f" Nearest claim that is proved: δ = {nearest.delta:.6g}, "
                f"ν = {at_least(nearest.nu, 6)}."
            )
        return PlantIndices("NOT_PROVED", None, None, reason, nearest)
    return PlantIndices("PROVED", indices, storage)


def _proved(a, b, c, d, delta, solver):
    """`(indices, storage, is_found)` for δ, or for the largest δ = ν where it is None.

    Indices and storage are None without a proof; `is_found` says whether the solver had one to try.
    """
    is_found = False
    for margin in _MARGINS:
        found = _solved(a, b, c, d, delta, solver, margin)
        if found is None:
            continue
        (storage, nu), is_found = found, True
        for back in _BACK:
            lower = nu - back * (abs(nu) + float(np.linalg.norm(b.T @ storage @ b)) + 1e-3)
            own = lower if delta is None else delta
            if _proves(a, b, c, d, own, lower, storage):
                return Indices(own, lower), storage, True
    return None, None, is_found


def _solved(a, b, c, d, delta, solver, margin):
    """`(P, ν)`, in coordinates in which numbers are near one.

    With x' = Tx, u = αu', y = βy', a storage V is V/αβ for (δβ/α, να/β). α/β is such that the
    transfer function's gain is about one, T makes a stable A contract.
    """
    import cvxpy as cp

    n, m = b.shape
    t = _coordinates(a)
    back = np.linalg.inv(t)
    ratio = 1 / _peak(a, b, c, d)  # α/β
    entering, leaving = (float(np.linalg.norm(v, 2)) or 1.0 for v in (t @ b, c @ back))
    t = t * np.sqrt(leaving / (entering * ratio))  # with β = 1
    back = np.linalg.inv(t)
    ab = t @ np.concatenate([a @ back, ratio * b], axis=1)
    cd = np.concatenate([c @ back, ratio * d], axis=1)
    share = 1.0 if delta is None else 1 / max(1.0, abs(delta) / ratio)
    p, nu = cp.Variable((n, n), symmetric=True), cp.Variable()
    own = nu / ratio**2 if delta is None else share * delta / ratio
    first, last = np.eye(n + m)[:, :n], np.eye(n + m)[:, n:]
    cross = (cd.T @ last.T + last @ cd) / 2
    form = (
        first @ p @ first.T - ab.T @ p @ ab + share * cross - own * (cd.T @ cd) - nu * last @ last.T
    )
    program = cp.Problem(cp.Maximize(nu), [form >> margin * np.eye(n + m), p >> margin * np.eye(n)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on accuracy, which a proof decides
            program.solve(solver=solver.upper())
    except cp.error.SolverError:
        return None
    usable = program.status in ("optimal", "optimal_inaccurate")
    if not usable or p.value is None or not np.all(np.isfinite(p.value)):
        return None
    storage = ratio / share * t.T @ p.value @ t
    return (storage + storage.T) / 2, float(nu.value) / (share * ratio)


def _peak(a, b, c, d, angles=200):
    """Largest gain of D + C(z - A)⁻¹B on some points of the unit circle; 1 for no gain."""
    poles = np.abs(np.angle(np.linalg.eigvals(a)))
    z = np.exp(1j * np.concatenate([poles, np.geomspace(1e-4, np.pi, angles)]))
    try:
        inner = np.linalg.solve(z[:, None, None] * np.eye(len(a)) - a, b.astype(complex))
    except np.linalg.LinAlgError:  # a pole among them
        return 1.0
    found = float(np.max(np.linalg.norm(c @ inner + d, 2, axis=(1, 2))))
    return found if 1e-12 < found < 1e12 else 1.0


def _coordinates(a):
    """T for which TAT⁻¹ contracts, of a stable A; else the identity."""
    eye = np.eye(len(a))
    radius = float(np.max(np.abs(np.linalg.eigvals(a))))
    if radius >= 1:
        return eye
    gramian = solve_discrete_lyapunov(a.T, (1 - radius) * eye)
    try:
        found = np.linalg.cholesky((gramian + gramian.T) / 2).T
    except np.linalg.LinAlgError:
        return eye
    return found if np.all(np.isfinite(found)) else eye


def _proves(a, b, c, d, delta, nu, storage):
    """Whether the inequality and P ⪰ 0 are proved, with every rounding bounded."""
    n, m = b.shape
    ab, cd = np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)
    through, error = times(storage, ab)
    pulled, error = times(ab.T, through, 0.0, error)
    outer, own = times(cd.T, cd)
    form = -pulled - delta * outer
    form[n:, :] += cd / 2
    form[:, n:] += cd.T / 2
    form[:n, :n] += storage
    places = np.arange(n, n + m)
    form[places, places] -= nu
    sizes = np.abs(pulled) + np.abs(delta * outer)
    sizes[n:, :] += np.abs(cd)
    sizes[:, n:] += np.abs(cd.T)
    sizes[:n, :n] += np.abs(storage)
    sizes[places, places] += abs(nu)
    error = (error + abs(delta) * own + 16 * UNIT * sizes) * SLACK + TINY
    return is_semidefinite(storage) and is_semidefinite(
        (form + form.T) / 2, (error + error.T) / 2 * SLACK
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PassiveLoop(Shown):
    """Verdict on a loop of two systems with indices, from `passive_feedback`.

    Attributes:
        verdict: `"PROVED"` (stable) or `"NOT_PROVED"` (the indices alone do not say).
        margins: (δ_p + ν_c, δ_c + ν_p), rounded down.
        gain_upper_bound: l2 gain from (r₁, r₂) to (y_p, y_c); infinite where nothing is proved.
        plant, controller: `Indices`.
    """

    verdict: str
    margins: tuple
    gain_upper_bound: float
    plant: Indices
    controller: Indices

    def __bool__(self):
        return self.verdict == "PROVED"

    def explain(self):
        """Plain text: the verdict, the margins, and what would be enough where they are not."""
        first, second = self.margins
        lines = [
            f"{self.verdict}: δ_p + ν_c = {at_least(first, 6)} and δ_c + ν_p = "
            f"{at_least(second, 6)} must both be positive."
        ]
        if self:
            lines.append(f"Gain from (r₁, r₂) to (y_p, y_c): {at_most(self.gain_upper_bound, 6)}.")
        else:
            lines.append(
                "Nearest claim that is enough: a controller with "
                f"ν > {at_most(-self.plant.delta, 6)} and δ > {at_most(-self.plant.nu, 6)}."
            )
        return "\n".join(lines)

    def _page(self):
        facts = (
            ("δ_p + ν_c", at_least(self.margins[0], 6)),
            ("δ_c + ν_p", at_least(self.margins[1], 6)),
            ("gain", f"≤ {at_most(self.gain_upper_bound, 6)}"),
        )
        return Page(f"PassiveLoop {self.verdict}", facts, notes=(self.explain(),))


def passive_feedback(plant_indices, controller_indices):
    """Whether the loop u_p = r₁ - y_c, u_c = r₂ + y_p of two systems is stable by their indices.

    With storages V_p, V_c ≥ 0 and V⁺ - V ≤ uᵀy - δ‖y‖² - ν‖u‖² for both, and r = 0, the products
    cancel, -y_cᵀy_p + y_pᵀy_c = 0, and for V = V_p + V_c

        V⁺ - V ≤ -(δ_p + ν_c)‖y_p‖² - (δ_c + ν_p)‖y_c‖²:

    both outputs are square summable if both sums are positive. With r, by the same addition,

        V⁺ - V ≤ -a‖y_p‖² - b‖y_c‖² + y_pᵀ(r₁ - 2ν_c r₂) + y_cᵀ(r₂ + 2ν_p r₁) - ν_p‖r₁‖² - ν_c‖r₂‖²,

    a and b the two sums, so that summed over time, from rest, with m = min(a, b),
    k = ‖[1, -2ν_c; 2ν_p, 1]‖ and c = max(-ν_p, -ν_c, 0), m‖y‖² ≤ k‖r‖‖y‖ + c‖r‖², and

        ‖y‖ ≤ (k + √(k² + 4mc))/(2m) · ‖r‖.

    Of a memoryless controller V_c = 0, and of a network `certify(…)` and `layer_indices` give
    incremental indices, which hold from 0 if the network maps 0 to 0. That the loop has a solution
    at every step is assumed; it has where one of the two is strictly proper.

    Args:
        plant_indices, controller_indices: `Indices`, or `PlantIndices` that are proved.

    Returns:
        `PassiveLoop`. `"NOT_PROVED"` means that the indices do not decide, not that the loop is
        unstable.

    Raises:
        TypeError: if an argument is neither.
        ValueError: for `PlantIndices` without indices.

    Example:

    >>> loop = passive_feedback(Indices(0.2, -1.0), Indices(1.1, 0.0))
    >>> loop.verdict, [round(m, 6) for m in loop.margins]
    ('PROVED', [0.2, 0.1])
    >>> print(passive_feedback(Indices(0.2, -1.0), Indices(0.4, 0.0)).explain())
    NOT_PROVED: δ_p + ν_c = 0.2 and δ_c + ν_p = -0.6 must both be positive.
    Nearest claim that is enough: a controller with ν > -0.2 and δ > 1.

    Reference: the passivity theorem with excess and shortage, in discrete time; sufficient.
    """
    plant, controller = (
        _indices(name, given)
        for name, given in (
            ("plant_indices", plant_indices),
            ("controller_indices", controller_indices),
        )
    )
    sums = [
        Fraction(plant.delta) + Fraction(controller.nu),
        Fraction(controller.delta) + Fraction(plant.nu),
    ]
    margins = tuple(_down(s) for s in sums)
    if not min(sums) > 0 or not min(margins) > 0:
        return PassiveLoop("NOT_PROVED", margins, math.inf, plant, controller)
    # ‖N‖ of the text by its Frobenius norm; every operation below is rounded up at the end.
    mixed = math.hypot(1.0, 1.0, 2 * controller.nu, 2 * plant.nu)
    lost = max(-plant.nu, -controller.nu, 0.0)
    least = min(margins)
    gain = (mixed + math.sqrt(mixed * mixed + 4 * least * lost)) / (2 * least)
    gain *= 1 + 64 * UNIT
    return PassiveLoop("PROVED", margins, float(gain), plant, controller)


def _down(exact):
    found = float(exact)
    return found if Fraction(found) <= exact else math.nextafter(found, -math.inf)


def _indices(name, given):
    if isinstance(given, PlantIndices):
        if given.indices is None:
            raise ValueError(
                f"`{name}` must have indices that are proved. Received: {given.reason}"
            )
        return given.indices
    if not isinstance(given, Indices):
        raise TypeError(
            f"`{name}` must be `Indices` or what `linear_indices` gave. "
            f"Received: an object of type {type(given).__name__}."
        )
    return given
