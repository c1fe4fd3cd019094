"""What the large rebuilds configure: adversarial training, bounds on kernels alone, one bound."""

import types

import keras
import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments import files, training
from tf_lyapunov.experiments.config import LayersConfig
from tf_lyapunov.experiments.reading import parse_config
from tf_lyapunov.modelfile import load_model
from tf_lyapunov.projection import constrain
from tf_lyapunov.training import AdversarialModel

TEXT = """
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
layers: {uniform: 2.0}
training:
  epochs: 2
  batch_size: 32
  optimizer: {name: sgd, learning_rate: 0.1, momentum: 0.9}
  adversarial: {name: fgm, radius: 0.3}
"""


def trained(config, path, data, **options):
    with files.RunDirectory(path).open(resume=True) as run:
        return training.train(config, run, data, resume=True, **options)


def test_adversarial_training_moves_inputs_saves_the_plain_model_and_resumes(tmp_path):
    # Without bounds, which cost compilations and change nothing here.
    text = TEXT.replace("layers: {uniform: 2.0}", "")
    data, config = datasets.load("blobs"), parse_config(text)
    whole = trained(config, tmp_path / "whole", data)
    one = parse_config(text, overrides=["training.epochs=1"])
    first = trained(one, tmp_path / "parts", data)
    parts = trained(config, tmp_path / "parts", data)
    assert parts.resumed_from == 1
    pairs = zip(whole.model.get_weights(), parts.model.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not isinstance(whole.model, AdversarialModel)
    saved = load_model(tmp_path / "whole" / files.MODEL)
    assert np.array_equal(saved.get_weights()[0], whole.model.get_weights()[0])
    plain = parse_config(text, overrides=["training.epochs=1", "training.adversarial=null"])
    other = trained(plain, tmp_path / "plain", data)
    assert not np.array_equal(other.model.get_weights()[0], first.model.get_weights()[0])


def test_the_configured_attack_is_the_one_that_trains():
    config = parse_config(
        TEXT.replace(
            "{name: fgm, radius: 0.3}",
            "{name: pgd, norm: linf, radius: 0.5, steps: 3, relative_step: 0.4, mix: 0.5}",
        )
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    found = training.adversarial_model(config, model)
    assert found.plain is model and found.mix == 0.5
    attack = found.attack
    assert type(attack).__name__ == "PGD" and attack.steps == 3
    assert type(attack.ball).__name__ == "Linf" and np.isclose(attack.step, 0.2)


def pooled():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(2, 3),
            keras.layers.MaxPooling2D(3, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def test_bounds_on_kernels_leave_the_gain_of_pools_out():
    model = pooled()
    kernel = training._by_hand(LayersConfig(budgets=[0.5, 0.25], scope="kernel"), model)
    stage = training._by_hand(LayersConfig(budgets=[0.5, 0.25]), model)
    assert stages(model)[0].post_gain == 2.0
    assert kernel == [1.0, 0.25] and stage == [0.5, 0.25]
    constrain(model, kernel)
    assert model.layers[0].kernel_constraint.max_gain == 0.5
    assert training._by_hand(LayersConfig(uniform=0.5), model) == [0.5, 0.5]
    assert training._by_hand(LayersConfig(), model) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: {uniform: 2.0}", "layers: {uniform: 2.0, budgets: [1.0]}", "not both"),
        ("layers: {uniform: 2.0}", "claim: {gain: 1.0}\nlayers: {uniform: 2.0}", "sets the bounds"),
        ("layers: {uniform: 2.0}", "layers: {uniform: 2.0, weights: [1.0]}", "final"),
        ("radius: 0.3", "radius: 0", "radius"),
        ("radius: 0.3", "radius: 0.3, mix: 1.5", "mix"),
    ],
)
def test_contradictory_settings_are_refused(old, new, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(TEXT.replace(old, new))


def test_a_stream_takes_no_augmentation_of_arrays():
    from tf_lyapunov.data.streams import ImageStream
    from tf_lyapunov.experiments.augmentation import training_batches

    shards = types.SimpleNamespace(num_classes=2, count=4)
    options = {"on_damage": "refuse", "cache": None, "deterministic": True, "shuffle_buffer": 4}
    stream = ImageStream("imagenet2012", shards, shards, shards, 8, **options)
    config = parse_config(
        "{dataset: {name: imagenet2012}, model: {name: cnn}, "
        "training: {augmentation: {flip: true}}}"
    )
    with pytest.raises(ConfigError, match="always cropped"):
        training_batches(config, stream)
