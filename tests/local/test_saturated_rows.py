"""Units of several rows on pieces of one slope."""

import numpy as np

from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.program.families.elementwise import named


def test_rows_on_pieces_of_one_slope_keep_their_own_values():
    # Row 0 is saturated at -1, row 1 at +1: both slopes are 0.
    operation = named("hard_tanh", {}, None)
    center = np.array([[-20.0], [20.0]])
    step = Elementwise(operation, center, center - 1, center + 1)
    c = np.array([[-1.0], [-1.0]])
    g, h, _ = step.backward(c, step.start(c))
    # -hard_tanh is 1 on row 0, and -1 on row 1.
    lower = (g * center).sum(axis=1) + h
    np.testing.assert_allclose(lower, [1.0, -1.0], atol=1e-12)
