"""Residual combination that stays within the gain of its branches."""

import keras
from keras import ops

from tf_lyapunov.layers.axes import Interval, at_least_float32
from tf_lyapunov.spectral.arguments import finite


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ConvexCombination(keras.layers.Layer):
    """Mixes two branches with a learned weight, `ConvexCombination()([x, f(x)])`.

        y = t·f(x) + (1 - t)·x,   t = the stored weight clipped to [0, 1]

    Its Lipschitz constant is at most t·L_f + (1 - t)·L_x: 1 where both branches have gain 1,
    unlike x + f(x), whose bound is 1 + L_f.

    Args:
        initial: initial t, float in [0, 1].

    Raises:
        ValueError: if `initial` is out of range, or the inputs are not two of equal shape.

    Example:

    >>> import keras, numpy as np
    >>> x = np.array([[4.0, 0.0]])
    >>> keras.ops.convert_to_numpy(ConvexCombination(0.25)([x, -x])).tolist()
    [[2.0, 0.0]]

    Reference: Qian and Wegman, "L2-nonexpansive neural networks" (ICLR 2019).
    """

    def __init__(self, initial=0.5, **kwargs):
        super().__init__(**kwargs)
        self.initial = finite("initial", initial)
        if not 0 <= self.initial <= 1:
            raise ValueError(f"`initial` must lie in [0, 1]. Received: initial={initial}.")

    def build(self, input_shape):
        is_pair = isinstance(input_shape, (list, tuple)) and len(input_shape) == 2
        if not is_pair or not all(isinstance(s, (list, tuple)) for s in input_shape):
            raise ValueError(
                "A convex combination is called on a list of two tensors, `[x, f(x)]`. "
                f"Received: input shape {input_shape}."
            )
        if tuple(input_shape[0][1:]) != tuple(input_shape[1][1:]):
            raise ValueError(
                "The two branches must have equal shapes. "
                f"Received: {input_shape[0]} and {input_shape[1]} in layer {self.name!r}."
            )
        self.mixture = self.add_weight(
            name="mixture",
            shape=(1,),  # a vector: NumPy cannot read a bfloat16 scalar of TensorFlow
            initializer=keras.initializers.Constant(self.initial),
            constraint=Interval(0.0, 1.0),
            autocast=False,
        )
        super().build(input_shape)

    def call(self, inputs):
        x, f = inputs
        # Clipped here as well: weights can be assigned, loaded and averaged past any constraint.
        # 1 - t rounded to 16 bits would make more than 1 of the two.
        t = ops.clip(at_least_float32(ops.convert_to_tensor(self.mixture)), 0.0, 1.0)
        x, f = (ops.cast(v, t.dtype) for v in (x, f))
        return ops.cast(t * f + (1 - t) * x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[0])

    def get_config(self):
        return {**super().get_config(), "initial": self.initial}
