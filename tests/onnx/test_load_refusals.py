"""Bad files, and files that ask for what has no place in a program, are told from good ones."""

import importlib
import tracemalloc

import keras
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import model, saved

from tf_lyapunov.errors import ModelFileError, UnfaithfulReading, UnsupportedLayerError
from tf_lyapunov.onnx import operators
from tf_lyapunov.onnx.load import load_onnx
from tf_lyapunov.vnnlib.subjects import onnx_replay

W = np.arange(10, dtype=np.float32).reshape(5, 2)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, name=f"{kind} {outputs[0]}", **attributes)


def small(**options):
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    return model(nodes, {"x": ("n", 5)}, ["y"], {"w": W}, **options)


def refused(path, match, error=ModelFileError, **options):
    with pytest.raises(error, match=match):
        load_onnx(path, **options)


# Files ------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.onnx", "no such file")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no protobuf", b"\xff" * 100])
def test_what_is_no_onnx_file_is_refused(content, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    refused(path, "truncated or no ONNX file")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    data = small().SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises((ModelFileError, ValueError)):
        load_onnx(path)


@pytest.mark.parametrize("dims", [[5, 3], [2**40, 2**20], [-5, -2], [5]])
def test_a_constant_that_declares_other_sizes_than_it_holds_is_refused(dims, tmp_path):
    proto = small()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    refused(saved(tmp_path, proto), "declares|negative")


def outside(proto, location, offset=0, length=40):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto


def write(folder, proto):
    path = folder / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_data_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(W.tobytes())
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret"), "link", ""):
        refused(write(inner, outside(small(), location)), "outside its folder")


def test_data_beside_the_file_must_be_there(tmp_path):
    refused(write(tmp_path, outside(small(), "w.bin")), "missing")
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    assert load_onnx(write(tmp_path, outside(small(), "w.bin"))).opset == 17
    for offset, length in ((8, 40), (0, 36), (-4, 40), ("x", 40)):
        refused(write(tmp_path, outside(small(), "w.bin", offset, length)), "data|number")


def test_an_old_operator_set_is_refused(tmp_path):
    refused(saved(tmp_path, small(opset=6)), "version_converter")


def test_functions_and_sparse_constants_are_refused(tmp_path):
    proto = small()
    made = helper.make_function(
        "own", "F", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    proto.functions.append(made)
    refused(saved(tmp_path, proto), "inline_local_functions")


# Graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([("Relu", ["a"], ["y"]), ("Relu", ["x"], ["a"])], "out of order"),
        ([("Relu", ["a"], ["y"]), ("Relu", ["y"], ["a"])], "cycle"),
        ([("Relu", ["x"], ["a"]), ("Tanh", ["x"], ["a"]), ("Relu", ["a"], ["y"])], "twice"),
        ([("Relu", ["x"], ["x"])], "twice"),
        ([("Add", ["x", "missing"], ["y"])], "no input, no constant"),
        ([("Relu", ["x"], ["z"])], "given by nothing"),
        ([("Relu", ["x"], ["y"], {"unknown": 3})], "checker"),
        ([("Relu", ["x", "x"], ["y"])], "checker"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(nodes, match, tmp_path):
    made = [node(k, i, o, **(rest[0] if rest else {})) for k, i, o, *rest in nodes]
    proto = model(made, {"x": ("n", 5)}, ["y"])
    refused(write(tmp_path, proto), match)


def test_a_constant_that_is_there_twice_is_refused(tmp_path):
    proto = small()
    proto.graph.initializer.append(proto.graph.initializer[0])
    refused(write(tmp_path, proto), "twice")


@pytest.mark.parametrize("place", ["output", "within"])
def test_wrong_declared_shapes_are_refused(place, tmp_path):
    """ONNX's checker and onnxruntime accept them."""
    declared = [helper.make_tensor_value_info("h", 1, ("n", 3))] if place == "within" else []
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    outputs = {"y": ("n", 3)} if place == "output" else ["y"]
    proto = model(nodes, {"x": ("n", 5)}, outputs, {"w": W}, declared=declared)
    refused(write(tmp_path, proto), "declares a shape", ValueError)


@pytest.mark.parametrize(
    "made",
    [
        model([node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 4)}, ["y"], {"w": W}),
        model([node("Add", ["x", "w"], ["y"])], {"x": ("n", 4)}, ["y"], {"w": W}),
        model([node("Conv", ["x", "w"], ["y"])], {"x": ("n", 3, 5, 5)}, ["y"],
              {"w": np.zeros((2, 4, 3, 3), np.float32)}),
        model([node("Conv", ["x", "w"], ["y"])], {"x": ("n", 4, 2, 2)}, ["y"],
              {"w": np.zeros((2, 4, 3, 3), np.float32)}),
        model([node("Concat", ["x", "x"], ["y"], axis=7)], {"x": ("n", 4)}, ["y"]),
        model([node("Reshape", ["x", "s"], ["y"])], {"x": ("n", 4)}, ["y"],
              {"s": np.array([0, 5], np.int64)}),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="Received"):
        load_onnx(write(tmp_path, made))


@pytest.mark.parametrize(
    "made",
    [
        [("ConstantOfShape", ["big"], ["c"]), ("Add", ["x", "c"], ["y"])],
        [("Expand", ["x", "big"], ["y"])],
        [("Tile", ["x", "big"], ["y"])],
        [("Expand", ["one", "big"], ["c"]), ("Add", ["x", "c"], ["y"])],
        [("Range", ["zero", "much", "step"], ["c"]), ("Gather", ["x", "c"], ["y"], {"axis": 1})],
        [("Pad", ["x", "pads"], ["y"])],
    ],
)
def test_values_beyond_memory_are_refused_before_they_are_made(made, tmp_path):
    constants = {
        "big": np.array([1, 2**42], np.int64), "one": np.ones((1, 1), np.float32),
        "zero": np.int64(0), "much": np.int64(2**50), "step": np.int64(1),
        "pads": np.array([0, 2**40, 0, 0], np.int64),
    }  # fmt: skip
    nodes = [node(k, i, o, **(rest[0] if rest else {})) for k, i, o, *rest in made]
    proto = model(nodes, {"x": ("n", 1)}, ["y"], constants)
    with pytest.raises(ValueError, match=r"memory|makes|pads by|larger|entries"):
        load_onnx(write(tmp_path, proto))


# Operators --------------------------------------------------------------------------------------


def image(kind, **attributes):
    return model([node(kind, ["x"], ["y"], **attributes)], {"x": ("n", 1, 4)}, ["y"])


HUGE = {
    "input": lambda: model(
        [node("Slice", ["x", "a", "b"], ["y"])], {"x": (1, 10**13)}, ["y"],
        {"a": np.array([0, 0]), "b": np.array([1, 3])},
    ),
    "edges": lambda: model(
        [node("Pad", ["x", "p"], ["y"], mode="edge")], {"x": ("n", 1)}, ["y"],
        {"p": np.array([0, 2**40, 0, 0])},
    ),
    "maxima": lambda: image("MaxPool", kernel_shape=[2**40], pads=[2**40 - 1, 0]),
    "means": lambda: image("AveragePool", kernel_shape=[2**40], pads=[2**40 - 1] * 2),
    "strides": lambda: model(
        [node("ConvTranspose", ["x", "k"], ["y"], strides=[2**40])], {"x": ("n", 1, 4)}, ["y"],
        {"k": np.ones((1, 1, 2), np.float32)},
    ),
    "shrunk": lambda: model(
        [node("Resize", ["x", "", "s"], ["y"], mode="linear")], {"x": ("n", 1, 10**7)}, ["y"],
        {"s": np.array([1, 1, 0.1], np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_what_a_few_bytes_make_beyond_memory_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setattr("tf_lyapunov.modelfile.sizes.available_memory", lambda: 2**34)
    tracemalloc.start()
    refused(saved(tmp_path, HUGE[name]()), "memory|cells", ValueError)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_constants_share_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("tf_lyapunov.modelfile.sizes.available_memory", lambda: 2**22)
    nodes = [node("ConstantOfShape", ["s"], [f"c{k}"]) for k in range(4)]
    nodes += [node("Add", [a, f"c{k}"], [b]) for k, (a, b) in enumerate(["xp", "pq", "qr", "ry"])]
    made = model(nodes, {"x": ("n", 2**17)}, ["y"], {"s": np.array([2**17])})
    refused(saved(tmp_path, made), "more memory than there is", ValueError)


def test_nodes_that_nothing_reads_are_not_run(tmp_path):
    """The runtime would refuse it, and other sizes of it would take all memory."""
    nodes = [node("Reshape", ["x", "s"], ["z"]), node("Relu", ["x"], ["y"])]
    path = saved(tmp_path, model(nodes, {"x": (1, 5)}, ["y"], {"s": np.array([2, 3])}))
    assert load_onnx(path).validation.values == 1
    assert np.array_equal(onnx_replay(path)(np.ones(5, np.float32)), np.ones(5))


def test_every_node_that_is_not_read_is_named_with_its_operator_set(tmp_path):
    nodes = [
        node("Exp", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("ArgMax", ["x"], ["c"]),
        helper.make_node("Own", ["x"], ["d"], name="mine", domain="com.mine"),
        node("Sub", ["b", "d"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"x": ("n", 5)}, ["y"])
    proto.opset_import.append(helper.make_opsetid("com.mine", 1))
    with pytest.raises(UnsupportedLayerError) as caught:
        load_onnx(write(tmp_path, proto))
    text = str(caught.value)
    assert "2 nodes are not read" in text and "operator set 13" in text
    assert "'Exp a'" in text and "'mine', operator Own of domain 'com.mine'" in text
    assert "ArgMax" not in text.split("Operators that are read")[0]  # nothing needs it


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (("Mul", ["x", "x"], ["y"]), "product of two"),
        (("MatMul", ["x", "x"], ["y"]), "product of two"),
        (("Div", ["x", "x"], ["y"]), "division"),
        (("ThresholdedRelu", ["x"], ["y"]), "jumps"),
        (("ReduceMean", ["x"], ["y"]), "batch axis"),
        (("Flatten", ["x"], ["y"], {"axis": 0}), "batch axis"),
        (("Cast", ["x"], ["y"], {"to": 7}), "discontinuous"),
        (("Cast", ["x"], ["y"], {"to": 10}), "discontinuous"),
        (("Sqrt", ["x"], ["y"]), "slope"),
        (("LpNormalization", ["x"], ["y"]), "not read"),
        (("MaxPool", ["x"], ["y", "z"], {"kernel_shape": [1]}), "discontinuous"),
    ],
)
def test_what_has_no_gain_is_refused(made, match, tmp_path):
    kind, inputs, outputs, *rest = made
    shape = ("n", 5, 5) if kind in ("MaxPool", "MatMul") else ("n", 5)
    proto = model([node(kind, inputs, outputs, **(rest[0] if rest else {}))], {"x": shape}, ["y"])
    refused(write(tmp_path, proto), match, UnsupportedLayerError)


def test_a_branch_is_refused(tmp_path):
    inner = helper.make_graph(
        [node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    made = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner, name="if")
    proto = model([made], {"x": ("n", 5)}, ["y"], {"c": np.array(True)})
    with pytest.raises(ValueError, match=r"If|checker"):
        load_onnx(write(tmp_path, proto))


def counted(*nodes, **constants):
    """x and w times a number that is computed of the number of samples, b."""
    first = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["b"])]
    held = {"zero": np.array([0]), "one": np.array([1]), "w": W, "v": 2 * W, **constants}
    return model([*first, *nodes], {"x": ("n", 5)}, ["y"], held)


PICKED = (node("Where", ["c", "w", "v"], ["u"]), node("MatMul", ["x", "u"], ["y"]))


@pytest.mark.parametrize("limit", [2, 7])
@pytest.mark.parametrize("kind", ["Equal", "Less", "GreaterOrEqual"])
def test_weights_that_the_number_of_samples_picks_are_refused(kind, limit, tmp_path):
    made = counted(node(kind, ["b", "k"], ["c"]), *PICKED, k=np.array([limit]))
    refused(saved(tmp_path, made), "decided by the number of samples", UnsupportedLayerError)


@pytest.mark.parametrize("kind", ["Min", "Max", "Div", "Mod"])
def test_other_functions_of_the_number_of_samples_are_refused(kind, tmp_path):
    nodes = [node(kind, ["b", "k"], ["m"]), node("Cast", ["m"], ["f"], to=1)]
    made = counted(*nodes, node("Add", ["x", "f"], ["y"]), k=np.array([3]))
    refused(saved(tmp_path, made), "decided by the number of samples", UnsupportedLayerError)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_size_of_copies_per_sample_is_not_taken_for_one(hidden, tmp_path):
    nodes = [node("ConstantOfShape", ["b"], ["o"]), node("Neg", ["o"], ["p"])]
    nodes += [node("Size", ["p" if hidden else "o"], ["q"]), node("Equal", ["q", "k"], ["c"])]
    made = counted(*nodes, *PICKED, k=np.array(7))
    refused(saved(tmp_path, made), "as many copies as there are samples", UnsupportedLayerError)


def test_a_slice_as_long_as_the_batch_is_refused(tmp_path):
    nodes = [node("Slice", ["x", "zero", "b", "one"], ["t"])]
    made = counted(*nodes, node("ReduceSum", ["t", "one"], ["y"]))
    refused(saved(tmp_path, made), "other numbers of samples", UnfaithfulReading)


def test_sizes_that_hold_for_every_number_of_samples_are_read(tmp_path):
    """12b / 2b entries of each of b samples, which are no fewer than 1, nor -1."""
    nodes = [
        node("Mul", ["b", "two"], ["d"]), node("Mul", ["d", "six"], ["e"]),
        node("Div", ["e", "d"], ["width"]), node("Equal", ["b", "minus"], ["c"]),
        node("Where", ["c", "minus", "b"], ["rows"]), node("Max", ["rows", "one"], ["more"]),
        node("Concat", ["more", "width"], ["size"], axis=0),
        node("Slice", ["x", "zero", "one", "one"], ["x1"]),
        node("Concat", ["x", "x1"], ["z"], axis=1),
        node("Reshape", ["z", "size"], ["y"]),
    ]  # fmt: skip
    made = counted(*nodes, two=np.array([2]), six=np.array([6]), minus=np.array([-1]))
    read = load_onnx(saved(tmp_path, made))
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    found = keras.ops.convert_to_numpy(read.keras_model(x))
    assert np.array_equal(found, np.concatenate([x, x[:, :1]], axis=1))


def test_an_operator_whose_meaning_is_newer_than_what_is_known_is_refused(monkeypatch, tmp_path):
    newest, read = operators.READERS["Relu"]
    monkeypatch.setitem(operators.READERS, "Relu", (newest - 1, read))
    refused(write(tmp_path, small()), "since operator set 14 is not known", UnsupportedLayerError)


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, settings", [("MatMul", {}), ("Einsum", {"equation": "ni,ij->nj"})])
def test_products_of_integers_which_wrap_around_are_refused(kind, settings, tmp_path):
    """Four times 2^31 - 5 is -20 in int32, and no probe is as large."""
    nodes = [node(kind, ["x", "w"], ["h"], **settings), node("Cast", ["h"], ["y"], to=1)]
    made = model(nodes, {"x": ("n", 4)}, ["y"], {"w": np.ones((4, 2), np.int32)})
    made.graph.input[0].type.tensor_type.elem_type = 6
    refused(saved(tmp_path, made), "wrap around", UnsupportedLayerError)


def test_inputs_of_half_precision_are_refused(tmp_path):
    proto = small()
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(ValueError, match=r"float32 or float64|checker"):
        load_onnx(write(tmp_path, proto))


def test_the_axis_that_counts_samples_must_be_clear(tmp_path):
    proto = model([node("Relu", ["x"], ["y"])], {"x": (4, 5)}, ["y"])
    path = write(tmp_path, proto)
    refused(path, "batch_axis=0", ValueError)
    assert load_onnx(path, batch_axis=0).inputs[0].shape == (None, 5)
    whole = load_onnx(path, batch_axis=None)
    assert whole.inputs[0].shape == (4, 5) and whole.outputs[0].batch is None
    assert whole.keras_model.output_shape == (None, 4, 5)
    refused(path, "batch_axis", ValueError, batch_axis=2)


def test_open_sizes_must_be_given(tmp_path):
    proto = model([node("GlobalMaxPool", ["x"], ["y"])], {"x": ("n", 3, "h", "w")}, ["y"])
    path = write(tmp_path, proto)
    refused(path, "input_shapes", ValueError)
    program = load_onnx(path, input_shapes={"x": (None, 3, 4, 5)})
    assert program.inputs[0].shape == (None, 3, 4, 5)
    for shapes in ({"x": (None, 4, 4, 5)}, {"z": (None, 1)}, {"x": (None, 3)}):
        refused(path, "input_shapes", ValueError, input_shapes=shapes)


def test_one_output_of_several_is_chosen(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    path = write(tmp_path, model(nodes, {"x": ("n", 5)}, ["h", "y"], {"w": W}))
    refused(path, "output='y'", ValueError)
    refused(path, "one of the graph's", ValueError, output="x")
    assert load_onnx(path, output="h").outputs[0].name == "h"


def test_a_constant_network_is_refused(tmp_path):
    proto = model([node("Relu", ["w"], ["y"])], {"x": ("n", 5)}, ["y"], {"w": W})
    refused(write(tmp_path, proto), "depend on its input", ValueError)


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    path = write(tmp_path, small())
    real = importlib.import_module

    def missing(name, *args):
        if name in ("onnx", "onnxruntime"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"tf_lyapunov\[onnx\]"):
        load_onnx(path)


# Validation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Relu", "MatMul"])
def test_a_wrong_reading_is_found_and_the_node_is_named(kind, monkeypatch, tmp_path):
    """The second node's, whatever comes behind it."""
    newest, read = operators.READERS[kind]

    def wrong(build, made, values):
        found = read(build, made, values)
        return build.scaled(made, found, 1.0001, 0.0, "_wrong")

    monkeypatch.setitem(operators.READERS, kind, (newest, wrong))
    nodes = [
        node("Tanh", ["x"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Relu", ["b"], ["c"]),
        node("Sigmoid", ["c"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path, model(nodes, {"x": ("n", 5)}, ["y"], {"w": W}))
    with pytest.raises(UnfaithfulReading, match=f"operator {kind}") as caught:
        load_onnx(path)
    assert caught.value.step.startswith(kind)


def test_a_program_takes_the_place_of_a_model(tmp_path):
    import tf_lyapunov as tfl

    program = load_onnx(write(tmp_path, small()))
    x = np.ones((2, 5), np.float32)
    model_ = program.to_keras()
    bounds = [tfl.lipschitz_upper_bound(held).gain_upper_bound for held in (program, model_)]
    assert bounds[0] == bounds[1] > 0
    assert np.array_equal(tfl.certify(program, x).radius, tfl.certify(model=model_, x=x).radius)
    attack = tfl.attacks.FGM(radius=tfl.L2(0.1))
    assert np.allclose(attack(program, x).x_adv, attack(model_, x).x_adv)
    assert float(tfl.gain_on(program, x, 0.1)[0]) == float(tfl.gain_on(model_, x, 0.1)[0])
    assert tfl.minimal_perturbation_lower_bound(program, x).bound.shape == (2,)


def test_models_made_of_a_program_are_apart(tmp_path):
    program = load_onnx(write(tmp_path, small()))
    first, second = program.to_keras(), program.to_keras()
    first.layers[-2].set_weights([np.zeros_like(W)])
    x = np.ones((1, 5), np.float32)
    assert not np.any(keras.ops.convert_to_numpy(first(x)))
    assert np.any(keras.ops.convert_to_numpy(second(x)))
    assert np.any(program.program.logits(x))
    assert repr(program) == "OnnxProgram(x[None, 5] -> y[None, 2], 2 nodes, opset 17)"


def test_float64_graphs_become_float64_models(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("JAX and PyTorch compute in float64 where they are told to only")
    proto = model(
        [node("MatMul", ["x", "w"], ["h"]), node("Tanh", ["h"], ["y"])],
        {"x": (("n", 5), "float64")}, ["y"], {"w": W.astype(np.float64) / 30},
    )  # fmt: skip
    program = load_onnx(write(tmp_path, proto))
    x = np.random.default_rng(0).normal(size=(3, 5))
    own = keras.ops.convert_to_numpy(program.to_keras()(x))
    assert own.dtype == np.float64
    assert np.abs(own - np.tanh(x @ (W.astype(np.float64) / 30))).max() < 1e-14


def test_integers_that_the_graph_casts_are_read(tmp_path):
    nodes = [
        node("Cast", ["x"], ["a"], to=1), node("Div", ["a", "c"], ["b"]),
        node("MatMul", ["b", "w"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"x": (("n", 5), "uint8")}, ["y"], {"w": W, "c": np.float32(255)})
    proto.graph.output[0].type.tensor_type.elem_type = 1
    program = load_onnx(write(tmp_path, proto))
    x = np.arange(10, dtype=np.uint8).reshape(2, 5) * 20
    own = keras.ops.convert_to_numpy(program.to_keras()(x))
    assert np.allclose(own, (x / 255.0) @ W, rtol=1e-5)
