"""A kernel and a bias with what Keras' layers take for them: initializers, regularizers."""

import keras

from tf_lyapunov.layers.base import LipschitzLayer
from tf_lyapunov.layers.keras_order import without


class WeightedLayer(LipschitzLayer):
    """A Lipschitz layer with a raw `kernel` and a `bias`.

    Regularizers see the raw variables, as those of Keras do. Where the kernel that is applied does
    not depend on the raw one's scale, a penalty on its size changes the learning rate alone.

    Args:
        use_bias: whether there is a bias.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, bias_constraint:
            of the raw variables, as in Keras.
        **kwargs: of `LipschitzLayer`, such as `max_gain` and `activity_regularizer`.

    Raises:
        ValueError: for arguments of Keras that would leave the bound, such as `lora_rank`.
    """

    def __init__(
        self,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        *,
        bias_constraint=None,
        max_gain=1.0,
        **kwargs,
    ):
        none = (None,)
        kwargs = without(
            self,
            kwargs,
            kernel_constraint=none,
            lora_rank=none,
            lora_alpha=none,
            quantization_config=none,
        )
        super().__init__(max_gain=max_gain, activity_regularizer=activity_regularizer, **kwargs)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.bias = None

    def _add_kernel(self, shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=shape,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            autocast=False,
        )

    def _add_bias(self, width):
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(width,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def get_config(self):
        return {
            **super().get_config(),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
