"""Arithmetic rounded to the safe side, and the roundoff of the number formats that layers use.

A product or sum of two floats, rounded to nearest, lies within half a unit in the last place of
the exact value; the next float above it is therefore an upper bound. Factors 0 and 1 are exact.
"""

import contextlib
import contextvars
import functools
import math
import os
import sys

import keras
import numpy as np

# Unit roundoff: half the distance between 1 and the next number of the format.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
TF32_ROUNDOFF = 2.0**-11
_IN_FLOAT64 = contextvars.ContextVar("in_float64", default=False)


@contextlib.contextmanager
def float64_evaluation():
    """Within it, error models are those of the same network evaluated in float64."""
    token = _IN_FLOAT64.set(True)
    try:
        yield
    finally:
        _IN_FLOAT64.reset(token)


def up(x):
    """The next float above `x` (elementwise)."""
    return np.nextafter(x, np.inf)


def down(x):
    """The next float below `x` (elementwise)."""
    return np.nextafter(x, -np.inf)


# What underflow takes off an entry of a product, 2⁻¹⁰⁷⁵, with room for sums of 2³⁵ of them.
TINY = 2.0**-1040


def product_up(*factors):
    """Upper bound on the exact product of non-negative floats.

    Example:

    >>> product_up(2.0, 1.0, 0.5) >= 1.0, product_up(0.3, 1.0), product_up(math.inf, 0.0)
    (True, 0.3, 0.0)
    """
    total = 1.0
    for factor in map(float, factors):
        if total == 0.0 or factor == 0.0:
            return 0.0
        exact = total == 1.0 or factor == 1.0
        total = total * factor if exact else float(up(total * factor))
    return total


def sum_up(*terms):
    """Upper bound on the exact sum of non-negative floats."""
    total = 0.0
    for term in map(float, terms):
        exact = total == 0.0 or term == 0.0
        total = total + term if exact else float(up(total + term))
    return total


def sqrt_up(x):
    """Upper bound on the square root of a non-negative float (exact for perfect squares)."""
    root = math.sqrt(x)
    # Squares of integers below 2²⁶ are exact floats.
    exact = math.isinf(root) or (root < 2**26 and root == math.floor(root) and root * root == x)
    return root if exact else float(up(root))


def root_sum_squares_up(*terms):
    """Upper bound on the Euclidean norm of non-negative floats."""
    present = [float(t) for t in terms if t != 0]
    if len(present) <= 1:
        return sum(present)
    return sqrt_up(sum_up(*(product_up(t, t) for t in present)))


def ldexp_up(x, exponent):
    """Upper bound on x·2^exponent for x ≥ 0; exact but where it under- or overflows.

    Example:

    >>> ldexp_up(1.0, -1100) > 0, ldexp_up(1.0, 2000), ldexp_up(3.0, 1)
    (True, inf, 6.0)
    """
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return value if abs(value) >= sys.float_info.min or x == 0 else float(up(value))


def quotient_up(numerator, denominator):
    """Upper bound on the exact quotient of two positive floats."""
    return numerator if denominator == 1.0 else float(up(numerator / denominator))


def euclidean_norms_up(rows):
    """Upper bounds, float64, on the Euclidean norms of the rows of a float array.

    The sum of n squares errs by the relative amount γ_n ≤ 1.01·n·2⁻⁵³, in any order of summation.
    """
    rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
    # A scale per row keeps squares away from over- and underflow; a power of two is exact.
    largest = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
    if np.all((largest == 0) | ((largest > 1e-100) & (largest < 1e100))):
        scale, scaled = 1.0, rows  # what underflows is below 1e-100 of the sum
    else:
        scale = 2.0 ** np.floor(np.log2(np.where(largest > 0, largest, 1.0)))
        scaled = rows / scale[:, None]
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    return norms * (1 + (rows.shape[1] + 4) * 1.01 * UNIT_ROUNDOFF["float64"]) * scale


def euclidean_norms(rows):
    """Euclidean norms of the rows of a float array in its format, whatever the size of its numbers.

    Squares of small numbers underflow, so that the root of their sum may be far below the norm.

    Example:

    >>> bool(euclidean_norms(np.array([[3e-170, 4e-170]]))[0] > 4.9e-170)
    True
    """
    rows = rows.reshape(len(rows), -1)
    info = np.finfo(rows.dtype)
    with np.errstate(over="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    # What underflowed of a sum that is this large is below its rounding.
    odd = np.flatnonzero(~((squares > info.tiny / info.eps**2) & (squares < info.max)))
    norms = np.sqrt(squares)
    if len(odd):
        part = rows[odd]
        largest = np.abs(part).max(axis=1, initial=0.0)
        scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        part = part / scale[:, None]
        norms[odd] = np.sqrt(np.einsum("ij,ij->i", part, part)) * scale
    return norms


def gamma(terms, unit_roundoff):
    """γ_n = n·u / (1 - n·u): relative error of n rounded operations in any order, inf if n·u ≥ 1.

    Example:

    >>> gamma(10, 2.0**-24) > 10 * 2.0**-24, gamma(300, 2.0**-8)
    (True, inf)

    Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), Lemma 3.1.
    """
    product = terms * unit_roundoff
    return product / (1 - product) * (1 + 1e-12) if product < 1 else math.inf


class NoRoundoff(ValueError):
    """A format without a roundoff, such as integers, which wrap around."""


def unit_roundoff(dtype):
    """Unit roundoff of a Keras dtype name; refuses formats without one here."""
    if dtype not in UNIT_ROUNDOFF:
        raise NoRoundoff(
            f"A certificate needs a floating-point compute dtype ({', '.join(UNIT_ROUNDOFF)}). "
            f"Received: {dtype!r}."
        )
    return UNIT_ROUNDOFF["float64" if _IN_FLOAT64.get() else dtype]


# Largest finite number.
LARGEST = {
    "float64": sys.float_info.max,
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
# Smallest normal number: devices set smaller results, and operands, to zero.
_SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126}


def underflow(dtype):
    """Absolute error of one operation in this format where its result underflows.

    Formats with the exponents of float32 flush results and operands to zero; float16 has gradual
    underflow, whose steps are 2⁻²⁴.
    """
    if _IN_FLOAT64.get():
        return _SMALLEST["float64"]
    return _SMALLEST.get(dtype, 2.0**-25)


def flushed(dtype):
    """Largest number of this format that a device may take for zero; 0 for gradual underflow."""
    return _SMALLEST.get(dtype, 0.0)


@functools.cache
def _accelerator():
    """`"gpu"`, `"tpu"` or None, as the active backend sees it."""
    if keras.backend.backend() == "torch":
        torch = sys.modules.get("torch")
        return "gpu" if torch is not None and torch.cuda.is_available() else None
    if keras.backend.backend() not in ("tensorflow", "jax"):
        return None
    for kind in ("tpu", "gpu"):
        try:
            if keras.distribution.list_devices(kind):
                return kind
        except Exception:  # a backend without this kind of device says so by raising
            continue
    return None


def operand_roundoff():
    """Relative rounding of the *operands* of float32 matrix products on the current device.

    Graphics processors may round them to TF32 (2⁻¹¹) and tensor processors to bfloat16 (2⁻⁸)
    unless the backend is told not to; oneDNN does so on a CPU only when an environment variable
    asks for it. 0 means full float32 operands.
    """
    if _IN_FLOAT64.get():
        return 0.0
    modes = ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")
    if any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in modes):
        return UNIT_ROUNDOFF["bfloat16"]
    device = _accelerator()
    if device is None:
        return 0.0
    backend = keras.backend.backend()
    if backend == "jax":
        precision = sys.modules["jax"].config.jax_default_matmul_precision
        if precision in ("highest", "float32"):
            return 0.0
    elif backend == "tensorflow" and device == "gpu":
        config = sys.modules["tensorflow"].config.experimental
        if not config.tensor_float_32_execution_enabled():
            return 0.0
    elif backend == "torch":
        backends = sys.modules["torch"].backends
        if not (backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32):
            return 0.0
    return UNIT_ROUNDOFF["bfloat16"] if device == "tpu" else TF32_ROUNDOFF
