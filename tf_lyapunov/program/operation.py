"""What a step of a program computes, with every constant as an explicit value."""

import dataclasses

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number format that a model computes in.

    Attributes:
        unit: roundoff of one operation, relative.
        tiny: what one operation may lose by underflow, absolute: devices flush subnormal results
            and operands.
        operands: roundoff of the operands of matrix products (TF32, bfloat16 modes).
        function: relative error of library functions (tanh, exp, …), of 1 + |value|.
    """

    unit: float
    tiny: float
    operands: float
    function: float

    @classmethod
    def of(cls, dtype):
        """The format of a Keras dtype name, as the active backend computes it.

        Example:

        >>> Precision.of("float32").unit == 2.0**-24
        True
        """
        unit = rounding.unit_roundoff(dtype)
        operands = rounding.operand_roundoff() if dtype == "float32" else 0.0
        # Settings of layers are float32 in every format.
        settings = max(unit, rounding.UNIT_ROUNDOFF["float32"])
        return cls(unit, rounding.underflow(dtype), operands, 16 * settings)

    @property
    def wide(self):
        """The format of layers that compute in float32 at least, before their last cast."""
        if self.unit <= rounding.UNIT_ROUNDOFF["float32"]:
            return self
        return Precision.of("float32")

    @property
    def setting(self):
        """Relative error of a number among a layer's settings, float32 in every format."""
        return max(self.unit, rounding.UNIT_ROUNDOFF["float32"])

    def sum(self, terms):
        """Relative error of a sum of so many products, in any order."""
        products = 2 * self.operands + self.operands**2
        return rounding.gamma(terms + 2, self.unit) * (1 + products) + products


# A numpy evaluation in float64, whose own error no float32 model can tell from zero.
EXACT = Precision(rounding.UNIT_ROUNDOFF["float64"], 2.0**-1022, 0.0, 2.0**-46)


@dataclasses.dataclass(frozen=True)
class Signal:
    """A batch of values with an elementwise bound on their error, or None where none is asked."""

    value: np.ndarray
    error: np.ndarray | None = None


class Operation:
    """A function of one or several signals, in float64, with a bound on a model's rounding.

    A subclass is a frozen dataclass of plain values and read-only float64 arrays: they are what
    the digest of a program is made of.
    """

    def forward(self, signals, precision):
        """The exact function of the signals' values, and the error of a model that computes it.

        Args:
            signals: list of `Signal`, batch axis first.
            precision: `Precision` of the model.

        Returns:
            `Signal`; its error bounds |computed - exact| entry by entry, for inputs within their
            own errors; None if the inputs' are.
        """
        raise NotImplementedError

    @property
    def has_writer(self):
        """Whether it has an ONNX form."""
        return type(self).write is not Operation.write

    def write(self, graph, names):
        """Adds ONNX nodes that compute it to a graph under construction.

        Args:
            graph: `tf_lyapunov.onnx.graph.Graph`.
            names: list of the names of its inputs there.

        Returns:
            Name of its output.

        Raises:
            UnsupportedLayerError: if it has no ONNX form.
        """
        raise UnsupportedLayerError(
            "Standard ONNX operators must be able to compute a step. Received: an operation of "
            f"type {type(self).__name__}."
        )

    def settings(self):
        """Type and values, for the digest."""
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return type(self).__name__, list(_flat(fields))

    def enter(self, state):
        """Adds type and values to the state of a hash."""
        kind, fields = self.settings()
        state.update(kind.encode())
        for name, value in fields:
            is_array = isinstance(value, np.ndarray)
            text = f"{value.dtype}{value.shape}" if is_array else repr(value)
            state.update(f"{name}{text}".encode())
            if is_array:
                state.update(hashed(value))


def _flat(fields):
    """Values of operations that an operation holds, one by one: a digest must see each."""
    for name, value in fields:
        if isinstance(value, Operation):
            kind, inner = value.settings()
            yield name, kind
            yield from ((f"{name}.{key}", held) for key, held in inner)
        elif isinstance(value, tuple) and any(isinstance(v, Operation) for v in value):
            yield from _flat([(f"{name}.{i}", held) for i, held in enumerate(value)])
        else:
            yield name, value


def with_error(signals, value, error):
    """`Signal` of `value`; `error` is a function that is called only if errors are asked for."""
    if any(s.error is None for s in signals):
        return Signal(value)
    with np.errstate(all="ignore"):
        # The bound itself is computed in float64 by nonnegative sums.
        return Signal(value, error() * (1 + 1e-9))


def hashed(array):
    """The bytes of an array in C order, as a hash reads them: contiguous ones are not copied."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def frozen(array, copy=True):
    """A read-only float64 copy; `copy=False` for an array that nothing else holds."""
    array = np.array(array, dtype=np.float64, copy=copy or None)
    array.setflags(write=False)
    return array
