"""Printed bounds say no more than the numbers."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.digits import at_least, at_most

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite, st.integers(3, 12))
def test_printed_bounds_are_bounds_and_near(value, digits):
    low, high = float(at_least(value, digits)), float(at_most(value, digits))
    assert low <= value <= high
    if 1e-290 < abs(value) < 1e290:
        assert math.isclose(low, high, rel_tol=3 * 10.0 ** (1 - digits))


def test_numbers_without_an_end_stay():
    assert at_least(-math.inf) == "-inf" and at_most(math.inf) == "inf" and at_most(0.0) == "0"
