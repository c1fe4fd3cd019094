"""The float64 proofs behind every solver, and the door to solvers."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.bounds.programs import sdp
from tf_lyapunov.bounds.programs.interior import MultiplierProblem, minimise
from tf_lyapunov.errors import SolverFailure


def is_exactly_semidefinite(matrix):
    """Positive semidefiniteness by rational elimination."""
    a = [[Fraction(float(v)) for v in row] for row in matrix]
    n = len(a)
    for k in range(n):
        if a[k][k] < 0:
            return False
        if a[k][k] == 0:
            if any(a[i][k] != 0 for i in range(k + 1, n)):
                return False
            continue
        for i in range(k + 1, n):
            factor = a[i][k] / a[k][k]
            for j in range(k + 1, n):
                a[i][j] -= factor * a[k][j]
    return True


def tridiagonal(seed, sizes, excess):
    """Blocks of a matrix whose smallest eigenvalue is about `excess`."""
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    factor = np.tril(rng.normal(size=(total, total)))
    ends = np.cumsum([0, *sizes])
    for k in range(len(sizes)):  # block bidiagonal
        factor[ends[k + 1] :, ends[k] : ends[k + 1]][
            sizes[k + 1] if k + 1 < len(sizes) else 0 :
        ] = 0
    factor[np.diag_indices(total)] = 0.5 + np.abs(factor[np.diag_indices(total)])
    factor[:, 0] *= 1e-7
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2 + excess * np.eye(total)
    cut = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    lower = [matrix[b, a] for a, b in zip(cut[:-1], cut[1:], strict=True)]
    return matrix, [matrix[c, c] for c in cut], lower


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(9.0, 17.0), st.sampled_from([-1.0, 1.0]))
def test_what_is_called_semidefinite_is_so_in_exact_arithmetic(seed, digits, sign):
    matrix, diagonal, lower = tridiagonal(seed, (3, 2, 3), sign * 10**-digits)
    if sdp.verified_block_semidefinite(diagonal, lower):
        assert is_exactly_semidefinite(matrix)
    if sdp.verified_block_semidefinite([matrix]):
        assert is_exactly_semidefinite(matrix)


def test_singular_matrices_on_which_cholesky_succeeds_by_rounding_are_not_proved():
    fooled = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        factor = rng.normal(size=(5, 4))
        matrix = factor @ factor.T  # of rank four, but for rounding
        matrix = (matrix + matrix.T) / 2
        indefinite = not is_exactly_semidefinite(matrix)
        assert not (indefinite and sdp.verified_block_semidefinite([matrix]))
        try:
            np.linalg.cholesky(matrix)
            fooled += indefinite
        except np.linalg.LinAlgError:
            pass
    assert fooled > 5  # power: LAPACK alone would have called these definite


def test_comfortable_matrices_are_proved_and_indefinite_ones_are_not():
    _, diagonal, lower = tridiagonal(1, (4, 5, 3), 1e-6)
    assert sdp.verified_block_semidefinite(diagonal, lower)
    _, diagonal, lower = tridiagonal(1, (4, 5, 3), -1e-6)
    assert not sdp.verified_block_semidefinite(diagonal, lower)
    assert not sdp.verified_block_semidefinite([np.array([[0.0]])])
    assert not sdp.verified_block_semidefinite([np.array([[np.nan]])])


def test_entry_errors_larger_than_the_margin_withhold_the_proof():
    _, diagonal, lower = tridiagonal(2, (4, 4), 1e-3)
    assert sdp.verified_block_semidefinite(diagonal, lower)
    assert not sdp.verified_block_semidefinite(diagonal, lower, [1e-2, 0.0])
    assert not sdp.verified_block_semidefinite(diagonal, lower, None, [1e-2])


def test_rows_of_very_different_sizes_are_proved():
    scale = np.array([1e-140, 1.0, 1e120])
    matrix = np.array([[1, 0.5, 0.2], [0.5, 1, 0.3], [0.2, 0.3, 1]]) * np.outer(scale, scale)
    assert sdp.verified_block_semidefinite([matrix])


def small_problem(rng, groups=None):
    """Gain of one hidden layer with three units, as a problem."""
    first, last = rng.normal(size=(3, 2)), rng.normal(size=(1, 3))
    constant = np.zeros((5, 5))
    constant[2:, 2:] = -last.T @ last
    direction = np.diag([1.0, 1.0, 0, 0, 0])
    weights = np.hstack([first, np.zeros((3, 3))])
    m, p = np.array([0.5, 0.55, 0.4]), np.array([0.0, 0.1, -0.2])
    return MultiplierProblem(constant, direction, np.arange(2, 5), weights, m, p, groups)


@pytest.mark.parametrize("tied", [False, True])
def test_the_newton_system_is_the_barriers_derivative(tied):
    from tf_lyapunov.bounds.programs.interior import _newton

    rng = np.random.default_rng(0)
    groups = np.array([0, 1, 0]) if tied else None
    problem = small_problem(rng, groups)
    share = np.eye(3) if groups is None else np.eye(2)[groups]
    z = np.array([9.0, 12.0, 11.0])[: share.shape[1]]
    theta, sharpness = 200.0, 3.0

    def cost(v):
        lam = share @ v[1:]
        logs = np.linalg.slogdet(problem.matrix(v[0], lam))[1] + np.sum(np.log(lam))
        return sharpness * v[0] - logs

    def gradient(v):
        lam = share @ v[1:]
        inverse = np.linalg.inv(problem.matrix(v[0], lam))
        tie = share if tied else None
        return _newton(problem, inverse, lam, sharpness, tie)

    v = np.concatenate([[theta], z])
    g, h = gradient(v)
    step = 1e-5
    for k, e in enumerate(np.eye(len(v))):
        assert g[k] == pytest.approx((cost(v + step * e) - cost(v - step * e)) / 2 / step, rel=1e-4)
        differences = (gradient(v + step * e)[0] - gradient(v - step * e)[0]) / 2 / step
        np.testing.assert_allclose(h[k], differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_the_structured_solver_agrees_with_the_others(solver):
    pytest.importorskip("cvxpy", reason="these solvers need cvxpy")
    problem = small_problem(np.random.default_rng(1))
    start = (300.0, np.full(3, 10.0))
    ours = sdp.solve(problem, start)
    theirs = sdp.solve(problem, solver=solver, tol=1e-8)
    assert ours.status == "optimal"
    assert ours.theta == pytest.approx(theirs.theta, rel=1e-5)
    proved = sdp.verified_minimum(problem, theirs, start)
    assert proved[0] == pytest.approx(ours.theta, rel=1e-5)
    assert sdp.verified_point(problem, *proved)


def test_an_infeasible_start_and_an_empty_answer_are_failures():
    problem = small_problem(np.random.default_rng(1))
    assert minimise(problem, -1.0, np.ones(3)) == []
    with pytest.raises(SolverFailure, match="no interior point"):
        sdp.solve(problem, (-1.0, np.ones(3)))
    pytest.importorskip("cvxpy", reason="the second half needs cvxpy")
    constant = -np.eye(5)
    hopeless = MultiplierProblem(
        constant, np.zeros((5, 5)), problem.rows, 0 * problem.weights, problem.m, 0 * problem.p
    )
    with pytest.raises(SolverFailure, match="clarabel returned"):
        sdp.solve(hopeless, solver="clarabel")


def test_a_missing_solver_names_the_extra(monkeypatch):
    import builtins

    real = builtins.__import__

    def without_cvxpy(name, *args, **kwargs):
        if name == "cvxpy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_cvxpy)
    sdp.check_solver("structured")
    with pytest.raises(ImportError, match=r"tf_lyapunov\[sdp\]"):
        sdp.check_solver("clarabel")


def test_a_solver_that_is_not_installed_is_named():
    cvxpy = pytest.importorskip("cvxpy", reason="needs cvxpy")
    if "MOSEK" in cvxpy.installed_solvers():
        pytest.skip("MOSEK is installed here")
    with pytest.raises(ImportError, match="'mosek' is not installed"):
        sdp.check_solver("mosek")
