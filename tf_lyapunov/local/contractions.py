"""`EinsumDense` and products with a constant among the linear maps of `maps`."""

import functools
import math

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.program.families.einsum import Contracted, contraction_gain


@maps.adjoint.register
def _(operation: Contracted, c, shapes):
    signal, kernel, output = operation.signal, operation.kernel_letters, operation.output
    kept = "".join(k for k in signal if k in output or k in kernel)
    found = np.einsum(f"{output},{kernel}->{kept}", c, operation.kernel, optimize=True)
    # What was summed over axes of the signal alone goes back to all of their entries.
    sizes = dict(zip(signal, (len(c), *shapes[0]), strict=True))
    found = found.reshape([sizes[k] if k in kept else 1 for k in signal])
    return [np.broadcast_to(found, (len(c), *shapes[0]))]


@maps.absolute.register
def _(operation: Contracted, sizes):
    return operation._sum(sizes[0], np.abs(operation.kernel))


@maps.offset.register
def _(operation: Contracted):
    return operation.bias


@maps.terms.register
def _(operation: Contracted, shapes):
    sizes = dict(zip(operation.kernel_letters, operation.kernel.shape, strict=True))
    back = math.prod(n for k, n in sizes.items() if k not in operation.signal)
    return max(operation._terms((1, *shapes[0])), back)


@maps.norms.register
def _(operation: Contracted, shapes):
    return [_norm(maps._Kept(operation), tuple(shapes[0]))]


@functools.lru_cache(maxsize=256)
def _norm(kept, shape):
    return float(contraction_gain(kept.operation, (None, *shape))[0])
