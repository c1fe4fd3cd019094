"""The command line says that its data sets have one array, and the model several inputs."""

import keras
import pytest
from keras import layers

from tf_lyapunov.cli import BAD_INPUT, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "two.keras"
    a, b = keras.Input((8, 8, 1), name="image"), keras.Input((4,), name="context")
    joined = layers.Concatenate()([layers.Flatten()(a), b])
    keras.Model([a, b], layers.Dense(10)(joined)).save(path)
    return path


@pytest.mark.parametrize("command", ["certify", "attack", "bracket", "evaluate"])
def test_a_model_with_several_inputs_is_refused_by_name(command, model, capsys):
    capsys.readouterr()
    code = main([command, str(model), "--data", "digits", "--samples", "5"])
    out, err = capsys.readouterr()
    assert code == BAD_INPUT and "Traceback" not in out + err
    text = " ".join((out + err).split())
    assert "'image', 'context'" in text and "the model must have one input" in text
