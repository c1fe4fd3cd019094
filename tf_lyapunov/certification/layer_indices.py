"""Passivity indices of one layer from its weights: Theorem 1 as a search, and its proof."""

import dataclasses
import math
import time
from fractions import Fraction

import numpy as np

from tf_lyapunov.certification import rounding
from tf_lyapunov.certification.interior import MultiplierProblem
from tf_lyapunov.certification.linear import absolute_norm_upper_bound, inference_value
from tf_lyapunov.certification.sdp import check_solver, solve, verified_minimum
from tf_lyapunov.errors import SolverFailure, UnsupportedLayerError
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_axes, convolution_matrix
from tf_lyapunov.theory.rounding import round_down
from tf_lyapunov.theory.sectors import Indices, Sector, finite_float
from tf_lyapunov.theory.spectra import smallest_eigenvalue

UNIT = rounding.UNIT_ROUNDOFF["float64"]
MULTIPLIERS = ("auto", "diagonal", "scalar", "norm")
# Signals of input and output together up to which "auto" uses one multiplier per unit (a minute).
_DIAGONAL_SIZE = 1200
# Newton steps that a solve takes.
_STEPS = 60
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class LayerIndices:
    """Passivity indices that a layer's weights prove.

    Attributes:
        delta: δ as asked for.
        nu: a proven ν, rounded down; -inf if nothing was proved.
        multipliers: Λ, (outputs,) or one number; empty for the norm rule.
        method: `"diagonal"`, `"scalar"`, `"norm"` or `"linear"`.
        verdict: `"PROVED"`, or `"SOLVER_FAILED"` with ν from a coarser rule.
        seconds: wall time.
    """

    delta: float
    nu: float
    multipliers: np.ndarray = dataclasses.field(repr=False)
    method: str
    verdict: str
    seconds: float

    @property
    def indices(self):
        """`Indices(delta, nu)`."""
        return Indices(self.delta, self.nu)

    @property
    def gain_upper_bound(self):
        """Largest slope b of the cone; infinite for δ ≤ 0."""
        return self.indices.gain

    def shortfall(self, claim):
        """How much ν is missing for a claimed ν at this δ; 0 if the claim is proved."""
        return max(float(claim.nu) - self.nu, 0.0)


@dataclasses.dataclass(frozen=True)
class SupplyVerdict:
    """Whether a layer is (Q, S, R)-dissipative by Theorem 1.

    Attributes:
        verdict: `"PROVED"`, `"NOT_PROVED"` or `"SOLVER_FAILED"`.
        margin: largest t found with (matrix of Theorem 1) - tI ⪰ 0, proved; negative if Theorem 1
            does not hold by that much.
        multipliers: Λ that proves it, (outputs,).
    """

    verdict: str
    margin: float
    multipliers: np.ndarray = dataclasses.field(repr=False)

    def __bool__(self):
        return self.verdict == "PROVED"


def layer_indices(
    layer, sector=None, *, delta, linear_map=None, multiplier="auto", solver="structured"
):
    """Largest ν for which Theorem 1 proves a layer IIFOFP(δ, ν), from its weights.

        maximise ν over diagonal Λ ≥ 0  subject to
        [Λ - δI, ½I - mΛW; (½I - mΛW)ᵀ, pWᵀΛW - νI] ⪰ 0,   m = (α+β)/2, p = αβ.

    Sufficient. I is rectangular where the widths differ. With Λ = λI and a convolution that keeps
    its shape the matrix condition is one operator norm of a convolution with zero padding,

        ν = d² - 1/(4(λ-δ)) - ‖cT - dI‖²,   c² = m²λ²/(λ-δ) - pλ,  d = mλ/(2c(λ-δ)),

    so that real sizes take seconds. Every ν is proved in float64, whatever the solver said.

    Args:
        layer: a built Keras layer with one kernel, or a kernel in Keras' layout, `(in, out)` if
            dense.
        sector: slopes of the activation; the layer's own if a layer is given.
        delta: δ, any real number.
        linear_map: geometry of a kernel that is not dense.
        multiplier: `"diagonal"`, `"scalar"` (convolutions that keep their shape), `"norm"` (rule
            (2.1), from σ alone), or `"auto"`.
        solver: see `sdp.solve`.

    Returns:
        `LayerIndices`.

    Raises:
        ValueError: if the size is unknown, or the multiplier does not fit the layer.
        UnsupportedLayerError: for a layer without a linear map.

    Example:

    >>> found = layer_indices(np.eye(3), Sector(0.5, 1.0), delta=1.0)
    >>> -1e-6 < found.nu <= 0.0  # slopes in [0.5, 1] lie in the cone of slopes [0, 1] and no less
    True

    Reference: Aquino et al., Theorem 1; sound form with the proof of equation (2.1) for norms.
    """
    begin = time.monotonic()
    delta = finite_float("delta", delta)
    if multiplier not in MULTIPLIERS:
        raise ValueError(
            f"`multiplier` must be one of {MULTIPLIERS}. Received: multiplier={multiplier!r}."
        )
    check_solver(solver)
    kernel, linear_map, sector = _read(layer, sector, linear_map)
    tap = _identity_tap(kernel, linear_map)
    if multiplier == "auto":
        multiplier = _fitting(kernel, linear_map, tap)
    if multiplier == "scalar" and tap is None:
        raise ValueError(
            "`multiplier='scalar'` needs a convolution of stride 1 with padding 'same' and as many "
            "channels out as in. Received: another map. Use 'diagonal' or 'norm'."
        )
    verdict, found, name = "PROVED", None, multiplier
    if multiplier == "scalar" and sector.alpha < sector.beta:
        found = _scalar(kernel, linear_map, sector, delta, tap)
    elif multiplier in ("diagonal", "scalar"):
        weight = _matrix(kernel, linear_map)
        if sector.alpha == sector.beta:
            found, name = (_linear(weight, sector.alpha, delta), np.zeros(0)), "linear"
        else:
            found = _diagonal(weight, sector, delta, solver)
    if multiplier != "norm" and found is None:
        verdict = "SOLVER_FAILED"
    if found is None:
        found, name = (_from_norm(kernel, linear_map, sector, delta), np.zeros(0)), "norm"
    nu = found[0]
    if delta > 0:  # beyond it the cone is empty, so that only rounding can lead there
        nu = min(nu, round_down(1 / (4 * Fraction(delta))))
    return LayerIndices(delta, nu, np.atleast_1d(found[1]), name, verdict, time.monotonic() - begin)


def indices_frontier(
    layer, sector=None, *, deltas, linear_map=None, multiplier="auto", solver="structured"
):
    """The boundary of the feasible (δ, ν): `layer_indices` at every δ.

    Everything below it (smaller ν, or smaller δ) is proved too: ω only grows.

    Args:
        layer, sector, linear_map, multiplier, solver: as for `layer_indices`.
        deltas: increasing values of δ.

    Returns:
        Tuple of `LayerIndices`, ν never increasing with δ.

    Example:

    >>> frontier = indices_frontier(np.eye(2), Sector(0.0, 1.0), deltas=[0.5, 1.0, 2.0])
    >>> [round(point.nu, 3) + 0.0 for point in frontier]
    [0.0, 0.0, -1.0]
    """
    options = {"linear_map": linear_map, "multiplier": multiplier, "solver": solver}
    deltas = [finite_float("deltas", d) for d in deltas]
    if deltas != sorted(deltas):
        raise ValueError(f"`deltas` must increase. Received: deltas={deltas}.")
    points = [layer_indices(layer, sector, delta=d, **options) for d in deltas]
    for k in range(len(points) - 2, -1, -1):  # what holds for a larger δ holds for a smaller one
        if points[k].nu < points[k + 1].nu:
            points[k] = dataclasses.replace(points[k], nu=points[k + 1].nu)
    return tuple(points)


def layer_gain(layer, sector=None, *, linear_map=None, solver="structured"):
    """Smallest l2 gain that diagonal multipliers prove for one layer, activation included.

    The limit of `layer_indices` for δ → ∞; at most σ(W)·max(|α|, |β|).

    Args:
        layer, sector, linear_map, solver: as for `layer_indices`.

    Returns:
        float, rounded up.

    Example:

    >>> round(layer_gain(np.array([[3.0, 4.0]]), Sector(0.0, 1.0)), 6)
    5.0
    """
    from tf_lyapunov.certification.chains import Chain
    from tf_lyapunov.certification.lipsdp import lipsdp

    kernel, linear_map, sector = _read(layer, sector, linear_map)
    norm = rounding.product_up(norm_upper_bound(kernel, linear_map).value, sector.magnitude)
    if _fitting(kernel, linear_map, None) != "diagonal":
        return norm
    weight = _matrix(kernel, linear_map)
    chain = Chain((weight, np.eye(len(weight))), (sector,))
    return min(norm, lipsdp(chain, solver=solver).gain_upper_bound)


def is_dissipative(layer, sector=None, *, q, s, r, linear_map=None, solver="structured"):
    """Whether Theorem 1 proves a layer incrementally (Q, S, R)-dissipative.

        Δyᵀ QΔy + 2Δyᵀ SΔu + Δuᵀ RΔu ≥ 0 for all pairs, if for some diagonal Λ ≥ 0
        [Q S; Sᵀ R] + [Λ, -mΛW; -mWᵀΛ, pWᵀΛW] ⪰ 0.

    Sufficient.

    Args:
        layer, sector, linear_map, solver: as for `layer_indices`.
        q: symmetric (outputs, outputs).
        s: (outputs, inputs).
        r: symmetric (inputs, inputs).

    Returns:
        `SupplyVerdict`, true only if proved.

    Raises:
        ValueError: if a matrix has the wrong shape, or is not symmetric where it must be.

    Example:

    >>> eye = np.eye(2)
    >>> bool(is_dissipative(eye, Sector(0.0, 1.0), q=-eye, s=0 * eye, r=1.01 * eye))
    True

    Reference: Aquino et al., Theorem 1, as published.
    """
    check_solver(solver)
    kernel, linear_map, sector = _read(layer, sector, linear_map)
    weight = _matrix(kernel, linear_map)
    outputs, inputs = weight.shape
    parts = {}
    shapes = {"q": (outputs, outputs), "s": (outputs, inputs), "r": (inputs, inputs)}
    for (name, shape), value in zip(shapes.items(), (q, s, r), strict=True):
        value = np.asarray(value, dtype=np.float64)
        symmetric = name == "s" or np.array_equal(value, value.T)
        if value.shape != shape or not np.all(np.isfinite(value)) or not symmetric:
            raise ValueError(
                f"`{name}` must be a finite {'' if name == 's' else 'symmetric '}matrix of shape "
                f"{shape}. Received: shape {value.shape}."
            )
        parts[name] = value
    constant = np.block([[parts["r"], parts["s"].T], [parts["s"], parts["q"]]])
    problem = _problem(weight, sector, constant, np.eye(inputs + outputs))
    start = np.ones(outputs)
    matrix = problem.matrix(0.0, start)
    scale = float(np.linalg.norm(matrix, 2)) or 1.0
    interior = (2 * scale, start)
    try:
        result = solve(problem, interior, solver=solver, tol=1e-7, scale=scale)
    except SolverFailure:
        return SupplyVerdict("SOLVER_FAILED", -2 * scale, start)
    proved = verified_minimum(problem, result, interior)
    if proved is None:
        return SupplyVerdict("SOLVER_FAILED", -2 * scale, start)
    # θ ≤ 0 proves M(0) ⪰ 0 as well, since J = I.
    return SupplyVerdict("PROVED" if proved[0] <= 0 else "NOT_PROVED", -proved[0], proved[1])


# Reading ----------------------------------------------------------------------------------------


def _read(layer, sector, linear_map):
    """Kernel in float64, its map and the sector."""
    if hasattr(layer, "get_config"):
        maps = linear_maps(layer)
        if len(maps) != 1:
            raise UnsupportedLayerError(
                "Indices are of layers with one linear map. "
                f"Received: {layer.name!r} of type {type(layer).__name__} with {len(maps)}. "
                "Pass its kernels one by one."
            )
        variable, linear_map = maps[0]
        kernel = inference_value(variable, layer.compute_dtype)
        sector = Sector.of(layer.activation) if sector is None else sector
    else:
        kernel = np.asarray(layer, dtype=np.float64)
        linear_map = linear_map or LinearMap("dense")
        if linear_map.kind == "dense" and kernel.ndim != 2:
            raise ValueError(
                "A dense kernel must have the shape (in, out). Received: shape "
                f"{kernel.shape}. Pass `linear_map` for a convolution."
            )
    if not isinstance(sector, Sector):
        raise TypeError(
            f"`sector` must be a `Sector`. Received: sector={sector!r}. "
            "Use `Sector.of('relu')` for an activation."
        )
    if kernel.size == 0 or not np.all(np.isfinite(kernel)):
        raise ValueError(f"A kernel must be finite. Received: shape {kernel.shape}, or NaN.")
    if linear_map.kind == "dense":
        linear_map = LinearMap("dense", (kernel.shape[0],))
    return kernel, linear_map, sector


def _sizes(kernel, linear_map):
    """`(outputs, inputs)` of the flattened map, or None if the size is unknown."""
    if linear_map.input_shape is None:
        return None
    return math.prod(linear_map.output_shape(kernel.shape)), math.prod(linear_map.input_shape)


def _fitting(kernel, linear_map, tap):
    sizes = _sizes(kernel, linear_map)
    if sizes is not None and sum(sizes) <= _DIAGONAL_SIZE:
        return "diagonal"
    return "scalar" if tap is not None else "norm"


def _matrix(kernel, linear_map):
    sizes = _sizes(kernel, linear_map)
    if sizes is None:
        raise ValueError(
            "A convolution needs a known input size here. Received: input_shape=None. "
            "Pass `linear_map` with `input_shape`, or use multiplier='scalar' or 'norm'."
        )
    if sum(sizes) > 4 * _DIAGONAL_SIZE:
        raise ValueError(
            f"A multiplier per unit for {sizes[0]} outputs and {sizes[1]} inputs would take about "
            f"{8e-11 * sum(sizes) ** 3 / 60 * _STEPS:.0f} minutes and "
            f"{2e-7 * sum(sizes) ** 2:.0f} GB. "
            "Use multiplier='scalar' or 'norm'."
        )
    if linear_map.kind == "dense":
        return np.ascontiguousarray(kernel.T)
    return convolution_matrix(kernel, linear_map).toarray()


def _identity_tap(kernel, linear_map):
    """Index of the kernel tap that copies the input, or None if the map changes its shape."""
    if linear_map.kind not in ("conv", "depthwise") or linear_map.padding != "same":
        return None
    known = dataclasses.replace(linear_map)
    rank = linear_map.rank(kernel.shape)
    if linear_map.input_shape is None:
        size = tuple((k - 1) * 8 + 1 for k in kernel.shape[:rank])
        channels = kernel.shape[-2] * (linear_map.groups if linear_map.kind == "conv" else 1)
        known = dataclasses.replace(linear_map, input_shape=(*size, channels))
    if known.output_shape(kernel.shape) != known.input_shape:
        return None
    taps = []
    for axis in convolution_axes(kernel.shape, known):
        if axis.stride != 1 or axis.left % axis.dilation:
            return None
        taps.append(axis.left // axis.dilation)
    return tuple(taps)


# Searches ---------------------------------------------------------------------------------------


def _problem(weight, sector, constant, direction):
    outputs, inputs = weight.shape
    columns = np.hstack([weight, np.zeros((outputs, outputs))])
    rows = inputs + np.arange(outputs)
    m, p = np.full(outputs, sector.m), np.full(outputs, sector.p)
    return MultiplierProblem(constant, direction, rows, columns, m, p)


def _diagonal(weight, sector, delta, solver):
    """`(ν, Λ)`, proved, or None."""
    outputs, inputs = weight.shape
    constant = np.zeros((inputs + outputs,) * 2)
    constant[inputs:, inputs:] = -delta * np.eye(outputs)
    constant[inputs:, :inputs] = np.eye(outputs, inputs) / 2
    constant[:inputs, inputs:] = np.eye(inputs, outputs) / 2
    direction = np.zeros_like(constant)
    direction[:inputs, :inputs] = np.eye(inputs)
    problem = _problem(weight, sector, constant, direction)
    size = max(float(np.linalg.norm(weight, 2)) * sector.magnitude, 1e-100)
    lam = max(2 * delta, 0.0) + 1 / size
    top = np.eye(outputs, inputs) / 2 - sector.m * lam * weight
    need = top.T @ top / (lam - delta) - sector.p * lam * weight.T @ weight
    start = (1.1 * float(np.linalg.eigvalsh(need)[-1]) + 0.1 * size, np.full(outputs, lam))
    try:
        result = solve(problem, start, solver=solver, scale=1e-2 * size)
    except SolverFailure:
        return None
    proved = verified_minimum(problem, result, start)
    return None if proved is None else (-proved[0], proved[1])


def _linear(weight, slope, delta):
    """Largest ν of y = slope·Wx: the smallest eigenvalue of its supply form, rounded down."""
    outputs, inputs = weight.shape
    square = np.zeros((inputs, inputs))
    shared = min(inputs, outputs)
    square[:shared] = slope * weight[:shared]
    form = (square + square.T) / 2 - delta * slope**2 * (weight.T @ weight)
    form = (form + form.T) / 2
    value, bound = smallest_eigenvalue(form)
    size = abs(slope) * float(np.linalg.norm(weight))
    forming = rounding.gamma(outputs + 8, UNIT) * (size + abs(delta) * size**2)
    return float(rounding.down(value - bound - 1.01 * forming))


def _from_norm(kernel, linear_map, sector, delta):
    """ν = -(δr² + r) with r = σ·max(|α|, |β|): equation (2.1), for δ ≥ 0; -r for smaller δ."""
    gain = rounding.product_up(norm_upper_bound(kernel, linear_map).value, sector.magnitude)
    r = Fraction(gain)
    return round_down(-(Fraction(max(delta, 0.0)) * r * r + r))


def _scalar(kernel, linear_map, sector, delta, tap):
    """Best λ for Λ = λI by golden section, concave in λ; `(ν, λ)`, proved, or None."""
    size = norm_upper_bound(kernel, linear_map).value * sector.magnitude
    if size == 0:
        return None
    floor = max(delta, 0.0)
    sizes = _sizes(kernel, linear_map)
    # Steering only: at real sizes by the bound for all sizes, which is cheaper.
    is_small = sizes is not None and max(sizes) <= 400
    coarse = linear_map if is_small else dataclasses.replace(linear_map, input_shape=None)

    def nu(log_excess, geometry=coarse):
        lam = floor + math.exp(log_excess) / size
        return _nu_of_scalar(kernel, geometry, sector, delta, lam, size, tap), lam

    low, high = math.log(1e-4 * (1 + floor * size)), math.log(1e4 * (1 + floor * size))
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = nu(left)[0], nu(right)[0]
    for _ in range(18):
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = nu(left)[0]
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = nu(right)[0]
    value, lam = nu((low + high) / 2, linear_map)
    return None if value == -math.inf else (value, lam)


def _nu_of_scalar(kernel, linear_map, sector, delta, lam, sigma, tap):
    """Proven ν for Λ = λI, rounded down; -inf if this λ proves nothing.

    With a = pλ - m²λ²/(λ-δ), b = mλ/(2(λ-δ)) and any c, d, the condition
    aTᵀT + b(T + Tᵀ) - (ν + 1/(4(λ-δ)))I ⪰ 0 follows from

        ν ≤ d² - 1/(4(λ-δ)) - ‖cT - dI‖² - max(0, -(a + c²))σ² - 2|b - cd|σ.
    """
    lam_exact, delta_exact = Fraction(lam), Fraction(delta)
    excess = lam_exact - delta_exact
    alpha, beta = Fraction(sector.alpha), Fraction(sector.beta)
    m, p = (alpha + beta) / 2, alpha * beta
    if excess <= 0 or lam < 0:
        return -math.inf
    a, b = p * lam_exact - m**2 * lam_exact**2 / excess, m * lam_exact / (2 * excess)
    if a >= 0:
        return -math.inf
    c = math.sqrt(float(-a))
    if not 0 < c < math.inf:
        return -math.inf
    d = float(b) / c
    shifted = c * kernel
    if linear_map.kind == "conv":
        index = np.arange(kernel.shape[-1])
        shifted[(*tap, index % kernel.shape[-2], index)] -= d
    else:
        shifted[(*tap, slice(None), 0)] -= d
    norm = norm_upper_bound(shifted, linear_map).value
    rounded = 3 * UNIT * (c * absolute_norm_upper_bound(kernel, linear_map) + abs(d))
    norm = Fraction(rounding.sum_up(norm, rounded * (1 + 1e-6)))
    sigma = Fraction(sigma) * Fraction(1 + 2.0**-40) / Fraction(sector.magnitude or 1.0)
    c, d = Fraction(c), Fraction(d)
    drift = max(Fraction(0), -(a + c * c)) * sigma**2 + 2 * abs(b - c * d) * sigma
    return round_down(d * d - 1 / (4 * excess) - norm**2 - drift)
