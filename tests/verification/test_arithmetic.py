"""The verifier's own arithmetic against exact rationals and an independent SVD."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.verification import activations, inequalities
from tf_lyapunov.verification.arithmetic import (
    has_square_root,
    hypot_up,
    is_semidefinite,
    largest_eigenvalue_up,
    norm_near,
    norm_up,
    product_up,
    row_norms_up,
    sqrt_up,
    sum_up,
    times,
)
from tf_lyapunov.verification.inequalities import Multipliers, cone_gain
from tf_lyapunov.verification.network import Chain
from tf_lyapunov.verification.operations import AveragePooling, Axis, Convolution, MaxPooling

positive = st.floats(1e-100, 1e100)


@given(st.lists(positive, min_size=1, max_size=3))
def test_scalar_bounds_are_never_below_exact_rationals(values):
    exact = [Fraction(v) for v in values]
    assert Fraction(product_up(*values)) >= math.prod(exact)
    assert Fraction(sum_up(*values)) >= sum(exact)
    assert Fraction(sqrt_up(values[0])) ** 2 >= exact[0]
    assert Fraction(hypot_up(*values)) ** 2 >= sum(v * v for v in exact)
    assert hypot_up(*values) <= math.sqrt(3) * max(values) * (1 + 1e-12)
    assert Fraction(float(row_norms_up(np.array([values]))[0])) ** 2 >= sum(v * v for v in exact)


def test_products_lie_within_their_errors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 30)), rng.normal(size=(30, 5)) * 1e8
    drift = 1e-9 * np.abs(a)
    product, error = times(a, b, drift, 0.0)
    for i in range(4):
        for j in range(5):
            for sign in (-1, 1):
                moved = [Fraction(float(v)) + sign * Fraction(float(d)) for v, d in
                         zip(a[i], drift[i], strict=True)]  # fmt: skip
                exact = sum(m * Fraction(float(v)) for m, v in zip(moved, b[:, j], strict=True))
                assert abs(exact - Fraction(float(product[i, j]))) <= Fraction(float(error[i, j]))


def test_a_positive_matrix_is_proved_and_a_negative_eigenvalue_is_not():
    rng = np.random.default_rng(1)
    for side in (1, 2, 40):
        basis = np.linalg.qr(rng.normal(size=(side, side)))[0]
        values = np.linspace(1e-9, 3.0, side)
        matrix = (basis * values) @ basis.T
        matrix = (matrix + matrix.T) / 2 * 2.0**300
        assert is_semidefinite(matrix)
        worse = matrix - 2.0**300 * 1.1e-9 * np.eye(side)
        assert not is_semidefinite(worse)
        # An entrywise error that could tip it is noticed.
        assert not is_semidefinite(matrix, 2.0**300 * 1e-8 * np.eye(side))
    assert not is_semidefinite(np.array([[1.0, np.nan], [np.nan, 1.0]]))
    assert not is_semidefinite(np.array([[0.0, 0.0], [0.0, 1.0]]))


def test_a_factor_is_checked_and_not_believed(monkeypatch):
    matrix = np.eye(3)
    assert has_square_root(matrix, 1e-12)
    monkeypatch.setattr(np.linalg, "cholesky", lambda a: np.eye(3) * (1 + 1e-6))
    assert not has_square_root(matrix, 1e-12)
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: np.zeros(3))
    monkeypatch.undo()
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: np.array([0.5]))
    assert largest_eigenvalue_up(np.diag([1.0, 2.0, 3.0])) >= 3.0


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (30, 20), (20, 300)])
def test_norms_are_bounds_and_tight(shape):
    matrix = np.random.default_rng(2).normal(size=shape) * 1e-150
    true = np.linalg.svd(matrix * 1e150, compute_uv=False)[0] * 1e-150
    bound = norm_up(matrix)
    assert true * (1 - 1e-14) <= bound <= true * (1 + 1e-10)
    assert norm_up(matrix, np.full(shape, 1e-160)) > bound
    assert norm_up(np.zeros(shape)) == 0.0


@pytest.mark.parametrize("shape", [(30, 20), (260, 300), (320, 230)])
def test_norms_near_a_guess_are_bounds_and_nearly_tight(shape):
    rng = np.random.default_rng(3)
    equal = np.zeros(shape)
    np.fill_diagonal(equal, 3.0)
    for matrix in (rng.normal(size=shape), equal, np.outer(rng.normal(size=shape[0]), equal[0])):
        true = np.linalg.svd(matrix, compute_uv=False)[0]
        assert true * (1 - 1e-14) <= norm_near(matrix) <= true * 1.01
        assert norm_near(matrix * 2.0**-600) == norm_near(matrix) * 2.0**-600
    assert norm_near(np.zeros(shape)) == 0.0


def test_a_guess_that_is_too_small_is_not_believed(monkeypatch):
    # The power method begins at the first direction, to which the largest is orthogonal.
    matrix = np.full((250, 250), 0.1)
    matrix[0, :] = matrix[:, 0] = 0.0
    matrix[0, 0] = 5.0
    assert 24.9 * (1 - 1e-14) <= norm_near(matrix) <= 24.9 * 1.01
    monkeypatch.setattr(np.linalg, "cholesky", lambda a: np.eye(250))
    assert norm_near(np.eye(250)) == np.inf


GEOMETRIES = [
    ("conv", (3, 3, 2, 4), (8, 7, 2), 1, 1, "same"),
    ("conv", (3, 2, 2, 4), (8, 7, 2), 2, 1, "same"),
    ("conv", (3, 3, 2, 1), (9, 9, 2), 1, 2, "valid"),
    ("conv", (5, 2, 3), (9, 2), 3, 1, "causal"),
    ("conv", (2, 2, 3, 6), (5, 6, 3), 2, 1, "valid"),
    ("depthwise", (3, 3, 3, 2), (6, 6, 3), 2, 1, "same"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_are_those_of_the_materialised_map(geometry):
    kind, kernel_shape, shape, stride, dilation, padding = geometry
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=kernel_shape)
    rank = len(shape) - 1
    linear_map = LinearMap(kind, shape, (stride,) * rank, (dilation,) * rank, padding)
    oracle = convolution_matrix(kernel, linear_map).toarray()
    kernels = kernel[None] if kind == "conv" else np.moveaxis(kernel, -2, 0)[..., None, :]
    axes = tuple(
        Axis.of(k, stride, dilation, n, padding)
        for k, n in zip(kernel_shape[:rank], shape, strict=False)
    )
    channels = kernels.shape[0] * kernels.shape[-1]
    mine = Convolution(kernels, axes, np.zeros(channels))
    weight, error = mine.matrix(shape)
    assert np.array_equal(weight, oracle) and error == 0.0
    true = np.linalg.svd(oracle, compute_uv=False)[0]
    assert true * (1 - 1e-14) <= mine.gain() <= true * (1 + 1e-10)
    by_frequency = max(
        Convolution(kernels[g : g + 1], axes, np.zeros(channels))._frequency_norm_up()
        for g in range(len(kernels))
    )
    assert true * (1 - 1e-14) <= by_frequency <= 1.5 * true
    values, errors = mine.forward(rng.normal(size=(2, *shape)), np.zeros((2, *shape)))
    x = np.random.default_rng(3)
    x.normal(size=kernel_shape)
    exact = oracle @ x.normal(size=(2, *shape)).reshape(2, -1).T
    assert np.all(np.abs(values.reshape(2, -1) - exact.T) <= errors.reshape(2, -1))
    assert errors.max() < 1e-12


@pytest.mark.parametrize(("size", "pool", "stride", "padding"), [
    (6, 3, 2, "valid"), (7, 3, 1, "same"), (5, 2, 2, "same"),
])  # fmt: skip
def test_pooling_gains_bound_sampled_differences(size, pool, stride, padding):
    axes = (Axis.of(pool, stride, 1, size, padding),) * 2
    rng = np.random.default_rng(4)
    for operation in (MaxPooling(axes), AveragePooling(axes)):
        best = 0.0
        for sparsity in (0.0, 0.5, 0.9):
            x = rng.normal(size=(200, size, size, 1))
            e = rng.normal(size=x.shape) * (rng.random(x.shape) >= sparsity)
            zero = np.zeros_like(x)
            change = operation.forward(x + e, zero)[0] - operation.forward(x, zero)[0]
            ratio = np.linalg.norm(change.reshape(200, -1), axis=1)
            size_e = np.linalg.norm(e.reshape(200, -1), axis=1)
            best = max(best, float(np.max(ratio[size_e > 0] / size_e[size_e > 0])))
        assert best <= operation.gain() * (1 + 1e-14)


@pytest.mark.parametrize("name", sorted(activations.TABLE))
def test_slopes_contain_the_derivatives_and_are_nearly_reached(name):
    x = np.linspace(-30, 30, 60001)
    for parameters in ({}, {"approximate": True}) if name == "gelu" else ({},):
        y, errors = activations.evaluate(name, parameters, x, np.zeros_like(x))
        assert errors.max() < 1e-12
        slope = np.diff(y) / np.diff(x)
        alpha, beta = activations.slopes(name, parameters)
        # Means of the slope over steps of h = 10⁻³, of values that round.
        room = 2e-16 * 30 / 1e-3
        assert slope.min() >= alpha - room and slope.max() <= beta + room
        assert slope.max() >= beta - 2e-3
        assert slope.min() <= alpha + 2e-3


def test_cone_gains_are_those_of_exact_arithmetic():
    for delta, nu in ((0.4, -2.0), (1.0, 0.25), (64.0, -1e-3)):
        root = math.sqrt(1 - 4 * delta * nu)
        assert (1 + root) / (2 * delta) <= cone_gain(delta, nu) <= (1 + root) / (2 * delta) + 1e-7
    assert cone_gain(1.0, 0.3) == math.inf


@pytest.mark.parametrize("lam", [5e-324, 3e-320, 1e-300, 1.0])
def test_the_error_of_the_form_covers_products_that_underflow(lam):
    chain = Chain((np.array([[0.9]]), np.array([[1.0]])), (0.0, 0.0), ((0.1, 1.0),))
    used = Multipliers(1.0, (np.array([lam]),), ((0.1, 1.0),))
    matrix, error, _ = inequalities._layers_form(chain, used)
    exact = -(Fraction(0.1) + 1) / 2 * Fraction(lam) * Fraction(0.9)
    assert abs(Fraction(matrix[1, 0]) - exact) <= Fraction(error[1, 0])
