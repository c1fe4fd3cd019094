"""What is known about one step of a network: its gain, and a model of its rounding error."""

import dataclasses

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.theory.sectors import Sector

# Units in the last place, relative to 1 + |input|, to which libraries evaluate tanh, erf, exp, …
FUNCTION_ULPS = 16
# Value at zero is read in float32, where it is accurate to a few units in the last place.
ZERO_SLACK = 1 + 1e-3
# A handful of correctly rounded float64 operations.
SLACK = 1 + 16 * rounding.UNIT_ROUNDOFF["float64"]


@dataclasses.dataclass(frozen=True)
class Affine:
    """Error model of one computed operation, ‖fl(f)(u) - f(u)‖ ≤ slope·‖u‖ + constant.

    `gain` and `offset` describe the exact map: ‖f(u)‖ ≤ gain·‖u‖ + offset.
    """

    gain: float = 1.0
    offset: float = 0.0
    slope: float = 0.0
    constant: float = 0.0

    def then(self, after):
        """Error model of `after` applied to this operation's computed output."""
        largest_slope = self.gain + self.slope
        largest_offset = self.offset + self.constant
        return Affine(
            gain=after.gain * self.gain,
            offset=after.gain * self.offset + after.offset,
            slope=after.gain * self.slope + after.slope * largest_slope,
            constant=after.gain * self.constant + after.slope * largest_offset + after.constant,
        )


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bound factor·‖u‖^power + offset on what a call computes on its way to a smaller result.

    A mean is a sum first, a normalization squares its input: these may overflow where the result
    would not.

    Attributes:
        factor, power, offset: of the bound.
        wide: whether it is computed in float32 or better, whatever the format of the signal.
    """

    factor: float = 0.0
    power: int = 1
    offset: float = 0.0
    wide: bool = False

    def of(self, norms):
        """The bound at norms of the input, float64 of any shape."""
        if self.factor == 0:
            return np.full(np.shape(norms), self.offset)
        return self.factor * norms**self.power + self.offset


@dataclasses.dataclass(frozen=True)
class Gain:
    """What one call does to l2 distances.

    Attributes:
        kind: word for tables.
        value: float, the gain; of the combined inputs where there are several.
        method: how the gain was found.
        affine: error model of the computed operation (its gain is `value`).
        rule: how the inputs' Lipschitz bounds combine before the factor `value`: `"single"`,
            `"sum"` or `"root_sum_squares"`.
        weights: factor of each input (√repeats where broadcasting repeats it).
        assumption: what the user declared, or None.
        sector: slope sector of an elementwise activation, else None.
        decision: name of a monotone or normalising output function (softmax, sigmoid, …) under
            which the largest output stays the largest, else None.
        affine64: error model of an evaluation in float64, or None if the rule is to be asked again.
        peak: `Peak` of what is larger than the inputs and the result.
        flushed: `(slope, constant)`: what the result may lose where squares on the way are so small
            that a device sets them to zero, in l2 at most slope·‖u‖ + constant.
    """

    kind: str
    value: float
    method: str
    affine: Affine = dataclasses.field(default_factory=Affine)
    rule: str = "single"
    weights: tuple = (1.0,)
    assumption: str | None = None
    sector: Sector | None = None
    decision: str | None = None
    affine64: Affine | None = None
    peak: Peak = dataclasses.field(default_factory=Peak)
    flushed: tuple = (0.0, 0.0)


def with_cast(affine, tensor, dtype, unit):
    """Adds the rounding of a layer's input to its compute dtype."""
    if tensor.dtype == dtype:
        return affine
    cast = Affine(1.0, 0.0, unit, 0.0)
    return cast.then(affine)


def layer_gain(call, kind, value, method, error, offset=0.0, constant=0.0):
    """`Gain` of a layer whose computed output errs by `error`·gain·‖u‖ + `constant`."""
    tensor, dtype = call.inputs[0], call.operation.compute_dtype
    affine = Affine(value, offset, rounding.product_up(error, value), constant)
    affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    return Gain(kind, value, method, affine)


def widened(dtype, operations):
    """Relative error of some operations in float32 or better, rounded to `dtype` at the end."""
    work = rounding.unit_roundoff("float32" if dtype in ("float16", "bfloat16") else dtype)
    error, last = rounding.gamma(operations, work), rounding.unit_roundoff(dtype)
    return error if last == work else error + last * (1 + error)
