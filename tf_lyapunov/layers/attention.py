"""Attention with a proved Lipschitz constant: softmax over memories, as a gradient step."""

import keras

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.keras_order import extending
from tf_lyapunov.layers.potential import ConvexPotential
from tf_lyapunov.spectral.arguments import positive
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.theory.potential import flow_gain_upper_bound

# β outside has a softmax without a slope, or one that no format holds.
_BETAS = (1e-3, 1e3)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SoftmaxPotential(ConvexPotential):
    """Softmax over memories as a gradient step that cannot expand, on the last axis.

        z = g·(x - (4h/(βs²))·W softmax(β(Wᵀx + b))),   s ≥ ‖W‖,   g = max_gain               (1)

    The columns of W are `width` memories; the softmax is the gradient of the convex
    f(v) = (1/β) log Σ_i exp(βv_i), and W softmax(β(Wᵀx + b)) that of f(Wᵀx + b).

    Gain at most `max_gain` at every value of the variables and in every compute dtype. With
    p = softmax(βv), the Jacobian J = β(diag p - ppᵀ) of the softmax is symmetric, and for every
    unit vector d

        0 ≤ dᵀJd = β Var_p(d) ≤ β (max d - min d)²/4 ≤ β/2,                                    (2)

    since a variance is at most a quarter of the squared range, and (d_i - d_j)² ≤ 2‖d‖². β/2 is
    reached, at p = (½, ½) and d = (1, -1)/√2. So the Jacobian of (1) is g(I - tWJWᵀ) with
    eigenvalues of tWJWᵀ in [0, tβ‖W‖²/2], and t = 4h/(βs²) with h ≤ 1 keeps those of I - tWJWᵀ in
    [-1, 1]. s is an upper bound with all rounding included, as in `ConvexPotentialDense`.

    Every position is mapped by itself. To mix tokens put `keras.layers.Permute((2, 1))` before and
    after it, or `keras.layers.Reshape`: both are isometries.

    Args:
        width: number of memories (`None`: the input's channels).
        beta: β, how sharply the softmax chooses.
        step: h; the gain is guaranteed for h ≤ 1 only.
        norm: `"bound"`, or without a guarantee `"power"` or `None`: see `ConvexPotentialDense`.
        use_bias, kernel_initializer, bias_initializer, max_gain, …: see `ConvexPotentialDense`.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np, keras
    >>> layer = SoftmaxPotential(8, beta=4.0)
    >>> tuple(layer(np.ones((2, 5, 4), "float32")).shape)
    (2, 5, 4)
    >>> bool(1.0 <= layer.gain_upper_bound() < 1.0 + 1e-9)
    True

    Reference: Meunier et al. (2022), equation (6), with the potential log Σ exp; Ramsauer et al.,
    Hopfield networks is all you need (2021), for softmax over memories. Sound form.
    """

    @extending(ConvexPotential, lacking=("activation",))
    def __init__(self, width=None, beta=1.0, *args, **kwargs):
        super().__init__(width, "linear", *args, **kwargs)
        self.beta = positive("beta", beta, _BETAS)
        self.activation = keras.activations.softmax

    @property
    def sharpness(self):
        """β as the compute dtype holds it, never above it."""
        return rounded_down(self.beta, self.compute_dtype)

    def _inverse_scale(self, kernel, *sources, training):
        inverse = super()._inverse_scale(kernel, *sources, training=training)
        # 1/(2h/s²) is for slopes up to 1, here up to β/2; the product is rounded up.
        return inverse * (self.beta / 2 * (1 + 4 * unit_roundoff(self.work_dtype)))

    def call(self, inputs, training=None):
        kernel, scale = self.effective(training)
        hidden = self._map(inputs, kernel)
        if self.bias is not None:
            hidden = hidden + self.bias
        chosen = self.activation(self.sharpness * hidden)
        outputs = inputs - self._adjoint(scale * chosen, kernel)
        gain = rounded_down(self.max_gain, self.compute_dtype)
        return outputs if gain == 1 else gain * outputs

    def gain_upper_bound(self):
        """Proven bound, float64, on the layer's gain: from its weights, not from `max_gain`."""
        values = self.effective_values()
        return flow_gain_upper_bound(
            values["kernel"],
            values["scale"],
            self.linear_map,
            beta=self.sharpness / 2,
            gain=rounded_down(self.max_gain, self.compute_dtype),
        )

    def get_config(self):
        config = {**super().get_config(), "beta": self.beta}
        del config["activation"]
        return config
