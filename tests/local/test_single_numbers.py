"""Windows with cells whose box is one number."""

import numpy as np

from tf_lyapunov.local.maxima import WindowMaximum
from tf_lyapunov.program.families.pooling import Pooled


def test_the_largest_cell_counts_when_its_box_is_one_number():
    # max(0, z) for z in [-0.3, 0.1] is not z.
    pool = Pooled("max", (2,), (2,), "valid", False)
    low, high = np.array([[[0.0], [-0.3]]]), np.array([[[0.0], [0.1]]])
    step = WindowMaximum(pool, (low + high) / 2, low, high)
    for c in (np.array([[[1.0]]]), np.array([[[-1.0]]])):
        g, h, _ = step.backward(c, step.start(c))
        for z in (-0.3, -0.1, 0.0, 0.1):
            bound = float(g.ravel() @ [0.0, z] + h[0])
            assert bound <= c.item() * max(0.0, z) + 1e-12
