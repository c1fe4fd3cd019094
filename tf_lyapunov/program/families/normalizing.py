"""Normalizations by statistics of their own input: layer, group and root mean square.

With z = Px, P = I - 11ᵀ/n (P = I for the root mean square), the normalization of n entries is

    y = D N(z) + β,   N(z) = z/√(‖z‖²/n + ε),   D = diag γ.

N has the Jacobian (I - zzᵀ/(n s²))/s with s² = ‖z‖²/n + ε, which is symmetric with the eigenvalues
1/s and ε/s³, all in (0, 1/√ε]. It maps the range of P into itself, so that the Jacobian of y is DM
with 0 ≤ M ≤ P/√ε and M = PM: (DM)(DM)ᵀ = DM²D ≤ DPD/ε. Hence

    ‖y(x) - y(x')‖ ≤ ‖DP‖/√ε·‖x - x'‖,

which is attained where all entries are equal, since M = P/√ε there. ‖DP‖ ≤ max|γ|; the vector of
the largest |γ| alone shows ‖DP‖ ≥ max|γ|·√(1 - 1/n). Without ε there is no such bound.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import SLACK, Affine, Gain, Peak, with_cast
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.weights import finite_value

_layers = keras.layers
# Above it max|γ| stands for ‖DP‖, which is at least √(1 - 1/n) of it.
_LARGEST = 512


@dataclasses.dataclass(frozen=True)
class Normalized(Operation):
    """y = γ·z/√(mean z² + ε) + β over sets of entries, z = x less its mean or x itself.

    Attributes:
        axes: that are normalized together (batch axis 0 not among them), once groups are split.
        groups: (axis, groups, width) of an axis that is split into two, or None.
        gamma, beta: float64, broadcast against a sample with its groups split.
        epsilon: float.
        centred: whether z = x - mean x.
        one_pass: whether the variance is computed as mean x² - (mean x)².
    """

    axes: tuple
    groups: tuple | None
    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float
    centred: bool
    one_pass: bool = False

    def _split(self, array):
        if self.groups is None:
            return array
        axis, groups, width = self.groups
        return array.reshape(*array.shape[:axis], groups, width, *array.shape[axis + 1 :])

    def forward(self, signals, precision):
        (signal,) = signals
        x = self._split(signal.value)
        mean = self._mean(x) if self.centred else 0.0
        z = x - mean
        spread = np.sqrt(self._mean(np.square(z)) + self.epsilon)
        value = self.gamma * z / spread + self.beta

        def error():
            return self._error(x, z, spread, value, self._split(signal.error), precision).reshape(
                signal.value.shape
            )

        return with_error(signals, value.reshape(signal.value.shape), error)

    def write(self, graph, names):
        (x,) = names
        shape = graph.sizes(x)
        trailing = self.axes == tuple(range(len(shape) + 1 - len(self.axes), len(shape) + 1))
        fused = self.centred and self.groups is None and trailing and graph.opset >= 17
        if fused and not graph.is_double and self._of_these_axes(shape):
            sizes = [shape[a - 1] for a in self.axes]
            gamma, beta = (np.broadcast_to(v, (*[1] * (v.ndim - len(sizes)), *sizes)).reshape(sizes)
                           for v in (self.gamma, self.beta))  # fmt: skip
            return graph.node(
                "LayerNormalization", x, gamma, beta, axis=self.axes[0], epsilon=self.epsilon
            )
        if self.groups is not None:
            axis, groups, width = self.groups
            x = graph.reshape(x, (*shape[: axis - 1], groups, width, *shape[axis:]))
        if self.centred:
            x = graph.pointwise("Sub", x, graph.reduce("Mean", x, self.axes, True))
        spread = graph.reduce("Mean", graph.pointwise("Mul", x, x), self.axes, True)
        spread = graph.pointwise("Sqrt", graph.pointwise("Add", spread, self.epsilon))
        y = graph.pointwise("Div", x, spread)
        y = graph.pointwise("Add", graph.pointwise("Mul", y, self.gamma), self.beta)
        return y if self.groups is None else graph.reshape(y, shape)

    def _of_these_axes(self, shape):
        """Whether γ and β are the same for all sets of entries."""
        others = len(shape) - len(self.axes)
        return all(math.prod(v.shape[: max(v.ndim - len(shape) + others, 0)]) == 1
                   for v in (self.gamma, self.beta))  # fmt: skip

    def _mean(self, array):
        return array.mean(axis=self.axes, keepdims=True)

    def _error(self, x, z, spread, value, moved, precision):
        """The error of inputs that are off by `moved`, and of a computation in float32 or better.

        With s the root of variance + ε: |z'/s' - z/s| ≤ |z' - z|/s' + |z|/s·|s' - s|/s', and
        |s' - s| is at most the root mean square of what the entries are off.
        """
        count = math.prod(x.shape[a] for a in self.axes)
        base = min(precision.unit, 2.0**-24)
        relative = max(rounding.gamma(count + 16, base), min(precision.function, 16 * 2.0**-24))
        sizes = np.abs(x) + moved
        average = self._mean(sizes)
        inside = relative * average if self.centred else 0.0
        beside = self._mean(moved) if self.centred else 0.0
        total = np.sqrt(self._mean(np.square(moved)))
        least = np.maximum(math.sqrt(self.epsilon), spread - total)
        shift = (moved + beside + inside + 2 * relative * (sizes + average)) / least
        off = relative * (np.square(least) + spread * (spread + average)) + np.square(inside)
        if self.one_pass:
            off = off + 2 * relative * self._mean(np.square(sizes))
        off = 1.5 * off / np.square(least)
        ratio = np.where(off < 0.75, off, np.inf)
        size = np.abs(self.gamma) * (np.abs(z) / spread + shift)
        own = np.abs(self.gamma) * (shift + np.abs(z) / spread * total / least)
        own = own + size * ratio + relative * (np.abs(self.gamma) * sizes / least)
        own = own + (relative + precision.unit) * (size + np.abs(self.beta) + np.abs(value))
        tiny = 8 * precision.tiny * (1 + np.abs(self.gamma)) / math.sqrt(self.epsilon)
        return own + tiny + np.zeros_like(x)


def centred_scale_norm(gamma):
    """Upper bound on ‖diag γ (I - 11ᵀ/n)‖ for a float64 vector γ of n entries.

    Its square is the largest eigenvalue of diag γ² - γγᵀ/n. See the module for both sides.

    Example:

    >>> round(centred_scale_norm(np.ones(4)), 12), centred_scale_norm(np.ones(1))
    (1.0, 0.0)
    """
    gamma = np.asarray(gamma, np.float64).ravel()
    n, largest = gamma.size, float(np.max(np.abs(gamma), initial=0.0))
    if n == 1 or largest == 0.0:
        return 0.0  # one entry less its mean is zero
    if n > _LARGEST:
        return largest
    scaled = np.abs(gamma) / largest
    square = np.diag(scaled**2) - np.outer(scaled, scaled) / n
    # Entries err by a few roundings, LAPACK's eigenvalues by a small multiple of n.
    value = float(np.linalg.eigvalsh(square)[-1]) + 16 * n * rounding.UNIT_ROUNDOFF["float64"]
    return min(largest, rounding.product_up(largest, rounding.sqrt_up(max(value, 0.0))))


def _variable(layer, variable, default, dtype=None):
    """A weight in float64, as it is stored or in the dtype that it is cast to."""
    if variable is None:
        return np.full(1, default)
    return finite_value(layer, variable, dtype or variable.dtype)


def _epsilon(operation, value):
    value = keras.config.epsilon() if value is None else value
    # The smaller of the stated constant and its float32 value gives the larger gain.
    value = min(float(value), float(np.float32(value)))
    if not (value > 0 and math.isfinite(value)):
        refuse(
            operation,
            "with epsilon = 0 it has no global Lipschitz constant",
            advice=f"Give it a positive epsilon. It has epsilon={value}.",
        )
    return value


def _axes(operation, axis, rank):
    axes = sorted({a % rank for a in ((axis,) if isinstance(axis, int) else tuple(axis))})
    if 0 in axes:
        refuse(operation, "it normalizes along the batch axis")
    return tuple(axes)


def _shaped(value, axes, rank):
    """A weight over `axes`, as an array that broadcasts against a sample."""
    if value.size == 1:
        return value.reshape([1] * (rank - 1))
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if a in axes else 1 for a in range(1, rank)])


def _over_axes(call, gamma, beta, axis, epsilon, centred):
    operation, tensor = call.operation, call.inputs[0]
    rank = len(tensor.shape)
    axes = _axes(operation, axis, rank)
    sizes = [tensor.shape[a] for a in axes]
    if None in sizes:
        refuse(operation, "it normalizes axes of unknown size")
    for value in (gamma, beta):
        if value.size != 1 and value.size != math.prod(sizes):
            refuse(operation, f"its weights do not fit inputs of shape {tensor.shape}")
    gamma, beta = (
        frozen(_shaped(v.reshape(sizes) if v.size > 1 else v, axes, rank)) for v in (gamma, beta)
    )
    one_pass = _one_pass()
    if one_pass:
        given = [axis] if isinstance(axis, int) else sorted(axis)
        if given == list(range(given[0], given[0] + len(given))):
            if axes != tuple(range(rank - len(axes), rank)):
                refuse(operation, "Keras on PyTorch normalizes the last axes in place of these")
            one_pass = False
    one_pass = one_pass and centred
    return Normalized(axes, None, gamma, beta, _epsilon(operation, epsilon), centred, one_pass)


def _one_pass():
    """Keras on PyTorch computes variances of some axes in one pass, which may cancel."""
    return keras.backend.backend() == "torch"


def _of_layer(call):
    layer, kind = call.operation, type(call.operation)
    if kind is _layers.RMSNormalization:
        gamma = _variable(layer, layer.scale, 1.0, layer.compute_dtype)
        return _over_axes(call, gamma, np.zeros(1), layer.axis, layer.epsilon, False)
    gamma = _variable(layer, layer.gamma, 1.0)
    beta = _variable(layer, layer.beta, 0.0)
    if kind is _layers.LayerNormalization:
        if layer.rms_scaling:
            refuse(
                layer,
                "with rms_scaling=True it divides what it has not centred by the deviation, which "
                "has no global Lipschitz constant",
                advice="Leave rms_scaling out, or use RMSNormalization.",
            )
        return _over_axes(call, gamma, beta, layer.axis, layer.epsilon, True)
    return _groups(call, gamma, beta)


def _groups(call, gamma, beta):
    layer, rank = call.operation, len(call.inputs[0].shape)
    axis = layer.axis % rank
    if axis == 0:
        refuse(layer, "it normalizes along the batch axis")
    width = call.inputs[0].shape[axis] // layer.groups
    spread = [1] * rank
    spread[axis - 1], spread[axis] = layer.groups, width
    gamma, beta = (
        frozen(v.reshape(spread) if v.size > 1 else v.reshape([1] * rank)) for v in (gamma, beta)
    )
    axes = tuple(a for a in range(1, rank + 1) if a != axis)
    groups, epsilon = (axis, layer.groups, width), _epsilon(layer, layer.epsilon)
    return Normalized(axes, groups, gamma, beta, epsilon, True, _one_pass())


def _sizes(call, operation):
    """Sizes of the axes that are normalized together, None where unknown."""
    shape = list(call.inputs[0].shape)
    if operation.groups is not None:
        axis, groups, width = operation.groups
        shape[axis : axis + 1] = [groups, width]
    return [shape[a] for a in operation.axes]


def _factor(operation, sizes):
    """`(‖D P‖ of the largest set of entries, its name)`; max|γ| without centring."""
    largest = float(np.max(np.abs(operation.gamma), initial=0.0))
    if not operation.centred or None in sizes:
        return largest, "max|γ|"
    if math.prod(sizes) == 1:
        return 0.0, "one entry less its mean"
    held = [operation.gamma.shape[a - 1] for a in operation.axes]
    if 1 < operation.gamma.size and math.prod(held) < math.prod(sizes):
        # The difference of two entries with the same γ has no mean.
        return largest, "max|γ|"
    if operation.gamma.size == 1:
        return largest, "max|γ|"  # of an all-equal γ, on any vector without a mean
    others = [a for a in range(operation.gamma.ndim) if a + 1 not in operation.axes]
    rows = np.transpose(operation.gamma, [*others, *(a - 1 for a in operation.axes)])
    rows = rows.reshape(-1, math.prod(sizes))
    return max(map(centred_scale_norm, rows)), "‖diag γ (I - 11ᵀ/n)‖"


def _gain(call, operation):
    tensor, output = call.inputs[0], call.outputs[0]
    sizes = _sizes(call, operation)
    factor, name = _factor(operation, sizes)
    largest = float(np.max(np.abs(operation.gamma), initial=0.0))
    root = float(rounding.down(math.sqrt(operation.epsilon)))
    value = rounding.quotient_up(factor, root) if factor else 0.0
    steepest = rounding.quotient_up(largest, root) if largest else 0.0
    size = math.inf if tensor.size is None else tensor.size
    norm = float(rounding.euclidean_norms_up(operation.beta.reshape(1, -1))[0])
    offset = rounding.product_up(norm, math.sqrt(size / operation.beta.size)) * SLACK
    count = math.inf if None in sizes else math.prod(sizes)
    affine = _affine(value, steepest, largest, offset, size, count, output.dtype)
    if operation.one_pass:
        # Cancellation leaves the computed variance without a bound from below.
        affine = dataclasses.replace(affine, slope=math.inf)
    affine = with_cast(affine, tensor, output.dtype, rounding.unit_roundoff(output.dtype))
    # The sum of squares; Keras computes it in float32 or better.
    return Gain(
        "normalization", value, f"{name}/√ε", affine, peak=Peak(1.0, 2, wide=True),
        flushed=(0.0, _flushed(operation, count, largest * math.sqrt(size), output.dtype)),
    )  # fmt: skip


def _flushed(operation, count, whole, dtype):
    """What the result loses at most where squares are set to zero.

    The variance is off by δ with |δ| ≤ (n + 4)τ, τ the smallest normal number, hence 1/s by at
    most |δ|/ε of itself where that is below 1/2; and ‖N(z)‖ ≤ √n, whatever z.
    """
    ratio = (count + 4) * rounding.flushed("float64" if dtype == "float64" else "float32")
    ratio = ratio / operation.epsilon
    return ratio * whole * SLACK if ratio < 0.5 else math.inf


def _affine(value, steepest, largest, offset, size, count, dtype):
    """Error model of a normalization in float32 or better, rounded to `dtype` at the end.

    With U = γ_{n+16}: the computed mean is off by e ≤ U·mean|x|, which shifts the entries (norm
    ≤ U‖x‖ over a group) and adds e² to the variance: relative to 1/s, min(1, e²/(2s²)) ≤ e/s of
    ‖z‖/s ≤ √n, so again at most U‖x‖/√ε. Algorithms that update mean and variance together add
    U·|mean|/s of the same. Products with |x|/s and |mean|/s add as much, and everything that is
    relative to the output is at most U·(max|γ|·√size + ‖β‖).
    """
    single = dtype in ("float16", "bfloat16")
    work = rounding.unit_roundoff("float32" if single else dtype)
    unit = rounding.gamma(count + 16, max(work, rounding.unit_roundoff("float32")))
    if dtype == "float64":
        unit = rounding.gamma(count + 16, work)
    whole = largest * math.sqrt(size) * (1 + 1e-12) + offset
    last = rounding.unit_roundoff(dtype) if single else 0.0
    slope = rounding.product_up(6 * unit * (1 + last), steepest)
    return Affine(value, offset, slope, (4 * unit + last * (1 + 4 * unit)) * whole)


def _rule(call):
    return _gain(call, _of_layer(call))


def _read(call):
    return [_of_layer(call)]


# Bare operations --------------------------------------------------------------------------------


def _of_bare(call):
    operation = call.operation
    if len(call.inputs) != 1:
        refuse(operation, "its weights are computed from inputs")
    names = ("x", "gamma", "beta") if type(operation).__name__ == "LayerNorm" else ("x", "scale")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    if given.get("x") is not call.inputs[0]:
        refuse(operation)

    def weight(name, default):
        value = given.get(name)
        if value is None or isinstance(value, keras.Variable):
            return _variable(operation, value, default)
        return _variable(operation, keras.ops.convert_to_tensor(value), default)

    weights = [weight(names[1], 1.0), weight("beta", 0.0)]
    centred = type(operation).__name__ == "LayerNorm"
    if getattr(operation, "rms_scaling", False):
        refuse(
            operation,
            "with rms_scaling=True it has no global Lipschitz constant",
            advice="Leave rms_scaling out.",
        )
    return _over_axes(call, *weights, operation.axis, operation.epsilon, centred)


def _bare_rule(call):
    return _gain(call, _of_bare(call))


def _read_bare(call):
    return [_of_bare(call)]


_NORMALIZATIONS = (
    _layers.LayerNormalization,
    _layers.GroupNormalization,
    _layers.RMSNormalization,
)
READERS = dict.fromkeys(_NORMALIZATIONS, _read)
RULES = dict.fromkeys(_NORMALIZATIONS, _rule)
BARE_READERS = dict.fromkeys(("LayerNorm", "RMSNorm"), _read_bare)
BARE_RULES = dict.fromkeys(("LayerNorm", "RMSNorm"), _bare_rule)
