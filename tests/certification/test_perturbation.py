"""Lower bounds on minimal perturbations of whole models: sound ones hold, published ones fail."""

import functools
import math

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.certification.perturbation import minimal_perturbation_lower_bound
from tf_lyapunov.errors import UnsupportedLayerError

layers = keras.layers


def mlp(activation, sizes=(5, 7, 6, 4), scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = inputs = keras.Input((sizes[0],))
    for width in sizes[1:-1]:
        x = layers.Dense(width, activation=activation)(x)
    model = keras.Model(inputs, layers.Dense(sizes[-1])(x))
    model.set_weights(
        [scale * rng.normal(size=w.shape) / math.sqrt(w.shape[0]) for w in model.get_weights()]
    )
    return model


def cnn():
    return keras.Sequential(
        [
            keras.Input((10, 10, 2)),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(3, 2),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(6, activation="tanh"),
            layers.Dense(3),
        ]
    )


def residual():
    inputs = keras.Input((5,))
    x = layers.Add()([inputs, layers.Dense(5, activation="tanh")(inputs)])
    x = layers.Dense(6, activation="sigmoid")(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


MODELS = {
    "tanh": lambda: mlp("tanh"),
    "steep tanh": lambda: mlp("tanh", scale=2.0),
    "sigmoid": lambda: mlp("sigmoid"),
    "softplus": lambda: mlp("softplus"),
    "relu": lambda: mlp("relu"),
    "two classes": lambda: mlp("tanh", sizes=(3, 4, 2)),
    "one logit": lambda: mlp("tanh", sizes=(3, 4, 1)),
    "cnn": cnn,
    "residual": residual,
}


def inputs_of(model, count, seed=0):
    shape = (count, *model.input_shape[1:])
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("name", MODELS)
def test_no_attack_inside_the_sound_bound_succeeds(name):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    x = inputs_of(model, 300)
    lower = minimal_perturbation_lower_bound(model, x, time_budget=0.0)
    assert lower.is_sound and not lower.warnings and len(lower) == 300
    assert np.array_equal(np.asarray(lower), lower.bound) and np.all(lower.bound > 0)
    attack = tfl.attacks.PGD(
        radius=tfl.L2(lower.bound * (1 - 1e-6)), steps=15, loss="margin", restarts=2,
        random_start=True,
    )  # fmt: skip
    assert not attack(model, x).success.any()
    # The same attack far outside succeeds: it can break what can be broken.
    outside = tfl.attacks.PGD(radius=tfl.L2(lower.bound * 20), steps=15, loss="margin")
    assert outside(model, x).success.any()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus"])
def test_smooth_stacks_do_better_than_the_product_of_norms(name):
    model = MODELS[name]()
    x = inputs_of(model, 100)
    lower = minimal_perturbation_lower_bound(model, x, time_budget=0.0)
    proof = tfl.certify(model, x)
    assert np.median(lower.bound) > 1.2 * np.median(proof.radius)


def test_a_linear_classifier_has_its_exact_minimal_perturbation():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    x = inputs_of(model, 50)
    lower = minimal_perturbation_lower_bound(model, x)
    weights, bias = (np.asarray(w, np.float64) for w in model.get_weights())
    logits = x.astype(np.float64) @ weights + bias
    for i, label in enumerate(logits.argmax(axis=1)):
        distances = [
            (logits[i, label] - logits[i, j]) / np.linalg.norm(weights[:, label] - weights[:, j])
            for j in range(3)
            if j != label
        ]
        assert math.isclose(lower.bound[i], min(distances), rel_tol=1e-9, abs_tol=1e-9)
        assert lower.bound[i] <= min(distances) * (1 + 1e-12)
    assert [step.rule for step in lower.per_layer] == ["output layer, exact"]


def test_every_layer_shows_its_bound():
    keras.utils.set_random_seed(0)
    model = cnn()
    lower = minimal_perturbation_lower_bound(model, inputs_of(model, 5), time_budget=0.0)
    names = [step.name for step in lower.per_layer]
    assert names[-1].startswith("dense") and names[0].startswith("conv2d")
    # The convolution with its normalization, both poolings, the tanh stack, the output layer.
    assert len(names) == 5
    assert all(step.bound.shape == (5,) for step in lower.per_layer)
    assert np.array_equal(lower.per_layer[0].bound, lower.bound) and lower.around is None


@pytest.mark.parametrize("name", ["relu", "residual", "cnn", "one logit"])
def test_relaxations_raise_the_bound_and_no_attack_gets_below_it(name):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    x = inputs_of(model, 1 if name == "cnn" else 2)
    gains = minimal_perturbation_lower_bound(model, x, time_budget=0.0)
    lower = minimal_perturbation_lower_bound(model, x, time_budget=60.0)
    assert np.all(lower.bound >= gains.bound)
    assert np.all(lower.bound == np.maximum(gains.bound, lower.around))
    assert np.median(lower.bound / gains.bound) > {"cnn": 3, "relu": 1.5}.get(name, 1.02)
    inside = tfl.attacks.PGD(
        radius=tfl.L2(lower.bound * (1 - 1e-6)), steps=25, loss="margin", restarts=2,
        random_start=True,
    )  # fmt: skip
    assert not inside(model, x).success.any()
    if name == "one logit":  # the quickest
        found = tfl.bracket(model, x, attacks=tfl.attacks.DDN(steps=50), time_budget=60.0)
        assert np.array_equal(found.bound, lower.bound)
        assert np.all(found.lower <= found.upper)
    wrong = minimal_perturbation_lower_bound(model, x, 1 - np.minimum(lower.labels, 1))
    assert np.all(wrong.bound[wrong.labels != wrong.predictions] == 0)


def test_relaxations_may_be_left_out_and_end_in_time():
    model = MODELS["relu"]()
    x = inputs_of(model, 4)
    late = minimal_perturbation_lower_bound(model, x, time_budget=1e-9)
    assert np.all(late.around == 0) and np.all(late.bound > 0)
    with pytest.raises(ValueError, match="time_budget"):
        minimal_perturbation_lower_bound(model, x, time_budget=-1.0)
    published = minimal_perturbation_lower_bound(model, x, rules="published")
    assert published.around is None  # nothing proved is mixed with what is not


def test_wrong_labels_have_the_bound_zero():
    model = MODELS["tanh"]()
    x = inputs_of(model, 20)
    y = (np.argmax(model.predict(x, verbose=0), axis=1) + 1) % 4
    assert np.all(minimal_perturbation_lower_bound(model, x, y).bound == 0)
    assert np.all(minimal_perturbation_lower_bound(model, x, y, rules="published").bound == 0)


def test_batches_of_any_size_give_the_same_bounds():
    model = MODELS["tanh"]()
    x = inputs_of(model, 17)
    whole, parts = (
        minimal_perturbation_lower_bound(model, x, batch_size=size, time_budget=0.0).bound
        for size in (256, 5)
    )
    assert np.allclose(whole, parts, rtol=1e-9)


def test_the_published_rules_are_violated_by_a_tanh_network():
    # One unit per layer, from -1 towards 0, where tanh bends twice as much as Table 4.1 allows.
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, activation="tanh"),
                              layers.Dense(2)])  # fmt: skip
    threshold = np.tanh(-0.4)
    model.set_weights([np.eye(1), np.zeros(1), np.array([[0.0, 1.0]]), np.array([0, -threshold])])
    x = np.array([[-1.0]])
    published = minimal_perturbation_lower_bound(model, x, rules="published")
    sound = minimal_perturbation_lower_bound(model, x)
    assert published.bound[0] > 0.65 > 0.6 >= sound.bound[0] > 0.5
    assert np.argmax(model.predict(x + 0.6001, verbose=0)) == 1
    (warning,) = published.warnings
    assert "Theorem 1" in str(warning) and "tanh" in warning.counterexample
    assert not published.is_sound


def test_the_published_convolution_rule_is_violated_by_a_network():
    model = keras.Sequential(
        [keras.Input((28, 28, 1)), layers.Conv2D(1, 5), layers.Flatten(), layers.Dense(2)]
    )
    head = np.zeros((24 * 24, 2))
    head[:, 0] = 1 / 24
    model.set_weights([np.ones((5, 5, 1, 1)), np.zeros(1), head, np.array([0.0, 1.0])])
    x = np.full((1, 28, 28, 1), 1.0)
    r = np.full_like(x, -1.0)
    published = minimal_perturbation_lower_bound(model, x, rules="published")
    assert published.bound[0] > np.linalg.norm(r)
    assert np.argmax(model.predict(x + r, verbose=0)) == 1
    assert minimal_perturbation_lower_bound(model, x).bound[0] <= np.linalg.norm(r)


def test_published_bounds_are_no_certificate():
    model = MODELS["tanh"]()
    x = inputs_of(model, 3)
    published = minimal_perturbation_lower_bound(model, x, rules="published")
    with pytest.raises(ValueError, match="method"):
        tfl.certify(model, x, method="published")
    with pytest.raises(TypeError):
        tfl.certify(published, x)


@pytest.mark.parametrize("build", [residual, MODELS["relu"]])
def test_published_rules_refuse_what_the_paper_does_not_cover(build):
    keras.utils.set_random_seed(0)
    model = build()
    if build is residual:
        with pytest.raises(UnsupportedLayerError, match="chains"):
            minimal_perturbation_lower_bound(model, inputs_of(model, 2), rules="published")
    else:
        lower = minimal_perturbation_lower_bound(model, inputs_of(model, 2), rules="published")
        assert "ReLU" in lower.warnings[0].counterexample


def test_bad_input_is_refused():
    model = MODELS["tanh"]()
    with pytest.raises(ValueError, match="rules"):
        minimal_perturbation_lower_bound(model, np.zeros((1, 5)), rules="best")
    with pytest.raises(ValueError, match="NaN"):
        minimal_perturbation_lower_bound(model, np.full((1, 5), np.nan))
    with pytest.raises(ValueError, match="shape"):
        minimal_perturbation_lower_bound(model, np.zeros((1, 4)))


@pytest.mark.parametrize(
    "bent",
    [
        keras.layers.LeakyReLU(negative_slope=0.1, dtype="float64"),
        keras.layers.ReLU(negative_slope=0.1, dtype="float64"),
        keras.layers.Activation(
            functools.partial(keras.activations.relu, negative_slope=0.1), dtype="float64"
        ),
    ],
    ids=["leaky", "relu", "partial"],
)
def test_settings_that_the_backend_rounds_to_float32_prove_no_decision(bent):
    """f(-1) = 1e5·(1 + 5e-10) - 0.1·1e6 > 0, and below 0 with 0.1 in float32, as on TensorFlow."""
    model = keras.Sequential(
        [
            keras.Input((1,), dtype="float64"),
            keras.layers.Dense(1, use_bias=False, dtype="float64"),
            bent,
            keras.layers.Dense(1, dtype="float64"),
        ]
    )
    model.layers[0].set_weights([np.array([[1e6]])])
    model.layers[2].set_weights([np.array([[1.0]]), np.array([1e5 * (1 + 5e-10)])])
    x = np.array([[-1.0]])
    assert minimal_perturbation_lower_bound(model, x).bound[0] == 0
    assert tfl.certify(model, x).radius[0] == 0
