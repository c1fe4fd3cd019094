"""The rebuild of the lower bounds: its long training continues, its results say what is true."""

import importlib
import pathlib
import sys

import keras
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("perturbation.tables", "perturbation.rebuild")
    yield [importlib.import_module(name) for name in names]
    for name in [n for n in sys.modules if n.startswith(("perturbation", "benchmarks"))]:
        del sys.modules[name]


def network():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6,), name="x"),
        keras.layers.Dense(8, "relu", name="hidden"),  # named as in a process of its own
        keras.layers.Dropout(0.5, name="dropped"),
        keras.layers.Dense(3, name="logits"),
    ]
    return keras.Sequential(layers, name="network")


def test_an_interrupted_training_ends_with_the_same_weights(scripts, tmp_path):
    train = scripts[0].fitted_by_epochs
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)).astype("float32"), rng.integers(0, 3, 300)
    whole = train(network(), x, y, 3, tmp_path / "whole", {"run": 1}).get_weights()
    train(network(), x, y, 2, tmp_path / "parts", {"run": 1})
    parts = train(network(), x, y, 3, tmp_path / "parts", {"run": 1}).get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    # A checkpoint of other options is not continued.
    other = train(network(), x, y, 1, tmp_path / "parts", {"run": 2}).get_weights()
    assert not all(np.array_equal(a, b) for a, b in zip(whole, other, strict=True))


def test_the_nin_network_has_the_published_shapes(scripts):
    model = scripts[0].nin()
    kernels = [w.shape for w in model.trainable_variables if len(w.shape) > 1]
    assert kernels[:3] == [(5, 5, 3, 192), (1, 1, 192, 160), (1, 1, 160, 96)]
    assert kernels[-1] == (192, 10) and model.output_shape == (None, 10)


def test_every_perturbation_below_a_sound_bound_is_told(scripts):
    rebuild = scripts[1]
    rows = {"Table 3.1": [{"below sound": 0}] * 5, "Table 4.2": [{"below sound": 0}] * 8}
    assert rebuild.contradictions(rows) == []
    rows["Table 4.2"] = [{"below sound": n} for n in (0, 2)]
    assert rebuild.contradictions(rows) == ["Table 4.2, setting 2: 2 found below the sound bound"]


def test_wrong_options_end_at_once(scripts, tmp_path, capsys):
    rebuild = scripts[1]
    assert rebuild.main(["--spambase", str(tmp_path / "absent.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        rebuild.main(["--cifar", str(tmp_path)])
    assert ended.value.code == 2
