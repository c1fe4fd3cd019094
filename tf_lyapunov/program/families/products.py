"""Products of two signals: entry by entry, matrix products and sums over shared axes.

They have no gain on all of space, so that `certify` without a region refuses them; on a ball or a
box they are bounded by `local.products`. Both signals are laid one behind the other (`Beside`), and
the product is a stack of matrix products of parts of that vector (`Product`).
"""

import dataclasses
import math
import string

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.merging import Joined
from tf_lyapunov.program.gain import Affine, Gain
from tf_lyapunov.program.graph import Tensor, check_own_call
from tf_lyapunov.program.operation import Operation, Signal, with_error
from tf_lyapunov.program.refusal import refuse

_layers = keras.layers
# Layers and operations of two signals that are read on a region.
LAYERS = (_layers.Multiply, _layers.Dot)
BARE = ("Multiply", "Matmul", "Einsum")


@dataclasses.dataclass(frozen=True)
class Beside(Joined):
    """All entries of several signals, one after the other."""

    def forward(self, signals, precision):
        flat = [
            Signal(
                s.value.reshape(len(s.value), -1),
                None if s.error is None else s.error.reshape(len(s.error), -1),
            )
            for s in signals
        ]
        return super().forward(flat, precision)


@dataclasses.dataclass(frozen=True)
class Product(Operation):
    """Matrix products Y_g = A_g B_g of entries of one vector z, for g = 1, …, G.

    Attributes:
        left: read-only int64 (G, I, K), positions in z of the entries of A_g.
        right: read-only int64 (G, K, J), of those of B_g.
        index: read-only int64 of the output's shape: positions in the flat (G, I, J).

    Raises:
        ValueError: if an entry stands twice in A_g and B_g of one g: what a ball of z leaves of
            them is then no ball of theirs.
    """

    left: np.ndarray
    right: np.ndarray
    index: np.ndarray

    def __post_init__(self):
        each = [v.reshape(len(v), -1) for v in (self.left, self.right)]
        if np.any(np.diff(np.sort(np.concatenate(each, axis=1), axis=1), axis=1) == 0):
            raise ValueError("No entry may stand twice in the factors of one matrix product.")

    def forward(self, signals, precision):
        (signal,) = signals
        a, b = self.factors(signal.value)
        value = self.placed(a @ b)

        def error():
            da, db = self.factors(signal.error)
            a_size, b_size, terms = np.abs(a), np.abs(b), a.shape[-1]
            moved = a_size @ db + da @ (b_size + db)
            largest, other = a_size + da, b_size + db
            own = precision.sum(terms) * (largest @ other)
            flushed = terms + largest.sum(axis=-1, keepdims=True)
            flushed = flushed + other.sum(axis=-2, keepdims=True)
            return self.placed(moved + own + 2 * precision.tiny * flushed)

        return with_error(signals, value, error)

    def write(self, graph, names):
        raise UnsupportedLayerError(
            "Exported models hold no products of two signals. Received: an operation of type "
            "Product. Export the model by Keras' own `model.export`."
        )

    def factors(self, z):
        """A and B of a batch of vectors."""
        z = z.reshape(len(z), -1)
        return z[:, self.left], z[:, self.right]

    def placed(self, y):
        """(n, G, I, J) in the output's order."""
        return y.reshape(len(y), -1)[:, self.index]


def _fixed(array):
    array = np.ascontiguousarray(array, dtype=np.int64)
    array.setflags(write=False)
    return array


def by_entry(shapes):
    """`Product` entry by entry, with broadcasting, of samples of two shapes."""
    first, second = (np.arange(math.prod(s)).reshape(s) for s in shapes)
    a, b = np.broadcast_arrays(first, second + first.size)
    index = np.arange(a.size).reshape(a.shape)
    return Product(_fixed(a.reshape(-1, 1, 1)), _fixed(b.reshape(-1, 1, 1)), _fixed(index))


def by_letters(shapes, first, second, output):
    """`Product` of samples of two shapes as in `einsum`, without the batch axis.

    Args:
        shapes: of both samples; an axis of length 1 counts as of the other's length.
        first, second, output: str, a letter for every axis.

    Raises:
        ValueError: for letters that stand in one factor alone and not in the output, also by an
            axis of length 1 that is summed over the other's length.
    """
    places, start = [], 0
    sizes = {}
    for letters, shape in zip((first, second), shapes, strict=True):
        places.append(np.arange(start, start + math.prod(shape)).reshape(shape))
        start += math.prod(shape)
        for letter, n in zip(letters, shape, strict=True):
            if letter not in output and sizes.get(letter, n) != n:
                raise ValueError("Axes that are summed over must have the same length.")
            sizes[letter] = max(sizes.get(letter, 1), n)
    for i, letters in enumerate((first, second)):
        places[i] = np.broadcast_to(places[i], [sizes[c] for c in letters])
    both = [c for c in first if c in second]
    stack, summed = [c for c in both if c in output], [c for c in both if c not in output]
    rows, columns = ([c for c in own if c not in both] for own in (first, second))
    if any(c not in output for c in (*rows, *columns)) or set(output) - set(first + second):
        raise ValueError("Every letter must stand in both factors, or in the output.")

    def arranged(place, letters, *groups):
        found = np.transpose(place, [letters.index(c) for group in groups for c in group])
        return _fixed(found.reshape([math.prod(sizes[c] for c in group) for group in groups]))

    left = arranged(places[0], first, stack, rows, summed)
    right = arranged(places[1], second, stack, summed, columns)
    made = [*stack, *rows, *columns]
    index = np.arange(math.prod(sizes[c] for c in made)).reshape([sizes[c] for c in made])
    return Product(left, right, _fixed(np.transpose(index, [made.index(c) for c in output])))


# Reading ------------------------------------------------------------------------------------------


def is_product(call):
    """Whether a call multiplies two signals of the graph."""
    operation = call.operation
    if isinstance(operation, keras.Layer):
        return type(operation) in LAYERS
    # Keras' own operations alone.
    if type(operation).__name__ not in BARE or not type(operation).__module__.startswith("keras."):
        return False
    return len([a for a in _arguments(call) if isinstance(a, Tensor)]) > 1


def _arguments(call):
    return keras.tree.flatten((call.args, call.kwargs))


def gain(call):
    """The `Gain` of a product: none, but on a region."""
    check_own_call(call.operation)
    rounding.unit_roundoff(call.outputs[0].dtype)
    read(call)  # refuses what is not read
    count = len(call.inputs)
    affine = Affine(math.inf)
    return Gain("product", math.inf, "none on all of space", affine, "sum", (1.0,) * count)


def read(call):
    """The operations of a product."""
    operation, shapes = call.operation, [t.shape[1:] for t in call.inputs]
    kind = type(operation).__name__
    if len(shapes) != 2:
        refuse(operation, f"it multiplies {len(shapes)} signals at once", advice="Multiply two.")
    if any(None in s for s in shapes):
        refuse(operation, "its sizes are unknown", advice="Fix the input's size.")
    dtypes = {t.dtype for t in (*call.inputs, *call.outputs)}
    if len(dtypes) > 1:
        refuse(operation, "its factors are of different types", advice="Cast them to one.")
    forms = {"Multiply": _multiply, "Matmul": _matmul, "Einsum": _einsum, "Dot": _dot}
    product = forms[kind](call, shapes)
    if product.index.shape != tuple(call.outputs[0].shape[1:]):
        refuse(operation, "its output has another shape than its reading")
    return [Beside(1), product]


def _multiply(call, shapes):
    if len(shapes[0]) != len(shapes[1]):
        refuse(call.operation, "tensors of different ranks are combined across samples")
    return by_entry(shapes)


def _matmul(call, shapes):
    rank = len(shapes[0])
    if rank != len(shapes[1]) or rank < 2:
        refuse(call.operation, "it combines samples along the batch axis")
    lead = string.ascii_letters[: rank - 2]
    return by_letters(shapes, f"{lead}yz", f"{lead}zx", f"{lead}yx")


def _einsum(call, shapes):
    text = call.operation.subscripts.replace(" ", "")
    tensors = [a for a in _arguments(call) if isinstance(a, Tensor)]
    if "." in text or "->" not in text or len(tensors) != 2:
        refuse(call.operation, "only two signals with all their axes named are read")
    inputs, output = text.split("->")
    parts = inputs.split(",")
    batch = output[:1]
    if any(p[:1] != batch or len(set(p)) < len(p) for p in (*parts, output)) or not batch:
        refuse(call.operation, "it combines samples along the batch axis, or takes diagonals")
    try:
        return by_letters(shapes, *(p[1:] for p in (*parts, output)))
    except ValueError:
        refuse(call.operation, "it sums over an axis of one factor alone")


def _dot(call, shapes):
    layer = call.operation
    if layer.normalize:
        refuse(layer, "it divides by the norms of its inputs")
    axes = (layer.axes, layer.axes) if isinstance(layer.axes, int) else tuple(layer.axes)
    ranks = [len(s) + 1 for s in shapes]
    axes = [a % n for a, n in zip(axes, ranks, strict=True)]
    if 0 in axes:
        refuse(layer, "it combines samples along the batch axis")
    first, second = list("abcdef"[: ranks[0] - 1]), list("uvwxyz"[: ranks[1] - 1])
    first[axes[0] - 1] = second[axes[1] - 1] = "s"
    if shapes[0][axes[0] - 1] != shapes[1][axes[1] - 1]:
        refuse(layer, "its axes have different lengths")
    output = "".join(c for c in (*first, *second) if c != "s")
    found = by_letters(shapes, "".join(first), "".join(second), output)
    if output:
        return found
    return dataclasses.replace(found, index=_fixed(found.index.reshape(1)))
