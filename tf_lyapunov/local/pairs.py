"""Maxima of two at a time: max(a, b) = (a + b)/2 + |a - b|/2.

A pool whose windows do not overlap and have 2^p cells along each axis is a chain of

    z ↦ ((a + b)/2, (a - b)/2),   (u, v) ↦ (u, |v|),   (u, v) ↦ u + v

axis by axis, the halves side by side in the channels. The first map has norm 1/√2, the last √2, so
that balls grow no more than by the pool itself; but boxes and balls of differences of neighbours
decide far more windows than those of the cells themselves, and what is left is elementwise.
"""

import dataclasses
import functools
import math

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.elementwise import Kinked
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.operation import Operation, with_error
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_axes


@dataclasses.dataclass(frozen=True, eq=False)
class Halves(Operation):
    """z ↦ ((a + b)/2, (a - b)/2) of neighbours a, b along an axis; an odd last entry is left out.

    Attributes:
        axis: of an array (n, *spatial, channels).
        channels_first: whether signals are (n, channels, *spatial); `axis` counts there.
    """

    axis: int
    channels_first: bool = False

    @property
    def channels(self):
        """Axis of the channels."""
        return 1 if self.channels_first else -1

    def pairs(self, z):
        """`(a, b)`."""
        z = np.moveaxis(z, self.axis, 0)
        count = len(z) // 2
        a, b = z[0 : 2 * count : 2], z[1 : 2 * count : 2]
        return np.moveaxis(a, 0, self.axis), np.moveaxis(b, 0, self.axis)

    def joined(self, u, v):
        """Both halves in one array."""
        return np.concatenate([u, v], axis=self.channels)

    def parted(self, c):
        """The halves of an array."""
        return np.split(c, 2, axis=self.channels)

    def forward(self, signals, precision):
        (signal,) = signals
        a, b = self.pairs(signal.value)

        def error():
            ea, eb = self.pairs(signal.error)
            size = (np.abs(a) + np.abs(b)) * precision.sum(3) + 4 * precision.tiny
            size = size + (ea + eb) / 2 * (1 + precision.sum(4))
            return self.joined(size, size)

        return with_error(signals, self.joined((a + b) / 2, (a - b) / 2), error)


@dataclasses.dataclass(frozen=True, eq=False)
class Rejoined(Operation):
    """(u, v) ↦ u + v, the halves of the channels.

    Attributes:
        channels_first: see `Halves`.
    """

    channels_first: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        u, v = self._parted(signal.value)

        def error():
            eu, ev = self._parted(signal.error)
            size = (np.abs(u) + np.abs(v)) * precision.sum(3) + 4 * precision.tiny
            return size + (eu + ev) * (1 + precision.sum(4))

        return with_error(signals, u + v, error)

    def _parted(self, c):
        return np.split(c, 2, axis=1 if self.channels_first else -1)


def paired(operation, shape):
    """A max pooling step as a chain of operations, or None where it has no such chain.

    Args:
        operation: an `Operation`.
        shape: of a sample that it reads.

    Example:

    >>> pool = Pooled("max", (2,), (2,), "valid", False)
    >>> [type(step).__name__ for step in paired(pool, (4, 3))]
    ['Halves', 'Kinked', 'Rejoined']
    """
    if not isinstance(operation, Pooled) or operation.kind != "max" or operation.sizes is None:
        return None
    first = operation.channels_first
    spatial, channels = (shape[1:], shape[0]) if first else (shape[:-1], shape[-1])
    if tuple(operation.sizes) != tuple(operation.strides):
        return None
    if any(q & (q - 1) for q in operation.sizes) or max(operation.sizes) == 1:
        return None
    if operation.padding != "valid" and any(
        n % q for n, q in zip(spatial, operation.sizes, strict=True)
    ):
        return None
    slopes = np.concatenate([np.ones(channels), -np.ones(channels)])
    found = []
    for axis, q in enumerate(operation.sizes):
        for _ in range(int(q).bit_length() - 1):
            found.append(Halves(axis + (2 if first else 1), first))
            found.append(Kinked(slopes.reshape(-1, *[1] * len(spatial)) if first else slopes))
            found.append(Rejoined(first))
    return tuple(found)


@maps.adjoint.register
def _(operation: Halves, c, shapes):
    u, v = operation.parted(c)
    out = np.zeros((len(c), *shapes[0]), c.dtype)
    a, b = operation.pairs(out)  # views
    np.add(u, v, out=a)
    np.subtract(u, v, out=b)
    out *= 0.5
    return [out]


@maps.absolute.register
def _(operation: Halves, sizes):
    a, b = operation.pairs(sizes[0])
    return operation.joined((a + b) / 2, (a + b) / 2)


@maps.terms.register
def _(operation: Halves, shapes):
    return 4


@maps.norms.register
def _(operation: Halves, shapes):
    return [float(rounding.up(math.sqrt(0.5)))]


@maps.adjoint.register
def _(operation: Rejoined, c, shapes):
    return [np.concatenate([c, c], axis=1 if operation.channels_first else -1)]


@maps.absolute.register
def _(operation: Rejoined, sizes):
    return sum(operation._parted(sizes[0]))


@maps.terms.register
def _(operation: Rejoined, shapes):
    return 4


@maps.norms.register
def _(operation: Rejoined, shapes):
    return [float(rounding.up(math.sqrt(2.0)))]


def difference_gain(flow, traced, source):
    """`(bound on the gain to the differences at a position, from which position)`, or None.

    Of neighbouring outputs of one convolution: a convolution with the kernel's half difference with
    itself, moved by its stride. Neighbours see almost the same, so that this gain is far below
    that of the convolution.
    """
    link = flow.links[source - 1] if source else None
    if link is None or not isinstance(link.operation, Halves) or link.inputs[0] == 0:
        return None
    before = flow.links[link.inputs[0] - 1]
    operation = before.operation
    if not isinstance(operation, Linear) or operation.channels_first:
        return None
    linear_map = operation.linear_map
    if linear_map.kind != "conv" or linear_map.groups != 1:
        return None
    shape = traced.shape(before.inputs[0])
    gain = _difference_norm(maps._Kept(operation), link.operation.axis - 1, tuple(shape))
    return None if gain is None else (gain, before.inputs[0])


@functools.lru_cache(maxsize=64)
def _difference_norm(kept, axis, shape):
    operation = kept.operation
    linear_map = dataclasses.replace(operation.linear_map, input_shape=shape)
    axes = convolution_axes(operation.kernel.shape, linear_map)
    if any(a.dilation != 1 for a in axes):
        return None
    kernel = np.asarray(operation.kernel, np.float64)
    stride = axes[axis].stride
    room = [(0, 0)] * kernel.ndim
    room[axis] = (0, stride)
    first = np.pad(kernel, room)
    room[axis] = (stride, 0)
    difference = (first - np.pad(kernel, room)) / 2
    strides = [a.stride * (2 if i == axis else 1) for i, a in enumerate(axes)]
    # Inputs with zeros around them: padded convolutions are parts of this one.
    sizes = [n + 2 * k for n, k in zip(shape[:-1], difference.shape, strict=False)]
    found = norm_upper_bound(difference, LinearMap("conv", (*sizes, shape[-1]), tuple(strides)))
    # Differences of weights are rounded once.
    return float(found.value + 1e-14 * np.linalg.norm(kernel) * math.prod(kernel.shape[:-2]))
