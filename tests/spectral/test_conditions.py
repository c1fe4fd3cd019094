"""`cond`: the branch that the condition names, compiled or not, with its gradient."""

import keras
import numpy as np
import pytest
from keras import ops

from tf_lyapunov.spectral.conditions import cond


def shrunk(x):
    """x/2 where |x|² > 1, else x."""
    return cond(ops.sum(x**2) > 1, lambda: x / 2, lambda: x)


class Shrunk(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return shrunk(x * self.scale)


@pytest.mark.parametrize("size, factor", [(0.5, 1.0), (3.0, 0.5)])
def test_the_branch_is_that_of_the_condition_whether_compiled_or_not(size, factor):
    x = np.full((1, 1), size, "float32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(shrunk(ops.convert_to_tensor(x))), x * factor
    )
    model = keras.Sequential([keras.Input((1,), batch_size=1), Shrunk()])
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
    np.testing.assert_array_equal(model.predict(x, verbose=0), x * factor)
    model.optimizer.learning_rate = 0.01
    model.train_on_batch(x, np.zeros((1, 1), "float32"))
    # The loss is (scale·size·factor)².
    expected = 1 - 0.01 * 2 * (size * factor) ** 2
    assert float(model.layers[0].scale) == pytest.approx(expected, rel=1e-6)
