"""Every operator that is read computes what onnxruntime computes, over its arguments."""

import keras
import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

from tf_lyapunov.onnx.load import load_onnx

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def ints(*values):
    return np.array(values, np.int64)


# name: (operator, input shape, constants behind the input, attributes, operator set)
CASES = {}


def case(name, kind, shape, *constants, opset=17, **attributes):
    assert name not in CASES
    CASES[name] = (kind, shape, constants, attributes, opset)


N = "batch"
IMAGE = (N, 3, 7, 6)
for kind in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Neg", "Abs", "HardSwish"):
    case(kind, kind, (N, 5))
    case(f"{kind} of images", kind, IMAGE)
case("Mish", "Mish", (N, 5), opset=18)
case("Mish of an image", "Mish", (1, 2, 3), opset=18)
case("Swish", "Swish", (N, 5), opset=24)
case("Swish by 1.5", "Swish", (N, 5), opset=24, alpha=1.5)
case("Gelu", "Gelu", (N, 5), opset=20)
case("Gelu by tanh", "Gelu", (N, 5), opset=20, approximate="tanh")
case("LeakyRelu", "LeakyRelu", (N, 5))
case("LeakyRelu 0.3", "LeakyRelu", (N, 5), alpha=0.3)
case("LeakyRelu below zero", "LeakyRelu", IMAGE, alpha=-0.3)
case("PRelu per channel", "PRelu", IMAGE, normal(3, 1, 1))
case("PRelu of the last axis", "PRelu", IMAGE, normal(6))
case("PRelu by one slope", "PRelu", (N, 5), normal(1))
case("Elu", "Elu", (N, 5))
case("Elu 0.7", "Elu", (N, 5), alpha=0.7)
case("Selu", "Selu", (N, 5))
case("Selu of other numbers", "Selu", (N, 5), alpha=1.5, gamma=1.25)
case("Celu", "Celu", (N, 5))
case("Celu 2", "Celu", (N, 5), alpha=2.0)
case("HardSigmoid", "HardSigmoid", (N, 5))
case("HardSigmoid of a sixth", "HardSigmoid", (N, 5), alpha=1 / 6, beta=0.5)
case("ThresholdedRelu at zero", "ThresholdedRelu", (N, 5), alpha=0.0)
case("Shrink", "Shrink", (N, 5), lambd=0.5, bias=0.5)
case("Clip by attributes", "Clip", (N, 5), opset=7, min=-1.0, max=0.5)
case("Clip by inputs", "Clip", (N, 5), np.float32(0), np.float32(6))
case("Clip from below", "Clip", (N, 5), np.float32(-0.25))
case("Clip with crossed limits", "Clip", (N, 5), np.float32(1), np.float32(-1))
case("Pow of one", "Pow", (N, 5), np.float32(1))
case("Gemm", "Gemm", (N, 5), normal(5, 4), normal(4))
case("Gemm turned", "Gemm", (N, 5), normal(4, 5), normal(1, 4), transB=1, alpha=0.3, beta=0.7)
case("Gemm without a bias", "Gemm", (N, 5), normal(5, 4), alpha=2.0)
case("Gemm of columns", "Gemm", (5, N), normal(5, 4), normal(1), transA=1)
case("MatMul", "MatMul", (N, 3, 5), normal(5, 4))
case("MatMul by a vector", "MatMul", (N, 5), normal(5))
case("MatMul by a stack", "MatMul", (N, 3, 2, 5), normal(3, 5, 4))
case("Add", "Add", (N, 5), normal(5))
case("Add per channel", "Add", IMAGE, normal(3, 1, 1))
case("Add that repeats", "Add", (N, 1, 5), normal(4, 1))
case("Sub", "Sub", (N, 5), normal(1))
case("Sub of an image", "Sub", IMAGE, normal(1, 3, 7, 6))
case("Mul", "Mul", (N, 5), normal(5))
case("Mul per channel", "Mul", IMAGE, normal(1, 3, 1, 1))
case("Div", "Div", (N, 5), np.float32(3))
case("Div by powers of two", "Div", IMAGE, np.array([[[2]], [[4]], [[8]]], np.float32))
case("Max with a constant", "Max", (N, 5), normal(5))
case("Min with a constant", "Min", IMAGE, np.float32(0.1), np.float32(0.2))
case("Sum with a constant", "Sum", (N, 5), normal(5), normal(1))
case("Sum of one", "Sum", (N, 5))
case("Mean of one", "Mean", (N, 5))

K = normal(4, 3, 3, 2)
case("Conv", "Conv", IMAGE, K, normal(4))
case("Conv without a bias, strided", "Conv", IMAGE, K, strides=[2, 3])
case("Conv with uneven pads", "Conv", IMAGE, K, normal(4), pads=[1, 2, 0, 3], strides=[2, 1])
case("Conv with gaps", "Conv", IMAGE, K, normal(4), dilations=[2, 3], pads=[2, 1, 2, 1])
case("Conv with gaps and strides", "Conv", IMAGE, K, dilations=[2, 1], strides=[2, 2])
case("Conv padded above", "Conv", IMAGE, K, auto_pad="SAME_UPPER", strides=[2, 2])
case("Conv padded below", "Conv", IMAGE, K, auto_pad="SAME_LOWER", strides=[2, 2])
case("Conv not padded", "Conv", IMAGE, K, auto_pad="VALID")
case("Conv in groups", "Conv", (N, 4, 6, 6), normal(6, 2, 3, 3), normal(6), group=2)
case("Conv depthwise", "Conv", IMAGE, normal(6, 1, 3, 3), normal(6), group=3, pads=[1, 1, 1, 1])
case("Conv depthwise, uneven strides", "Conv", IMAGE, normal(3, 1, 3, 3), group=3, strides=[2, 1])
case("Conv depthwise with gaps", "Conv", IMAGE, normal(3, 1, 2, 2), group=3, dilations=[2, 2])
case("Conv 1D", "Conv", (N, 3, 9), normal(4, 3, 3), normal(4), pads=[2, 0], strides=[2])
case("Conv 1D depthwise", "Conv", (N, 3, 9), normal(3, 1, 3), normal(3), group=3)
case("Conv 3D", "Conv", (N, 2, 4, 5, 4), normal(3, 2, 2, 3, 2), normal(3), pads=[0, 1, 0, 1, 0, 1])
case("Conv 3D strided", "Conv", (N, 2, 4, 5, 4), normal(3, 2, 2, 2, 2), strides=[2, 1, 2])
T = normal(3, 4, 3, 2)
case("ConvTranspose", "ConvTranspose", IMAGE, T, normal(4))
case("ConvTranspose strided", "ConvTranspose", IMAGE, T, normal(4), strides=[2, 3])
case("ConvTranspose padded", "ConvTranspose", IMAGE, T, normal(4), strides=[2, 2],
     pads=[1, 0, 1, 0], output_padding=[1, 0])  # fmt: skip
case("ConvTranspose with much output padding", "ConvTranspose", IMAGE, T, normal(4),
     strides=[3, 3], output_padding=[2, 1])  # fmt: skip
case("ConvTranspose with gaps", "ConvTranspose", IMAGE, T, dilations=[2, 1], strides=[2, 1])
case("ConvTranspose in groups", "ConvTranspose", (N, 4, 5, 5), normal(4, 3, 3, 3), group=2)
case("ConvTranspose of a shape", "ConvTranspose", IMAGE, T, strides=[2, 2], output_shape=[14, 12])
case("ConvTranspose padded above", "ConvTranspose", IMAGE, T, auto_pad="SAME_UPPER",
     strides=[2, 2])  # fmt: skip
case("ConvTranspose as Keras pads", "ConvTranspose", IMAGE, normal(3, 4, 4, 4), normal(4),
     strides=[2, 2], pads=[1, 1, 1, 1])  # fmt: skip
case("ConvTranspose 1D", "ConvTranspose", (N, 3, 5), normal(3, 2, 4), strides=[2], pads=[1, 2])
case("ConvTranspose 3D", "ConvTranspose", (N, 2, 3, 3, 3), normal(2, 3, 2, 2, 2), normal(3))
STATISTICS = (normal(3), normal(3), normal(3), np.abs(normal(3)) + 0.5)
case("BatchNormalization", "BatchNormalization", IMAGE, *STATISTICS)
case("BatchNormalization of vectors", "BatchNormalization", (N, 3), *STATISTICS, epsilon=1e-3)

for kind in ("MaxPool", "AveragePool"):
    case(kind, kind, IMAGE, kernel_shape=[2, 2])
    case(f"{kind} strided", kind, IMAGE, kernel_shape=[3, 2], strides=[2, 2])
    case(f"{kind} padded", kind, IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    case(f"{kind} with uneven pads", kind, IMAGE, kernel_shape=[3, 3], pads=[0, 1, 2, 1])
    case(f"{kind} to the ceiling", kind, IMAGE, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)
    case(f"{kind} to the ceiling, padded", kind, (N, 2, 8, 9), kernel_shape=[3, 3],
         strides=[3, 2], pads=[1, 1, 1, 1], ceil_mode=1)  # fmt: skip
    case(f"{kind} padded above", kind, IMAGE, kernel_shape=[3, 3], strides=[2, 2],
         auto_pad="SAME_UPPER")  # fmt: skip
    case(f"{kind} padded below", kind, IMAGE, kernel_shape=[3, 3], strides=[2, 2],
         auto_pad="SAME_LOWER")  # fmt: skip
    case(f"{kind} 1D", kind, (N, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 0])
    case(f"{kind} 3D", kind, (N, 2, 4, 4, 4), kernel_shape=[2, 2, 2], strides=[2, 2, 2])
case("MaxPool with gaps", "MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 3])
case("AveragePool with gaps", "AveragePool", IMAGE, kernel_shape=[2, 2], dilations=[2, 3],
     opset=19)  # fmt: skip
case("AveragePool over pads", "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1],
     count_include_pad=1)  # fmt: skip
case("AveragePool over pads to the ceiling", "AveragePool", (N, 2, 6, 6), kernel_shape=[3, 3],
     strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1, ceil_mode=1)  # fmt: skip
case("GlobalAveragePool", "GlobalAveragePool", IMAGE)
case("GlobalAveragePool 1D", "GlobalAveragePool", (N, 3, 5))
case("GlobalMaxPool", "GlobalMaxPool", IMAGE)
case("GlobalMaxPool 3D", "GlobalMaxPool", (N, 2, 3, 3, 3))
case("LpPool", "LpPool", IMAGE, kernel_shape=[2, 2], p=2)
case("LpPool of 1", "LpPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], p=1)

PADS = ints(0, 0, 1, 2, 0, 0, 2, 1)
case("Pad", "Pad", IMAGE, PADS)
case("Pad by a number", "Pad", IMAGE, PADS, np.float32(1.5))
for mode in ("reflect", "edge"):
    case(f"Pad by {mode}", "Pad", IMAGE, PADS, mode=mode)
case("Pad by wrap", "Pad", IMAGE, PADS, opset=19, mode="wrap")
case("Pad that cuts", "Pad", IMAGE, ints(0, 0, -1, 0, 0, 0, 2, -2))
case("Pad of axes", "Pad", IMAGE, ints(1, 2), np.float32(0), ints(-1), opset=18)
case("Pad by attributes", "Pad", (N, 4), opset=7, pads=[0, 1, 0, 2], value=0.5)
case("Pad of channels", "Pad", IMAGE, ints(0, 1, 0, 0, 0, 2, 0, 0))
EMPTY = np.zeros(0, np.float32)
SCALES = np.array([1, 1, 2, 3], np.float32)
case("Resize to the nearest", "Resize", IMAGE, EMPTY, SCALES, mode="nearest")
case("Resize by repetition", "Resize", IMAGE, EMPTY, SCALES, mode="nearest",
     coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
case("Resize smaller", "Resize", IMAGE, EMPTY, np.array([1, 1, 0.6, 0.5], np.float32))
case("Resize linearly", "Resize", IMAGE, EMPTY, SCALES, mode="linear")
case("Resize to sizes", "Resize", (1, 3, 7, 6), EMPTY, EMPTY, ints(1, 3, 9, 4), mode="linear",
     coordinate_transformation_mode="align_corners")  # fmt: skip
case("Resize as PyTorch", "Resize", IMAGE, EMPTY, SCALES, mode="linear",
     coordinate_transformation_mode="pytorch_half_pixel")  # fmt: skip
case("Resize by cubics", "Resize", IMAGE, EMPTY, SCALES, mode="cubic", cubic_coeff_a=-0.5)
case("Resize by cubics, edges left out", "Resize", IMAGE, EMPTY, SCALES, mode="cubic",
     exclude_outside=1)  # fmt: skip
case("Resize of operator set 10", "Resize", IMAGE, SCALES, opset=10, mode="linear")
case("Resize of operator set 10 to the nearest", "Resize", IMAGE,
     np.array([1, 1, 1.5, 2], np.float32), opset=10)  # fmt: skip
case("Resize of a series", "Resize", (N, 3, 5), EMPTY, np.array([1, 1, 2], np.float32),
     mode="linear")  # fmt: skip
case("Upsample", "Upsample", IMAGE, SCALES, opset=9)
case("Upsample linearly", "Upsample", IMAGE, SCALES, opset=9, mode="linear")
case("Upsample by attributes", "Upsample", IMAGE, opset=7, scales=[1.0, 1.0, 2.0, 2.0])

case("Reshape", "Reshape", IMAGE, ints(0, 3, -1))
case("Reshape with an open batch", "Reshape", IMAGE, ints(-1, 42, 3))
case("Reshape of one sample", "Reshape", (1, 4, 3), ints(1, 12))
case("Flatten", "Flatten", IMAGE)
case("Flatten at 2", "Flatten", (1, 4, 3), axis=2)
case("Transpose", "Transpose", IMAGE, perm=[0, 2, 3, 1])
case("Transpose of the batch", "Transpose", (N, 4, 3), perm=[1, 0, 2])
case("Squeeze", "Squeeze", (N, 1, 4, 1), ints(1, -1))
case("Squeeze by attributes", "Squeeze", (N, 1, 4), opset=11, axes=[1])
case("Unsqueeze", "Unsqueeze", (N, 4), ints(1, -1))
case("Unsqueeze by attributes", "Unsqueeze", (N, 4), opset=11, axes=[1])
case("Slice", "Slice", IMAGE, ints(1, 0), ints(-1, 100), ints(2, 3), ints(1, 2))
case("Slice backwards", "Slice", IMAGE, ints(-1), ints(-100), ints(2), ints(-2))
case("Slice by attributes", "Slice", IMAGE, opset=9, starts=[1], ends=[3], axes=[1])
case("Gather", "Gather", IMAGE, ints(2, 0, 0, -1), axis=1)
case("Gather one", "Gather", IMAGE, np.int64(1), axis=2)
case("Gather a table", "Gather", (N, 5), np.array([[0, 1], [4, 4]], np.int64), axis=1)
case("Split", "Split", (N, 6), axis=1)
case("Split by sizes", "Split", (N, 6), ints(1, 2, 3), axis=1)
case("Split by attributes", "Split", (N, 6), opset=11, axis=1, split=[2, 4])
case("Concat with constants", "Concat", (1, 2, 3), normal(1, 1, 3), normal(1, 2, 3), axis=1)
case("Concat of one", "Concat", (N, 3), axis=1)
case("Expand", "Expand", (N, 1, 3), ints(1, 4, 3))
case("Expand by an axis", "Expand", (1, 3), ints(2, 1, 3))
case("Tile", "Tile", IMAGE, ints(1, 2, 1, 3))
case("Tile of vectors", "Tile", (N, 4), ints(1, 2))
case("DepthToSpace", "DepthToSpace", (N, 8, 2, 3), blocksize=2)
case("DepthToSpace by columns", "DepthToSpace", (N, 8, 2, 3), blocksize=2, mode="CRD")
case("SpaceToDepth", "SpaceToDepth", (N, 2, 4, 6), blocksize=2)
case("SpaceToDepth by 3", "SpaceToDepth", (N, 1, 6, 3), blocksize=3)
case("Identity", "Identity", (N, 4))
case("Identity of images", "Identity", IMAGE)
case("Dropout", "Dropout", (N, 4))
case("Dropout of operator set 7", "Dropout", (N, 4), opset=7, ratio=0.3)
case("Cast", "Cast", (N, 4), to=1)
case("Cast of images", "Cast", IMAGE, to=1)

for kind in ("ReduceMean", "ReduceMax", "ReduceMin"):
    case(kind, kind, IMAGE, axes=[2, 3])
    case(f"{kind} that drops axes", kind, IMAGE, axes=[1, -1], keepdims=0)
case("ReduceSum", "ReduceSum", IMAGE, ints(2, 3))
case("ReduceSum that drops axes", "ReduceSum", IMAGE, ints(-1), keepdims=0)
case("ReduceMean by an input", "ReduceMean", IMAGE, ints(1), opset=18)
case("Softmax", "Softmax", (N, 5))
case("Softmax of channels", "Softmax", IMAGE, axis=1)
case("Softmax of operator set 11", "Softmax", (N, 3, 4), opset=11)
case("Softmax of operator set 11, last", "Softmax", (N, 3, 4), opset=11, axis=2)
case("LogSoftmax", "LogSoftmax", (N, 5))
case("LogSoftmax of channels", "LogSoftmax", IMAGE, axis=1)
case("LogSoftmax of operator set 11", "LogSoftmax", (N, 3, 4), opset=11)
case("LayerNormalization", "LayerNormalization", (N, 4, 5), normal(5), normal(5))
case("LayerNormalization of two axes", "LayerNormalization", (N, 4, 5), normal(4, 5), axis=1)
case("RMSNormalization", "RMSNormalization", (N, 5), normal(5), opset=23)
case("RMSNormalization of rows", "RMSNormalization", (N, 3, 5), normal(5), opset=23, epsilon=0.1)
case("InstanceNormalization", "InstanceNormalization", IMAGE, normal(3), normal(3))
case("InstanceNormalization 1D", "InstanceNormalization", (N, 3, 7), normal(3), normal(3))
case("GroupNormalization", "GroupNormalization", (N, 4, 5, 5), normal(4), normal(4), opset=21,
     num_groups=2)  # fmt: skip
case("GroupNormalization of a series", "GroupNormalization", (N, 4, 5), normal(4), normal(4),
     opset=21, num_groups=4, epsilon=1e-2)  # fmt: skip
case("LRN", "LRN", (N, 7, 3, 3), size=3)
case("LRN of other numbers", "LRN", (N, 7, 3, 3), size=5, alpha=0.5, beta=0.5, bias=2.0)
case("Einsum", "Einsum", (N, 4, 5), normal(5, 3), equation="bij,jk->bik")
case("Einsum along another axis", "Einsum", (N, 4, 5), normal(4, 3), equation="bij,ik->bkj")
case("Einsum of several axes", "Einsum", (N, 4, 5), normal(4, 5, 3), equation="bij,ijk->bk")
case("Einsum with an ellipsis", "Einsum", (N, 4, 5), normal(3, 5), equation="...j,kj->...k")
case("Einsum of one", "Einsum", (N, 4, 5), equation="bij->bji")


def proto_of(name):
    kind, shape, constants, attributes, opset = CASES[name]
    names = [f"c{i}" for i in range(len(constants))]
    count = {"Split": 3 if "Split by sizes" == name else 2}.get(kind, 1)
    outputs = [f"y{i}" if i else "y" for i in range(count)]
    node = helper.make_node(kind, ["x", *names], outputs, name="the node", **attributes)
    held = dict(zip(names, constants, strict=True))
    return model([node], {"x": shape}, ["y"], held, opset=opset)


def points(program, count=5):
    (port,) = program.inputs
    x = 2 * np.random.default_rng(3).normal(size=(count, *port.sample_shape))
    return x.astype(port.dtype)


def agrees(path, **options):
    """Loads a file and compares Keras and the program with onnxruntime on new inputs."""
    program = load_onnx(path, **options)
    x = points(program)
    place = program.inputs[0].batch or 0
    fixed = program.inputs[0].shape[:1] == (1,) or CASES_BATCH_ONE(path)
    feed = np.moveaxis(x, 0, place)
    if fixed:
        want = np.stack([run(path, r[None], output=program.outputs[0].name) for r in x])
        if program.outputs[0].batch is not None:
            want = np.moveaxis(want, 1 + program.outputs[0].batch, 1)[:, 0]
    else:
        want = run(path, feed, output=program.outputs[0].name)
        want = np.moveaxis(want, program.outputs[0].batch, 0)
    own = keras.ops.convert_to_numpy(program.to_keras()(x))
    size = 1 + np.abs(want).max()
    assert own.shape == want.shape
    assert np.abs(own - want).max() <= 2e-5 * size
    return program


def CASES_BATCH_ONE(path):
    import onnx

    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return bool(dims) and dims[0].dim_value == 1


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_read_as_onnxruntime_runs_it(name, tmp_path):
    options = {"batch_axis": 1} if name == "Gemm of columns" else {}
    agrees(saved(tmp_path, proto_of(name)), **options)


@pytest.mark.parametrize("index", [
    [[0, 1], [2, 0], [-1, -1]], [[[0, 1]], [[2, 0]]], [1, 2], [[2], [0]],
])  # fmt: skip
def test_positions_along_several_axes_are_picked(index, tmp_path):
    """As PyTorch's exporter writes x[:, :, rows, columns]."""
    index = np.array(index, np.int64)
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[2, 3, 0, 1]),
        helper.make_node("GatherND", ["a", "i"], ["y"]),
    ]
    path = saved(tmp_path, model(nodes, {"x": (N, 2, 3, 4)}, ["y"], {"i": index}))
    x = normal(3, 2, 3, 4)
    program = load_onnx(path)
    found = keras.ops.convert_to_numpy(program.to_keras()(x))
    assert np.array_equal(np.moveaxis(found, 0, program.outputs[0].batch), run(path, x))
