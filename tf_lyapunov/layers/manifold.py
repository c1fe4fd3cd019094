"""Layers whose kernel is itself orthogonal: `optimizers.Stiefel` moves it on the manifold.

Nothing is computed in a call beside x W. The optimizer, not the layer, keeps the kernel
orthogonal: with another one, or after an assignment, it is what it is, and so is the gain, which
is always measured.
"""

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.initial import WideInitializers
from tf_lyapunov.layers.keras_order import extending, without
from tf_lyapunov.layers.linear import check_activation, known_width
from tf_lyapunov.optimizers.marks import mark_orthogonal
from tf_lyapunov.theory.orthogonal import gram_residual_upper_bound, residual_norm_upper_bound

PRESERVES = (None, "norms", "gradients")


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class OrthogonalDense(WideInitializers, keras.layers.Dense):
    """Dense layer whose kernel is a point on the Stiefel manifold, kept there by the optimizer.

        y = φ(x W + b),   WᵀW = I for units ≤ in,   WWᵀ = I for units ≥ in                     (1)

    At inference it is a `keras.layers.Dense`, and is exported as one. Train it with
    `optimizers.Stiefel(inner)`: the step costs one Gram matrix and its application to the kernel
    beside the inner optimizer's, in place of a parametrisation in every call. With another
    optimizer the kernel leaves the manifold.

    The gain is never assumed to be 1. Certificates bound the norm of the kernel as cast, and
    `gain_upper_bound()` is the bound from its Gram matrix G of the smaller side, in float64 and
    rounded up,

        ‖x W - x' W‖ ≤ (1 + ‖G - I‖_F)^½·‖x - x'‖.                                            (2)

    Args:
        units: width of the output.
        activation, use_bias, …: as in `keras.layers.Dense`, in its order; an activation must not
            be steeper than 1, and may be a `MaxMin`, `GroupSort`, `FullSort`, `Householder` or
            `LipschitzPReLU` layer. Kernels of another initializer than the default,
            `"orthogonal"`, come to the manifold with the first step.
        preserves: None, or what must hold exactly: `"norms"`, ‖x W‖ = ‖x‖ (an isometry), or
            `"gradients"`, ‖W ȳ‖ = ‖ȳ‖ for gradients ȳ that pass through, where the outputs are
            those of an isometry's adjoint.

    Raises:
        ValueError: when built, if the kernel cannot do what `preserves` says: an isometry needs
            units ≥ in, its adjoint units ≤ in; for a `kernel_constraint`, an adapter (LoRA) or
            quantization, which would move the kernel off the manifold, and a steep activation.

    Example:

    >>> import numpy as np
    >>> layer = OrthogonalDense(3)
    >>> layer.build((None, 5))
    >>> kernel = np.asarray(layer.kernel, "float64")
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(3), atol=1e-5))
    True
    >>> 1.0 <= layer.gain_upper_bound() < 1.00001
    True

    Reference: Li, Li and Todorovic, "Efficient Riemannian optimization on the Stiefel manifold"
    (ICLR 2020), for networks with such kernels.
    """

    @extending(keras.layers.Dense)
    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="orthogonal",
        *args,
        preserves=None,
        **kwargs,
    ):
        none = (None,)
        kwargs = without(self, kwargs, lora_rank=none, lora_alpha=none, quantization_config=none)
        super().__init__(units, activation, use_bias, kernel_initializer, *args, **kwargs)
        if self.kernel_constraint is not None:
            raise ValueError(
                f"`kernel_constraint` of a {type(self).__name__} must be None: a kernel is kept "
                "orthogonal by the optimizer or held by a constraint, not both. Received: "
                f"kernel_constraint={type(self.kernel_constraint).__name__}. Use "
                "`keras.layers.Dense` for a constrained kernel."
            )
        check_activation(self.activation)
        if preserves not in PRESERVES:
            raise ValueError(
                f"`preserves` must be one of {PRESERVES}. Received: preserves={preserves!r}."
            )
        self.preserves = preserves

    def build(self, input_shape):
        width = known_width(input_shape, self)
        _check_sides(self, width, self.units)
        super().build(input_shape)
        mark_orthogonal(self.kernel)
        if isinstance(self.activation, keras.Layer) and not self.activation.built:
            self.activation.build(self.compute_output_shape(input_shape))

    def effective_values(self):
        """The kernel as inference uses it: dict of its name and a float64 array."""
        value = ops.cast(ops.convert_to_tensor(self.kernel), self.compute_dtype)
        if self.compute_dtype in ("float16", "bfloat16"):
            value = ops.cast(value, "float32")
        return {"kernel": np.asarray(ops.convert_to_numpy(value), np.float64)}

    def departure_upper_bound(self):
        """Bound on ‖G - I‖ of the kernel as cast, G its Gram matrix of the smaller side."""
        return gram_residual_upper_bound(self.effective_values()["kernel"])

    def gain_upper_bound(self):
        """Bound (2) on the gain of the layer, from its kernel as cast."""
        return residual_norm_upper_bound(self.effective_values()["kernel"])

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            "An adapter added to the kernel would leave the manifold. Received: enable_lora on "
            f"layer {self.name!r}. Export the model by `export_plain` and adapt that."
        )

    def quantize(self, *args, **kwargs):
        raise ValueError(
            "A rounded kernel would leave the manifold. Received: quantize on layer "
            f"{self.name!r}. Export the model by `export_plain` and quantize that."
        )

    def get_config(self):
        return {**super().get_config(), "preserves": self.preserves}


def _check_sides(layer, inputs, outputs):
    """Raises if a matrix of these sides cannot preserve what its layer is asked to."""
    what, least = {"norms": ("an isometry", inputs), "gradients": ("its adjoint", outputs)}.get(
        layer.preserves, (None, 0)
    )
    most = outputs if layer.preserves == "norms" else inputs
    if what is None or least <= most:
        return
    need = "as many outputs as inputs" if layer.preserves == "norms" else (
        "no more outputs than inputs")  # fmt: skip
    raise ValueError(
        f"A kernel that preserves {layer.preserves} needs at least {need}: {inputs}×{outputs} "
        f"numbers cannot be {what}'s. Received: {inputs} inputs, {outputs} outputs, "
        f"preserves={layer.preserves!r} in layer {layer.name!r}."
    )
