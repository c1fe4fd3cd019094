"""Operators of several signals: maxima, sums, means, concatenations, and linear contractions."""

import functools
import string

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.linear import added, dense, shifted
from tf_lyapunov.onnx.signals import Signal, plain


def _apart(values):
    signals = [v for v in values if isinstance(v, Signal)]
    constants = [np.asarray(v) for v in values if v is not None and not isinstance(v, Signal)]
    return signals, constants


def _extreme(largest):
    kind = keras.layers.Maximum if largest else keras.layers.Minimum
    pick, operation = (
        (np.maximum, keras.ops.maximum) if largest else (np.minimum, keras.ops.minimum)
    )

    def read(build, node, values):
        signals, constants = _apart(values)
        signal = signals[0]
        if len(signals) > 1:
            signal = added(build, node, signals, kind)
        positive = (any if largest else all)(s.nonnegative for s in signals)
        if constants:
            bound = functools.reduce(pick, constants)
            signal, bound = build.against(node, signal, bound)
            build.setting(signal, bound)
            tensor = operation(signal.tensor, np.asarray(bound, signal.dtype))
            signal = signal.like(build.operation(node, tensor, "_bound" * (len(signals) > 1)))
            if largest:
                positive = positive or bool(np.all(bound >= 0))
            else:
                positive = positive and bool(np.all(bound >= 0))
        return signal.like(signal.tensor, nonnegative=positive)

    return read


def _sum(build, node, values):
    signals, constants = _apart(values)
    signal = signals[0] if len(signals) == 1 else added(build, node, signals)
    for i, constant in enumerate(constants):
        signal = shifted(build, node, signal, constant, suffix=f"_constant_{i}" * (i > 0))
    return signal


def _mean(build, node, values):
    signals, constants = _apart(values)
    if constants:
        raise NotRead("a mean with constants is not read")
    return signals[0] if len(signals) == 1 else added(build, node, signals, keras.layers.Average)


def _concat(build, node, values):
    """Constants become padded cells, to which they are added."""
    signals, constants = _apart(values)
    rank, batch = signals[0].rank, signals[0].batch
    if any(s.rank != rank or s.batch != batch for s in signals):
        raise NotRead("it joins signals whose batch axes differ")
    if any(c.ndim != rank for c in constants):
        raise BadGraph("it joins values of different ranks")
    axis = node.get("axis")
    if axis is None:
        raise BadGraph("it states no axis")
    place = signals[0].sample_axis(axis)
    order = signals[0].order
    parts, offset, gap = [], [], 0
    for value in values:
        if isinstance(value, Signal):
            value = build.arranged(node, value, order)
            parts.append([value, gap, 0])
            offset.append(np.zeros(()))
            gap = 0
            continue
        value = np.asarray(value)
        value = value[None] if batch is None else np.moveaxis(value, batch, 0)
        if value.shape[0] != 1 and np.any(value != value[:1]):
            raise NotRead("its constant differs from sample to sample")
        offset.append(value[0])
        if parts:
            parts[-1][2] += value.shape[1 + place]
        else:
            gap += value.shape[1 + place]
    tensors = []
    for signal, before, after in parts:
        tensor = signal.tensor
        if before or after:
            widths = [(0, 0)] * len(tensor.shape)
            widths[1 + order.index(place)] = (before, after)
            tensor = build.operation(node, keras.ops.pad(tensor, widths), "_gap")
        tensors.append(tensor)
    positive = all(s.nonnegative for s in signals) and not constants
    result = tensors[0]
    if len(tensors) > 1:
        axis = 1 + order.index(place)
        axis = -1 if axis == len(order) else axis
        result = build.layer(
            node, keras.layers.Concatenate, tensors, "_signals" * bool(constants), axis=axis
        )
    joined = signals[0].like(result, nonnegative=positive)
    if not constants:
        return joined
    # The constants, zeros where signals are.
    sample = joined.sample
    whole, start = np.zeros(sample, joined.dtype), 0
    for value, held in zip(values, offset, strict=True):
        width = value.sample[place] if isinstance(value, Signal) else held.shape[place]
        if not isinstance(value, Signal):
            key = [slice(None)] * len(sample)
            key[place] = slice(start, start + width)
            whole[tuple(key)] = held
        start += width
    return build.scaled(node, joined, 1.0, np.transpose(whole, order))


# Contractions -----------------------------------------------------------------------------------


def _terms(node, values):
    """`(letters per operand, letters of the result)`, with ellipses written out."""
    text = str(node.get("equation", "")).replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(values):
        raise BadGraph(f"its equation {text!r} does not fit its {len(values)} operands")
    ranks = [v.rank if isinstance(v, Signal) else np.ndim(v) for v in values]
    free = [c for c in string.ascii_letters if c not in text]
    widest = max(
        (r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t),
        default=0,
    )
    dots = "".join(free[:widest])
    found = []
    for term, rank in zip(terms, ranks, strict=True):
        own = rank - len(term.replace("...", ""))
        found.append(term.replace("...", dots[widest - own :] if own else ""))
    if not arrow:
        letters = "".join(found)
        once = sorted(c for c in set(letters) if letters.count(c) == 1 and c not in dots)
        right = dots + "".join(once)
    return found, right.replace("...", dots)


def _einsum(build, node, values):
    terms, result = _terms(node, values)
    signals, constants = _apart(values)
    if len(signals) > 1:
        raise NotRead("a product of two signals has no global Lipschitz constant")
    (place,) = [i for i, v in enumerate(values) if isinstance(v, Signal)]
    signal, letters = signals[0], terms.pop(place)
    if any(len(t) != len(set(t)) for t in (letters, result, *terms)):
        raise NotRead("it takes diagonals")
    if len(letters) != signal.rank or any(
        len(t) != c.ndim for t, c in zip(terms, constants, strict=True)
    ):
        raise BadGraph("its equation does not fit the axes of its operands")
    kernel, held = _folded(terms, constants, letters + result)
    sample = "".join(c for i, c in enumerate(letters) if i != signal.batch)
    many, batch = None, None
    if signal.batch is not None:
        many = letters[signal.batch]
        if many in held or many not in result:
            raise NotRead("it combines samples along the batch axis")
        batch = result.index(many)
    kept = result.replace(many, "") if many else result
    free = next(c for c in string.ascii_letters if c not in letters + result + held)
    first = many or free
    own = first + "".join(sample[a] for a in signal.order)
    if not held and sorted(kept) == sorted(sample):
        order = tuple(kept.index(c) for c in own[1:])
        return Signal(signal.tensor, order, batch, signal.nonnegative)
    shared = [c for c in held if c in sample]
    if len(held) == 2 and len(shared) == 1 and kernel is not None:
        # A matrix along one axis, which takes its place: a Dense layer.
        (inner,), (outer,) = shared, [c for c in held if c not in shared] or [""]
        swapped = sample.replace(inner, outer)
        if outer and inner not in kept and sorted(swapped) == sorted(kept):
            matrix = kernel if held[0] == inner else kernel.T
            found = dense(build, node, signal, sample.index(inner), matrix)
            own = "".join(swapped[a] for a in found.order)
            return Signal(found.tensor, tuple(kept.index(c) for c in own), batch)
    kernel = np.ones((), signal.dtype) if kernel is None else np.asarray(kernel, signal.dtype)
    if held:
        tensor = keras.ops.einsum(f"{own},{held}->{first}{kept}", signal.tensor, kernel)
    else:
        tensor = keras.ops.einsum(f"{own}->{first}{kept}", signal.tensor)
    return plain(build.operation(node, tensor), batch)


def _folded(terms, constants, outside):
    """One constant of several, letters that occur nowhere else summed."""
    if not constants:
        return None, ""
    letters = "".join(dict.fromkeys("".join(terms)))
    kept = "".join(c for c in letters if c in outside)
    if len(constants) == 1 and kept == terms[0]:
        return constants[0], kept
    wide = [np.asarray(c, np.float64) for c in constants]
    if np.prod([float(c.size) for c in wide]) > 2**26:
        raise NotRead("its constants are too large to be multiplied")
    return np.einsum(f"{','.join(terms)}->{kept}", *wide), kept


READERS = {
    "Max": (13, _extreme(True)),
    "Min": (13, _extreme(False)),
    "Sum": (13, _sum),
    "Mean": (13, _mean),
    "Concat": (13, _concat),
    "Einsum": (28, _einsum),
}
