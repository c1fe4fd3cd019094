"""Local response normalization."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.layers.response import LocalResponseNormalization
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import FUNCTION_ULPS, SLACK, layer_gain
from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class ResponseNormalized(Operation):
    """y_c = x_c·D_c^-β, D_c = k + α·Σ_{|j-c| ≤ r} x_j², along an axis (batch axis 0).

    Attributes:
        axis: int.
        reach: r, less than the number of channels.
        bias, alpha, beta: k > 0, α ≥ 0, β > 0.
    """

    axis: int
    reach: int
    bias: float
    alpha: float
    beta: float

    def forward(self, signals, precision):
        (signal,) = signals
        value = signal.value * self._factor(signal.value)

        def error():
            size, wide = np.abs(signal.value), precision.wide
            least, most = np.maximum(size - signal.error, 0.0), size + signal.error
            # D^-β lies between those of the least and of the most energy.
            upper, lower = self._factor(least), self._factor(most)
            moved = signal.error * upper + size * (upper - lower)
            width = 2 * self.reach + 1
            flushed = 4 * self.alpha * width * wide.tiny / self.bias
            own = relative_error(self.beta, width, wide.setting, flushed) * upper
            own = own + overflow_loss(self.bias, self.alpha, self.beta)
            own = own + precision.unit * (upper + own)
            return moved + own * most + 4 * precision.tiny * (1 + most + upper)

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        rank, width = len(graph.sizes(x)) + 1, 2 * self.reach + 1
        if rank == 4 and not graph.is_double:
            order = (0, self.axis, *(a for a in range(1, rank) if a != self.axis))
            y = graph.node(
                "LRN",
                graph.transposed(x, order),
                size=width,
                bias=float(self.bias),
                alpha=float(self.alpha) * width,
                beta=float(self.beta),
            )
            return graph.transposed(y, np.argsort(order).tolist())
        # Windows of channels as those of a pool over the last axis.
        channels = graph.sizes(x)[self.axis - 1]
        order = (*(a for a in range(rank) if a != self.axis), self.axis)
        x = graph.transposed(x, order)
        shape = [graph.sizes(*names)[a - 1] for a in order[1:]]
        squares = graph.reshape(graph.pointwise("Mul", x, x), (1, -1, channels))
        energy = graph.node(
            "AveragePool",
            squares,
            kernel_shape=(1, width),
            pads=(0, self.reach, 0, self.reach),
            count_include_pad=1,
        )
        energy = graph.node("Mul", graph.reshape(energy, shape), self.alpha * width)
        factor = graph.node("Pow", graph.node("Add", energy, self.bias), -self.beta)
        return graph.transposed(graph.node("Mul", x, factor), np.argsort(order).tolist())

    def _factor(self, x):
        with np.errstate(over="ignore"):
            squares = np.moveaxis(np.square(x), self.axis, -1)
            pads = [(0, 0)] * (x.ndim - 1) + [(self.reach, self.reach)]
            squares, size = np.pad(squares, pads), x.shape[self.axis]
            energy = sum(squares[..., i : i + size] for i in range(2 * self.reach + 1))
            return np.moveaxis((self.bias + self.alpha * energy) ** -self.beta, -1, self.axis)


def relative_error(beta, width, unit, flushed=0.0):
    """Relative error of D^-β as computed, inf where D may lose everything.

    D errs by γ_(w+4); its power by β times that, and by the library's power, whose argument of exp
    is as large as β·log D where no square root serves.
    """
    inner = rounding.gamma(width + 8, unit) + flushed
    exponent = math.log(2) * (1024 if unit == rounding.UNIT_ROUNDOFF["float64"] else 128)
    ulps = FUNCTION_ULPS + (0 if beta in (0.5, 0.75, 1.0) else 4 * beta * exponent)
    if inner >= 1 or ulps * unit >= 1:
        return math.inf
    return math.expm1(-beta * math.log1p(-inner)) * 2 + rounding.gamma(ulps + 2, unit)


def overflow_loss(bias, alpha, beta):
    """What the factor loses at most where squares overflow: 0 in place of (α·2¹²⁶)^-β."""
    if alpha <= 0:
        return 0.0
    return min(bias**-beta * SLACK, (min(alpha, 1.0) * 2.0**126) ** -beta * SLACK)


def _read(call):
    layer, shape = call.operation, call.inputs[0].shape
    axis = layer.axis % len(shape)
    reach = min(layer.depth_radius, shape[axis] - 1)
    return [ResponseNormalized(axis, reach, layer.bias, layer.alpha, layer.beta)]


def response_gain(depth_radius, bias, beta, channels):
    """Gain of local response normalization, for every input and every alpha.

    With D_c = k + αS_c, τ_c = αS_c/D_c and S_c the energy of the window of c, the Jacobian is
    J = diag(D^-β) - M, M_cj = 2αβ·D_c^(-β-1)·x_c x_j on windows. By Schur's test with weights |x|,

        Σ_j |J_cj||x_j| ≤ R·|x_c|,   R = k^-β·max_τ (1-τ)^β·(1 + 2βτ)
        Σ_c |J_cj||x_c| ≤ C·|x_j|,   C = 2k^-β·max_τ [½((1-τ)/(1+τ))^β + 2βτ(1-τ)^β]

    so that ‖J‖ ≤ √(R·C), whatever the width of the window: all channels in the same half of a
    window lie in each other's windows, hence each half adds at most αS/(k+αS)^(β+1) to a column.
    Where every window holds all channels, J has the eigenvalues D^-β·{1, 1-2βτ} and the gain is
    k^-β, as it is for windows of one channel. Never above k^-β·(1 + 2β·g·√w) with
    g = (β/(1+β))^(β+1)/β, the plain bound by ‖diag‖ + ‖M‖.

    Args:
        depth_radius: integer r ≥ 0; w = 2r + 1.
        bias: positive float k.
        beta: positive float.
        channels: number of channels.

    Returns:
        float, rounded up; k^-β ≤ gain ≤ 1.4·k^-β.

    Example:

    >>> response_gain(0, 1.0, 0.5, 8), round(response_gain(2, 1.0, 0.75, 32), 3)
    (1.0, 1.223)

    Reference: sound form of Peck et al. (2017), section 4.6, who take max λ.
    """
    scale = 1.0 if bias == 1.0 else bias**-beta * SLACK
    if depth_radius == 0 or depth_radius >= channels - 1:
        return scale
    rows = ((2 * beta + 1) / (2 * beta + 2)) ** beta * (2 * beta + 1) / (beta + 1)
    ends = np.linspace(0.0, 1.0, 2**14 + 1)
    low, high = ends[:-1], ends[1:]
    # Each factor at the end of the interval where it is larger.
    columns = 0.5 * ((1 - low) / (1 + low)) ** beta + 2 * beta * high * (1 - low) ** beta
    sharp = math.sqrt(rows * 2 * columns.max())
    peak = (beta / (1 + beta)) ** (beta + 1) / beta
    plain = 1 + 2 * beta * peak * math.sqrt(min(2 * depth_radius + 1, channels))
    # A few rounded powers in float64.
    return min(sharp, plain) * scale * (1 + 1e-13)


def _response_rule(call):
    layer = call.operation
    channels = call.inputs[0].shape[layer.axis]
    if channels is None:
        raise ValueError(f"Layer {layer.name!r} needs a known number of channels.")
    value = response_gain(layer.depth_radius, layer.bias, layer.beta, channels)
    dtype, width = layer.compute_dtype, min(2 * layer.depth_radius + 1, channels)
    work = rounding.unit_roundoff("float32" if dtype in ("float16", "bfloat16") else dtype)
    error = relative_error(layer.beta, width, work)
    last = rounding.unit_roundoff(dtype)
    error += 0.0 if last == work else last * (1 + error)
    base, lost = layer.bias**-layer.beta * SLACK, overflow_loss(layer.bias, layer.alpha, layer.beta)
    gain = layer_gain(call, "scaling", value, "local response normalization, Schur's test", 0.0)
    slope = gain.affine.slope + error * base + lost
    affine = dataclasses.replace(gain.affine, slope=slope)
    # Squares that are set to zero change D by this share, and D^-β accordingly.
    small = rounding.flushed("float64" if dtype == "float64" else "float32")
    share = 4 * layer.alpha * width * small / layer.bias
    flushed = math.expm1(-layer.beta * math.log1p(-share)) * base if share < 0.5 else math.inf
    return dataclasses.replace(gain, affine=affine, flushed=(flushed * SLACK, 0.0))


READERS = {LocalResponseNormalization: _read}
RULES = {LocalResponseNormalization: _response_rule}
