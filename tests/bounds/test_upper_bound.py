"""`lipschitz_upper_bound` by every method, of outputs of any shape and number."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory import eigenvalues, norms

METHODS = ("composition", "liplt", "closed_form", "eclipse", "lipsdp", "dissipativity", "auto")


def kernel(layer):
    return np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)


def regression():
    """Three numbers behind a tanh; the largest slope is at zero, where the map is linear."""
    first, second = layers.Dense(6, activation="tanh"), layers.Dense(3, activation="tanh")
    model = keras.Sequential([keras.Input((4,)), first, second])
    return model, np.linalg.norm(kernel(first) @ kernel(second), 2)


def segmentation():
    """Scores of three classes for every pixel, by two small convolutions."""
    image = keras.Input((4, 4, 1))
    first = layers.Conv2D(2, 3, padding="same", activation="tanh")
    second = layers.Conv2D(3, 3, padding="same")
    model = keras.Model(image, second(first(image)))
    linear = layers.Conv2D(2, 3, padding="same")
    plain = keras.Model(image, second(linear(image)))
    linear.set_weights(first.get_weights())
    units = np.eye(16, dtype="float32").reshape(16, 4, 4, 1)
    return model, np.linalg.norm(plain.predict(units, verbose=0).reshape(16, -1), 2)


def reshaped():
    """A feature map made by dense layers, moved and scaled afterwards."""
    first, second = layers.Dense(6, activation="tanh"), layers.Dense(8)
    model = keras.Sequential(
        [keras.Input((4,)), first, second, layers.Reshape((2, 2, 2)), layers.Rescaling(3.0),
         layers.Permute((3, 1, 2)), layers.ZeroPadding2D(1, data_format="channels_last")]
    )  # fmt: skip
    return model, 3 * np.linalg.norm(kernel(first) @ kernel(second), 2)


def sequence():
    """A sequence of vectors, each made by the same dense layer; the slope at zero is a half."""
    dense = layers.Dense(3, activation="softplus")
    return keras.Sequential([keras.Input((5, 2)), dense]), 0.5 * np.linalg.norm(kernel(dense), 2)


MODELS = {
    "regression": regression,
    "segmentation": segmentation,
    "feature map": reshaped,
    "sequence": sequence,
}


def slope(model, x, step):
    """Largest ratio of output and input changes over random directions."""
    d = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    y, z = (
        model.predict(v, verbose=0).reshape(len(x), -1).astype(float) for v in (x, x + step * d)
    )
    size = np.linalg.norm((step * d).reshape(len(x), -1), axis=1)
    return float(np.max(np.linalg.norm(z - y, axis=1) / size))


@pytest.mark.parametrize("name", MODELS)
def test_every_method_that_applies_bounds_outputs_of_any_shape(name):
    model, attained = MODELS[name]()
    x = np.random.default_rng(0).normal(size=(200, *model.input_shape[1:])).astype("float32")
    product = tfl.lipschitz_upper_bound(model).gain_upper_bound
    seen = slope(model, x, 0.05)
    for method in METHODS:
        try:
            bound = tfl.lipschitz_upper_bound(model, method=method, time_budget=10)
        except UnsupportedLayerError as error:
            assert name == "sequence" and "needs outputs that a dense layer" in str(error)
            continue
        assert bound.method == method
        assert seen * (1 - 1e-3) <= bound.gain_upper_bound <= product * (1 + 1e-9)
        # At zero, since biases are, the Jacobian is known.
        assert attained * (1 - 1e-5) <= bound.gain_upper_bound


def test_a_method_does_better_than_the_product_on_images_and_numbers():
    for make in (regression, segmentation, reshaped):
        model, _ = make()
        product = tfl.lipschitz_upper_bound(model).gain_upper_bound
        assert tfl.lipschitz_upper_bound(model, method="lipsdp").gain_upper_bound < 0.97 * product


def test_what_follows_the_chain_counts():
    first, second = layers.Dense(6, activation="relu"), layers.Dense(8)
    inputs = keras.Input((4,))
    logits = second(first(inputs))
    plain = keras.Model(inputs, logits)
    for after, factor in ((layers.Rescaling(3.0), 3.0), (layers.Softmax(), 0.5)):
        model = keras.Model(inputs, after(logits))
        for method in ("lipsdp", "liplt"):
            inner = tfl.lipschitz_upper_bound(plain, method=method).gain_upper_bound
            outer = tfl.lipschitz_upper_bound(model, method=method, outputs="model")
            assert outer.gain_upper_bound == pytest.approx(factor * inner, rel=1e-6)


def test_several_outputs_are_bounded_in_the_norm_of_their_concatenation():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    first, second = layers.Dense(2), layers.Dense(6, name="second")
    outputs = {"x": first(a), "y": layers.Reshape((3, 2))(second(b))}
    model = keras.Model([a, b], outputs)
    before = [len(layer._outbound_nodes) for layer in model.layers]
    norms = np.linalg.norm(kernel(first), 2), np.linalg.norm(kernel(second), 2)
    for perturbed, exact in ((None, max(norms)), ("a", norms[0]), (1, norms[1])):
        bound = tfl.lipschitz_upper_bound(model, perturbed=perturbed)
        assert exact <= bound.gain_upper_bound <= exact * (1 + 1e-6)
        assert any("2 outputs' concatenation" in text for text in bound.assumptions)
    assert [len(layer._outbound_nodes) for layer in model.layers] == before
    x = keras.Input((3,))
    twice = layers.Dense(4)
    both = keras.Model(x, [twice(x), keras.ops.tanh(twice(x))])
    bound = tfl.lipschitz_upper_bound(both).gain_upper_bound
    exact = np.sqrt(2) * np.linalg.norm(kernel(twice), 2)
    assert exact * (1 - 1e-9) <= bound <= exact * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "local"}, "use `certify`"),
        ({"method": "spectral"}, "`method` must be one of"),
        ({"perturbed": "z"}, "`perturbed` must be an input"),
        ({"time_budget": 0}, "`time_budget` must be"),
        ({"tol": -0.1}, "`tol` must be a number"),
        ({"tol": float("inf")}, "`tol` must be a number"),
        ({"tol": True}, "`tol` must be a number"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=message) as error:
        tfl.lipschitz_upper_bound(model, **options)
    assert "Received: " in str(error.value)


def test_tolerance_buys_eigenvalues_and_keeps_the_bound(monkeypatch):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((40, 40, 12)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(32, 3, strides=2),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )
    found, computed = {}, []
    kept = eigenvalues._top
    monkeypatch.setattr(eigenvalues, "_top", lambda *a: computed.append(1) or kept(*a))
    for tol in (0.0, 0.02, 0.5):
        norms.forget()
        computed.clear()
        bound = tfl.lipschitz_upper_bound(model, tol=tol)
        found[tol] = bound.gain_upper_bound, len(computed)
        assert any("bounded too high" in text for text in bound.assumptions) == (tol > 0)
    exact, most = found.pop(0.0)
    for tol, (gain, count) in found.items():
        assert exact * (1 - 1e-9) <= gain <= exact * (1 + tol) ** 3 * (1 + 1e-9)
        assert count <= most
    assert found[0.5][1] < most
    # What was bounded loosely is not taken for the tight bound afterwards.
    assert tfl.lipschitz_upper_bound(model).gain_upper_bound == exact
