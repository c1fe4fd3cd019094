"""System 1: cascade matrix, closed-form design, Remark 4, Corollary 2."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory import lyapunov
from tf_lyapunov.theory.cascade import cascade_matrix
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.spectra import is_positive_semidefinite


def test_the_cascade_matrix_is_the_printed_one():
    claim = Indices(0.5, 0.1)
    layers = [Indices(1.0, 0.2), Indices(2.0, 0.05), Indices(3.0, -0.4)]
    expected = np.array(
        [
            [0.1 - 0.2, 0.5, 0.0, -0.5],
            [0.5, -1.0 - 0.05, 0.5, 0.0],
            [0.0, 0.5, -2.0 + 0.4, 0.5],
            [-0.5, 0.0, 0.5, 0.5 - 3.0],
        ]
    )
    np.testing.assert_allclose(cascade_matrix(claim, layers), expected, rtol=1e-15)


def test_one_layer_cancels_the_off_diagonal():
    matrix = cascade_matrix(Indices(0.5, 0.1), [Indices(0.5, 0.1)])
    assert np.array_equal(matrix, np.zeros((2, 2)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.floats(-3.0, 3.0), min_size=8, max_size=8),
    st.lists(st.floats(-3.0, 3.0), min_size=14, max_size=14),
)
def test_minus_a_is_the_quadratic_form_of_the_supply_rates(n, signals, values):
    layers = [Indices(abs(values[2 * i]), min(values[2 * i + 1], 0.0)) for i in range(n)]
    claim = Indices(0.7, -0.3)
    x = np.array(signals[: n + 1])

    def omega(indices, u, y):
        return u * y - indices.delta * y * y - indices.nu * u * u

    direct = omega(claim, x[0], x[n]) - sum(
        omega(layer, x[i], x[i + 1]) for i, layer in enumerate(layers)
    )
    form = x @ -cascade_matrix(claim, layers) @ x
    assert form == pytest.approx(direct, abs=1e-12 * (1 + np.abs(x).max() ** 2) * 50)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(0.0, 1.0), st.integers(1, 12))
def test_the_closed_form_exists_for_every_claim_and_depth(delta, fraction, depth):
    claim = Indices(delta, fraction * 0.25 / delta)
    layers = lyapunov.closed_form_indices(claim, depth)
    assert len(layers) == depth
    for layer in layers:
        assert layer.delta > 0
        assert layer.nu >= 0
        assert layer.delta * layer.nu <= 0.25 * (1 + 2.0**-49)
    matrix = -cascade_matrix(claim, layers)
    d = math.cos(math.pi / (depth + 1)) if depth > 1 else 0.0
    scale = 1 + delta
    np.testing.assert_allclose(np.diag(matrix), d, atol=1e-10 * scale)
    assert np.linalg.eigvalsh(matrix)[0] >= -1e-10 * scale


def test_the_closed_form_is_proved_semidefinite_but_not_quasi_dominant():
    claim = Indices(0.89, 0.28)
    for depth in (2, 3, 5, 8):
        test = lyapunov.theorem_3(claim, lyapunov.closed_form_indices(claim, depth))
        d = math.cos(math.pi / (depth + 1))
        assert test.semidefinite.holds
        assert not test.quasi_dominance.holds
        assert test.quasi_dominance.margin == pytest.approx(d - 1, abs=1e-9)


def test_the_closed_form_diagonal_is_the_smallest_that_works():
    for depth in (2, 3, 4, 7):
        d = math.cos(math.pi / (depth + 1))
        for diagonal, expected in ((d * (1 + 1e-9), True), (d * (1 - 1e-9), False)):
            matrix = diagonal * np.eye(depth + 1)
            matrix -= 0.5 * (np.eye(depth + 1, k=1) + np.eye(depth + 1, k=-1))
            matrix[0, depth] += 0.5
            matrix[depth, 0] += 0.5
            assert is_positive_semidefinite(matrix).holds is expected


def test_the_closed_form_refuses_negative_nu_with_feasible_neighbours():
    with pytest.raises(DesignInfeasible, match="nu") as refusal:
        lyapunov.closed_form_indices(Indices(0.5, -0.1), 4)
    assert refusal.value.nearest
    for claim in refusal.value.nearest:
        lyapunov.closed_form_indices(claim, 4)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 10.0), st.floats(-5.0, 0.0), st.integers(1, 8))
def test_remark_4_is_designed_or_refused_with_the_largest_feasible_nu(delta, nu, depth):
    claim = Indices(delta, nu)
    try:
        layers = lyapunov.remark_4_indices(claim, depth)
    except DesignInfeasible as refusal:
        (nearest,) = refusal.nearest
        assert nearest.delta == delta
        assert nearest.nu < nu
        claim, layers = nearest, lyapunov.remark_4_indices(nearest, depth)
        # The refused claims start just above: nothing much larger would have been feasible.
        with pytest.raises(DesignInfeasible):
            lyapunov.remark_4_indices(Indices(delta, nearest.nu * (1 - 1e-4)), depth)
    assert lyapunov.remark_4_holds(claim, layers)
    if depth > 1:
        assert lyapunov.theorem_3(claim, layers).quasi_dominance.holds
        assert np.linalg.eigvalsh(-cascade_matrix(claim, layers))[0] >= 0


def test_remark_4_without_its_outer_rows_proves_nothing():
    # Interior row as printed (δ_1 + ν_2 > 1), outer rows ignored: -A is indefinite.
    claim = Indices(0.89, 0.28)
    layers = [Indices(1.0, 0.25), Indices(0.5, 0.4)]
    assert layers[0].delta + layers[1].nu > 1
    assert not lyapunov.remark_4_holds(claim, layers)
    assert lyapunov.theorem_3(claim, layers).semidefinite.refuted


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_depth_must_be_a_positive_integer(depth):
    with pytest.raises(ValueError, match="depth"):
        lyapunov.closed_form_indices(Indices(1.0, 0.1), depth)


def test_budgets_need_positive_delta():
    with pytest.raises(ValueError, match="positive"):
        lyapunov.budget(Indices(0.0, -1.0))
    with pytest.raises(ValueError, match="positive"):
        lyapunov.corollary_2(Indices(-1.0, -1.0), 0.1)


@given(st.floats(0.05, 20.0), st.floats(0.0, 1.0))
def test_the_square_root_is_what_the_derivation_gives(delta, fraction):
    layer = Indices(delta, fraction * 0.25 / delta)
    assert lyapunov.budget(layer, square_root=True) ** 2 == pytest.approx(lyapunov.budget(layer))
    assert lyapunov.budget(layer, square_root=True) == pytest.approx(layer.gain_as_published)


@given(st.floats(0.05, 20.0), st.floats(0.0, 1.0))
def test_theorem_2_has_a_counterexample_for_every_pair_with_nu_not_negative(delta, fraction):
    layer = Indices(delta, fraction * 0.25 / delta)
    witness = lyapunov.theorem_2_counterexample(layer, width=3)
    assert np.linalg.norm(witness.weight, 2) <= lyapunov.budget(layer)
    omega = (
        witness.dx @ witness.dy
        - delta * witness.dy @ witness.dy
        - layer.nu * witness.dx @ witness.dx
    )
    assert witness.supply == pytest.approx(omega)
    assert witness.supply < 0
