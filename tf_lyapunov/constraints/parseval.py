"""Parseval networks: a constraint that pulls a kernel towards a tight frame, step by step."""

import math

import keras
from keras import ops

from tf_lyapunov.spectral.arguments import from_known, positive
from tf_lyapunov.spectral.precision import work_dtype


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ParsevalFrame(keras.constraints.Constraint):
    """Pull the singular values of a reshaped kernel towards 1 after every optimizer step.

        W ← (1 + b)·W - b·W WᵀW,   W of shape (out, everything else)                       (1)

    so that every singular value s becomes s·(1 + b - b·s²). A heuristic, and no guarantee: each
    step covers only a fraction of about 2b of the way, singular values above √(1 + 2/b) (14.2 for
    b = 0.01) diverge, and the norm of a reshaped convolution kernel is not that of its map (the
    true one can be √(kh·kw) times larger). For a guarantee use `constraints.SpectralBound`.

    Parseval networks also average the branches of residual blocks: `layers.ConvexCombination`
    learns the weights t and 1 - t of the sum, `keras.layers.Average` fixes them at one half.

    Args:
        step: b, in (0, 1].
        scale_convolutions: whether kernels of convolutions are pulled towards singular values
            1/√(2·kh·kw + 1) instead of 1, as in the released code, which stores the frame and
            divides it by that root in every forward pass.

    Raises:
        ValueError: if `step` is out of range, or, when called, if the kernel is a vector.

    Example:

    >>> import numpy as np, keras
    >>> w = ParsevalFrame(0.5)(np.diag([0.5, 1.0]).astype("float32"))
    >>> keras.ops.convert_to_numpy(w).tolist()
    [[0.6875, 0.0], [0.0, 1.0]]

    Reference: Cisse et al., "Parseval networks" (ICML 2017), eq. (6); as published.
    """

    def __init__(self, step=0.01, scale_convolutions=False):
        self.step = positive("step", step, (1e-12, 1.0))
        if not isinstance(scale_convolutions, bool):
            raise TypeError(
                "`scale_convolutions` must be True or False. "
                f"Received: scale_convolutions={scale_convolutions!r}."
            )
        self.scale_convolutions = scale_convolutions

    def __call__(self, kernel):
        kernel = ops.convert_to_tensor(kernel)
        shape = tuple(kernel.shape)
        if len(shape) < 2:
            raise ValueError(
                "A Parseval frame needs a kernel with inputs and outputs. Received: shape "
                f"{shape}. Constrain kernels, not biases."
            )
        target = 1.0
        if self.scale_convolutions and len(shape) > 2:
            target = 1.0 / math.sqrt(2.0 * math.prod(shape[:-2]) + 1.0)
        # Keras keeps the outputs last: V = Wᵀ, and WWᵀW = (V VᵀV)ᵀ.
        v = ops.cast(ops.reshape(kernel, (-1, shape[-1])), work_dtype(kernel)) / target
        if v.shape[0] < v.shape[1]:
            cubic = ops.matmul(ops.matmul(v, ops.transpose(v)), v)
        else:
            cubic = ops.matmul(v, ops.matmul(ops.transpose(v), v))
        v = ((1.0 + self.step) * v - self.step * cubic) * target
        return ops.cast(ops.reshape(v, shape), kernel.dtype)

    def get_config(self):
        return {"step": self.step, "scale_convolutions": self.scale_convolutions}

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls().get_config())
