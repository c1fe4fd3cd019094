"""α_lim: sampling ≤ ascent ≤ proof, and closed forms where there are any."""

import math

import keras
import numpy as np
import pytest

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.evaluation.layerwise import layerwise_robustness
from tf_lyapunov.evaluation.localized import localized_robustness

layers = keras.layers


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def dense(*sizes, activation="relu", head=None, seed=0):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((sizes[0],))
    for width in sizes[1:-1]:
        x = layers.Dense(width, activation=activation, bias_initializer="random_normal")(x)
    return keras.Model(inputs, layers.Dense(sizes[-1], activation=head)(x))


def points(model, count=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape[1:]))


def test_the_sigmoid_of_figure_2_has_its_closed_form():
    unit = layers.Dense(1, kernel_initializer="ones", activation="sigmoid")
    model = keras.Sequential([keras.Input((1,)), unit])
    radii = np.array([0.5, 2.0, 5.0, 8.0, 10.0, 11.0])
    curve = localized_robustness(model, [[-10.0], [10.0]], radii, directions=8)
    exact = (sigmoid(-10 + radii) - sigmoid(-10)) / radii
    assert np.allclose(curve.gradient, exact, rtol=1e-9)
    assert np.all(curve.gradient <= curve.certified)
    # One dimension: every direction is one of the two.
    assert np.allclose(curve.monte_carlo, exact, rtol=1e-9)
    assert np.all(curve.certified < 2.5 * exact)
    assert np.all(curve.certified[2:] < 1.1 * exact[2:])


@pytest.mark.parametrize("norm", [2, math.inf])
def test_ascent_and_proof_meet_for_a_linear_model(norm):
    model = dense(12, 5)
    weights = np.asarray(model.get_weights()[0], np.float64)
    exact = np.linalg.norm(weights, 2) if norm == 2 else np.abs(weights).sum(axis=0).max()
    curve = localized_robustness(
        model, points(model), [0.1, 1.0], norm=norm, outputs="logits", directions=50, steps=300
    )
    assert np.allclose(curve.gradient, exact, rtol=1e-5)
    assert np.allclose(curve.certified, exact, rtol=1e-5)
    assert np.all(curve.monte_carlo <= curve.gradient) and np.all(curve.monte_carlo < 0.99 * exact)


MODELS = {
    "relu": lambda: dense(6, 9, 4),
    "deep softmax": lambda: dense(5, 7, 6, 3, head="softmax"),
    "tanh": lambda: dense(5, 8, 3, activation="tanh"),
    "one logit": lambda: dense(4, 6, 1),
    "images": lambda: keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    ),
}


@pytest.mark.parametrize("outputs", ["softmax", "logits"])
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("name", MODELS)
def test_sampling_is_below_ascent_and_ascent_below_the_bound(name, norm, outputs):
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    curve = localized_robustness(
        model, points(model), [0.01, 0.3, 2.0], norm=norm, outputs=outputs, directions=40, steps=25,
        time_budget=0.5,
    )  # fmt: skip
    assert np.all(curve.monte_carlo_by_point <= curve.gradient_by_point)
    assert np.all(curve.gradient_by_point <= curve.certified_by_point * (1 + 1e-9) + curve.noise)
    assert np.all(np.diff(curve.gradient) >= 0) and np.all(np.isfinite(curve.certified))
    assert curve.gradient[0] > 0
    value, radius = curve.saturation
    assert value == curve.gradient[-1] and radius in curve.radii
    assert curve.rows()[1]["gradient"] == curve.gradient[1]


def test_the_released_protocol_clips_and_never_falls():
    model = dense(6, 9, 4)
    x = np.random.default_rng(0).uniform(size=(5, 6))
    curve = localized_robustness(model, x, [0.05, 0.5, 2.0], protocol="released", steps=10)
    assert np.all(np.diff(curve.monte_carlo) >= 0)
    assert np.all(curve.gradient >= curve.monte_carlo)
    corner = localized_robustness(
        model, np.zeros((1, 6)), [0.1], protocol="released", bounds=(0.0, 0.0), steps=3
    )
    assert corner.gradient[0] == 0  # nothing may move


def test_the_same_seed_gives_the_same_curve_and_batches_do_not_matter_to_the_bound():
    model = dense(6, 9, 4)
    x = points(model, 7)
    first, again = (
        localized_robustness(model, x, [0.1], directions=10, steps=5, seed=3) for _ in range(2)
    )
    parts = localized_robustness(model, x, [0.1], directions=10, steps=5, batch_size=3)
    assert np.array_equal(first.gradient, again.gradient)
    assert np.allclose(first.certified, parts.certified, rtol=1e-6)


def test_layers_multiply_to_a_bound_of_the_network_where_sampling_finds_the_worst_direction():
    model = keras.Sequential(
        [keras.Input((1,)), layers.Rescaling(0.5), layers.Activation("tanh"), layers.Rescaling(3.0)]
    )
    found = layerwise_robustness(model, [[0.0], [1.0]], 0.2, directions=4)
    assert np.allclose(found.estimates[[0, 2]], [0.5, 3.0], rtol=1e-5)
    assert np.allclose(found.radii, 0.2 * np.cumprod([1, *found.estimates[:-1]]))
    assert not found.contracts and found.is_consistent
    assert found.network <= found.product * (1 + 1e-5) and found.network > 0.99 * found.product


def test_a_constant_layer_ends_the_layerwise_product():
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(2, kernel_initializer="zeros"), layers.Dense(2)]
    )
    found = layerwise_robustness(model, [[1.0, 2.0]], 0.1, directions=3)
    assert found.product == 0 and found.network == 0 and found.is_consistent


def test_branches_have_no_layerwise_rule():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Add()([inputs, layers.Dense(3)(inputs)]))
    with pytest.raises(UnsupportedLayerError, match="chains of layers"):
        layerwise_robustness(model, np.zeros((1, 3)), 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": [0.0]}, "positive"),
        ({"radii": [1e9]}, "diameter"),
        ({"x": np.full((2, 6), np.nan)}, "finite points"),
        ({"norm": 1}, "2 or math.inf"),
        ({"outputs": "probabilities"}, "outputs"),
        ({"protocol": "mine"}, "protocol"),
        ({"directions": 0}, "directions"),
    ],
)
def test_bad_input_is_refused(change, message):
    model = dense(6, 4)
    settings = {"x": points(model), "radii": [0.1], **change}
    with pytest.raises(ValueError, match=message):
        localized_robustness(model, settings.pop("x"), settings.pop("radii"), **settings)
