"""The Laplacian penalty equals its definition, and is part of training alone."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tf_lyapunov.training import LaplacianModel, label_smoothness

EPS = float(np.finfo("float32").eps)


def by_definition(h, labels, power):
    h = np.asarray(h, float).reshape(len(h), -1)
    lengths = np.linalg.norm(h, axis=1, keepdims=True)
    h = h / np.where(lengths > 0, lengths, 1)
    similarity = h @ h.T
    laplacian = np.diag(similarity.sum(axis=1)) - similarity
    return np.trace(labels.T @ np.linalg.matrix_power(laplacian, power) @ labels)


def classifier(**options):
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, "relu", name="a", **options),
            layers.Dense(4, name="linear", **options),
            layers.ReLU(name="b", **options),
            layers.Dense(3, dtype="float32"),
        ]
    )


def data(n=12):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, 5)).astype("float32"), rng.integers(0, 3, n)


@given(
    n=st.integers(2, 9),
    power=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
)
def test_smoothness_is_its_matrix_formula_at_every_scale(n, power, seed, scale):
    rng = np.random.default_rng(seed)
    h = (scale * np.maximum(rng.normal(size=(n, 2, 3)), 0)).astype("float32")
    labels = np.eye(3)[rng.integers(0, 3, n)]
    expected = by_definition(h, labels, power)
    found = float(label_smoothness(h, labels.astype("float32"), power))
    # Eigenvalues of L are at most 2n.
    assert abs(found - expected) <= 64 * EPS * n * (2.0 * n) ** power


def test_one_class_is_smooth():
    h = np.random.default_rng(0).random((5, 4)).astype("float32")
    assert abs(float(label_smoothness(h, np.ones((5, 1), "float32")))) <= 64 * EPS * 5 * 100


def penalty_of(model, x, y, gamma, power):
    graph = keras.Model(model.inputs[0], [model.get_layer(n).output for n in ("a", "b")])
    one_hot = np.eye(3)[y]
    first, second = (by_definition(keras.ops.convert_to_numpy(h), one_hot, power) for h in graph(x))
    return gamma**power * abs(second - first)


@pytest.mark.parametrize("one_hot", [False, True])
def test_training_adds_the_penalty_and_evaluation_does_not(one_hot):
    (x, y), model = data(), classifier()
    loss = (
        keras.losses.CategoricalCrossentropy(from_logits=True)
        if one_hot
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    target = np.eye(3)[y] if one_hot else y
    smooth = LaplacianModel(model, ["a", "b"], gamma=0.5)
    smooth.compile(keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
    trained = smooth.fit(x, target, batch_size=12, verbose=0).history
    plain = smooth.evaluate(x, target, batch_size=12, verbose=0, return_dict=True)
    expected = penalty_of(model, x, y, 0.5, 2)
    assert expected > 0.1
    assert np.isclose(trained["loss"][0] - plain["loss"], expected, rtol=1e-4)
    assert np.isclose(trained["accuracy"][0], plain["accuracy"])


def test_training_lowers_the_penalty_and_leaves_an_ordinary_model(tmp_path):
    (x, y), model = data(32), classifier()
    before = penalty_of(model, x, y, 1.0, 2)
    smooth = LaplacianModel(model, ["a", "b"], gamma=1.0)
    smooth.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    smooth.fit(x, y, batch_size=32, epochs=15, verbose=0)
    assert penalty_of(model, x, y, 1.0, 2) < 0.5 * before
    smooth.plain.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is keras.Sequential
    assert np.allclose(loaded.predict(x, verbose=0), smooth.predict(x, verbose=0), atol=1e-6)
    smooth.save(tmp_path / "w.keras")
    again = keras.models.load_model(tmp_path / "w.keras")
    assert again.layer_names == ["a", "b"] and again.gamma == 1.0


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_dead_units_and_low_precision_leave_every_weight_finite(policy):
    (x, y), model = data(), classifier(dtype=policy)
    x[:4] = 0.0  # zero rows at every ReLU
    smooth = LaplacianModel(model, ["a", "b"], gamma=0.1)
    smooth.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    history = smooth.fit(x, y, batch_size=12, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert all(np.all(np.isfinite(w)) for w in smooth.get_weights())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least two"),
        (["a"], "at least two"),
        (["a", "a"], "at least two"),
        (["a", "linear"], "ReLU"),
        (["a", "nowhere"], "nowhere"),
    ],
)
def test_layers_that_are_no_named_relus_are_refused_with_those_that_are(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        LaplacianModel(classifier(), names)
    assert "'a'" in str(caught.value)


def test_models_without_a_graph_or_weights_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Own()
    with pytest.raises(ValueError, match="must be built"):
        LaplacianModel(model, ["a", "b"])
    model(np.zeros((1, 5), "float32"))
    with pytest.raises(ValueError, match="functional and sequential"):
        LaplacianModel(model, ["a", "b"])
    with pytest.raises(TypeError, match="names"):
        LaplacianModel(classifier(), "ab")
    with pytest.raises(TypeError, match="Keras model"):
        LaplacianModel(lambda x: x, ["a", "b"])
