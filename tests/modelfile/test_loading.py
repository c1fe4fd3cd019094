"""Model files that are truncated, corrupt or hostile are refused with the reason."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.modelfile import load_model, save_model
from tf_lyapunov.models import mlp


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.keras"
    save_model(mlp((6,), 3, [4]), path)
    return path


def rewritten(path, change, name="config.json"):
    """The same archive with one member changed."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def test_a_saved_model_is_loaded_with_its_weights(tmp_path):
    model = mlp((6,), 3, [4])
    save_model(model, tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    assert np.array_equal(
        keras.ops.convert_to_numpy(model(x)), keras.ops.convert_to_numpy(loaded(x))
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelFileError, match="truncated"):
        load_model(saved)


def test_a_flipped_byte_is_refused(saved):
    with zipfile.ZipFile(saved) as archive:
        info = archive.getinfo("model.weights.h5")
    content = bytearray(saved.read_bytes())
    content[info.header_offset + 200 + info.file_size // 2] ^= 0xFF
    saved.write_bytes(bytes(content))
    with pytest.raises(ModelFileError, match=r"checksum of model\.weights\.h5"):
        load_model(saved)


def test_a_lambda_layer_is_refused_with_its_name(tmp_path):
    inputs = keras.Input((3,))
    outputs = keras.layers.Lambda(lambda x: x + 1, name="evil")(inputs)
    path = tmp_path / "m.keras"
    keras.Model(inputs, outputs).save(path)
    with pytest.raises(ModelFileError, match="'evil' is a Lambda, which holds Python code"):
        load_model(path)


def test_a_lambda_hidden_in_another_place_is_refused(saved):
    def hide(text):
        config = json.loads(text)
        layer = config["config"]["layers"][-1]["config"]
        layer["kernel_constraint"] = {
            "class_name": "__lambda__",
            "config": {"value": "code"},
            "module": "builtins",
            "registered_name": None,
        }
        return json.dumps(config).encode()

    with pytest.raises(ModelFileError, match="lambda function"):
        load_model(rewritten(saved, hide))


@pytest.mark.parametrize("module", ["os", "subprocess", "tensorflow.io", "mypackage.layers"])
def test_classes_from_elsewhere_are_refused_by_name(saved, module):
    def redirect(text):
        config = json.loads(text)
        layer = config["config"]["layers"][-1]
        layer["class_name"], layer["module"] = "system", module
        return json.dumps(config).encode()

    with pytest.raises(ModelFileError, match=f"{module}.system belongs neither to Keras"):
        load_model(rewritten(saved, redirect))


def test_absurd_sizes_are_refused_before_memory_is_taken(saved):
    def grow(text):
        config = json.loads(text)
        config["config"]["layers"][-1]["config"]["units"] = 10**12
        return json.dumps(config).encode()

    with pytest.raises(ModelFileError, match="declares 5000000000028 weights"):
        load_model(rewritten(saved, grow))


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    other = tmp_path / "other.keras"
    save_model(mlp((6,), 3, [5]), other)
    with zipfile.ZipFile(other) as archive:
        weights = archive.read("model.weights.h5")
    with pytest.raises(ModelFileError, match="Keras cannot load it"):
        load_model(rewritten(saved, lambda content: weights, "model.weights.h5"))


@pytest.mark.parametrize("group", ["layers/dense/vars", "layers/dense", "layers"])
def test_missing_weights_are_not_replaced_by_random_ones(saved, group):
    def drop(content):
        memory = io.BytesIO(content)
        with h5py.File(memory, "r+") as file:
            del file[group]
        return memory.getvalue()

    with pytest.raises(ModelFileError, match=r"could not be loaded|it holds"):
        load_model(rewritten(saved, drop, "model.weights.h5"))


def test_nan_weights_are_refused(tmp_path):
    model = mlp((6,), 3, [4])
    weights = model.get_weights()
    weights[0][0, 0] = np.nan
    model.set_weights(weights)
    save_model(model, tmp_path / "m.keras")
    with pytest.raises(ModelFileError, match="NaN or infinite"):
        load_model(tmp_path / "m.keras")


def test_paths_that_leave_the_archive_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("../../evil.txt", "x")
    with pytest.raises(ModelFileError, match="outside the archive"):
        load_model(saved)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        load_model(tmp_path / "missing.keras")
    (tmp_path / "m.h5").write_text("x")
    with pytest.raises(ModelFileError, match=r"end in \.keras"):
        load_model(tmp_path / "m.h5")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(ModelFileError, match="not a Keras archive"):
        load_model(tmp_path / "m.keras")


def test_a_config_that_is_not_json_is_refused(saved):
    with pytest.raises(ModelFileError, match="corrupt"):
        load_model(rewritten(saved, lambda text: b"{"))
    with pytest.raises(ModelFileError, match="refused"):
        load_model(rewritten(saved, lambda text: b"[]"))


@pytest.fixture
def unopened(monkeypatch):
    """Keras must not be asked to load the file: that is when memory is taken."""

    def fail(*args, **kwargs):
        raise AssertionError("Keras was asked to load it")

    monkeypatch.setattr(keras.saving, "load_model", fail)


def edited(path, change):
    """`change` of the configurations of its layers by name."""

    def apply(text):
        config = json.loads(text)
        layers = config["config"]["layers"]
        change({layer["config"]["name"]: layer["config"] for layer in layers}, layers)
        return json.dumps(config).encode()

    return rewritten(path, apply)


def test_two_sizes_that_fit_each_make_a_product_that_does_not(saved, unopened):
    """Every size is below the number of stored bytes; the kernel between them is not."""

    def grow(by_name, layers):
        for layer in layers:
            layer.pop("build_config", None)
            if "units" in layer["config"]:
                layer["config"]["units"] = 10_000

    with pytest.raises(ModelFileError, match="declares 100080000 weights"):
        load_model(edited(saved, grow))


def test_signals_larger_than_memory_are_refused(tmp_path, unopened):
    path = tmp_path / "m.keras"
    net = [keras.Input((2, 2, 1)), keras.layers.ZeroPadding2D(1, name="pad")]
    save_model(keras.Sequential([*net, keras.layers.GlobalMaxPooling2D()]), path)

    def grow(by_name, layers):
        by_name["pad"]["padding"] = [[10**6, 10**6], [10**6, 10**6]]
        for layer in layers:
            layer.pop("build_config", None)

    with pytest.raises(ModelFileError, match=r"'pad' makes .* more than there is memory"):
        load_model(edited(path, grow))


def test_weights_that_grow_when_they_are_unpacked_are_refused(saved, unopened):
    """A small archive of zeros, far longer than its architecture needs."""
    with zipfile.ZipFile(saved) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members["model.weights.h5"] += bytes(20_000_000)
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    assert saved.stat().st_size < 100_000
    with pytest.raises(ModelFileError, match=r"holds 200.* bytes, and its model needs"):
        load_model(saved)


def test_data_sets_without_their_values_are_refused(saved, unopened):
    def hollow(content):
        memory = io.BytesIO(content)
        with h5py.File(memory, "r+") as file:
            shape = file["layers/dense/vars/0"].shape
            del file["layers/dense/vars/0"]
            file.create_dataset("layers/dense/vars/0", shape, "f4", chunks=True)
        return memory.getvalue()

    with pytest.raises(ModelFileError, match="'layers/dense/vars/0' is compressed, or its values"):
        load_model(rewritten(saved, hollow, "model.weights.h5"))


def function(name, module="builtins"):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


@pytest.mark.parametrize(
    "value",
    ["get_file", "clear_session", "zeros", function("get_file"), function("relu", "keras.ops")],
    ids=str,
)
def test_only_functions_that_are_activations_are_activations(saved, unopened, value):
    def name(by_name, layers):
        layers[-1]["config"]["activation"] = value

    with pytest.raises(ModelFileError, match=r"is no activation|names no activation"):
        load_model(edited(saved, name))


@pytest.mark.parametrize("key", ["kernel_initializer", "bias_regularizer", "kernel_constraint"])
@pytest.mark.parametrize(
    "value", ["get_file", function("relu"), {**function("x"), "class_name": "Dense"}], ids=str
)
def test_settings_are_of_their_kind(saved, unopened, key, value):
    def name(by_name, layers):
        layers[-1]["config"][key] = value

    with pytest.raises(ModelFileError, match=key):
        load_model(edited(saved, name))


def test_every_activation_of_keras_and_ours_is_read(tmp_path):
    from tf_lyapunov.layers import GroupSort

    known = [n for n in dir(keras.activations) if n not in ("get", "serialize", "deserialize")]
    known = [n for n in known if callable(getattr(keras.activations, n))]
    for held in (*known, keras.layers.LeakyReLU(0.3), GroupSort(2), keras.activations.silu):
        layers = [keras.layers.Dense(4, activation=held), keras.layers.Activation("relu")]
        model = keras.Sequential([keras.Input((3,)), *layers])
        save_model(model, tmp_path / "m.keras")
        load_model(tmp_path / "m.keras")


def test_the_thread_that_asks_is_left_as_it_was(saved):
    first = keras.layers.Dense(1).name
    load_model(saved)
    with keras.StatelessScope():
        pass  # would give values to variables that were left without
    number = int(keras.layers.Dense(1).name.rpartition("_")[2])
    before = int(first.rpartition("_")[2] or 0) if "_" in first else 0
    assert number <= before + 3  # the model's own two layers, and this one
