"""`export_onnx`: files that onnxruntime runs as the model computes, or none."""

import itertools
import os
import sys

import exported
import keras
import numpy as np
import pytest
from exported import IMAGE, SERIES, VECTOR, chain
from keras import ops

import tf_lyapunov as tfl
from tf_lyapunov.errors import OutputFileError, UnfaithfulExport, UnsupportedLayerError
from tf_lyapunov.onnx.graph import Graph
from tf_lyapunov.program.families import elementwise, linear, merging, moving, pooling, sorting
from tf_lyapunov.program.families import softmax as softmaxes
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.operation import Operation
from tf_lyapunov.program.vocabulary import FAMILIES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
L = keras.layers


def digits():
    layers = [
        L.Conv2D(4, 3, padding="same", activation="relu"),
        L.BatchNormalization(),
        L.LeakyReLU(),
        L.MaxPooling2D(),
        L.Conv2D(5, 2, strides=2, padding="same"),
        L.AveragePooling2D(2, 1, "same"),
        L.Flatten(),
        L.Dense(3, activation="softmax"),
    ]
    return chain((8, 8, 3), *layers)


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def inputs_of(model, count=3, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.normal(size=(count, *t.shape[1:]))).astype("float32")
            for t in model.inputs]  # fmt: skip


def called(model, arrays):
    given = arrays if len(arrays) > 1 else arrays[0]
    return ops.convert_to_numpy(model(given, training=False)).astype(np.float64)


# What is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", exported.FLAT)
def test_a_file_computes_what_the_model_does(name, tmp_path):
    model, path = exported.made(name), tmp_path / "net.onnx"
    found = tfl.export_onnx(model, path, rng=np.random.default_rng(0))
    arrays = inputs_of(model)
    expected = called(model, arrays)
    held = exported.outputs(path, *arrays)
    assert held.shape == expected.shape
    assert np.all(np.abs(held - expected) <= 2e-5 * (1 + np.abs(expected).max()))
    assert found.agreement.difference <= 1e-3 and "onnxruntime" in found.agreement.evaluator
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    constants = {tensor.name for tensor in graph.initializer}
    assert all(set(node.input) - constants - {""} for node in graph.node)  # constants are folded
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_the_cases_hold_every_family_twice_and_every_operation():
    names = {module.__name__.rsplit(".", 1)[1] for module in FAMILIES}
    assert set(exported.CASES) == names | {"several inputs"}
    assert all(len(exported.CASES[name]) >= 2 for name in names)
    everything = {c for kind in Operation.__subclasses__() for c in (kind, *kind.__subclasses__())
                  if c.__module__.startswith("tf_lyapunov.program.families")}  # fmt: skip
    without = {c for c in everything if c.write is Operation.write}
    assert {c.__name__ for c in without} == {"Declared"}
    # Products of two signals are read on a region alone, and not exported.
    without |= {c for c in everything if c.__module__.endswith(".products")}
    # The first of every family, then the second ones, until all were seen.
    rounds = itertools.zip_longest(*([f"{f}: {n}" for n in c] for f, c in exported.CASES.items()))
    seen = set()
    for name in filter(None, itertools.chain(*rounds)):
        steps = read_network(exported.made(name), bounded=False).program.steps
        seen |= {type(o) for step in steps for o in step.operations}
        if seen == everything - without:
            return
    raise AssertionError(everything - without - seen)


@pytest.mark.parametrize("count", [2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", exported.CASES)
def test_float64_agrees_to_the_last_digits(family, count, tmp_path):
    for name in list(exported.CASES[family])[:count]:
        model, path = exported.made(f"{family}: {name}"), tmp_path / "net.onnx"
        found = tfl.export_onnx(model, path, dtype="float64", rng=np.random.default_rng(0))
        assert found.agreement.difference <= 1e-11
        file = onnx.load(path)
        assert onnx.TensorProto.FLOAT not in {t.data_type for t in file.graph.initializer}
        assert all(not f.HasField("f") or f.f == np.float64(f.f) for n in file.graph.node
                   for f in n.attribute)  # fmt: skip
        if found.unsupported:
            assert "reference evaluator" in found.agreement.evaluator
            assert "cannot run this file" in found.explain()
            assert set(found.unsupported) <= set(kinds(path))
        else:
            arrays = [x.astype(np.float64) for x in inputs_of(model)]
            program = read_network(model, bounded=False).program
            held = exported.outputs(path, *arrays)
            logits = program.evaluate(arrays, (program.output,))[1][program.output]
            if program.decision is None:
                assert np.allclose(held, logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_every_opset_gives_the_same_function(opset, tmp_path):
    path = tmp_path / "net.onnx"
    for name in (
        "normalizing: layer", "normalizing: groups", "softmax: two axes", "reducing: sum",
        "reducing: smallest", "pooling: global", "moving: pad", "moving: crop",
        "moving: upsampling 2d", "sorting: groups", "norms: global norm", "elementwise: gelu",
    ):  # fmt: skip
        model = exported.made(name)
        found = tfl.export_onnx(model, path, opset=opset, rng=np.random.default_rng(0))
        assert found.opset == onnx.load(path).opset_import[0].version == opset
        arrays = inputs_of(model)
        assert np.allclose(exported.outputs(path, *arrays), called(model, arrays), atol=1e-5)


def test_transpositions_between_convolutions_cancel(tmp_path):
    tfl.export_onnx(digits(), tmp_path / "net.onnx")
    assert kinds(tmp_path / "net.onnx") == [
        "Transpose", "Conv", "Relu", "BatchNormalization", "LeakyRelu", "MaxPool", "Conv",
        "AveragePool", "Transpose", "Reshape", "Gemm", "Softmax",
    ]  # fmt: skip
    inputs = keras.Input(IMAGE)
    x = L.Conv2D(4, 1, activation="relu")(inputs)
    y = L.Concatenate()([L.Conv2D(4, 3, padding="same")(x), L.Add()([x, L.Conv2D(4, 1)(x)])])
    model = keras.Model(inputs, L.GlobalAveragePooling2D()(y))
    tfl.export_onnx(model, tmp_path / "branches.onnx")
    assert kinds(tmp_path / "branches.onnx").count("Transpose") == 1


def test_moves_are_the_plain_operators(tmp_path):
    for name, expected in (
        ("moving: pad", ["Pad", "Transpose", "Conv", "Transpose"]),
        ("moving: reshape", ["Reshape", "MatMul", "Add"]),
        ("moving: upsampling 2d", ["Transpose", "Conv", "Resize", "Transpose"]),
        ("moving: crop", ["Transpose", "Conv", "Slice", "Transpose"]),
        ("moving: repeat vector", ["Reshape", "Expand"]),
        ("indexing: flip", ["Slice"]),
        ("indexing: pad by edges", ["Transpose", "Conv", "Pad", "Transpose"]),
        ("indexing: pad by reflection", ["Pad"]),
        ("indexing: swap", ["Transpose"]),
        ("moving: down", ["Reshape", "Transpose", "Reshape", "Transpose", "Conv", "Transpose"]),
    ):
        tfl.export_onnx(exported.made(name), tmp_path / "net.onnx")
        assert kinds(tmp_path / "net.onnx") == expected, name


def test_names_come_from_the_layers_and_inputs_keep_keras_shape(tmp_path):
    model, path = exported.made("several inputs: image and vector"), tmp_path / "net.onnx"
    found = tfl.export_onnx(model, path)
    graph = onnx.load(path).graph
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
              for i in graph.input}  # fmt: skip
    assert shapes == {"image": ["batch", *IMAGE], "vector": ["batch", *VECTOR]}
    last = model.layers[-1].name
    assert [o.name for o in graph.output] == [last] == [found.output]
    assert [d.dim_param or d.dim_value
            for d in graph.output[0].type.tensor_type.shape.dim] == ["batch", 3]  # fmt: skip
    made = {name for node in graph.node for name in node.output}
    assert {layer.name for layer in model.layers if layer.weights} <= made


def test_a_batch_of_any_size_runs(tmp_path):
    tfl.export_onnx(digits(), tmp_path / "net.onnx")
    x = np.random.default_rng(0).normal(size=(7, 8, 8, 3)).astype("float32")
    whole = exported.outputs(tmp_path / "net.onnx", x)
    rows = [exported.outputs(tmp_path / "net.onnx", x[i : i + 1]) for i in range(7)]
    assert np.allclose(np.concatenate(rows), whole, atol=1e-6)


def test_equal_models_give_equal_bytes_and_name_their_digests(tmp_path):
    model = digits()
    for name in "ab":
        tfl.export_onnx(model, tmp_path / f"{name}.onnx")
    first = (tmp_path / "a.onnx").read_bytes()
    assert first == (tmp_path / "b.onnx").read_bytes()
    found = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    network = read_network(model)
    assert found == {
        "tf_lyapunov.version": tfl.__version__,
        "tf_lyapunov.model_digest": network.digest(),
        "tf_lyapunov.program_digest": network.program.digest(),
    }
    weight = model.weights[0]
    weight.assign(ops.convert_to_numpy(weight) * (1 + 1e-6))
    tfl.export_onnx(model, tmp_path / "c.onnx")
    changed = {p.key: p.value for p in onnx.load(tmp_path / "c.onnx").metadata_props}
    assert changed["tf_lyapunov.program_digest"] != found["tf_lyapunov.program_digest"]


def test_equal_programs_have_equal_digests_whatever_their_names():
    def program(*names):
        layers = [L.Dense(3, "relu", name=names[0]), L.Dense(2, name=names[1])]
        return read_network(chain(VECTOR, *layers)).program

    first, other = program("a", "b"), program("c", "d")
    assert first.digest() == other.digest()
    swapped = read_network(chain(VECTOR, L.Dense(3), L.Dense(2, "relu"))).program
    assert swapped.digest() != first.digest()
    inputs = keras.Input(VECTOR)
    pair = [L.Dense(2)(inputs), L.Dense(2)(inputs)]
    models = [keras.Model(inputs, L.Subtract()(parts)) for parts in (pair, pair[::-1])]
    assert len({read_network(model).program.digest() for model in models}) == 2


def test_integers_and_half_formats_become_the_formats_of_the_file(tmp_path):
    path = tmp_path / "net.onnx"
    inputs = keras.Input(SERIES, dtype="int32", name="counts")
    model = keras.Model(inputs, L.Dense(3)(L.Rescaling(0.5)(inputs)))
    tfl.export_onnx(model, path)
    x = np.arange(28, dtype=np.int32).reshape(1, *SERIES)
    assert np.allclose(exported.outputs(path, x), called(model, [x]), atol=1e-5)
    half = chain(VECTOR, L.Dense(4, "tanh", dtype="mixed_bfloat16"), L.Dense(2))
    tfl.export_onnx(half, path)
    x = inputs_of(half, 5)
    exact = read_network(half).program.logits(np.asarray(x[0], np.float64))
    assert np.allclose(exported.outputs(path, *x), exact, atol=1e-6)


def test_channels_first_needs_no_transposition(tmp_path):
    inputs = keras.Input((3, 6, 6))
    pooled = ops.max_pool(inputs, 2, 2, data_format="channels_first")
    model = keras.Model(inputs, L.BatchNormalization(axis=1)(pooled))
    # What TensorFlow cannot run on a CPU is a layer of its own.
    path = tmp_path / "net.onnx"
    if keras.backend.backend() != "tensorflow":
        tfl.export_onnx(model, path)
        assert "Transpose" not in kinds(path)
    network = read_network(chain(IMAGE, L.Conv2D(2, 3)))
    (step,) = network.program.steps
    (operation,) = step.operations
    turned = linear.Linear(operation.kernel, operation.bias, operation.linear_map, True)
    graph = Graph("float32", 17)
    graph.apply(turned, [graph.input("x", (4, 6, 6), "float32")])
    assert [node.kind for node in graph.nodes] == ["Conv"]


def test_sizes_that_the_model_leaves_open_are_stated(tmp_path):
    inputs = keras.Input((None, None, 2))
    x = L.GlobalAveragePooling2D()(L.Conv2D(3, 3, padding="same")(inputs))
    model, path = keras.Model(inputs, L.Dense(2)(x)), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="input_shapes"):
        tfl.export_onnx(model, path)
    assert tfl.export_onnx(model, path, input_shapes=[(None, 5, 4, 2)]).inputs == {
        model.inputs[0].name: (None, 5, 4, 2)
    }


# What is not written -----------------------------------------------------------------------------


def _wrong(kind):
    """`node` of a graph that writes one operator wrongly."""
    original = Graph.node

    def node(self, name, *operands, **attributes):
        if name == kind == "Conv":
            half = len(attributes["pads"]) // 2
            attributes["pads"] = (*attributes["pads"][half:], *attributes["pads"][:half])
        elif name == kind == "AveragePool":
            attributes["count_include_pad"] = 1
        elif name == kind == "LeakyRelu":
            attributes["alpha"] *= 1.001
        elif name == kind == "LayerNormalization":
            attributes["epsilon"] *= 1.5
        elif name == kind == "TopK":
            attributes["largest"] = 1
        elif name == kind == "Reshape":
            operands = (operands[0], (17, *operands[1][1:]))
        elif name == kind == "Sub":
            operands = operands[::-1]
        elif name == kind == "Gemm":
            operands = (operands[0], np.asarray(operands[1]) * (1 + 1e-5), *operands[2:])
        elif name == kind == "Concat":
            operands = operands[::-1]
        elif name == kind == "MaxPool":
            attributes["strides"] = attributes["strides"][::-1]
        elif name == kind == "Slice":
            shifted = [tuple(s - 1 for s in ends) for ends in operands[1:3]]
            operands = (operands[0], *shifted, *operands[3:])
        return original(self, name, *operands, **attributes)

    return node


@pytest.mark.parametrize(
    "kind, name",
    [
        ("Conv", "linear: conv2d same"),
        ("AveragePool", "pooling: mean same"),
        ("LeakyRelu", "elementwise: leaky"),
        ("LayerNormalization", "normalizing: layer"),
        ("TopK", "sorting: groups"),
        ("Reshape", "moving: flatten"),
        ("Sub", "merging: subtract"),
        ("Gemm", "linear: dense"),
        ("Concat", "merging: concatenate"),
        ("MaxPool", "pooling: max"),
        ("Slice", "moving: crop"),
    ],
)
def test_a_writer_that_is_wrong_is_caught_and_nothing_is_written(kind, name, tmp_path, monkeypatch):
    model, path = exported.made(name), tmp_path / "net.onnx"
    tfl.export_onnx(model, path)
    path.unlink()
    monkeypatch.setattr(Graph, "node", _wrong(kind))
    with pytest.raises(UnfaithfulExport, match="Nothing was written") as error:
        tfl.export_onnx(model, path)
    # A wrong shape is found by onnx's own checker, or by onnxruntime.
    named = error.value.step and repr(error.value.step) in str(error.value)
    assert named or kind in ("Reshape", "MaxPool", "Concat")
    assert os.listdir(tmp_path) == []


def test_a_small_mistake_in_a_deep_network_is_caught_at_its_step(tmp_path, monkeypatch):
    layers = [L.Dense(64, "relu", kernel_initializer="he_normal", name=f"layer{i}")
              for i in range(20)]  # fmt: skip
    inputs = x = keras.Input((64,))
    for layer in layers:
        x = layer(x)
    model, original = keras.Model(inputs, x), linear.Linear.write
    wrong = frozen = ops.convert_to_numpy(layers[7].kernel).astype(np.float64)

    def write(self, graph, names):
        if np.array_equal(self.kernel, frozen):
            self = linear.Linear(wrong + 1e-4 * np.eye(64), self.bias, self.linear_map)
        return original(self, graph, names)

    monkeypatch.setattr(linear.Linear, "write", write)
    with pytest.raises(UnfaithfulExport) as error:
        tfl.export_onnx(model, tmp_path / "net.onnx")
    assert error.value.step == "layer7" and "'layer7/gemm'" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_another_function_is_caught(tmp_path, monkeypatch):
    for table, name, broken, case in (
        (elementwise.WRITERS, "tanh", elementwise.WRITERS["softsign"], "elementwise: tanh"),
        (elementwise.WRITERS, "gelu", lambda g, x: elementwise._write_gelu(g, x, True),
         "elementwise: gelu"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(table, name, broken)
            with pytest.raises(UnfaithfulExport):
                tfl.export_onnx(exported.made(case), tmp_path / "net.onnx")
    for cls, case in (
        (sorting.Reflected, "sorting: householder"),
        (merging.Extreme, "merging: maximum"),
        (softmaxes.Softmax, "softmax: last axis"),
        (pooling.Pooled, "pooling: global max"),
        (moving.Moved, "moving: truncate"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "write", lambda self, graph, names: names[0])
            with pytest.raises(UnfaithfulExport):
                tfl.export_onnx(exported.made(case), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


@keras.saving.register_keras_serializable("exported")
class Squared(L.Layer):
    """A user's own function, on a bounded set."""

    def call(self, x):
        return ops.tanh(x) * ops.tanh(x)


def test_layers_of_users_are_refused_by_name(tmp_path):
    tfl.register_gain(Squared, 1.0, assumption="The slope of tanh² is at most 0.8.")
    model = chain(VECTOR, L.Dense(3), Squared(name="mine"), Squared(name="too"), L.Dense(2))
    with pytest.raises(UnsupportedLayerError, match=r"'mine' \(Declared\), step 'too'"):
        tfl.export_onnx(model, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_products_of_signals_are_refused_as_they_are_by_certificates(tmp_path):
    inputs = keras.Input(VECTOR)
    model = keras.Model(inputs, L.Multiply()([L.Dense(3)(inputs), L.Dense(3)(inputs)]))
    with pytest.raises(UnsupportedLayerError, match="multiply"):
        tfl.export_onnx(model, tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"dtype": "float16"}, ValueError, "'float32' or 'float64'"),
        ({"opset": 12}, ValueError, "13 to"),
        ({"opset": 99}, ValueError, "Received: opset=99"),
        ({"opset": 17.0}, TypeError, "integer"),
        ({"opset": True}, TypeError, "integer"),
        ({"input_shapes": [(None, 6), (None, 6)]}, ValueError, "1 inputs"),
    ],
)
def test_settings_without_meaning_are_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        tfl.export_onnx(exported.made("linear: dense"), tmp_path / "net.onnx", **settings)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named_and_an_old_file_is_kept(tmp_path):
    model = exported.made("linear: dense")
    with pytest.raises(ValueError, match=r"end in \.onnx"):
        tfl.export_onnx(model, tmp_path / "net.keras")
    with pytest.raises(OutputFileError):
        tfl.export_onnx(model, tmp_path / "absent" / "net.onnx")
    old = tmp_path / "net.onnx"
    old.write_bytes(b"mine")
    with pytest.raises(ValueError):
        tfl.export_onnx(model, old, opset=1)
    assert old.read_bytes() == b"mine"
    tfl.export_onnx(model, old)
    onnx.checker.check_model(onnx.load(old), full_check=True)
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_weights_that_float32_cannot_hold_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((2,), dtype="float64"), L.Dense(2, dtype="float64")])
    model.layers[0].kernel.assign(np.diag([1e39, 1.0]))
    with pytest.raises(ValueError, match=r"1e\+39.*float64"):
        tfl.export_onnx(model, tmp_path / "net.onnx")
    assert tfl.export_onnx(model, tmp_path / "net.onnx", dtype="float64").dtype == "float64"


def test_squares_that_overflow_are_no_silent_zeros(tmp_path):
    model = chain(VECTOR, L.Dense(4), L.RMSNormalization())
    model.layers[1].kernel.assign(np.full((6, 4), 1e20))
    with pytest.raises(UnfaithfulExport, match=r"rms_normalization.*float64"):
        tfl.export_onnx(model, tmp_path / "net.onnx")
    tfl.export_onnx(model, tmp_path / "net.onnx", dtype="float64")


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r"pip install tf_lyapunov\[onnx\]"):
                tfl.export_onnx(exported.made("linear: dense"), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_reading_a_model_to_export_it_leaves_it_as_it_was(tmp_path):
    model = digits()
    before = [ops.convert_to_numpy(w).copy() for w in model.weights]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    tfl.export_onnx(model, tmp_path / "net.onnx")
    assert nodes == [len(layer._inbound_nodes) for layer in model.layers]
    assert all(np.array_equal(a, ops.convert_to_numpy(b))
               for a, b in zip(before, model.weights, strict=True))  # fmt: skip


def test_channels_beside_a_large_one_keep_their_digits_under_response_normalization(tmp_path):
    model, path = chain(VECTOR, tfl.layers.LocalResponseNormalization(1)), tmp_path / "net.onnx"
    tfl.export_onnx(model, path)
    x = np.array([[1000, 0.1, 0.2, 0.1, 0.3, 0.1]], np.float32)
    exact = read_network(model).program.logits(x.astype(np.float64))
    assert np.allclose(exported.outputs(path, x), exact, rtol=1e-5)
