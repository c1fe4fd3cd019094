"""Passivity indices of one layer from its weights: Theorem 1 as a search, and its proof."""

import dataclasses
import functools
import math
import time
from fractions import Fraction

import numpy as np

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.dissipativity import (
    NetworkIndices,
    estimated_nu,
    proven_indices,
    proven_minimum,
)
from tf_lyapunov.bounds.layer_searches import diagonal_indices, linear_nu
from tf_lyapunov.bounds.programs.interior import MultiplierProblem
from tf_lyapunov.bounds.programs.sdp import check_solver
from tf_lyapunov.bounds.shift_invariant import (
    concave_argmax,
    identity_tap,
    scalar_indices,
)
from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.progress import reports_progress, stage
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.theory.rounding import round_down
from tf_lyapunov.theory.sectors import Sector

MULTIPLIERS = ("auto", "diagonal", "scalar", "norm")
# Signals of input and output together up to which "auto" uses one multiplier per unit (a minute).
_DIAGONAL_SIZE = 1200
# Newton steps that a solve takes.
_STEPS = 60
# Golden sections in the search for the smallest cone: its center to 0.3% of the gain.
_CONES = 12
# Of centers between this and its inverse the squares are numbers, and so is δ.
_SMALLEST = 2.0**-500
_WORDS = {
    "diagonal": "Theorem 1 with one multiplier per output",
    "scalar": "Theorem 1 with one multiplier for all outputs",
    "norm": "rule (2.1) from the operator norm alone",
    "linear": "the eigenvalues of the linear map",
}


@dataclasses.dataclass(frozen=True)
class LayerIndices(NetworkIndices):
    """Passivity indices that a layer's weights prove.

    Attributes:
        delta: δ as asked for, or found.
        nu: a proven ν, rounded down.
        multipliers: Λ, (outputs,) or one number, inf for outputs without weights; empty for the
            rules without multipliers.
        verdict: `"PROVED"`, or `"SOLVER_FAILED"` with ν from a coarser rule.
        seconds: wall time.
        method: `"diagonal"`, `"scalar"`, `"norm"` or `"linear"`.
        layer: name of the layer, `"kernel"` if weights were given.
    """

    method: str
    layer: str

    def explain(self, claim=None):
        """Plain text: what is proved, how, and what a claim on the layer lacks.

        Args:
            claim: `Indices` with a δ of at most this one, or None.
        """
        lines = [
            f"Layer {self.layer!r} is IIFOFP(δ, ν) with δ = {at_least(self.delta, 6)} and "
            f"ν = {at_least(self.nu, 6)}, proved by {_WORDS[self.method]}."
        ]
        if self.delta > 0 and math.isfinite(self.nu):
            a, b = self.indices.slopes
            a, b = at_least(a, 6), at_most(b, 6)
            lines.append(f"Its slopes lie in [{a}, {b}]; its gain is at most {b}.")
        if self.verdict != "PROVED":
            lines.append("The solver failed, so that a coarser rule stands in for it.")
        missing = 0.0 if claim is None else self.shortfall(claim)
        if claim is not None:
            held = f"misses by {missing:.6g} in ν" if missing else "holds"
            lines.append(f"The claim (δ, ν) = ({claim.delta:g}, {claim.nu:g}) {held}.")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class SupplyVerdict:
    """Whether a layer is (Q, S, R)-dissipative by Theorem 1.

    Attributes:
        verdict: `"PROVED"`, `"NOT_PROVED"` or `"SOLVER_FAILED"`.
        margin: largest t found with (matrix of Theorem 1) - tI ⪰ 0, proved; negative if Theorem 1
            does not hold by that much.
        multipliers: Λ that proves it, (outputs,).
        layer: name of the layer, `"kernel"` if weights were given.
    """

    verdict: str
    margin: float
    multipliers: np.ndarray = dataclasses.field(repr=False)
    layer: str = "kernel"

    def __bool__(self):
        return self.verdict == "PROVED"

    def explain(self):
        """Plain text: which layer, and by how much the matrix inequality holds or fails."""
        if self.verdict == "SOLVER_FAILED":
            return f"Layer {self.layer!r}: the solver failed, and nothing is proved."
        if self:
            return f"Layer {self.layer!r} is dissipative: Theorem 1 holds with {self.margin:.6g}I."
        return (
            f"Layer {self.layer!r} is not proved to be dissipative: Theorem 1 would hold with R "
            f"and Q enlarged by {-self.margin:.6g}I."
        )


@reports_progress
def layer_indices(
    layer,
    sector=None,
    *,
    delta=None,
    linear_map=None,
    multiplier="auto",
    solver="structured",
    progress=None,
):
    """Largest ν for which Theorem 1 proves a layer IIFOFP(δ, ν), from its weights.

        maximise ν over diagonal Λ ≥ 0  subject to
        [Λ - δI, ½I - mΛW; (½I - mΛW)ᵀ, pWᵀΛW - νI] ⪰ 0,   m = (α+β)/2, p = αβ.

    Sufficient. I is rectangular where the widths differ. With Λ = λI and a convolution that keeps
    its shape the matrix condition is one operator norm of a convolution with zero padding,

        ν = d² - 1/(4(λ-δ)) - ‖cT - dI‖²,   c² = m²λ²/(λ-δ) - pλ,  d = mλ/(2c(λ-δ)),

    so that real sizes take seconds. Every ν is proved in float64, whatever the solver said.

    Args:
        layer: a built Keras layer with one kernel, an affine layer of `tf_lyapunov.layers`, or a
            kernel in Keras' layout, `(in, out)` if dense.
        sector: slopes of the activation, a `Sector` or what `Sector.of` takes; the layer's own if
            a layer is given.
        delta: δ, any real number; None for the δ > 0 whose cone ‖Δy - cΔu‖ ≤ r‖Δu‖ has about the
            smallest radius r.
        linear_map: geometry of a kernel that is not dense.
        multiplier: `"diagonal"`, `"scalar"` (convolutions that keep their shape), `"norm"` (rule
            (2.1), from σ alone), or `"auto"`.
        solver: see `sdp.solve`.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook.

    Returns:
        `LayerIndices`.

    Raises:
        ValueError: if the size is unknown, or the multiplier does not fit the layer.
        UnsupportedLayerError: for a layer without a linear map, or an unknown activation.

    Example:

    >>> found = layer_indices(np.eye(3), Sector(0.5, 1.0), delta=1.0)
    >>> -1e-6 < found.nu <= 0.0  # slopes in [0.5, 1] lie in the cone of slopes [0, 1] and no less
    True
    >>> a, b = layer_indices(np.eye(3), Sector(0.5, 1.0)).indices.slopes  # the smallest cone
    >>> round(a, 2), round(b, 2)
    (0.5, 1.0)

    Reference: Aquino et al., Theorem 1; sound form with the proof of equation (2.1) for norms.
    """
    begin = time.monotonic()
    if multiplier not in MULTIPLIERS:
        raise ValueError(
            f"`multiplier` must be one of {MULTIPLIERS}. Received: multiplier={multiplier!r}."
        )
    check_solver(solver)
    read = _Layer.read(layer, sector, linear_map)
    if delta is None:
        delta = _delta_of_smallest_cone(read, multiplier, solver)
    else:
        delta = finite_float("delta", delta)
    nu, lam, method, verdict = _largest_nu(read, delta, multiplier, solver)
    if delta > 0:  # beyond it the cone is empty, so that only rounding can lead there
        nu = min(nu, round_down(1 / (4 * Fraction(delta))))
    seconds = time.monotonic() - begin
    return LayerIndices(delta, nu, np.atleast_1d(lam), verdict, seconds, method, read.name)


def _largest_nu(read, delta, multiplier, solver):
    """`(ν, Λ, method, verdict)`."""
    if multiplier == "auto":
        multiplier = read.fitting
    if multiplier == "scalar" and read.tap is None:
        raise ValueError(
            "`multiplier='scalar'` needs a convolution of stride 1 with padding 'same' and as many "
            "channels out as in. Received: another map. Use 'diagonal' or 'norm'."
        )
    if multiplier != "norm":
        found, method = None, multiplier
        if read.sector.alpha == read.sector.beta or not np.any(read.kernel):
            nu, method = linear_nu(read.matrix(), read.sector.alpha, delta), "linear"
            found = None if nu is None else (nu, ())
        elif multiplier == "scalar":
            found = scalar_indices(read.kernel, read.linear_map, read.sector, delta, read.tap)
        else:
            found = diagonal_indices(read.matrix(), read.sector, delta, proven_indices, solver)
        if found is not None:
            return *found, method, "PROVED"
    verdict = "PROVED" if multiplier == "norm" else "SOLVER_FAILED"
    # ν = -(δr² + r), equation (2.1), for δ ≥ 0; -r for smaller δ.
    if math.isinf(read.norm):
        return -math.inf, (), "norm", verdict
    r = Fraction(read.norm)
    return round_down(-(Fraction(max(delta, 0.0)) * r * r + r)), (), "norm", verdict


def _delta_of_smallest_cone(read, multiplier, solver):
    """δ = 1/(2c): the gain of y - cu is convex in c, and its bound r² = c² - 2cν with it."""
    size = min(max(read.norm, _SMALLEST), 1 / _SMALLEST) if read.norm else 1.0
    chosen = read.fitting if multiplier == "auto" else multiplier
    is_curved = read.sector.alpha < read.sector.beta and np.any(read.kernel)
    searches = is_curved and chosen == "diagonal"
    weight = read.matrix() if searches else None

    def largest_nu(delta):
        found = None
        if searches:
            found = diagonal_indices(weight, read.sector, delta, estimated_nu, solver)
        return _largest_nu(read, delta, multiplier, solver)[0] if found is None else found[0]

    def squared_radius(c):
        squared = c * c - 2 * c * largest_nu(1 / (2 * c))
        cones.advance()
        return squared

    with stage("cones", _CONES + 2) as cones:
        # c beyond the gain only widens the cone; c = 0 is the limit of δ to infinity.
        best = concave_argmax(lambda c: -squared_radius(c), 1e-3 * size, size, _CONES)
    return 1 / (2 * best)


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
    from tf_lyapunov.bounds.lipsdp import lipsdp

    read = _Layer.read(layer, sector, linear_map)
    if read.fitting != "diagonal":
        return read.norm
    weight = read.matrix()
    chain = Chain((weight, np.eye(len(weight))), (read.sector,))
    return min(read.norm, lipsdp(chain, solver=solver).gain_upper_bound)


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
    read = _Layer.read(layer, sector, linear_map)
    weight, sector = read.matrix(), read.sector
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
    columns = np.hstack([weight, np.zeros((outputs, outputs))])
    rows, start = inputs + np.arange(outputs), np.ones(outputs)
    m, p = np.full(outputs, sector.m), np.full(outputs, sector.p)
    problem = MultiplierProblem(constant, np.eye(inputs + outputs), rows, columns, m, p)
    scale = float(np.linalg.norm(problem.matrix(0.0, start), 2)) or 1.0
    proved = proven_minimum(problem, (2 * scale, start), solver=solver, tol=1e-7, scale=scale)
    if proved is None:
        return SupplyVerdict("SOLVER_FAILED", -2 * scale, start, read.name)
    # θ ≤ 0 proves M(0) ⪰ 0 as well, since J = I.
    verdict = "PROVED" if proved[0] <= 0 else "NOT_PROVED"
    return SupplyVerdict(verdict, -proved[0], proved[1], read.name)


# Reading ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer as read: its kernel in float64, geometry, slopes and name."""

    kernel: np.ndarray
    linear_map: LinearMap
    sector: Sector
    name: str
    channels_first: bool = False

    @classmethod
    def read(cls, layer, sector, linear_map):
        name, first = "kernel", getattr(layer, "data_format", "") == "channels_first"
        if hasattr(layer, "get_config"):
            kernel, linear_map = _kernel(layer)
            sector, name = layer.activation if sector is None else sector, layer.name
        else:
            kernel = np.asarray(layer, dtype=np.float64)
            linear_map = linear_map or LinearMap("dense")
            if linear_map.kind == "dense" and kernel.ndim != 2:
                raise ValueError(
                    "A dense kernel must have the shape (in, out). Received: shape "
                    f"{kernel.shape}. Pass `linear_map` for a convolution."
                )
            if sector is None:
                raise TypeError(
                    "`sector` must be given with a kernel. Received: sector=None. Use "
                    "`Sector.of('relu')` for an activation, `Sector.linear()` for none."
                )
        if kernel.size == 0 or not np.all(np.isfinite(kernel)):
            raise ValueError(f"A kernel must be finite. Received: shape {kernel.shape}, or NaN.")
        if linear_map.kind == "dense":
            linear_map = LinearMap("dense", (kernel.shape[0],))
        return cls(kernel, linear_map, Sector.of(sector), name, first)

    @property
    def sizes(self):
        """`(outputs, inputs)` of the flattened map, or None if the size is unknown."""
        shape = self.linear_map.input_shape
        if shape is None:
            return None
        return math.prod(self.linear_map.output_shape(self.kernel.shape)), math.prod(shape)

    @functools.cached_property
    def tap(self):
        """Index of the tap that copies the input, or None if the map changes its shape."""
        return identity_tap(self.kernel, self.linear_map)

    @property
    def fitting(self):
        """The multiplier that is tightest among those that take about a minute at most."""
        small = self.sizes is not None and sum(self.sizes) <= _DIAGONAL_SIZE
        if small and not self.channels_first:
            return "diagonal"
        return "scalar" if self.tap is not None else "norm"

    @functools.cached_property
    def norm(self):
        """σ·max(|α|, |β|), rounded up: the gain of the layer."""
        norm = norm_upper_bound(self.kernel, self.linear_map).value
        return rounding.product_up(norm, self.sector.magnitude)

    def matrix(self):
        """W, float64 (outputs, inputs)."""
        if self.channels_first:
            raise ValueError(
                "Signals are compared in the order of their entries, which is known for "
                f"channels_last. Received: layer {self.name!r} with channels_first. Use "
                "multiplier='scalar' or 'norm'."
            )
        sizes = self.sizes
        if sizes is None:
            raise ValueError(
                "A convolution needs a known input size here. Received: input_shape=None. "
                "Pass `linear_map` with `input_shape`, or use multiplier='scalar' or 'norm'."
            )
        if sum(sizes) > 4 * _DIAGONAL_SIZE:
            raise ValueError(
                f"A multiplier per unit for layer {self.name!r} with {sizes[0]} outputs and "
                f"{sizes[1]} inputs would take about "
                f"{8e-11 * sum(sizes) ** 3 / 60 * _STEPS:.0f} minutes and "
                f"{2e-7 * sum(sizes) ** 2:.0f} GB. Use multiplier='scalar' or 'norm'."
            )
        if self.linear_map.kind == "dense":
            return np.ascontiguousarray(self.kernel.T)
        return convolution_matrix(self.kernel, self.linear_map).toarray()


def _kernel(layer):
    """The kernel of a Keras layer or of one of `tf_lyapunov.layers`, with its geometry."""
    from tf_lyapunov.layers.linear import LipschitzConv, LipschitzDense

    call = type(layer).call
    if layer.built and call in (LipschitzDense.call, LipschitzConv.call):
        is_dense = call is LipschitzDense.call
        linear_map = LinearMap("dense") if is_dense else layer.linear_map
        return layer.effective_values()["kernel"], linear_map
    if not call.__module__.startswith("keras."):
        raise UnsupportedLayerError(
            "The indices of a layer are read from its kernel. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}, which may use it in another way. "
            "Pass the kernel that it computes with."
        )
    maps = linear_maps(layer)
    if len(maps) != 1:
        raise UnsupportedLayerError(
            "Indices are of layers with one linear map. Received: "
            f"{layer.name!r} of type {type(layer).__name__} with {len(maps)}. "
            "Pass its kernels one by one."
        )
    variable, linear_map = maps[0]
    return inference_value(variable, layer.compute_dtype), linear_map
