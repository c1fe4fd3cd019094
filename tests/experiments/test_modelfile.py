"""Model files that are truncated, corrupt or hostile are refused with the reason."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.experiments.modelfile import load_model, save_model
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

    with pytest.raises(ModelFileError, match="units=1000000000000"):
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
