"""Dense and convolution layers: the kernel used at inference, its norm and its rounding error."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.layers import almost_orthogonal, bjorck, normalized, orthogonal
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.spectral.reading import SUPPORTED, linear_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap

# Layers of this library that apply one kernel, computed from their raw variables.
OWN_DENSE = (
    almost_orthogonal.AlmostOrthogonalDense,
    bjorck.BjorckDense,
    normalized.FrobeniusDense,
    normalized.NormalizedDense,
    normalized.SpectralDense,
    orthogonal.CayleyDense,
)
OWN_CONVOLUTIONS = (
    almost_orthogonal.AlmostOrthogonalConv1D,
    almost_orthogonal.AlmostOrthogonalConv2D,
    normalized.SpectralConv1D,
    normalized.SpectralConv2D,
)
LINEAR_LAYERS = (*SUPPORTED, *OWN_DENSE, *OWN_CONVOLUTIONS)


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


def is_linear(layer):
    """Whether the layer is exactly one of Keras' or of our dense or convolution classes."""
    return type(layer) in LINEAR_LAYERS


def kernel_maps(layer, input_shape=None):
    """Variables that inference reads kernels from, with the geometry of their maps.

    As `spectral.reading.linear_maps`; for a layer of this library its cache of effective weights,
    brought up to date.

    Args:
        layer: a built layer for which `is_linear` holds.
        input_shape: shape of its input with the batch axis.

    Returns:
        List of `(variable, LinearMap)`.

    Raises:
        ValueError: if the effective weights are not finite.
    """
    if type(layer) not in (*OWN_DENSE, *OWN_CONVOLUTIONS):
        return linear_maps(layer, input_shape=input_shape)
    finite_values(layer)  # refreshes the cache
    (variable,) = layer._cache
    if type(layer) in OWN_DENSE:
        return [(variable, LinearMap("dense", (int(variable.shape[0]),)))]
    if input_shape is None:
        return [(variable, layer.linear_map)]
    return [(variable, layer._map(input_shape))]


def finite_values(layer):
    """`effective_values()` of a layer of this library, refused where one is not finite."""
    values = layer.effective_values()
    if not all(np.all(np.isfinite(v)) for v in values.values()):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in the effective weights of layer "
            f"{layer.name!r}. The model has diverged; no certificate of it exists."
        )
    return values


def inference_value(variable, dtype):
    """A variable as a layer of this compute dtype uses it, in float64."""
    value = keras.ops.cast(keras.ops.convert_to_tensor(variable), dtype)
    # A vector: NumPy cannot read a bfloat16 scalar of TensorFlow.
    entries = np.asarray(keras.ops.convert_to_numpy(keras.ops.reshape(value, (-1,))))
    return entries.astype(np.float64).reshape(tuple(value.shape))


def channel_axis(layer, rank):
    """Axis of the layer's output that holds its channels."""
    return 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1


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
        bound = norm_upper_bound(kernel, linear_map)
        own = (bound.value, absolute, bias, terms, dtype, tensor if i == 0 else None)
        value, matrix, folded = bound.value, None, ""
        if linear_map.kind == "dense":
            matrix = kernel
        if last and batch_norm is not None:
            kernel = batch_norm.fold(kernel, linear_map)
            # Three roundings per folded entry, in the norm at most that of the absolute kernel.
            slack = 4 * rounding.UNIT_ROUNDOFF["float64"]
            extra = slack * absolute_norm_upper_bound(kernel, linear_map)
            bound = norm_upper_bound(kernel, linear_map)
            value = rounding.sum_up(bound.value, extra)
            matrix = kernel if matrix is not None else None
            folded = ", batch normalization folded"
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
    inflation = 1 + (kernel.size + 4) * 1.01 * rounding.UNIT_ROUNDOFF["float64"]
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
    return min(math.sqrt(largest[0] * largest[1]) * inflation, frobenius)


@dataclasses.dataclass(frozen=True)
class BatchNormScale:
    """A batch normalization at inference: y = scale·x + shift per channel.

    Attributes:
        scale: float64 (channels,), γ/√(var + e), signed.
        shift_bound: float64 (channels,), |β| + |mean·scale|, which rounding errors scale with.
        offset: float64 (channels,), β - mean·scale, the output at zero input.
    """

    scale: np.ndarray
    shift_bound: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, layer):
        """Reads a built `keras.layers.BatchNormalization` in inference mode."""

        def read(variable, default):
            if variable is None:
                return default
            return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)

        variance = read(layer.moving_variance, None)
        mean = read(layer.moving_mean, None)
        gamma = read(layer.gamma, np.ones_like(variance))
        beta = read(layer.beta, np.zeros_like(variance))
        # The smaller of the stated constant and its float32 value gives the larger gain.
        constant = min(float(layer.epsilon), float(np.float32(layer.epsilon)))
        if not all(np.all(np.isfinite(v)) for v in (variance, mean, gamma, beta)):
            raise ValueError(
                f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
            )
        if np.any(variance + constant <= 0):
            raise ValueError(
                "A batch normalization needs var + epsilon > 0. "
                f"Received: layer {layer.name!r} with smallest variance {variance.min()!r}."
            )
        scale = gamma / np.sqrt(variance + constant)
        return cls(scale, np.abs(beta) + np.abs(mean * scale), beta - mean * scale)

    @property
    def gain(self):
        """max |γ|/√(var + e), rounded up (three roundings)."""
        largest = float(np.max(np.abs(self.scale), initial=0.0))
        return largest * (1 + 4 * rounding.UNIT_ROUNDOFF["float64"])

    def fold(self, kernel, linear_map):
        """Kernel of the linear map followed by this normalization (without the shift)."""
        if linear_map.kind == "depthwise":
            return kernel * self.scale.reshape(kernel.shape[-2:])
        if linear_map.kind == "conv_transpose":
            return kernel * self.scale[:, None]
        return kernel * self.scale

    def affine(self, output):
        """Error model: Keras normalizes in float32 or better, by about ten operations."""
        repeats = math.inf if output.size is None else output.size / max(self.scale.size, 1)
        norms = rounding.euclidean_norms_up(np.stack([self.offset, self.shift_bound]))
        offset, shift = (rounding.product_up(float(v), math.sqrt(repeats)) for v in norms)
        single = rounding.unit_roundoff("float32")
        unit = rounding.gamma(10, single)
        out = rounding.unit_roundoff(output.dtype)
        error = unit + (out * (1 + unit) if out > single else 0.0)
        return Affine(
            self.gain, offset, error * self.gain, rounding.product_up(error, offset + shift)
        )
