"""Why a step has no place in a certificate, and what to do about it."""

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import registry

_PRODUCT = "a product of two inputs has no global Lipschitz constant"
_ATTENTION = "dot-product attention has no global Lipschitz constant"
_STEPS = "it is discontinuous, so that it has no Lipschitz constant"
_STEEP = "its slope is not bounded, so that it has no global Lipschitz constant"
_INTEGERS = "its inputs are integers or strings, not points of a Euclidean space"
_CONTRAST = "it divides by the range of its own input, which has no global Lipschitz constant"
# Classes of layers and operations without any gain: none can be declared for them.
WITHOUT_GAIN = {
    **dict.fromkeys(("Multiply", "Dot", "Matmul", "Einsum", "Tensordot", "Outer"), _PRODUCT),
    **dict.fromkeys(("Inner", "Vdot", "Kron", "Cross", "Prod", "Cumprod", "Square"), _PRODUCT),
    **dict.fromkeys(("Var", "Moments", "Hypot2", "Correlate", "Corrcoef"), _PRODUCT),
    **dict.fromkeys(
        ("MultiHeadAttention", "GroupedQueryAttention", "GroupQueryAttention", "Attention"),
        _ATTENTION,
    ),
    **dict.fromkeys(("AdditiveAttention", "DotProductAttention"), _ATTENTION),
    **dict.fromkeys(
        ("Sign", "Round", "Floor", "Ceil", "Trunc", "Argmax", "Argmin", "Argsort", "OneHot"), _STEPS
    ),
    **dict.fromkeys(("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual"), _STEPS),
    **dict.fromkeys(("FloorDivide", "Mod", "Discretization", "Threshold", "HardShrink"), _STEPS),
    **dict.fromkeys(("Masking", "Heaviside", "SearchSorted", "Digitize"), _STEPS),
    **dict.fromkeys(
        ("Exp", "Exp2", "Expm1", "Log", "Log1p", "Log2", "Log10", "Power", "Sqrt", "Rsqrt"), _STEEP
    ),
    **dict.fromkeys(("Reciprocal", "Tan", "Sinh", "Cosh", "Arccos", "Arcsin", "Erfinv"), _STEEP),
    **dict.fromkeys(("Arctanh", "Arccosh", "Cbrt"), _STEEP),
    **dict.fromkeys(("Embedding", "Hashing", "HashedCrossing", "CategoryEncoding"), _INTEGERS),
    **dict.fromkeys(("StringLookup", "IntegerLookup", "TextVectorization"), _INTEGERS),
    **dict.fromkeys(("AutoContrast", "ContrastLimitedAdaptiveHistogramEqualization"), _CONTRAST),
}
_UNIT = "it divides by the norm of its own input, with no global Lipschitz constant near zero"
WITHOUT_GAIN.update(dict.fromkeys(("UnitNormalization", "Normalize"), _UNIT))
_ADVICE = dict.fromkeys(
    ("UnitNormalization", "Normalize"),
    "Use LayerNormalization or RMSNormalization with a positive epsilon.",
)
_ADVICE["RecurrentEquilibrium"] = (
    "`certify_dynamics(model, x, y)` proves the gain of the model and radii of its sequences."
)
_REASONS = {
    "Lambda": "it holds arbitrary code",
    **dict.fromkeys(("GRU", "LSTM"), "gates multiply signals, with no global Lipschitz constant"),
    "RecurrentEquilibrium": "its states remember, and other proofs are about one step",
    "SimpleRNN": "no gain over all lengths and states is known for it",
}
# What bounds on a region read all the same.
_ON_REGION = ("Multiply", "Dot", "Matmul", "Einsum", "MultiHeadAttention", "Attention",
              "SimpleRNN", "GRU", "LSTM")  # fmt: skip


class Refusal(UnsupportedLayerError):
    """An `UnsupportedLayerError` about one step, which can be told beside others.

    Attributes:
        line: what is received, why it is refused and what to do, in one line.
    """

    def __init__(self, message, line):
        super().__init__(message)
        self.line = line


def refuse(operation, reason=None, *, advice=None):
    """Raises a `Refusal` that names the step, why it has no place, and what to do.

    Args:
        operation: a Keras layer or operation.
        reason: why, or None for the reason known for its class.
        advice: what to do, or None; a declaration is offered only where a gain may exist.
    """
    kind = type(operation).__name__
    own = getattr(operation, "operation", None)
    if kind == "Part" and own is not None:
        operation, kind = own, type(own).__name__
    reason = reason or WITHOUT_GAIN.get(kind) or _REASONS.get(kind)
    has_none = reason in WITHOUT_GAIN.values() or "no global Lipschitz" in (reason or "")
    reason = reason or "no proven gain is known for it"
    if advice is None:
        advice = _ADVICE.get(kind) or _advice(operation, kind, has_none)
        if kind in _ON_REGION:
            advice += (
                " On a ball or a box it is bounded by `output_bounds`, `gain_on` and "
                "`certify(method='linear')`."
            )
    what = f"layer {operation.name!r} of type {kind}"
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in registry.kept()))
    raise Refusal(
        f"A certificate cannot include this layer: {reason}. Received: {what}. {advice} "
        f"Supported layers: {names}.",
        f"{what}: {reason}. {advice}",
    )


def _advice(operation, kind, has_none):
    if has_none:
        return (
            "No gain can be declared for it: take it out of the model, or certify the part before "
            "or behind it."
        )
    if isinstance(operation, keras.Layer):
        return (
            "If you can prove a gain, declare it by "
            f"`tf_lyapunov.register_gain({kind}, rule, assumption=...)`."
        )
    return (
        "If you can prove a gain, put the operation into a layer of your own and declare it by "
        "`tf_lyapunov.register_gain(YourLayer, rule, assumption=...)`."
    )


def raise_all(found, owners=()):
    """Raises the one error that was found, or one that lists all; nothing if there is none.

    Args:
        found: dictionary from names of steps to their `UnsupportedLayerError`.
        owners: dictionary from names of steps to the layer of the user's own around them.
    """
    if not found:
        return
    lines = []
    for name, error in found.items():
        line = getattr(error, "line", None) or str(error)
        owner = dict(owners).get(name)
        if owner is not None:
            kind = type(owner).__name__
            line += (
                f" It is called inside layer {owner.name!r} of type {kind}; a gain of that whole "
                f"layer may be declared by `tf_lyapunov.register_gain({kind}, rule, "
                "assumption=...)`."
            )
        lines.append((name, line))
    if len(found) == 1:
        ((name, error),) = found.items()
        extra = lines[0][1][len(getattr(error, "line", None) or str(error)) :]
        if not extra:
            raise error
        raise UnsupportedLayerError(str(error) + extra) from error
    text = "\n".join(f"  {i}. step {name!r}: {line}" for i, (name, line) in enumerate(lines, 1))
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in registry.kept()))
    raise UnsupportedLayerError(
        f"A certificate cannot include {len(found)} steps of this model. Received:\n{text}\n"
        f"Supported layers: {names}."
    )
