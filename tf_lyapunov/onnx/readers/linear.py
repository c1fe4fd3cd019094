"""Products with constant matrices and sums with constants: Gemm, MatMul, Add, Sub, Mul, Div."""

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.signals import Signal, plain, size_of

_PRODUCT = (
    "a product of two signals has no global Lipschitz constant (gated units, attention, "
    "squeeze-and-excitation)"
)


def dense(build, node, signal, place, kernel, bias=None, suffix=""):
    """y = W·x + b along axis `place` of a sample, which keeps its place.

    Args:
        build: `Builder`.
        node: `OnnxNode`.
        signal: `Signal`.
        place: axis of a sample.
        kernel: (in, out).
        bias: (out,) or None.
        suffix: of the layer's name.
    """
    if signal.sample[place] != kernel.shape[0]:
        raise BadGraph(
            f"its matrix of shape {kernel.shape} meets an axis of size {signal.sample[place]}"
        )
    signal = build.with_last(node, signal, place)
    kernel = np.asarray(kernel, signal.dtype)
    weights = [kernel] if bias is None else [kernel, np.asarray(bias, signal.dtype)]
    tensor = build.layer(
        node,
        keras.layers.Dense,
        signal.tensor,
        suffix,
        weights,
        units=kernel.shape[1],
        use_bias=bias is not None,
    )
    return signal.like(tensor)


def shifted(build, node, signal, constant, sign=1.0, suffix=""):
    """sign·x + constant, with broadcasting."""
    if not np.any(constant) and np.ndim(constant) <= signal.rank and sign == 1.0:
        shape = np.shape(constant)
        if np.broadcast_shapes(shape, signal.shape(1)) == signal.shape(1):
            return signal
    signal, constant = build.against(node, signal, constant)
    return build.scaled(node, signal, sign, constant, suffix)


def multiplied(build, node, signal, constant, suffix=""):
    """x·constant, with broadcasting."""
    signal, constant = build.against(node, signal, constant)
    if np.all(constant == 1):
        return signal
    return build.scaled(node, signal, constant, 0.0, suffix)


def scale_exactly(kernel, factor):
    """The kernel times a number where no entry is rounded, else None."""
    kernel = np.asarray(kernel)
    if kernel.dtype == np.float64:
        mantissa, _ = np.frexp(factor)
        return kernel * factor if abs(mantissa) == 0.5 else None
    exact = kernel.astype(np.float64) * float(factor)
    rounded = exact.astype(kernel.dtype)
    return rounded if np.array_equal(rounded.astype(np.float64), exact) else None


def _gemm(build, node, values):
    a, b = values[:2]
    c = values[2] if len(values) > 2 else None
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if isinstance(a, Signal) and isinstance(b, Signal):
        raise NotRead(_PRODUCT)
    if isinstance(a, Signal):
        if a.rank != 2 or np.ndim(b) != 2:
            raise BadGraph("Gemm takes matrices")
        kernel = b.T if node.get("transB", 0) else b
        axis = 0 if node.get("transA", 0) else 1
        swapped, signal = bool(node.get("transA", 0)), a
    else:
        if b.rank != 2 or np.ndim(a) != 2:
            raise BadGraph("Gemm takes matrices")
        kernel = a if node.get("transA", 0) else a.T
        axis = 1 if node.get("transB", 0) else 0
        swapped, signal = bool(node.get("transB", 0)), b
    place, bias = signal.sample_axis(axis), None
    factor = scale_exactly(kernel, alpha) if alpha != 1 else kernel
    if not isinstance(c, Signal) and c is not None and factor is not None:
        scaled = scale_exactly(c, beta) if beta != 1 else np.asarray(c)
        out, row = kernel.shape[1], axis if not swapped else 1 - axis
        if scaled is not None:
            full = scaled.reshape((1,) * (2 - scaled.ndim) + scaled.shape)
            if full.shape[1 - row] == 1 and full.shape[row] in (1, out):
                bias = np.broadcast_to(full.ravel(), (out,))
    name = "" if c is None or bias is not None else "_product"
    kernel_used = kernel if factor is None else factor
    result = dense(build, node, signal, place, kernel_used, bias, name)
    if factor is None:
        result = build.scaled(node, result, alpha, 0.0, "_alpha")
    if swapped:
        result = transposed(result, (1, 0))
    if c is None or bias is not None:
        return result
    if isinstance(c, Signal):
        if beta != 1:
            c = build.scaled(node, c, beta, 0.0, "_beta")
        return added(build, node, [result, c])
    shift = scale_exactly(c, beta) if beta != 1 else np.asarray(c)
    if shift is not None:
        return shifted(build, node, result, shift)
    if np.asarray(c).dtype != np.float32:
        raise NotRead("beta times its constant is rounded")
    # Added in two parts, since beta times it is no number of the format.
    exact = np.asarray(c, np.float64) * beta
    high = exact.astype(np.float32)
    result = shifted(build, node, result, high, suffix="_bias")
    return shifted(build, node, result, (exact - high).astype(np.float32))


def transposed(signal, axes):
    """The signal with its logical axes in another order: nothing moves."""
    places = [signal.place(a) for a in axes]
    batch = places.index(None) if None in places else None
    kept = [p for p in places if p is not None]
    order = tuple(kept.index(axis) for axis in signal.order)
    return Signal(signal.tensor, order, batch, signal.nonnegative)


def added(build, node, signals, kind=keras.layers.Add):
    """A merging layer of several signals, brought to one shape and order."""
    rank = max(s.rank for s in signals)
    signals = [build.lifted(node, s, rank) for s in signals]
    batches = {s.batch for s in signals}
    if len(batches) > 1:
        raise NotRead("it combines a signal's batch axis with another's axis")
    shape = np.broadcast_shapes(*(s.sample for s in signals))
    signals = [build.repeated(node, s, shape) for s in signals]
    order = signals[0].order
    signals = [build.arranged(node, s, order) for s in signals]
    return signals[0].like(build.layer(node, kind, [s.tensor for s in signals]))


def _matmul(build, node, values):
    a, b = values
    if isinstance(a, Signal) and isinstance(b, Signal):
        raise NotRead(_PRODUCT)
    left = isinstance(b, Signal)
    signal, kernel = (b, np.asarray(a)) if left else (a, np.asarray(b))
    while kernel.ndim > 2 and kernel.shape[0] == 1 and kernel.ndim > signal.rank:
        kernel = kernel[0]
    if kernel.ndim > 2 and size_of(kernel.shape[:-2]) == 1:
        signal = build.lifted(node, signal, kernel.ndim)
        kernel = kernel.reshape(kernel.shape[-2:])
    if kernel.ndim > 2:
        return _stacked(build, node, signal, kernel, left)
    if kernel.ndim == 0 or signal.rank == 0:
        raise BadGraph("MatMul takes no numbers")
    vector = kernel.ndim == 1
    if left:
        axis = -2 if signal.rank > 1 else -1
        matrix = kernel[:, None] if vector else kernel.T
    else:
        axis, matrix = -1, kernel[:, None] if vector else kernel
    place = signal.sample_axis(axis)
    result = dense(build, node, signal, place, matrix)
    if not vector:
        return result
    return without_axis(build, node, result, place)


def without_axis(build, node, signal, place):
    """The signal without an axis of one of a sample."""
    batch = signal.batch
    if batch is not None and place < batch:
        batch -= 1
    axes = [a for a in range(len(signal.order)) if a != place]
    return build.refitted(node, signal, axes, batch, "_drop")


def _stacked(build, node, signal, kernel, left):
    """A product with a stack of matrices."""
    signal = build.plain(node, build.lifted(node, signal, kernel.ndim))
    batch, rank = signal.batch, signal.rank
    kernel = np.asarray(kernel, signal.dtype)
    kernel = kernel.reshape((1,) * (rank - kernel.ndim) + kernel.shape)
    # The axis of the signal that a product keeps.
    kept = rank - 1 if left else rank - 2
    if batch is not None and batch < rank - 2:
        if kernel.shape[batch] != 1:
            raise NotRead("its constant differs from sample to sample")
        kernel = kernel.squeeze(batch)
    elif batch not in (kept, None):
        raise NotRead("it combines samples along the batch axis")
    while kernel.ndim > 2 and kernel.shape[0] == 1:
        kernel = kernel[0]
    tensor, sample = signal.tensor, signal.sample
    if batch == kept:  # every sample is a row, or a column, of its own
        single = (*sample, 1) if left else (*sample[:-1], 1, sample[-1])
        tensor = build.layer(node, keras.layers.Reshape, tensor, "_single", target_shape=single)
    pair = (kernel, tensor) if left else (tensor, kernel)
    tensor = build.operation(node, keras.ops.matmul(*pair))
    if batch == kept:
        shape = tuple(tensor.shape[1:])
        shape = shape[:-1] if left else (*shape[:-2], shape[-1])
        tensor = build.layer(node, keras.layers.Reshape, tensor, "_kept", target_shape=shape)
    return plain(tensor, batch)


def _add(build, node, values):
    a, b = values
    if isinstance(a, Signal) and isinstance(b, Signal):
        return added(build, node, [a, b])
    signal, constant = (a, b) if isinstance(a, Signal) else (b, a)
    return shifted(build, node, signal, constant)


def _sub(build, node, values):
    a, b = values
    if isinstance(a, Signal) and isinstance(b, Signal):
        return added(build, node, [a, b], keras.layers.Subtract)
    if isinstance(a, Signal):
        return shifted(build, node, a, -np.asarray(b))
    return shifted(build, node, b, a, -1.0)


def _mul(build, node, values):
    a, b = values
    if isinstance(a, Signal) and isinstance(b, Signal):
        raise NotRead(_PRODUCT)
    signal, constant = (a, b) if isinstance(a, Signal) else (b, a)
    return multiplied(build, node, signal, constant)


def divided(build, node, signal, constant, suffix=""):
    """x/constant: a product where no reciprocal is rounded."""
    constant = np.asarray(constant)
    if not np.all(constant):
        raise BadGraph("it divides by zero")
    mantissa, _ = np.frexp(constant)
    if np.all(np.abs(mantissa) == 0.5):
        return multiplied(build, node, signal, 1 / constant, suffix)
    signal, constant = build.against(node, signal, constant)
    build.setting(signal, constant)
    tensor = keras.ops.divide(signal.tensor, np.asarray(constant, signal.dtype))
    return signal.like(build.operation(node, tensor, suffix))


def _div(build, node, values):
    a, b = values
    if isinstance(b, Signal):
        raise NotRead("a division by a signal has no global Lipschitz constant")
    return divided(build, node, a, b)


def _where(build, node, values):
    """Entries of two values, chosen by a constant: each times its mask."""
    condition, *given = values
    if not isinstance(condition, np.ndarray):
        raise NotRead("it chooses by its input, which jumps where the two choices differ")
    masks = [np.asarray(condition, bool), ~np.asarray(condition, bool)]
    signals = [(v, m) for v, m in zip(given, masks, strict=True) if isinstance(v, Signal)]
    parts = [
        multiplied(build, node, v, m.astype(v.dtype), f"_{'kept' if m is masks[0] else 'other'}")
        for v, m in signals
    ]
    if len(parts) == 2:
        return added(build, node, parts)
    constant = next(np.where(m, v, 0) for v, m in zip(given, masks, strict=True)
                    if not isinstance(v, Signal))  # fmt: skip
    return shifted(build, node, parts[0], constant)


def _cumulated(build, node, values):
    """Running sums along an axis: a triangular matrix."""
    signal, axis = values
    if not isinstance(axis, np.ndarray) or axis.size != 1:
        raise NotRead("its axis is computed from inputs")
    place = signal.sample_axis(int(axis.reshape(())))
    size = signal.sample[place]
    build.check_bytes(8 * size * size)
    kernel = np.triu(np.ones((size, size), signal.dtype), bool(node.get("exclusive", 0)))
    kernel = kernel.T if node.get("reverse", 0) else kernel
    return dense(build, node, signal, place, kernel)


def _dense_with_bias(build, node, values):
    """MatMul and the Add of a vector behind it, which `patterns` joined."""
    signal, kernel, bias = values
    return dense(build, node, signal, signal.sample_axis(-1), np.asarray(kernel), bias)


READERS = {
    "Gemm": (13, _gemm),
    "MatMul": (13, _matmul),
    "Add": (14, _add),
    "Sub": (14, _sub),
    "Mul": (14, _mul),
    "Div": (14, _div),
    "Where": (16, _where),
    "CumSum": (14, _cumulated),
    "tf_lyapunov.Dense": (0, _dense_with_bias),
}
