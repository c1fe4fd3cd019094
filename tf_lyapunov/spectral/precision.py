"""Rounding: the constants that turn a computed bound into one that holds in exact arithmetic.

Model: every product and sum is rounded with relative error at most the unit roundoff u, in any
order and with or without fused multiply-adds, so an inner product of n terms errs by at most
γ_n·Σ|xᵢyᵢ| with γ_n = n·u / (1 - n·u) (Higham, Accuracy and Stability, section 3.1). Subnormal
numbers (below 1.2e-38 in float32) count as the zeros that many devices take them for: a bound may
miss √entries times as much.
"""

import contextlib
import importlib
import os

import keras

_FAST_MATH = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
# p bits of significand: u = 2^-p.
_SIGNIFICAND_BITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}


def unit_roundoff(dtype):
    """Unit roundoff u of a floating-point type.

    Example:

    >>> unit_roundoff("float32") == 2.0**-24
    True
    """
    name = keras.backend.standardize_dtype(dtype)
    if name not in _SIGNIFICAND_BITS:
        raise TypeError(
            f"A kernel must be of a floating-point type {tuple(_SIGNIFICAND_BITS)}. "
            f"Received: dtype={name}."
        )
    return 2.0 ** -_SIGNIFICAND_BITS[name]


def gamma(terms, roundoff):
    """γ_n = n·u / (1 - n·u), the relative error of an n-term inner product.

    Raises:
        ValueError: if n·u ≥ 1/2, where the bound says nothing any more.
    """
    if terms * roundoff >= 0.5:
        raise ValueError(
            f"A sum of {terms} terms is too long to be bounded at unit roundoff {roundoff:.1e}. "
            "Use a float64 kernel."
        )
    return terms * roundoff / (1 - terms * roundoff)


def work_dtype(kernel):
    """Type in which a bound on `kernel` is computed: at least float32, with true products.

    bfloat16 and float16 kernels are read exactly as float32. Where the active backend may round
    float32 products to fewer bits (TF32 on a GPU under TensorFlow or PyTorch, oneDNN's reduced
    math modes), the bound is computed in float64. JAX is told its precision by `full_precision`.
    """
    name = keras.backend.standardize_dtype(kernel.dtype)
    unit_roundoff(name)
    if name == "float64" or _products_may_be_rounded():
        return "float64"
    return "float32"


def _products_may_be_rounded():
    backend = keras.backend.backend()
    if backend in ("tensorflow", "torch") and any(
        os.environ.get(name, "strict").lower() not in ("", "strict") for name in _FAST_MATH
    ):
        return True
    if backend == "tensorflow":
        config = importlib.import_module("tensorflow").config
        return bool(
            config.experimental.tensor_float_32_execution_enabled()
            and config.list_physical_devices("GPU")
        )
    if backend == "torch":
        torch = importlib.import_module("torch")
        return torch.get_float32_matmul_precision() != "highest"
    return False


def full_precision():
    """Context in which float32 matrix products are not rounded below float32 (JAX's TF32)."""
    if keras.backend.backend() == "jax":
        return importlib.import_module("jax").default_matmul_precision("highest")
    return contextlib.nullcontext()
