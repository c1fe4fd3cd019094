"""Values of a graph that depend on its inputs, as tensors of the Keras model that is built.

The axes of an ONNX value are its logical axes. A Keras tensor has its batch axis first, and its
channels last where convolutions and pools want them; which axis is where is kept beside it, so that
transposes cost nothing until an operation needs an order.
"""

import dataclasses
import math

from tf_lyapunov.onnx.foreign import NotRead

# Stands for the number of samples where shapes are computed, and for nothing else: a prime that no
# network's sizes make.
BATCH = 1_999_999_973


@dataclasses.dataclass(frozen=True)
class Signal:
    """A value per sample.

    Attributes:
        tensor: `keras.KerasTensor`, batch axis first.
        order: `tensor`'s axis 1 + i is axis `order[i]` of a sample.
        batch: position of the axis that counts samples among the logical axes, or None.
        nonnegative: whether it is known to have no negative entry.
    """

    tensor: object
    order: tuple
    batch: int | None
    nonnegative: bool = False

    @property
    def sample(self):
        """Shape of a sample, in logical order."""
        shape = [0] * len(self.order)
        for i, axis in enumerate(self.order):
            shape[axis] = self.tensor.shape[1 + i]
        return tuple(shape)

    @property
    def rank(self):
        """Number of logical axes."""
        return len(self.order) + (self.batch is not None)

    @property
    def dtype(self):
        """Keras name."""
        return str(self.tensor.dtype)

    def shape(self, batch):
        """Logical shape with so many samples."""
        found = list(self.sample)
        if self.batch is not None:
            found.insert(self.batch, batch)
        return tuple(found)

    def place(self, axis):
        """Which axis of a sample a logical axis is; None for the batch axis."""
        if not -self.rank <= axis < self.rank:
            raise NotRead(f"axis {axis} of a value with {self.rank} axes")
        axis %= self.rank
        if self.batch is None or axis < self.batch:
            return axis
        return None if axis == self.batch else axis - 1

    def sample_axis(self, axis):
        """As `place`, refused for the batch axis."""
        place = self.place(axis)
        if place is None:
            raise NotRead("it combines samples along the batch axis")
        return place

    def keras_axis(self, axis):
        """Which axis of the tensor a logical axis is."""
        return 1 + self.order.index(self.sample_axis(axis))

    @property
    def is_plain(self):
        """Whether the tensor's axes are in logical order."""
        return self.order == tuple(range(len(self.order)))

    def like(self, tensor, **changes):
        """The signal of a tensor with the same axes."""
        return dataclasses.replace(self, tensor=tensor, **{"nonnegative": False, **changes})


def plain(tensor, batch, nonnegative=False):
    """`Signal` of a tensor whose axes are in logical order."""
    return Signal(tensor, tuple(range(len(tensor.shape) - 1)), batch, nonnegative)


def size_of(shape):
    """Number of entries."""
    return math.prod(shape)
