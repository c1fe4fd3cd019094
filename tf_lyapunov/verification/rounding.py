"""How a model's own arithmetic rounds: error terms of its dtypes, for two different questions.

`exact` bounds what float64 arithmetic here errs by, and what the model's dtype loses by underflow:
devices flush subnormal results and operands, so that a product errs by tiny·(1 + |w| + |x|) on top
of any relative error. `computed` bounds the whole distance of the model's own arithmetic.
"""

import dataclasses
import math

from tf_lyapunov.verification import arithmetic
from tf_lyapunov.verification.arithmetic import SLACK, TINY, UNIT

# Name: (unit roundoff, absolute error of a result that underflows, largest number).
_FORMATS = {
    "float64": (UNIT, TINY, 1.7976931348623157e308),
    "float32": (2.0**-24, 2.0**-126, 3.4028234663852886e38),
    "bfloat16": (2.0**-8, 2.0**-126, 3.3895313892515355e38),
    "float16": (2.0**-11, 2.0**-25, 65504.0),
}
# Settings such as a slope are numbers of single precision on some backends, in any dtype.
_SETTINGS = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Errors of one operation.

    Attributes:
        unit: relative error of a result.
        tiny: absolute error of a result.
        cast: relative error of an operand, which is cast to the dtype first.
        settings: relative error of the operation's own numbers.
        largest: beyond it, results are infinite.
    """

    unit: float
    tiny: float
    cast: float
    settings: float
    largest: float

    def gamma(self, terms):
        """Relative error of a sum of products.

        The bound of `arithmetic.gamma` in float64. Long sums in low precision have none; there
        a random walk stands for it, as devices add in blocks or in a wider format.
        """
        if self.unit == UNIT:
            return arithmetic.gamma(terms)
        product = terms * self.unit
        if product < 0.1:
            return product / (1 - product) * SLACK
        return max(16 * math.sqrt(terms) * self.unit, 0.1)


def exact(dtype):
    """`Rounding` of float64 arithmetic here, with the underflow of a model's dtype."""
    _, tiny, largest = _FORMATS.get(dtype, _FORMATS["float64"])
    return Rounding(UNIT, tiny, 0.0, 0.0, largest)


def computed(dtype):
    """`Rounding` of a model that computes in this dtype."""
    unit, tiny, largest = _FORMATS.get(dtype, _FORMATS["float64"])
    return Rounding(unit, tiny, unit, max(unit, _SETTINGS), largest)


FLOAT64 = exact("float64")
