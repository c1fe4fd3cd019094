"""Directed rounding, checked in exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.program import rounding

POSITIVE = st.floats(1e-100, 1e100)


@given(st.lists(POSITIVE, min_size=1, max_size=5))
def test_products_sums_and_norms_are_rounded_up(values):
    exact = [Fraction(v) for v in values]
    product = rounding.product_up(*values)
    assert math.isinf(product) or Fraction(product) >= math.prod(exact)
    assert Fraction(rounding.sum_up(*values)) >= sum(exact)
    squares = sum(e * e for e in exact)
    assert Fraction(rounding.root_sum_squares_up(*values)) ** 2 >= squares
    assert Fraction(float(rounding.euclidean_norms_up([values])[0])) ** 2 >= squares


@given(POSITIVE)
def test_roots_are_rounded_up_and_by_a_unit_at_most(x):
    root = rounding.sqrt_up(x)
    assert Fraction(root) ** 2 >= Fraction(x)
    assert root <= math.nextafter(math.sqrt(x), math.inf)


def test_neutral_factors_stay_exact():
    assert rounding.product_up(0.3, 1.0, 1.0) == 0.3
    assert rounding.sum_up(0.3, 0.0) == 0.3
    assert rounding.root_sum_squares_up(0.0, 0.3) == 0.3
    assert rounding.product_up(math.inf, 0.0) == 0.0
    assert rounding.sqrt_up(9.0) == 3.0 and rounding.sqrt_up(math.inf) == math.inf


def test_norms_survive_extreme_scales():
    rows = np.array([[3e300, 4e300], [3e-300, 4e-300], [0.0, 0.0]])
    norms = rounding.euclidean_norms_up(rows[:1])
    assert 5e300 <= norms[0] <= 5e300 * (1 + 1e-14)
    assert rounding.euclidean_norms_up(rows[1:2])[0] >= 5e-300 * (1 - 1e-15)
    assert rounding.euclidean_norms_up(rows[2:])[0] == 0.0


@given(st.integers(1, 10**7))
def test_gamma_covers_the_compounded_rounding_of_so_many_operations(terms):
    u = 2.0**-24
    bound = rounding.gamma(terms, u)
    assert bound >= math.expm1(terms * math.log1p(u))


def test_gamma_is_infinite_where_the_sum_may_lose_everything():
    assert rounding.gamma(2**24, 2.0**-24) == math.inf


def test_a_relaxed_math_mode_is_noticed(monkeypatch):
    for name in ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        monkeypatch.delenv(name, raising=False)
    if rounding._accelerator() is None:
        assert rounding.operand_roundoff() == 0.0
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    assert rounding.operand_roundoff() == 2.0**-8


def test_norms_of_small_rows_do_not_vanish_beside_large_ones():
    norms = rounding.euclidean_norms_up(np.array([[1.0, 0.0], [3e-200, 4e-200], [0.0, 0.0]]))
    assert 5e-200 <= norms[1] < 5.0001e-200 and norms[0] >= 1.0 and norms[2] == 0.0
