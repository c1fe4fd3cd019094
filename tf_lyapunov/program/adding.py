"""Biases that Keras adds along another axis than their own."""

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError


def check_added(layer, bias, output):
    """Refuses to read a bias that Keras on TensorFlow adds along another axis.

    Its `add` takes a tensor with one long axis for a bias: it goes along the last axis where that
    is as long, else along the first after the batch.

    Args:
        layer: the layer, for the message.
        bias: float64, as it broadcasts against a sample of the output.
        output: `graph.Tensor` of the output.

    Raises:
        UnsupportedLayerError: if it is added elsewhere, and not all of its entries are equal.

    Reference: Keras 3.15.1; `findings/keras_tensorflow_add_as_bias.sh`.
    """
    long = [i for i, n in enumerate(bias.shape) if n != 1]
    if keras.backend.backend() != "tensorflow" or len(long) != 1 or np.ptp(bias) == 0:
        return
    own, size = long[0] - bias.ndim, bias.size
    lands = set()
    for axis in (-1, 1 - len(output.shape)):
        if output.shape[axis] in (None, size):  # an unknown length may be this one
            lands.add(axis)
        if output.shape[axis] == size:
            break
    else:
        lands.add(own)
    if lands != {own}:
        raise UnsupportedLayerError(
            "Keras on TensorFlow adds a bias along the last axis, or the first one, wherever that "
            f"is as long as the bias. Received: layer {layer.name!r} with a bias of shape "
            f"{bias.shape} and output shape {output.shape}. Leave the bias out, or use another "
            "size."
        )
