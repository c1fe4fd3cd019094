"""Functions that tools write as several operators are read as one; near ones are refused."""

import math

import keras
import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.onnx.load import load_onnx

ROOT, RATE = math.sqrt(2), math.sqrt(2 / math.pi)


def numbers(**values):
    return {name: np.float32(value) for name, value in values.items()}


GELU = [("Div", "x root", "a"), ("Erf", "a", "b"), ("Add", "b one", "c")]
TANH = [("Mul", "x x", "a"), ("Mul", "a x", "b"), ("Mul", "b cubic", "c"), ("Add", "x c", "d"),
        ("Mul", "d rate", "e"), ("Tanh", "e", "f"), ("Add", "f one", "g")]  # fmt: skip
LAYER = [("ReduceMean", "x", "m", {"axes": [-1]}), ("Sub", "x m", "c")]
ROOTS = [("ReduceMean", "s", "v", {"axes": [-1]}), ("Add", "v tiny", "w"), ("Sqrt", "w", "r")]
GROUPS = {"split": np.array([0, 3, 2, 2]), "joined": np.array([0, 3, 4]), "two": np.array([2])}
# name: (nodes, numbers, class of layer or name of activation that is read)
FOUND = {
    "swish": ([("Sigmoid", "x", "s"), ("Mul", "x s", "y")], {}, "silu"),
    "swish turned": ([("Sigmoid", "x", "s"), ("Mul", "s x", "y")], {}, "silu"),
    "swish with a rate": (
        [("Mul", "x k", "a"), ("Sigmoid", "a", "s"), ("Mul", "x s", "y")], numbers(k=1.75), "silu",
    ),
    "hard swish": (
        [("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Mul", "x b", "c"),
         ("Div", "c six", "y")],
        numbers(three=3, zero=0, six=6), "hard_silu",
    ),
    "hard swish by HardSigmoid": (
        [("HardSigmoid", "x", "s", {"alpha": 1 / 6, "beta": 0.5}), ("Mul", "x s", "y")], {},
        "hard_silu",
    ),
    "mish": ([("Softplus", "x", "a"), ("Tanh", "a", "b"), ("Mul", "x b", "y")], {}, "mish"),
    "GELU": (
        [*GELU, ("Mul", "x c", "d"), ("Mul", "d half", "y")], numbers(root=ROOT, one=1, half=0.5),
        "gelu",
    ),
    "GELU halved first": (
        [*GELU, ("Mul", "half x", "d"), ("Mul", "d c", "y")], numbers(root=ROOT, one=1, half=0.5),
        "gelu",
    ),
    "GELU by tanh": (
        [*TANH, ("Mul", "x half", "h"), ("Mul", "h g", "y")],
        numbers(cubic=0.044715, rate=RATE, one=1, half=0.5), "Gelu",
    ),
    "softsign": ([("Abs", "x", "a"), ("Add", "a one", "b"), ("Div", "x b", "y")], numbers(one=1),
                 "softsign"),
    "softplus": (
        [("Greater", "x k", "a"), ("Softplus", "x", "b"), ("Where", "a x b", "y")],
        numbers(k=20), "softplus",
    ),
    "layer normalization": (
        [*LAYER, ("Pow", "c two", "s"), *ROOTS, ("Div", "c r", "y")], numbers(two=2, tiny=1e-3),
        "LayerNormalization",
    ),
    "layer normalization by a product": (
        [*LAYER, ("Mul", "c c", "s"), *ROOTS, ("Div", "c r", "y")], numbers(tiny=1e-3),
        "LayerNormalization",
    ),
    "root mean square normalization": (
        [("Mul", "x x", "s"), *ROOTS, ("Div", "x r", "y")], numbers(tiny=1e-3), "RMSNormalization",
    ),
    "mean of one axis, root of another": (
        [("ReduceMean", "x", "m", {"axes": [1]}), ("Sub", "x m", "c"), ("Mul", "c c", "s"), *ROOTS,
         ("Div", "c r", "y")], numbers(tiny=1e-3),
        "RMSNormalization",
    ),
    "logarithm of a sigmoid": ([("Sigmoid", "x", "s"), ("Log", "s", "y")], {}, "log_sigmoid"),
    "largest half first": (
        [("Split", "x", "a b", {"axis": 2}), ("Max", "b a", "c"), ("Min", "a b", "d"),
         ("Concat", "c d", "y", {"axis": 2})],
        {}, "MaxMin",
    ),
    "both halves": (
        [("Neg", "x", "n"), ("Relu", "x", "a"), ("Relu", "n", "b"),
         ("Concat", "a b", "y", {"axis": 1})],
        {}, "TwoSidedReLU",
    ),
    "sorted": (
        [("TopK", "x four", "y i", {"axis": 2})], {"four": np.array([4])}, "FullSort",
    ),
    "sorted pairs": (
        [("Reshape", "x split", "g"), ("TopK", "g two", "t i", {"axis": 3, "largest": 0}),
         ("Reshape", "t joined", "y")],
        GROUPS, "GroupSort",
    ),
    "largest two": (
        [("TopK", "x two", "y i", {"axis": 1})], {"two": np.array([2])}, "FullSort",
    ),
    "norm": ([("ReduceL2", "x", "y", {"axes": [2], "keepdims": 0})], {}, "GlobalL2NormPooling2D"),
    "softmax": (
        [("Exp", "x", "e"), ("ReduceSum", "e last", "s"), ("Div", "e s", "y")],
        {"last": np.array([-1])}, "Softmax",
    ),
    "rectifier by a choice": (
        [("Greater", "x zero", "a"), ("Where", "a x zero", "y")], numbers(zero=0), "relu",
    ),
    "leaky rectifier by a choice": (
        [("LessOrEqual", "x zero", "a"), ("Mul", "x slope", "b"), ("Where", "a b x", "y")],
        numbers(zero=0, slope=0.25), "LeakyReLU",
    ),
    "soft shrink by two choices": (
        [("Greater", "x t", "a"), ("Sub", "x t", "b"), ("Where", "a b zero", "c"),
         ("Less", "x minus", "d"), ("Add", "x t", "e"), ("Where", "d e zero", "f"),
         ("Add", "c f", "y")],
        numbers(t=0.75, minus=-0.75, zero=0), "SoftShrink",
    ),
    "soft shrink by signs": (
        [("Abs", "x", "n"), ("Greater", "n t", "a"), ("Sign", "x", "s"), ("Mul", "s t", "b"),
         ("Sub", "x b", "c"), ("Mul", "x zero", "d"), ("Where", "a c d", "y")],
        numbers(t=0.75, zero=0), "SoftShrink",
    ),
    "choice by a constant": (
        [("Where", "mask x z", "y")], {"mask": np.arange(4) > 1}, "Add",
    ),
    "choice of a constant": (
        [("Where", "mask fill x", "y")],
        {"mask": np.arange(12).reshape(3, 4) > 7, "fill": np.float32(0.5)}, "Rescaling",
    ),
    "running sums": (
        [("CumSum", "x axis", "y", {"reverse": 1})], {"axis": np.array(1)}, "Dense",
    ),
    "GELU of a product": (
        [("Mul", "z half", "x0"), ("Div", "x0 root", "a"), ("Erf", "a", "b"), ("Add", "b one", "c"),
         ("Mul", "x0 c", "d"), ("Mul", "d half", "y")],
        numbers(root=ROOT, one=1, half=0.5), "gelu",
    ),
}  # fmt: skip
NEAR = {
    "another gate": ([("Sigmoid", "z", "s"), ("Mul", "x s", "y")], {}),
    "GELU with another root": (
        [*GELU, ("Mul", "x c", "d"), ("Mul", "d half", "y")], numbers(root=1.3, one=1, half=0.5),
    ),
    "GELU that is not halved": ([*GELU, ("Mul", "x c", "y")], numbers(root=ROOT, one=1)),
    "softplus that jumps": (
        [("Greater", "x k", "a"), ("Softplus", "x", "b"), ("Where", "a x b", "y")], numbers(k=2),
    ),
    "positions of the largest": (
        [("TopK", "x two", "t i", {"axis": 1}), ("Cast", "i", "j", {"to": 1}), ("Add", "j t", "y")],
        {"two": np.array([2])},
    ),
    "shrink that jumps": (
        [("Greater", "x t", "a"), ("Where", "a x zero", "c"),
         ("Less", "x minus", "d"), ("Where", "d x zero", "f"), ("Add", "c f", "y")],
        numbers(t=0.75, minus=-0.75, zero=0),
    ),
    "shrink by signs that jumps": (
        [("Abs", "x", "n"), ("Greater", "n t", "a"), ("Sign", "x", "s"), ("Mul", "s half", "b"),
         ("Sub", "x b", "c"), ("Mul", "x zero", "d"), ("Where", "a c d", "y")],
        numbers(t=0.75, half=0.5, zero=0),
    ),
    "shrink of unlike halves": (
        [("Greater", "x t", "a"), ("Sub", "x t", "b"), ("Where", "a b zero", "c"),
         ("Less", "x minus", "d"), ("Add", "x t", "e"), ("Where", "d e zero", "f"),
         ("Add", "c f", "y")],
        numbers(t=0.75, minus=-0.5, zero=0),
    ),
    "choice that jumps": (
        [("Greater", "x zero", "a"), ("Where", "a x one", "y")], numbers(zero=0, one=1),
    ),
    "logarithm of another": ([("Softplus", "x", "s"), ("Log", "s", "y")], {}),
    "another sum of powers": (
        [("Exp", "x", "e"), ("ReduceSum", "e last", "s"), ("Exp", "z", "f"), ("Div", "f s", "y")],
        {"last": np.array([-1])},
    ),
    "softsign of another": (
        [("Abs", "z", "a"), ("Add", "a one", "b"), ("Div", "x b", "y")], numbers(one=1),
    ),
    "normalization without epsilon": (
        [*LAYER, ("Mul", "c c", "s"), *ROOTS, ("Div", "c r", "y")], numbers(tiny=0),
    ),
    "variance of another": (
        [*LAYER, ("Mul", "z z", "s"), *ROOTS, ("Div", "c r", "y")], numbers(tiny=1e-3),
    ),
}  # fmt: skip


def file(folder, nodes, constants):
    made = [("Tanh", "x", "z"), *nodes]
    made = [
        helper.make_node(kind, inputs.split(), output.split(), **(rest[0] if rest else {}))
        for kind, inputs, output, *rest in made
    ]
    return saved(folder, model(made, {"x": ("n", 3, 4)}, ["y"], constants))


@pytest.mark.parametrize("name", FOUND)
def test_a_composition_is_read_as_one_function(name, tmp_path):
    nodes, constants, expected = FOUND[name]
    path = file(tmp_path, nodes, constants)
    model_ = load_onnx(path).to_keras()
    kinds = {getattr(getattr(o, "activation", None), "__name__", "") for o in model_.operations}
    assert expected in kinds | {type(o).__name__ for o in model_.operations}
    x = 3 * np.random.default_rng(1).normal(size=(6, 3, 4)).astype("float32")
    want = run(path, x)
    # onnxruntime's sigmoid errs by 2⁻²², which its logarithm magnifies.
    room = 1e-3 if expected == "log_sigmoid" else 1e-5
    assert np.abs(keras.ops.convert_to_numpy(model_(x)) - want).max() <= room


# Almost a composition, and legal: read operator by operator.
APART = {
    "smallest half first": (
        [("Split", "x", "a b", {"axis": 2}), ("Max", "b a", "c"), ("Min", "a b", "d"),
         ("Concat", "d c", "y", {"axis": 2})],
        {}, "MaxMin",
    ),
    "halves joined elsewhere": (
        [("Split", "x", "a b", {"axis": 2}), ("Max", "b a", "c"), ("Min", "a b", "d"),
         ("Concat", "c d", "y", {"axis": 1})],
        {}, "MaxMin",
    ),
    "halves of two": (
        [("Neg", "z", "n"), ("Relu", "x", "a"), ("Relu", "n", "b"),
         ("Concat", "a b", "y", {"axis": 1})],
        {}, "TwoSidedReLU",
    ),
    "sorted groups of another shape": (
        [("Reshape", "x split", "g"), ("TopK", "g two", "t i", {"axis": 3, "largest": 0}),
         ("Reshape", "t joined", "y")],
        {**GROUPS, "joined": np.array([0, 6, 2])}, "GroupSort",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_is_almost_a_composition_is_read_operator_by_operator(name, tmp_path):
    nodes, constants, other = APART[name]
    path = file(tmp_path, nodes, constants)
    model_ = load_onnx(path).to_keras()
    assert other not in {type(o).__name__ for o in model_.operations}
    x = 3 * np.random.default_rng(1).normal(size=(6, 3, 4)).astype("float32")
    assert np.abs(keras.ops.convert_to_numpy(model_(x)) - run(path, x)).max() <= 1e-5


def above(value):
    """The next number of single precision."""
    return np.nextafter(np.float32(value), np.float32(np.inf))


def test_a_factor_that_gains_more_than_the_function_is_not_taken_for_its_own(tmp_path):
    """What is read is proved of the whole: the hard swish of a larger factor is a steeper one."""
    nodes, constants, _ = FOUND["hard swish"]
    nodes = [*nodes[:-1], ("Mul", "c sixth", "y")]
    sixth = np.float32(1 / 6)
    load_onnx(file(tmp_path, nodes, {**constants, "sixth": sixth}))
    with pytest.raises(UnsupportedLayerError, match="not read"):
        load_onnx(file(tmp_path, nodes, {**constants, "sixth": above(sixth)}))


@pytest.mark.parametrize("grown", [False, True])
def test_a_norm_pool_of_a_larger_scale_keeps_its_larger_gain(grown, tmp_path):
    scale = np.float32(1 / np.sqrt(6))
    nodes = [
        helper.make_node(
            "LpPool", ["x"], ["z"], kernel_shape=[3, 2], strides=[1, 1], p=2, pads=[0, 0, 0, 0]
        ),
        helper.make_node("Mul", ["z", "s"], ["y"]),
        helper.make_node("Flatten", ["y"], ["f"]),
    ]
    held = above(scale) if grown else scale
    path = saved(tmp_path, model(nodes, {"x": ("n", 1, 5, 5)}, ["f"], {"s": held}))
    program = load_onnx(path)
    kinds = {type(o).__name__ for o in program.to_keras().operations}
    assert ("L2NormPooling2D" in kinds) is not grown
    bound = tfl.lipschitz_upper_bound(program).gain_upper_bound
    assert bound >= (float(held) * np.sqrt(6) if grown else 1.0)


POWERS = [("Abs", "x", "a"), ("Pow", "a p", "b"), ("AveragePool", "b", "c", None),
          ("Mul", "c count", "d"), ("Pow", "d root", "y")]  # fmt: skip


@pytest.mark.parametrize("settings, changes, reads", [
    ({}, {}, True),
    ({"pads": [1, 0, 0, 1], "count_include_pad": 1}, {}, True),
    ({}, {"p": 2.0, "root": 0.5}, True),
    ({"pads": [1, 0, 0, 1]}, {}, False),  # means of fewer cells at the edges
    ({"auto_pad": "SAME_UPPER"}, {}, False),
    ({"ceil_mode": 1}, {}, False),
    ({}, {"count": 5.0}, False),
    ({}, {"root": 0.25}, False),
    ({}, {"p": 0.5, "root": 2.0}, False),
])  # fmt: skip
def test_norms_of_windows_by_powers_are_one_layer(settings, changes, reads, tmp_path):
    held = numbers(**{"p": 3.5, "count": 6, "root": 1 / 3.5} | changes)
    given = {"kernel_shape": [3, 2], "strides": [2, 1], **settings}
    nodes = [
        helper.make_node(kind, ends.split(), [end], **(given if rest else {}))
        for kind, ends, end, *rest in POWERS
    ]
    path = saved(tmp_path, model(nodes, {"x": ("n", 2, 6, 5)}, ["y"], held))
    if not reads:
        with pytest.raises(UnsupportedLayerError, match="power"):
            load_onnx(path)
        return
    net = load_onnx(path).to_keras()
    assert "LpPooling2D" in {type(o).__name__ for o in net.operations}
    x = np.random.default_rng(1).normal(size=(3, 2, 6, 5)).astype("float32")
    assert np.abs(keras.ops.convert_to_numpy(net(x)) - run(path, x)).max() <= 1e-5


@pytest.mark.parametrize("name", NEAR)
def test_a_composition_of_something_else_is_refused(name, tmp_path):
    with pytest.raises(UnsupportedLayerError, match="not read"):
        load_onnx(file(tmp_path, *NEAR[name]))
