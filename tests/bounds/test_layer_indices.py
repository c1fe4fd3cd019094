"""Indices from weights: against an independent program, against counterexamples, and real sizes."""

import math
from fractions import Fraction

import keras
import numpy as np
import pytest

from tf_lyapunov.bounds import dissipativity
from tf_lyapunov.bounds.layer_indices import (
    indices_frontier,
    is_dissipative,
    layer_gain,
    layer_indices,
)
from tf_lyapunov.errors import SolverFailure, UnsupportedLayerError
from tf_lyapunov.theory.dissipativity import theorem_1_matrix, worst_supply
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.spectra import is_positive_semidefinite

SECTORS = [Sector(0.0, 1.0), Sector(0.1, 1.0), Sector(-0.13, 1.13)]


def published_program(weight, sector, delta, scalar=False):
    """Largest ν of Theorem 1 by cvxpy, written as printed."""
    cp = pytest.importorskip("cvxpy", reason="the second formulation needs cvxpy")
    outputs, inputs = weight.shape
    nu = cp.Variable()
    lam = cp.Variable(nonneg=True) * np.eye(outputs) if scalar else None
    if lam is None:
        lam = cp.diag(cp.Variable(outputs, nonneg=True))
    s = np.eye(outputs, inputs) / 2
    corner = s - sector.m * lam @ weight
    bottom = sector.p * weight.T @ lam @ weight - nu * np.eye(inputs)
    matrix = cp.bmat([[lam - delta * np.eye(outputs), corner], [corner.T, bottom]])
    cp.Problem(cp.Maximize(nu), [(matrix + matrix.T) / 2 >> 0]).solve(solver="CLARABEL")
    return float(nu.value)


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.7])
def test_nu_is_the_optimum_of_theorem_1(sector, shape, delta):
    weight = np.random.default_rng(sum(shape)).normal(size=shape) + 0.5 * np.eye(*shape)
    found = layer_indices(weight.T, sector, delta=delta)
    expected = published_program(weight, sector, delta)
    assert found.verdict == "PROVED" and found.method == "diagonal"
    assert found.nu == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.7, 30.0])
@pytest.mark.parametrize("shape, rank", [((3, 8), 3), ((4, 30), 2), ((1, 5), 1)])
def test_inputs_that_share_no_output_cost_nothing_and_change_nothing(
    sector, delta, shape, rank, monkeypatch
):
    rng = np.random.default_rng(sum(shape))
    weight = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    weight[:, : shape[0]] += np.eye(shape[0])
    seen, kept = [], dissipativity._problem
    monkeypatch.setattr(
        dissipativity, "_problem", lambda chain, d: seen.append(chain.widths[0]) or kept(chain, d)
    )
    found = layer_indices(weight.T, sector, delta=delta)
    assert min(seen) == 2 * shape[0]  # those that an output is compared with, and as many as W sees
    monkeypatch.setattr(dissipativity, "_fewer_inputs", lambda chain: chain)
    whole = layer_indices(weight.T, sector, delta=delta)
    assert found.verdict == whole.verdict == "PROVED"
    assert found.nu == pytest.approx(whole.nu, rel=1e-6, abs=1e-7) and found.nu <= 0


@pytest.mark.parametrize("sector", SECTORS)
def test_the_smallest_cone_is_found_without_proofs_on_the_way(sector, monkeypatch):
    weight = np.random.default_rng(1).normal(size=(4, 12))
    proofs, kept = [], dissipativity.verified_minimum
    monkeypatch.setattr(
        dissipativity, "verified_minimum", lambda *a, **o: proofs.append(1) or kept(*a, **o)
    )
    found = layer_indices(weight.T, sector)
    assert found.verdict == "PROVED" and len(proofs) == 1
    radius = lambda p: (1 / (2 * p.delta)) ** 2 - p.nu / p.delta  # noqa: E731
    for factor in (0.8, 1.25):
        other = layer_indices(weight.T, sector, delta=found.delta * factor)
        assert radius(found) <= radius(other) * (1 + 1e-5)


@pytest.mark.parametrize("sector", SECTORS)
def test_the_multipliers_make_the_published_matrix_semidefinite(sector):
    weight = np.random.default_rng(3).normal(size=(4, 5))
    found = layer_indices(weight.T, sector, delta=0.4)
    slack = Indices(found.delta, found.nu - 1e-9)
    matrix = theorem_1_matrix(weight, sector, slack, found.multipliers)
    assert is_positive_semidefinite(matrix).holds
    greedy = Indices(found.delta, found.nu + 1e-3)
    assert is_positive_semidefinite(
        theorem_1_matrix(weight, sector, greedy, found.multipliers)
    ).refuted


@pytest.mark.parametrize("sector", [*SECTORS, Sector.linear(), Sector(-0.7, -0.7)])
@pytest.mark.parametrize("seed", range(4))
def test_no_counterexample_violates_the_indices(sector, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=rng.integers(1, 5, size=2))
    for delta in (-0.3, 0.0, 0.5, 3.0):
        for multiplier in ("diagonal", "norm"):
            found = layer_indices(weight.T, sector, delta=delta, multiplier=multiplier)
            worst = worst_supply(weight, sector, found.indices, draws=8, seed=seed)
            assert worst.supply >= -1e-12


def test_a_linear_layer_has_its_exact_indices():
    weight = np.random.default_rng(0).normal(size=(3, 3))
    found = layer_indices(weight.T, Sector.linear(), delta=0.3)
    exact = np.linalg.eigvalsh((weight + weight.T) / 2 - 0.3 * weight.T @ weight)[0]
    assert found.nu <= exact and found.nu == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("padded", [(5,), (4, 4)])
def test_a_scalar_multiplier_is_exact_for_zero_padded_convolutions(sector, padded):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(3,) * len(padded) + (2, 2)) / 3
    geometry = LinearMap("conv", (*padded, 2), padding="same")
    matrix = convolution_matrix(kernel, geometry).toarray()
    found = layer_indices(kernel, sector, delta=0.4, linear_map=geometry, multiplier="scalar")
    expected = published_program(matrix, sector, 0.4, scalar=True)
    assert found.nu <= expected + 1e-6
    assert found.nu == pytest.approx(expected, rel=1e-3)
    diagonal = layer_indices(kernel, sector, delta=0.4, linear_map=geometry)
    assert diagonal.method == "diagonal"
    by_norm = layer_indices(kernel, sector, delta=0.4, linear_map=geometry, multiplier="norm")
    assert by_norm.nu <= found.nu + 1e-9 and found.nu <= diagonal.nu + 1e-6
    assert worst_supply(matrix, sector, found.indices, draws=4).supply >= -1e-12


@pytest.mark.parametrize(
    "geometry, shape",
    [
        (LinearMap("conv", (6, 6, 4), padding="same", groups=2), (3, 3, 2, 4)),
        (LinearMap("conv", (7, 2), padding="same", dilation=2), (3, 2, 2)),
        (LinearMap("conv", (6, 2), padding="same"), (4, 2, 2)),
        (LinearMap("depthwise", (5, 5, 3), padding="same"), (3, 3, 3, 1)),
    ],
)
def test_the_identity_tap_is_found_in_every_geometry(geometry, shape):
    # A kernel whose map is the identity: with slopes [0.5, 1] its cone is that of the activation.
    kernel = np.zeros(shape)
    for position in np.ndindex(shape):
        trial = np.zeros(shape)
        trial[position] = 1.0
        matrix = convolution_matrix(trial, geometry).toarray()
        if np.array_equal(matrix, np.diag(np.diag(matrix))):
            kernel += trial
    assert np.array_equal(
        convolution_matrix(kernel, geometry).toarray(), np.eye(np.prod(geometry.input_shape))
    )
    sector = Sector(0.5, 1.0)
    found = layer_indices(kernel, sector, delta=2 / 3, linear_map=geometry, multiplier="scalar")
    assert found.nu == pytest.approx(Indices.from_slopes(0.5, 1.0).nu, abs=1e-4)


def test_a_convolution_of_real_size_takes_seconds_and_beats_the_norm_rule():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 16, 16)) / 12
    geometry = LinearMap("conv", (28, 28, 16), padding="same")
    found = layer_indices(kernel, Sector(0.0, 1.0), delta=0.5, linear_map=geometry)
    assert found.method == "scalar" and found.seconds < 20
    by_norm = layer_indices(
        kernel, Sector(0.0, 1.0), delta=0.5, linear_map=geometry, multiplier="norm"
    )
    sigma = norm_upper_bound(kernel, geometry).value
    assert by_norm.nu == pytest.approx(-(0.5 * sigma**2 + sigma), rel=1e-9)
    assert by_norm.nu < found.nu < 0


def test_the_frontier_falls_and_its_gains_approach_the_layers_gain():
    kernel = np.random.default_rng(4).normal(size=(4, 4))
    frontier = indices_frontier(kernel, Sector(0.0, 1.0), deltas=[0.1, 1.0, 10.0, 100.0])
    nus = [point.nu for point in frontier]
    assert nus == sorted(nus, reverse=True)
    gain = layer_gain(kernel, Sector(0.0, 1.0))
    assert gain <= np.linalg.norm(kernel, 2) * (1 + 1e-12)
    gains = [point.gain_upper_bound for point in frontier]
    assert min(gains) >= gain * (1 - 1e-6)
    assert gains[-1] == pytest.approx(gain, rel=0.02)


def test_general_supply_rates_are_decided_on_both_sides():
    weight = np.random.default_rng(5).normal(size=(3, 4))
    sector, eye, wide = Sector(0.0, 1.0), np.eye(3), np.eye(4)
    gain = layer_gain(weight.T, sector)
    options = {"q": -eye, "s": np.zeros((3, 4))}
    holds = is_dissipative(weight.T, sector, r=(1.001 * gain) ** 2 * wide, **options)
    fails = is_dissipative(weight.T, sector, r=(0.99 * gain) ** 2 * wide, **options)
    assert holds and holds.verdict == "PROVED" and holds.margin >= 0
    assert not fails and fails.verdict == "NOT_PROVED" and fails.margin < 0
    indices = layer_indices(weight.T, sector, delta=0.5).indices
    supply = {"q": -0.5 * eye, "s": np.eye(3, 4) / 2}
    assert is_dissipative(weight.T, sector, r=(1e-5 - indices.nu) * wide, **supply)
    assert not is_dissipative(weight.T, sector, r=(-1e-2 - indices.nu) * wide, **supply)


def test_keras_layers_are_read_with_their_activation():
    layer = keras.layers.Dense(3, activation="leaky_relu")
    layer.build((None, 4))
    kernel = np.asarray(layer.kernel, dtype=np.float64)
    expected = layer_indices(kernel, "leaky_relu", delta=0.3)
    found = layer_indices(layer, delta=0.3)
    assert found.nu == expected.nu and found.layer == layer.name and expected.layer == "kernel"
    assert found.nu == layer_indices(kernel, Sector.of("leaky_relu"), delta=0.3).nu
    conv = keras.layers.Conv2D(2, 3, padding="same", activation="relu")
    conv.build((None, 4, 4, 2))
    assert layer_indices(conv, delta=0.3).verdict == "PROVED"
    separable = keras.layers.SeparableConv1D(2, 3)
    separable.build((None, 6, 2))
    with pytest.raises(UnsupportedLayerError, match="one linear map"):
        layer_indices(separable, Sector.linear(), delta=0.3)


def test_lipschitz_layers_are_read_with_their_effective_kernel():
    from tf_lyapunov.layers.almost_orthogonal import AlmostOrthogonalConv2D
    from tf_lyapunov.layers.normalized import SpectralDense
    from tf_lyapunov.layers.potential import ConvexPotentialDense

    layer = SpectralDense(4, activation="relu", max_gain=0.7)
    layer.build((None, 4))
    x = np.random.default_rng(0).normal(size=(2, 500, 4)).astype("float32")
    y = np.array([layer(part) for part in x], dtype=np.float64)
    found = layer_indices(layer, delta=0.5)
    assert found.verdict == "PROVED" and found.gain_upper_bound < 3.0
    dx, dy = (x[0] - x[1]).astype(np.float64), y[0] - y[1]
    supply = np.sum(dx * dy, 1) - 0.5 * np.sum(dy**2, 1) - found.nu * np.sum(dx**2, 1)
    assert np.all(supply >= -1e-5 * np.sum(dx**2, 1))
    assert layer_gain(layer) <= 0.7 * (1 + 1e-6)
    conv = AlmostOrthogonalConv2D(2, 3, activation="relu")
    conv.build((None, 4, 4, 2))
    assert layer_indices(conv, delta=0.5).verdict == "PROVED"
    potential = ConvexPotentialDense(4)
    potential.build((None, 4))
    with pytest.raises(UnsupportedLayerError, match="ConvexPotentialDense"):
        layer_indices(potential, delta=0.5)


def test_what_a_claim_lacks_is_said_with_the_layers_name():
    layer = keras.layers.Dense(2, "relu", name="third", kernel_initializer="identity")
    layer.build((None, 2))
    found = layer_indices(layer, delta=2.0)
    assert found.shortfall(Indices(2.0, -2.0)) == 0.0
    assert found.shortfall(Indices(1.0, -2.0)) == 0.0
    assert found.shortfall(Indices(2.0, -0.5)) == pytest.approx(-0.5 - found.nu)
    text = found.explain(Indices(2.0, -0.5))
    assert "'third'" in text and "misses by 0.5 in ν" in text
    assert "holds" in found.explain(Indices(2.0, -2.0))
    with pytest.raises(ValueError, match=r"`claim.delta` must be at most"):
        found.shortfall(Indices(3.0, -9.0))
    supply = {"q": -np.eye(2), "s": np.zeros((2, 2)), "r": 0.75 * np.eye(2)}
    text = is_dissipative(layer, **supply).explain()
    # (λ-1+t)(3/4+t) ≥ λ²/4 for some λ from t = 1/8 on.
    assert "'third' is not proved" in text and "enlarged by 0.125I" in text
    assert "holds with" in is_dissipative(layer, **{**supply, "r": 2 * np.eye(2)}).explain()


@pytest.mark.parametrize("seed", range(3))
def test_without_a_delta_the_cone_is_about_the_smallest(seed):
    rng = np.random.default_rng(seed)
    weight = np.eye(4) + rng.normal(size=(4, 4)) / 4

    def radius(found):
        a, b = found.indices.slopes
        return (b - a) / 2

    best = layer_indices(weight.T, Sector(0.3, 1.0))
    gain = layer_gain(weight.T, Sector(0.3, 1.0))
    others = [
        radius(layer_indices(weight.T, Sector(0.3, 1.0), delta=1 / (2 * c * gain)))
        for c in np.linspace(0.05, 1.2, 24)
    ]
    assert best.verdict == "PROVED" and radius(best) < gain
    assert min(others) - 0.05 * gain < radius(best) <= min(others) * (1 + 2e-3)


@pytest.mark.filterwarnings("error")
def test_units_without_weights_and_extreme_sizes_are_no_exception():
    weight = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]])
    relu = Sector(0.0, 1.0)
    whole = layer_indices(weight[:2].T, relu, delta=0.7)
    with_dead = layer_indices(weight.T, relu, delta=0.7)
    assert with_dead.verdict == "PROVED"
    assert np.isinf(with_dead.multipliers).tolist() == [False, False, True, False]
    assert with_dead.nu == pytest.approx(whole.nu, rel=1e-6)
    assert -1e-6 <= layer_indices(np.zeros((2, 3)), relu, delta=0.7).nu <= 0.0
    for power in (-500, 500):
        scaled = layer_indices(np.ldexp(weight[:2].T, power), relu, delta=np.ldexp(0.7, -power))
        assert scaled.nu == pytest.approx(np.ldexp(whole.nu, power), rel=1e-6)


def test_a_failing_solver_leaves_the_norm_rule(monkeypatch):
    from tf_lyapunov.bounds import layer_indices as module

    def fails(*args, **kwargs):
        raise SolverFailure("no", "structured", "error")

    monkeypatch.setattr("tf_lyapunov.bounds.dissipativity.solve", fails)
    found = module.layer_indices(np.eye(2), Sector(0.0, 1.0), delta=1.0)
    assert found.verdict == "SOLVER_FAILED" and found.method == "norm"
    assert found.nu == pytest.approx(-2.0)


def test_bad_arguments_are_refused_by_name():
    relu, kernel = Sector(0.0, 1.0), np.eye(3)
    with pytest.raises(ValueError, match="`delta` must be finite"):
        layer_indices(kernel, relu, delta=np.nan)
    with pytest.raises(ValueError, match="`multiplier` must be one of"):
        layer_indices(kernel, relu, delta=1.0, multiplier="full")
    with pytest.raises(ValueError, match="multiplier='scalar'"):
        layer_indices(kernel, relu, delta=1.0, multiplier="scalar")
    with pytest.raises(TypeError, match="`sector` must be given with a kernel"):
        layer_indices(kernel, delta=1.0)
    with pytest.raises(UnsupportedLayerError, match="softmax"):
        layer_indices(kernel, "softmax", delta=1.0)
    with pytest.raises(ValueError, match="input_shape=None"):
        layer_indices(
            np.ones((3, 2, 2)), relu, delta=1.0, linear_map=LinearMap("conv"), multiplier="diagonal"
        )
    with pytest.raises(ValueError, match="`r` must be a finite symmetric matrix"):
        is_dissipative(kernel, relu, q=kernel, s=kernel, r=np.ones((2, 2)))
    with pytest.raises(ValueError, match="`deltas` must increase"):
        indices_frontier(kernel, relu, deltas=[1.0, 0.0])
    wide = LinearMap("conv", (64, 64, 3), padding="same")
    with pytest.raises(ValueError, match=r"minutes and \d+ GB.*scalar"):
        layer_indices(
            np.ones((3, 3, 3, 3)), relu, delta=1.0, linear_map=wide, multiplier="diagonal"
        )


def test_quantized_layers_and_adapters_are_refused():
    """The stored integers of an int8 layer are not its weights: here they are 8 times smaller."""
    layer = keras.layers.Dense(3)
    layer.build((None, 3))
    layer.set_weights([1000 * np.eye(3), np.zeros(3)])
    layer.quantize("int8")
    with pytest.raises(UnsupportedLayerError, match="Quantized"):
        layer_indices(layer, Sector(0.0, 1.0), delta=1.0)
    layer = keras.layers.Dense(3)
    layer.build((None, 3))
    layer.enable_lora(1)
    with pytest.raises(UnsupportedLayerError, match="LoRA"):
        layer_indices(layer, Sector(0.0, 1.0), delta=1.0)


def test_layers_that_use_their_kernel_in_another_way_are_refused():
    class Amplified(keras.layers.Dense):
        def call(self, x):
            return 100.0 * super().call(x)

    layer = Amplified(3)
    layer.build((None, 3))
    with pytest.raises(UnsupportedLayerError, match="Amplified"):
        layer_indices(layer, delta=1.0)


def test_signals_with_channels_first_are_not_paired_as_if_channels_came_last():
    layer = keras.layers.Conv1D(1, 1, use_bias=False, data_format="channels_first")
    layer.build((None, 2, 3))
    layer.set_weights([np.array([[[1.0], [0.0]]])])
    found = layer_indices(layer, delta=0.1)
    # y_t = u_{0t} by rows: Δuᵀ Δy = |u_0|², hence ν = 0; with channels last it is negative.
    assert found.method == "norm" and found.nu <= 0.0
    with pytest.raises(ValueError, match="channels_last"):
        layer_indices(layer, delta=0.1, multiplier="diagonal")


@pytest.mark.parametrize("weight, slope", [(1e-170, 1.0), (1.0, 1e-170), (1e-120, 1e-50)])
def test_squares_that_underflow_are_not_left_out_of_the_indices(weight, slope):
    # y = su, s = 1e-170: sΔu² - δs²Δu² with δ = 1e300 is -1e-40, which s² alone does not show.
    found = layer_indices(np.array([[weight]]), Sector(slope, slope), delta=1e300)
    truth = Fraction(weight) * Fraction(slope) * (1 - 10**300 * Fraction(weight) * Fraction(slope))
    assert truth * (1 + Fraction(1, 10**12)) < Fraction(found.nu) <= truth


@pytest.mark.parametrize("size", [1.7e308, 1e200, 1e-200, 1e-310, 5e-324])
@pytest.mark.parametrize("multiplier", ["auto", "scalar"])
@pytest.mark.parametrize("sector", [(0.0, 1.0), (1.0, 1.0), (-2.0, -1.0), (0.0, 1e200)])
def test_indices_of_weights_of_any_size_are_proved_or_said_not_to_be(size, multiplier, sector):
    kernel, linear_map = np.full((1, 1, 1), size), LinearMap("conv", (3, 1), padding="same")
    slopes = [Fraction(size) * Fraction(s) for s in sector]  # of the layer, channel by channel
    for delta in (None, 1.0, 0.0, -1e300, 1e300):
        found = layer_indices(
            kernel, Sector(*sector), delta=delta, linear_map=linear_map, multiplier=multiplier
        )
        assert found.explain()
        if math.isfinite(found.nu):
            worst = min(s - Fraction(found.delta) * s * s for s in slopes)
            assert Fraction(found.nu) <= worst
        else:
            assert found.nu == -math.inf
