"""Products with a constant: EinsumDense, and `matmul`, `dot`, `tensordot`, `einsum` in a graph.

All are sums y = Σ x[…]·K[…] over letters: those of x and K alone are summed or kept, shared ones
are contracted, and letters of x, K and y together index separate blocks K_d. Up to order, y is the
block diagonal map of the matrices K_d (contracted × kept) for every index of x that stays, after a
sum over the letters of x that occur nowhere else: the gain is max_d ‖K_d‖·√(their sizes), attained.
"""

import dataclasses
import math
import string

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.adding import check_added
from tf_lyapunov.program.families import fused
from tf_lyapunov.program.families.linear import absolute_norm_upper_bound, map_affine
from tf_lyapunov.program.gain import Gain, with_cast
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.weights import finite_value
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap

_layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Contracted(Operation):
    """y = einsum(letters, x, K) + b.

    Attributes:
        signal, kernel_letters, output: letters of the axes of x, K and y, batch axis first in x
            and y.
        kernel: float64.
        bias: float64 that broadcasts against a sample of y, or None.
    """

    signal: str
    kernel_letters: str
    output: str
    kernel: np.ndarray
    bias: np.ndarray | None = None

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._sum(signal.value, self.kernel)
        if self.bias is not None:
            value = value + self.bias

        def error():
            size, terms = np.abs(self.kernel), self._terms(signal.value.shape)
            largest = np.abs(signal.value) + signal.error
            found = self._sum(signal.error, size)
            found = found + precision.sum(terms) * self._sum(largest, size)
            flushed = 1 + float(size.max(initial=0.0)) + np.max(largest, initial=0.0)
            found = found + precision.tiny * terms * flushed
            if self.bias is not None:
                found = found + precision.sum(terms) * (np.abs(self.bias) + np.abs(value))
            return found

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        lead, last = self.signal[:-1], self.output[-1]
        if self.output == lead + last and self.kernel_letters == self.signal[-1] + last:
            y = graph.node("MatMul", x, self.kernel)
        elif self.kernel_letters:
            letters = f"{self.signal},{self.kernel_letters}->{self.output}"
            y = graph.node("Einsum", x, self.kernel, equation=letters)
        else:
            y = graph.node("Einsum", x, equation=f"{self.signal}->{self.output}")
            y = y if self.kernel == 1 else graph.pointwise("Mul", y, self.kernel)
        return y if self.bias is None else graph.pointwise("Add", y, self.bias)

    def _sum(self, x, kernel):
        letters = f"{self.signal},{self.kernel_letters}->{self.output}"
        return np.einsum(letters, x, kernel, optimize=True)

    def _terms(self, shape):
        sizes = {**dict(zip(self.kernel_letters, self.kernel.shape, strict=True)),
                 **dict(zip(self.signal, shape, strict=True))}  # fmt: skip
        return math.prod(n for letter, n in sizes.items() if letter not in self.output)


def _letters(call, signal, kernel, output, rank):
    """Letters with `...` written out, for x of this rank; the batch axis must stay first."""
    operation = call.operation
    free = [c for c in string.ascii_letters if c not in signal + kernel + output]
    if "..." in kernel:
        refuse(operation, "its constant has open axes")
    if "..." in signal:
        missing = "".join(free[: rank - len(signal.replace("...", ""))])
        if "..." not in output:
            refuse(operation, "it sums over open axes")
        signal, output = signal.replace("...", missing), output.replace("...", missing)
    if len(signal) != rank or any(len(set(part)) < len(part) for part in (signal, kernel, output)):
        refuse(operation, "it takes diagonals")
    if not output or output[0] != signal[0] or signal[0] in kernel:
        refuse(operation, "it combines samples along the batch axis")
    return signal, kernel, output


def contraction_gain(operation, shape):
    """`(norm, norm of the absolute values, products per output entry, how)` of a `Contracted`.

    Args:
        operation: `Contracted`.
        shape: of x with the batch axis; sizes of letters of x that are summed must be known.
    """
    kernel, letters = operation.kernel, operation.kernel_letters
    sizes = dict(zip(operation.signal, shape, strict=True))
    alone = [c for c in operation.signal if c not in letters + operation.output]
    # Letters of the constant alone are summed first.
    summed = tuple(i for i, c in enumerate(letters)
                   if c not in operation.signal + operation.output)  # fmt: skip
    magnitude = np.abs(kernel).sum(axis=summed)
    folded = math.prod(kernel.shape[i] for i in summed)
    kernel = kernel.sum(axis=summed)
    letters = "".join(c for i, c in enumerate(letters) if i not in summed)
    blocks = [c for c in letters if c in operation.signal and c in operation.output]
    inner = [c for c in letters if c in operation.signal and c not in operation.output]
    outer = [c for c in letters if c not in operation.signal]
    order = [letters.index(c) for c in (*blocks, *inner, *outer)]
    held = dict(zip(letters, kernel.shape, strict=True))
    shape = [math.prod(held[c] for c in group) for group in (blocks, inner, outer)]
    stack = np.transpose(kernel, order).reshape(shape)
    sizes_up = np.transpose(magnitude, order).reshape(shape)
    bounds = [norm_upper_bound(block, LinearMap("dense", (shape[1],))) for block in stack]
    # A sum of `folded` entries of the constant rounds in float64 here, too.
    extra = rounding.gamma(folded, rounding.UNIT_ROUNDOFF["float64"]) if folded > 1 else 0.0
    absolute = max((absolute_norm_upper_bound(b, LinearMap("dense", (shape[1],)))
                    for b in sizes_up), default=0.0)  # fmt: skip
    value = max((b.value for b in bounds), default=0.0)
    if extra:
        value = rounding.sum_up(value, rounding.product_up(extra, absolute))
    times = rounding.sqrt_up(math.prod(sizes[c] for c in alone)) if alone else 1.0
    method = bounds[0].method if bounds else "empty"
    how = f"norm of its matrix, {method}" + (f", {shape[0]} blocks" if shape[0] > 1 else "")
    terms = shape[1] * folded * math.prod(sizes[c] for c in alone)
    return rounding.product_up(value, times), rounding.product_up(absolute, times), terms, how


def _gain(call, found, dtype):
    tensor, output = call.inputs[0], call.outputs[0]
    if any(n is None and c not in found.output
           for c, n in zip(found.signal, tensor.shape, strict=True)):  # fmt: skip
        refuse(call.operation, "it sums over axes of unknown size")
    value, absolute, terms, how = contraction_gain(found, tensor.shape)
    offset = 0.0
    if found.bias is not None:
        size = math.inf if output.size is None else output.size
        norm = float(rounding.euclidean_norms_up(found.bias.reshape(1, -1))[0])
        offset = rounding.product_up(norm, math.sqrt(size / found.bias.size)) if norm else 0.0
    affine = map_affine(value, absolute, offset, terms, dtype)
    affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    return Gain("map", value, how, affine)


# EinsumDense ------------------------------------------------------------------------------------


def _of_layer(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    if layer.quantization_mode is not None or layer.lora_enabled:
        refuse(layer, "it is quantized or has an adapter")
    signal, kernel = layer.equation.replace(" ", "").split("->")[0].split(",")
    output = layer.equation.replace(" ", "").split("->")[1]
    rank = len(call.inputs[0].shape)
    signal, kernel, output = _letters(call, signal, kernel, output, rank)
    weight = finite_value(layer, layer.kernel, dtype)
    bias = None if layer.bias is None else frozen(finite_value(layer, layer.bias, dtype))
    if bias is not None and bias.ndim >= len(output):
        bias = frozen(bias.reshape(bias.shape[bias.ndim - len(output) + 1 :]))
    return Contracted(signal, kernel, output, frozen(weight), bias)


def _read(call):
    found = _of_layer(call)
    if found.bias is not None:
        check_added(call.operation, found.bias, call.outputs[0])
    return [found, *fused.read(call.operation, call.outputs[0])]


def _rule(call):
    return _gain(call, _of_layer(call), call.operation.compute_dtype)


# Bare operations --------------------------------------------------------------------------------


def _constant(call, value):
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        pass
    elif np.asarray(value).dtype.kind not in "iuf":
        refuse(call.operation, "one of its arguments is not a number")
    dtype = call.outputs[0].dtype
    return finite_value(call.operation, value, dtype)


def _pair(call):
    """`(x first?, constant)` of a product of two arguments."""
    arguments = [*call.args, *call.kwargs.values()]
    if len(call.inputs) != 1 or len(arguments) != 2:
        refuse(call.operation)
    first = isinstance(arguments[0], Tensor)
    return first, _constant(call, arguments[1] if first else arguments[0])


def _matmul(call):
    first, kernel = _pair(call)
    rank = len(call.inputs[0].shape)
    names = string.ascii_letters
    if first:  # x[… i] K[… i o]
        signal = names[: rank - 1] + "y"
        if kernel.ndim == 1:
            return signal, "y", signal[:-1], kernel
        lead, last = signal[:-2], signal[-2] + "z"
        tail = "yz"
    else:  # K[… o i] x[… i p]
        if rank < 3:
            refuse(call.operation, "it combines samples along the batch axis")
        signal = names[: rank - 2] + "y" + "x"
        if kernel.ndim == 1:
            return signal, "y", signal[:-2] + "x", kernel
        lead, last = signal[:-2], "zx"
        tail = "zy"
    # Leading axes of the constant meet those of x from the right.
    extra = kernel.ndim - 2
    room = max(len(lead) - 1, 0)
    while extra > room and kernel.shape[0] == 1:
        kernel, extra = kernel.reshape(kernel.shape[1:]), extra - 1
    if extra > room:
        refuse(call.operation, "it combines a constant with the batch axis")
    sizes = call.inputs[0].shape
    letters, output = "", list(lead)
    for i in range(extra):
        place = len(lead) - extra + i
        here, there = sizes[place], kernel.shape[i]
        if here == there:
            letters += lead[place]
        elif there == 1:
            letters += "ABCDEFGH"[i]  # summed over its one entry
        elif here == 1:
            letters += "STUVWXYZ"[i]  # of the constant alone, kept
            output[place] = "STUVWXYZ"[i]
        else:
            refuse(call.operation, "its sizes are unknown")
    return signal, letters + tail, "".join(output) + last, kernel


def _dot(call):
    first, kernel = _pair(call)
    if kernel.ndim == 0:
        refuse(call.operation, "it multiplies by a number", advice="Use `multiply`.")
    if kernel.ndim > 2 and keras.backend.backend() == "torch":
        refuse(
            call.operation,
            "Keras on PyTorch multiplies stacks of matrices as `matmul` does",
            advice="Use `tensordot` with its axes.",
        )
    rank = len(call.inputs[0].shape)
    if not first:
        if kernel.ndim > 1 or rank < 3:
            refuse(call.operation, "it combines samples along the batch axis")
        signal = string.ascii_letters[:rank]
        return signal, signal[-2], signal[:-2] + signal[-1], kernel
    signal = string.ascii_letters[:rank]
    letters = list("ABCDEFGHIJ"[: kernel.ndim])
    letters[-2 if kernel.ndim > 1 else 0] = signal[-1]
    kept = [c for c in letters if c != signal[-1]]
    return signal, "".join(letters), signal[:-1] + "".join(kept), kernel


def _tensordot(call):
    first, kernel = _pair(call)
    if not first:
        refuse(call.operation, "it combines samples along the batch axis")
    rank, axes = len(call.inputs[0].shape), call.operation.axes
    if isinstance(axes, int):
        pairs = [(rank - axes + i, i) for i in range(axes)]
    else:
        lists = [[a] if isinstance(a, int) else list(a) for a in axes]
        pairs = [(a % rank, b % kernel.ndim) for a, b in zip(*lists, strict=True)]
    signal, letters = string.ascii_lowercase[:rank], list("ABCDEFGHIJ"[: kernel.ndim])
    for a, b in pairs:
        letters[b] = signal[a]
    used = {signal[a] for a, _ in pairs}
    output = [c for c in signal if c not in used] + [c for c in letters if c.isupper()]
    return signal, "".join(letters), "".join(output), kernel


def _einsum(call):
    arguments, text = list(call.args), call.operation.subscripts.replace(" ", "")
    if isinstance(arguments[0], str):
        arguments = arguments[1:]
    parts = text.split("->")
    inputs = parts[0].split(",")
    if len(parts) != 2 or len(inputs) != len(arguments) or len(call.inputs) != 1:
        refuse(call.operation)
    if len(arguments) == 1:  # a sum over axes, or a permutation
        return inputs[0], "", parts[1], np.ones(())
    if len(arguments) != 2:
        refuse(call.operation, "it has more than two arguments")
    place = [isinstance(a, Tensor) for a in arguments].index(True)
    kernel = _constant(call, arguments[1 - place])
    return inputs[place], inputs[1 - place], parts[1], kernel


_FORMS = {"Matmul": _matmul, "Dot": _dot, "Tensordot": _tensordot, "Einsum": _einsum}


def _of_bare(call):
    if len(call.inputs) != 1:
        refuse(call.operation)  # a product of inputs
    signal, letters, output, kernel = _FORMS[type(call.operation).__name__](call)
    rank = len(call.inputs[0].shape)
    signal, letters, output = _letters(call, signal, letters, output, rank)
    if len(letters) != kernel.ndim:
        refuse(call.operation)
    return Contracted(signal, letters, output, frozen(kernel))


def _read_bare(call):
    return [_of_bare(call)]


def _bare_rule(call):
    return _gain(call, _of_bare(call), call.outputs[0].dtype)


# Layers whose `activation` is a node of its own behind their map.
CLOSED_LAYERS = (_layers.EinsumDense,)
READERS = {_layers.EinsumDense: _read}
RULES = {_layers.EinsumDense: _rule}
BARE_READERS = dict.fromkeys(_FORMS, _read_bare)
BARE_RULES = dict.fromkeys(_FORMS, _bare_rule)
