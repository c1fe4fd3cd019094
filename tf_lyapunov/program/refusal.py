"""The error of what has no proven gain: which layer, why, and what is supported."""

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import registry

_PRODUCT = "a product of two inputs has no global Lipschitz constant"
_VARIANCE = "it divides by statistics of its own input, which has no global Lipschitz constant"
_ATTENTION = "dot-product attention has no global Lipschitz constant"
_REASONS = {
    "Multiply": _PRODUCT,
    "Dot": _PRODUCT,
    "LayerNormalization": _VARIANCE,
    "GroupNormalization": _VARIANCE,
    "RMSNormalization": _VARIANCE,
    "UnitNormalization": _VARIANCE,
    "MultiHeadAttention": _ATTENTION,
    "GroupedQueryAttention": _ATTENTION,
    "Attention": _ATTENTION,
    "Lambda": "it holds arbitrary code",
    "Embedding": "its inputs are integers, not points of a Euclidean space",
    "Masking": "it switches whole steps off, which is discontinuous",
}


def refuse(operation, reason=None):
    """Raises `UnsupportedLayerError` naming the layer and what is supported."""
    kind = type(operation).__name__
    reason = reason or _REASONS.get(kind, "no proven gain is known for it")
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in registry.kept()))
    raise UnsupportedLayerError(
        f"A certificate cannot include this layer: {reason}. Received: layer {operation.name!r} of "
        f"type {kind}. If you can prove a gain, declare it by `tf_lyapunov.register_gain({kind}, "
        f"rule, assumption=...)`. Supported layers: {names}."
    )
