"""Dense and convolution layers: y = Wx + b."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.adding import check_added
from tf_lyapunov.program.families import fused
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.weights import LINEAR_LAYERS, inference_value, kernel_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_axes, convolution_taps
from tf_lyapunov.theory.threads import one_thread


@dataclasses.dataclass(frozen=True)
class Linear(Operation):
    """y = Wx + b for a kernel in Keras' layout; `linear_map` says what it does.

    Attributes:
        kernel: float64, as cast for inference.
        bias: float64 (channels,), or None.
        linear_map: `LinearMap`, with the size of the input where it is a convolution.
        channels_first: whether signals have their channels before their positions.
    """

    kernel: np.ndarray
    bias: np.ndarray | None
    linear_map: LinearMap
    channels_first: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._map(signal.value, self.kernel)
        if self.bias is not None:
            value += self._shaped(self.bias, value.ndim)

        def error():
            size, taps = np.abs(self.kernel), self._terms()
            largest = np.abs(signal.value) + signal.error
            lost = precision.sum(taps)
            if math.isinf(lost):  # too many terms for the format
                return np.full_like(value, np.inf)
            # What comes in wrong, and what the sums of the largest values lose, by one map.
            found = self._map(signal.error + lost * largest, size)
            # Operands and products that are flushed to zero.
            flushed = 1 + float(size.max(initial=0.0)) + np.max(largest, initial=0.0)
            found = found + precision.tiny * taps * flushed
            if self.bias is not None:
                bias = self._shaped(np.abs(self.bias), value.ndim)
                found = found + lost * bias
            return found

        return with_error(signals, value, error)

    def _terms(self):
        taps = math.prod(self.kernel.shape[:-2])
        if self.linear_map.kind == "depthwise":
            return taps
        return taps * self.kernel.shape[-1 if self.linear_map.kind == "conv_transpose" else -2]

    def _shaped(self, vector, rank):
        return vector.reshape(-1, *[1] * (rank - 2)) if self.channels_first else vector

    def write(self, graph, names):
        (x,) = names
        if self.linear_map.kind != "dense":
            return self._write_convolution(graph, x)
        if self.bias is not None and len(graph.sizes(x)) == 1:
            return graph.node("Gemm", x, self.kernel, self.bias)
        y = graph.node("MatMul", x, self.kernel)
        return y if self.bias is None else graph.node("Add", y, self.bias)

    def _write_convolution(self, graph, x):
        """With channels first and stated padding; an ONNX transposed convolution flips nothing."""
        rank, sizes = self.kernel.ndim - 2, graph.sizes(x)
        spatial = tuple(range(rank))
        if self.channels_first:
            sizes = (*sizes[1:], sizes[0])
        else:
            x = graph.transposed(x, (0, rank + 1, *range(1, rank + 1)))
        geometry = dataclasses.replace(self.linear_map, input_shape=sizes)
        axes = convolution_axes(self.kernel.shape, geometry)
        # For a transposed one `size` is that of the output, and an end that is missing is added.
        ends = [(a.output - 1) * a.stride + a.extent - a.left - a.size for a in axes]
        turned = self.linear_map.kind == "conv_transpose"
        if self.linear_map.kind == "depthwise":
            kernel = np.transpose(self.kernel, (rank, rank + 1, *spatial))
            kernel = kernel.reshape(-1, 1, *kernel.shape[2:])
        else:
            kernel = np.transpose(self.kernel, (rank + 1, rank, *spatial))
        y = graph.node(
            "ConvTranspose" if turned else "Conv",
            x,
            graph.constant(kernel, "kernel"),
            *([] if self.bias is None else [graph.constant(self.bias, "bias")]),
            kernel_shape=kernel.shape[2:],
            strides=tuple(a.stride for a in axes),
            dilations=tuple(a.dilation for a in axes),
            pads=(*(a.left for a in axes), *(max(e, 0) for e in ends)),
            output_padding=tuple(max(-e, 0) for e in ends) if turned and min(ends) < 0 else None,
            group=sizes[-1] if self.linear_map.kind == "depthwise" else self.linear_map.groups,
        )
        if self.channels_first:
            return y
        return graph.transposed(y, (0, *range(2, rank + 2), 1))

    def _map(self, x, kernel):
        if self.linear_map.kind == "dense":
            return _product(x, kernel)
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        value = convolved(x, kernel, self.linear_map)
        return np.moveaxis(value, -1, 1) if self.channels_first else value


# Bytes of the patches that one product reads, which stay in the cache between the two, and of
# those of one sample beyond which each tap has its own product.
_PATCHES, _LARGEST = 2**18, 2**22
# Rows of a product at least, for which the kernel is read once.
_ROWS = 64


def convolved(x, kernel, linear_map):
    """The convolution of channels-last signals (n, *sizes, channels).

    One product with a matrix of patches, or, where that is large, one per tap.

    Args:
        x: float64.
        kernel: float64 in Keras' layout.
        linear_map: `LinearMap` of a convolution, at the size of `x`.

    Example:

    >>> kernel = np.array([1.0, -1.0]).reshape(2, 1, 1)
    >>> x = np.array([[[1.0], [4.0], [9.0]]])
    >>> convolved(x, kernel, LinearMap("conv", (3, 1))).ravel().tolist()
    [-3.0, -5.0]
    """
    linear_map = dataclasses.replace(linear_map, input_shape=tuple(x.shape[1:]))
    axes = convolution_axes(kernel.shape, linear_map)
    out = np.zeros((len(x), *linear_map.output_shape(kernel.shape)))
    # Products of a few million flops: two threads of BLAS would wait for one another, on a busy
    # machine a time slice each.
    with one_thread():
        if linear_map.kind == "conv" and linear_map.groups == 1:
            rows = math.prod(a.output for a in axes)
            sample = 8 * rows * math.prod(kernel.shape[:-1])
            # Zeros of the padding must not meet an infinite weight.
            if 0 < sample <= _LARGEST and np.all(np.isfinite(kernel)):
                samples = max(_PATCHES // sample, math.ceil(_ROWS / rows))
                return _by_patches(x, kernel, axes, out, samples)
        turned = linear_map.kind == "conv_transpose"
        for tap, narrow, wide in convolution_taps(kernel.shape, linear_map):
            read, write = (narrow, wide) if turned else (wide, narrow)
            out[write] += _tap(x[read], kernel[tap], linear_map)
    return out


def _by_patches(x, kernel, axes, out, samples):
    """`out` filled with the products of patches of x, so many samples at once."""
    channels = x.shape[-1]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    inner, padded = [], []
    for axis in axes:
        extent = (axis.output - 1) * axis.stride + (axis.taps - 1) * axis.dilation + 1
        kept = min(axis.size, extent - axis.left)
        inner.append(slice(axis.left, axis.left + kept))
        padded.append(extent)
    held = np.zeros((min(samples, len(x)), *padded, channels))
    grid = [s * a.stride for s, a in zip(held.strides[1:], axes, strict=False)]
    taps = [s * a.dilation for s, a in zip(held.strides[1:], axes, strict=False)]
    patches = np.lib.stride_tricks.as_strided(
        held,
        (len(held), *(a.output for a in axes), *(a.taps for a in axes), channels),
        (held.strides[0], *grid, *taps, held.strides[-1]),
        writeable=False,
    )
    within = tuple(slice(0, s.stop - s.start) for s in inner)
    for start in range(0, len(x), samples):
        rows = x[start : start + samples]
        held[(slice(0, len(rows)), *inner)] = rows[(slice(None), *within)]
        columns = patches[: len(rows)].reshape(-1, len(matrix))
        np.matmul(columns, matrix, out=out[start : start + samples].reshape(-1, out.shape[-1]))
    return out


def _tap(x, matrix, linear_map):
    if linear_map.kind == "conv_transpose":
        return _product(x, matrix.T)
    if linear_map.kind == "depthwise":
        value = x[..., None] * matrix
        return value.reshape(*x.shape[:-1], -1)
    if linear_map.groups == 1:
        return _product(x, matrix)
    groups = linear_map.groups
    parts = x.reshape(*x.shape[:-1], groups, -1)
    blocks = matrix.reshape(len(matrix), groups, -1)
    return np.einsum("...gi,igo->...go", parts, blocks).reshape(*x.shape[:-1], -1)


def _product(x, matrix):
    """x @ matrix by one product, whatever the rank and the strides of x."""
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])


def read(call):
    """The maps of a dense or convolution layer, then its activation."""
    layer, tensor = call.operation, call.inputs[0]
    dtype, found = layer.compute_dtype, []
    first = getattr(layer, "data_format", "") == "channels_first"
    maps = kernel_maps(layer, tensor.shape)
    held = getattr(layer, "bias", None)
    if held is not None and first:
        shaped = inference_value(held, dtype).reshape(-1, *[1] * (len(tensor.shape) - 2))
        check_added(layer, shaped, call.outputs[0])
    for i, (variable, linear_map) in enumerate(maps):
        bias = None
        if i == len(maps) - 1 and held is not None:
            bias = frozen(inference_value(held, dtype))
        kernel = frozen(inference_value(variable, dtype), copy=False)
        found.append(Linear(kernel, bias, linear_map, first))
    return found + fused.read(layer, call.outputs[0])


# Gains ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LinearGain:
    """Gain of one linear map as used at inference.

    Attributes:
        suffix: `""`, or `"/depthwise"` and `"/pointwise"` for the two maps of a separable layer.
        value: upper bound on the operator norm, batch normalization included where folded.
        method: how the norm was bounded.
        affine: error model of the computed map (see `Affine`).
        affine64: the same when the map is evaluated in float64.
        matrix: float64 `(in, out)` for dense layers, batch normalization folded; else None.
    """

    suffix: str
    value: float
    method: str
    affine: Affine
    affine64: Affine
    matrix: np.ndarray | None


def linear_gains(layer, tensor, output, batch_norm=None, *, bounded=True):
    """Gains of the maps of one dense or convolution layer, called on `tensor`.

    Args:
        layer: a built Keras layer for which `is_linear` holds.
        tensor, output: `graph.Tensor` of the input and of the output.
        batch_norm: `BatchNormScale` to fold into the last map, or None.
        bounded: whether to compute norms; else the gains are infinite, without error models.

    Returns:
        List of `LinearGain`, in the order of application.
    """
    dtype = layer.compute_dtype
    maps = kernel_maps(layer, tensor.shape)
    gains = []
    for i, (variable, linear_map) in enumerate(maps):
        last = i == len(maps) - 1
        kernel = inference_value(variable, dtype)
        if not np.all(np.isfinite(kernel)):
            raise ValueError(
                f"Weights must be finite. Received: NaN or infinity in the kernel of layer "
                f"{layer.name!r}. The model has diverged; no certificate of it exists."
            )
        suffix = ("/depthwise", "/pointwise")[i] if len(maps) == 2 else ""
        if not bounded:
            gains.append(LinearGain(suffix, math.inf, "not bounded", None, None, None))
            continue
        absolute = absolute_norm_upper_bound(kernel, linear_map)
        terms = _terms(kernel.shape, linear_map)
        bias = bias_norm(layer, output, dtype) if last else 0.0
        folded, slack = "", 0.0
        if last and batch_norm is not None:
            kernel = batch_norm.fold(kernel, linear_map)
            # Three roundings per folded entry, in the norm at most that of the absolute kernel.
            slack = 4 * rounding.UNIT_ROUNDOFF["float64"]
            slack *= absolute_norm_upper_bound(kernel, linear_map)
            folded = ", batch normalization folded"
        bound = norm_upper_bound(kernel, linear_map)
        value = rounding.sum_up(bound.value, slack)
        matrix = kernel if linear_map.kind == "dense" else None
        plain = value
        if folded:
            # W = W_folded/scale: enough for rounding errors, and no second norm.
            plain = min(rounding.product_up(value, batch_norm.inverse_gain), absolute)
        own = (plain, absolute, bias, terms, dtype, tensor if i == 0 else None)
        exact = "exact" if bound.exact else "upper bound"
        method = f"operator norm, {bound.method} ({exact}){folded}"
        after = (batch_norm, output) if last else (None, output)
        affine = _affine(*own, value, *after)
        with rounding.float64_evaluation():
            affine64 = _affine(*own, value, *after)
        gains.append(LinearGain(suffix, value, method, affine, affine64, matrix))
    return gains


def _affine(gain, absolute, bias, terms, dtype, tensor, value, batch_norm, output):
    """Error model of one map, followed by a batch normalization that is computed on its own."""
    affine = map_affine(gain, absolute, bias, terms, dtype)
    if tensor is not None and tensor.dtype != dtype:  # the layer casts its input first
        u = rounding.unit_roundoff(dtype)
        extra = u * gain * (1 + rounding.gamma(terms + 2, u))
        affine = dataclasses.replace(affine, slope=affine.slope + extra)
    if batch_norm is None:
        return affine
    return dataclasses.replace(affine.then(batch_norm.affine(output)), gain=value)


def map_affine(gain, absolute, bias, terms, dtype):
    """Error model of x ↦ Wx + b as computed: products summed in any order.

    Args:
        gain: bound on ‖W‖.
        absolute: bound on the norm of |W|, or of a matrix with larger entries.
        bias: ‖b‖.
        terms: products per output entry.
        dtype: of the arithmetic.
    """
    accumulation = rounding.gamma(terms + 2, rounding.unit_roundoff(dtype))
    operands = rounding.operand_roundoff() if dtype == "float32" else 0.0
    products = 2 * operands + operands**2
    slope = rounding.product_up(accumulation * (1 + products) + products, absolute)
    return Affine(gain, bias, slope, rounding.product_up(accumulation, bias))


def bias_norm(layer, output, dtype):
    """Norm of the bias repeated over all output positions; inf where their number is unknown."""
    if getattr(layer, "bias", None) is None:
        return 0.0
    bias = inference_value(layer.bias, dtype)
    if not np.all(np.isfinite(bias)):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in the bias of layer "
            f"{layer.name!r}."
        )
    norm = float(rounding.euclidean_norms_up(bias[None])[0])
    positions = math.inf if output.size is None else output.size // bias.size
    return rounding.product_up(norm, rounding.sqrt_up(positions))


def _terms(kernel_shape, linear_map):
    """Number of products summed for one output entry, at most."""
    taps = math.prod(kernel_shape[:-2])
    if linear_map.kind == "depthwise":
        return taps
    return taps * kernel_shape[-1 if linear_map.kind == "conv_transpose" else -2]


def absolute_norm_upper_bound(kernel, linear_map):
    """Upper bound on the norm of the map with kernel |K|, which multiplies rounding errors.

    Schur's test, ‖|W|‖² ≤ (largest row sum)·(largest column sum), valid for every padding and
    stride; for dense kernels the Frobenius norm if that is smaller.
    """
    magnitude = np.abs(kernel)
    inflation = 1 + (kernel.size + 6) * 1.01 * rounding.UNIT_ROUNDOFF["float64"]
    if linear_map.kind == "dense":
        rows, columns = magnitude.sum(axis=0), magnitude.sum(axis=1)
        frobenius = float(np.linalg.norm(kernel)) * inflation
    else:
        frobenius = math.inf
        per_channel = magnitude.sum(axis=tuple(range(kernel.ndim - 2)))
        if linear_map.kind == "depthwise":
            rows, columns = per_channel, per_channel.sum(axis=1)
        elif linear_map.kind == "conv_transpose":
            rows, columns = per_channel.sum(axis=1), per_channel.sum(axis=0)
        else:
            rows = per_channel.sum(axis=0)
            columns = per_channel.reshape(len(per_channel), linear_map.groups, -1).sum(axis=2)
    largest = np.max(rows, initial=0.0), np.max(columns, initial=0.0)
    # Root by root: products of sums may under- and overflow.
    return min(math.sqrt(largest[0]) * math.sqrt(largest[1]) * inflation, frobenius)


READERS = dict.fromkeys(LINEAR_LAYERS, read)
# `network` bounds them map by map, with the normalization that follows folded in.
RULES = {}
