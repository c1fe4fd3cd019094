"""Smallest singular values: below the true one, near it, and 0 where nothing can be proved."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.theory.singular_values import smallest_singular_value_lower_bound as lower


def with_values(values, rows, seed):
    """A matrix whose singular values are known, but for 1e-15 of the largest."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    p, _ = np.linalg.qr(rng.normal(size=(len(values),) * 2))
    return (q * values) @ p.T


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 5), st.floats(-6, 0), st.integers(-900, 900))
def test_the_bound_is_below_the_smallest_value_and_near_it(size, more, power, exponent):
    values = np.logspace(power, 0, size)
    matrix = with_values(values, size + more, size)
    known = values[0] * 2.0**exponent
    for a in (np.ldexp(matrix, exponent), np.ldexp(matrix.T, exponent)):
        found = lower(a)
        # The matrix itself is rounded: its values are off by 1e-15 of the largest, which is 1.
        assert found <= known + 4e-15 * 2.0**exponent
        assert found >= known * (1 - 1e-6) or exponent < -800


def test_it_holds_where_the_exact_value_is_known():
    # σ_min of [[1, 1], [1, 1 + t]] is |t|/σ_max: the determinant is t.
    for t in (2.0**-10, 2.0**-20):
        s = np.longdouble(2 + t)
        exact = t / np.sqrt(((s * s - 2 * t) + s * np.sqrt(s * s - 4 * np.longdouble(t))) / 2)
        assert exact * (1 - 1e-6) <= lower([[1, 1], [1, 1 + t]]) <= exact


def test_singular_matrices_have_none_and_bad_ones_are_refused():
    assert lower(np.ones((4, 3))) == lower(np.zeros((2, 2))) == 0.0
    assert lower([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]]) < 2.0**-52
    for bad in (np.ones(3), np.ones((0, 2)), [[np.nan]], [[np.inf]]):
        with pytest.raises(ValueError, match="two axes and finite entries"):
            lower(bad)
