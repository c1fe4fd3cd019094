"""Dense layers with nearly orthonormal kernels, by Björck-Bowie iterations."""

import keras
from keras import ops

from tf_lyapunov.layers.keras_order import NUMBERS, extending, formerly
from tf_lyapunov.layers.linear import LipschitzDense, with_gain
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.polar import bjorck, bjorck_factors


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class BjorckDense(LipschitzDense):
    """Dense layer whose kernel is drawn towards the nearest one with orthonormal columns (or rows).

        y = φ(x K + b),   K = max_gain·B_k(W/bound(W)),   B(W) = W(3I - WᵀW)/2

    σ(K) ≤ max_gain for every number of iterations, because each maps singular values in [0, 1]
    into [0, 1] and the rounding of the last is divided out. More iterations bring the singular
    values closer to max_gain (of a singular value 1 - e they leave about 1 - 3e²/2); kernels
    start orthogonal. The gradient is that of the last iteration from where the others have led,
    which descends from every kernel of full rank (`spectral.polar.bjorck_factors`).

    Args:
        units: width of the output.
        iterations: number of iterations k; cost 6·min(in, units)³ flops each, in training and
            when the cache is filled.
        activation, use_bias, kernel_initializer, *args, **kwargs: as in `keras.layers.Dense`, in
            its order, and `max_gain`.

    Example:

    >>> import numpy as np
    >>> layer = BjorckDense(3)
    >>> layer.build((None, 5))
    >>> kernel = layer.effective_values()["kernel"]
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(3), atol=1e-4))
    True

    Reference: Anil, Lucas and Grosse (2019), section 4.3; sound form.
    """

    @formerly("units", "iterations", "kernel_initializer", kept=1, mistaken=NUMBERS)
    @extending(LipschitzDense)
    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="orthogonal",
        *args,
        iterations=6,
        **kwargs,
    ):
        super().__init__(units, activation, use_bias, kernel_initializer, *args, **kwargs)
        self.iterations = count("iterations", iterations, 1000)

    def _parametrised(self, kernel, training=False):
        return (with_gain(bjorck(kernel, self.iterations), self.max_gain, min(kernel.shape)),)

    def _applied(self, x, kernel):
        outer, inner = bjorck_factors(kernel, self.iterations)
        inner = with_gain(inner, self.max_gain, 4 * min(kernel.shape))
        if kernel.shape[0] >= kernel.shape[1]:
            return ops.matmul(ops.matmul(x, outer), inner)
        return ops.matmul(ops.matmul(x, inner), outer)

    def get_config(self):
        return {**super().get_config(), "iterations": self.iterations}
