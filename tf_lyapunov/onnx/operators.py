"""All operators that are read, assembled from the families."""

from tf_lyapunov.onnx.foreign import NotRead
from tf_lyapunov.onnx.readers import (
    activation,
    convolution,
    linear,
    merging,
    moving,
    normalizing,
    placing,
    pooling,
    resizing,
    sorting,
)
from tf_lyapunov.onnx.signals import Signal

_PRODUCTS = ("MatMul", "Gemm", "Einsum", "tf_lyapunov.Dense")
# Operator -> (newest version of its meaning that is known here, reader).
READERS = {}
for _family in (activation, convolution, linear, merging, moving, normalizing, placing, pooling,
                resizing, sorting):  # fmt: skip
    READERS.update(_family.READERS)


def names():
    """Names of the operators that are read, in order."""
    return sorted(name for name in READERS if not name.startswith("tf_lyapunov."))


def read(build, node, values):
    """What a node gives, as a `Signal` or an array, or a list of them.

    Args:
        build: `building.Builder`.
        node: `OnnxNode`.
        values: `Signal`, array or None per input.

    Raises:
        NotRead: with the reason.
    """
    check_known(node)
    if node.kind in _PRODUCTS:
        for value in values:
            if isinstance(value, Signal) and "int" in value.dtype:
                raise NotRead("it multiplies integers, which wrap around; cast them before it")
    return READERS[node.kind][1](build, node, values)


def check_known(node):
    """Refuses operators that are not read.

    Raises:
        NotRead: with the reason.
    """
    if node.domain or (node.since is None and node.kind not in READERS):
        raise NotRead("it is no operator of ONNX's own" if node.domain else "no such operator")
    if node.kind not in READERS:
        raise NotRead(_WHY.get(node.kind, "it is not read"))
    newest = READERS[node.kind][0]
    if node.since is not None and node.since > newest:
        raise NotRead(f"its meaning since operator set {node.since} is not known")


_FLOW = "what it computes is decided while it runs"
_STEPS = "it is discontinuous, so that it has no Lipschitz constant"
_NO_LAYER = "no function that the library knows the slopes of computes it"
_STEEP = "its slope is not bounded, so that it has no global Lipschitz constant"
_MEMORY = "recurrent layers are not read"
_WHY = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), _FLOW),
    **dict.fromkeys(("ArgMax", "ArgMin", "Sign", "Round", "Floor", "Ceil"), _STEPS),
    **dict.fromkeys(("Greater", "Less", "Equal", "OneHot", "Hardmax", "Mod"), _STEPS),
    **dict.fromkeys(("Exp", "Log", "Sqrt", "Pow", "Reciprocal", "Tan", "Sinh", "Cosh"), _STEEP),
    **dict.fromkeys(("GreaterOrEqual", "LessOrEqual", "NonZero", "Unique"), _STEPS),
    **dict.fromkeys(("Sin", "Cos", "Atan", "Asinh", "Erf", "ReduceLogSumExp"), _NO_LAYER),
    **dict.fromkeys(("RNN", "LSTM", "GRU"), _MEMORY),
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"),
        "quantized networks compute steps",
    ),
    "Attention": "dot-product attention has no global Lipschitz constant",
}
