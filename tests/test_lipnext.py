"""LipNeXt-like networks: gain one on the manifold, where `Stiefel` keeps them; measured off it."""

import keras
import numpy as np
import pytest

from tf_lyapunov import export_plain, layers, lipschitz_upper_bound, models
from tf_lyapunov.optimizers import Stiefel

SPEC = {"name": "lipnext", "size": [2, 16], "patch": 2}


@pytest.fixture(scope="module")
def trained():
    model = models.build({**SPEC, "head": "bounded"}, (5, 4, 3), 4, seed=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 5, 4, 3)).astype("float32")
    y = rng.integers(0, 4, 32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Stiefel(keras.optimizers.Adam(0.02)), loss)
    model.fit(x, y, epochs=10, batch_size=16, verbose=0)
    return model, x


def test_the_gain_stays_one_while_it_trains(trained):
    model, x = trained
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    for kernel in kernels:
        w = keras.ops.convert_to_numpy(kernel).astype(np.float64)
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        assert np.linalg.norm(gram - np.eye(len(gram)), 2) < 2e-5
    assert 0.999 < lipschitz_upper_bound(model).gain_upper_bound < 1.0 + 2e-5 * len(kernels)
    # p has moved, so that positions are told apart.
    assert any(np.any(keras.ops.convert_to_numpy(layer.bias)) for layer in model.layers
               if isinstance(layer, layers.PositionBias))  # fmt: skip
    plain = keras.ops.convert_to_numpy(export_plain(model)(x))
    own = keras.ops.convert_to_numpy(model(x))
    assert np.max(np.abs(plain - own)) <= 1e-5 * np.max(np.abs(own))


def test_off_the_manifold_the_gain_is_what_the_kernels_are():
    model = models.build(SPEC, (4, 4, 3), 4, seed=1)
    layer = model.get_layer("before_1")
    layer.kernel.assign(2 * layer.kernel)
    head = 2.0  # of differences of logits: class vectors have norm one
    found = lipschitz_upper_bound(model).gain_upper_bound
    assert 2 * 0.9 < found <= 2 * head * (1 + 1e-3)


def test_a_position_bias_is_a_translation_that_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3, 2)), layers.PositionBias("normal")])
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype("float32")
    moved = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(moved - x, np.broadcast_to(moved[0] - x[0], x.shape), atol=1e-6)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(again(x)), moved)
    with pytest.raises(ValueError, match="must be known"):
        layers.PositionBias().build((None, None, 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [({"size": "XXL"}, "size"), ({"size": [2, 4]}, "hold a channel"), ({"patch": 0}, "patch"),
     ({"activation": "gelu"}, "activation")],
)  # fmt: skip
def test_wrong_descriptions_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        models.build({**SPEC, **spec}, (4, 4, 3), 4)
