"""Mixing of neighbours without a convolution: circular shifts of groups of channels."""

import keras
from keras import ops

from tf_lyapunov.layers.axes import image_format, known_size
from tf_lyapunov.spectral.arguments import finite


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ShiftMixing(keras.layers.Layer):
    """Shifts groups of channels by one place along each axis, around the border: an isometry.

        y[…, i, …, c] = x[…, i - s, …, c]  (indices modulo the size),  s = 1, -1, 0 by c's group

    Of C channels the first ⌊share·C⌋ go forward along the first axis, the next as many back; so for
    every axis, and the rest stays. Entries are moved, nothing is computed: lengths and distances
    are kept exactly. Between dense layers on the channels, such as `OrthogonalDense`, it takes the
    place of a convolution.

    Args:
        share: of the channels for each direction; at most ¼ on images, ½ on sequences.
        data_format: as in Keras, of images `(n, H, W, C)` and sequences `(n, L, C)`.

    Raises:
        ValueError: if `share` is out of range, the input is no image or sequence, or it has too few
            channels for one to move.

    Example:

    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(1, 3, 2)
    >>> np.asarray(ShiftMixing(0.5)(x))[0].T.tolist()
    [[4.0, 0.0, 2.0], [3.0, 5.0, 1.0]]

    Reference: "LipNeXt: scaling up Lipschitz-based certified robustness to billion-parameter
    models" (arXiv 2601.18513).
    """

    def __init__(self, share=0.125, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.share = finite("share", share)
        if not 0 < self.share <= 0.5:
            raise ValueError(f"`share` must be positive and at most ½. Received: share={share}.")
        self.data_format = image_format(data_format)

    def _axes(self, shape):
        """`(spatial axes, channel axis, channels of each group)` of a batch shape."""
        rank = len(shape)
        if rank not in (3, 4):
            raise ValueError(
                f"A {type(self).__name__} moves along the axes of images or sequences. Received: "
                f"input shape {tuple(shape)} in layer {self.name!r}."
            )
        channel = 1 if self.data_format == "channels_first" else rank - 1
        spatial = tuple(axis for axis in range(1, rank) if axis != channel)
        if self.share * 2 * len(spatial) > 1:
            raise ValueError(
                f"`share` must be at most {1 / (2 * len(spatial))} on {len(spatial)} axes. "
                f"Received: share={self.share} in layer {self.name!r}."
            )
        channels = known_size(shape, channel, self.name)
        size = int(self.share * channels)
        if size == 0:
            raise ValueError(
                "A group must hold a channel, or nothing moves. Received: "
                f"share={self.share} of {channels} channels in layer {self.name!r}."
            )
        return spatial, channel, size

    def build(self, input_shape):
        self._axes(input_shape)
        super().build(input_shape)

    def call(self, x):
        spatial, channel, size = self._axes(x.shape)
        parts, start = [], 0
        moves = [(axis, step) for axis in spatial for step in (1, -1)]
        for axis, step in moves:
            parts.append(ops.roll(_part(x, channel, start, start + size), step, axis=axis))
            start += size
        if start < x.shape[channel]:
            parts.append(_part(x, channel, start, x.shape[channel]))
        return ops.concatenate(parts, axis=channel)

    def compute_output_shape(self, input_shape):
        self._axes(input_shape)
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "share": self.share, "data_format": self.data_format}


def _part(x, axis, start, stop):
    return x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(x.shape)))]
