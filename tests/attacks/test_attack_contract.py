"""The attack contract: verified success, honest failure, and inputs that are refused."""

import gc
import weakref

import keras
import numpy as np
import pytest
from models_to_attack import cnn, linear, linear_radius, mlp, points

from tf_lyapunov.attacks import FGM, PGD, Attack
from tf_lyapunov.theory.balls import L2, Linf

balls = pytest.mark.parametrize("ball", [L2, Linf])


@balls
def test_success_means_wrong_near_and_finite_and_failure_has_no_distance(ball):
    model, x = cnn(), points(150, 6, 6, 2)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    labels[::5] = (labels[::5] + 1) % 3
    radius = np.linspace(0.01, 0.6, len(x))
    result = PGD(ball(radius), steps=15)(model, x, labels)
    outputs = model.predict(result.x_adv, verbose=0)
    distance = ball(0).norm(result.x_adv.astype(np.float64) - x.astype(np.float64))
    assert 0.2 < result.success_rate < 1
    assert result.x_adv.dtype == np.float32 and result.x_adv.shape == x.shape
    assert np.all(distance <= radius)
    wrong = np.argmax(outputs, axis=1) != labels
    assert np.array_equal(wrong, result.success)
    assert np.array_equal(result.predictions_adv, np.argmax(outputs, axis=1))
    assert np.array_equal(np.isnan(result.distance), ~result.success)
    assert np.array_equal(result.distance[wrong], distance[wrong])
    assert np.all(result.margins[wrong] <= 0) and np.all(result.margins[~wrong] >= 0)
    assert result.robust_accuracy == 1 - result.success_rate


def test_inputs_that_are_wrong_already_are_successes_at_distance_zero():
    model, x = mlp(), points(20, 6)
    wrong = (np.argmax(model.predict(x, verbose=0), axis=1) + 1) % 3
    for attack in (FGM(L2(0.5)), PGD(Linf(0.1), random_start=True), PGD(L2(0.0))):
        result = attack(model, x, wrong)
        assert np.all(result.success) and np.all(result.distance == 0)
        assert np.array_equal(result.x_adv, x)


def test_labels_default_to_the_predictions_and_may_be_one_hot_or_a_column():
    model, x = mlp(), points(40, 6)
    own = np.argmax(model.predict(x, verbose=0), axis=1)
    attack = PGD(L2(0.4), steps=5)
    expected = attack(model, x)
    assert np.array_equal(expected.labels, own)
    for y in (own, own[:, None], np.eye(3)[own], own.astype(float), own.tolist()):
        assert np.array_equal(attack(model, x, y).x_adv, expected.x_adv)


@balls
def test_a_radius_of_zero_breaks_nothing(ball):
    model, x = mlp(), points(20, 6)
    result = PGD(ball(0.0))(model, x)
    assert not np.any(result.success) and np.array_equal(result.x_adv, x)


def test_constant_models_fail_without_nan_and_say_that_the_gradient_is_zero():
    model = linear(np.zeros((3, 4)), [0.0, 1.0, -1.0, 0.5])
    for attack in (FGM(L2(1.0)), PGD(L2(1.0), restarts=2), PGD(Linf(1.0), stop_early=False)):
        result = attack(model, points(5, 3))
        assert not np.any(result.success) and np.all(result.zero_gradient)
        assert np.all(np.isfinite(result.x_adv)) and np.all(np.isnan(result.distance))
        assert np.all(np.isfinite(result.loss)) and "zero gradient" in str(result)


def test_a_model_that_ignores_its_input_altogether_is_no_error():
    inputs = keras.Input((3,))
    outputs = keras.layers.Lambda(lambda t: keras.ops.ones_like(t) * keras.ops.arange(3.0))(inputs)
    result = PGD(L2(1.0))(keras.Model(inputs, outputs), points(5, 3))
    assert not np.any(result.success) and np.all(result.zero_gradient)


@pytest.mark.parametrize("factor", [[0.0, 0.0], [0.0, 1.0]])
def test_gradients_that_are_nan_move_nothing(factor):
    inputs = keras.Input((2,))
    # sqrt has an infinite slope at zero; its product with zero is NaN, in one entry or in all.
    root = keras.layers.Lambda(lambda t: keras.ops.sqrt(t * keras.ops.array(factor)))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Add()([inputs, root])))
    for ball in (L2(1.0), Linf(1.0)):
        for keep in ("nearest", "last"):
            result = PGD(ball, keep=keep)(model, 5 + np.abs(points(4, 2)))
            assert np.all(np.isfinite(result.x_adv)) and np.all(result.zero_gradient)


@balls
def test_rounding_never_loses_a_success_nor_leaves_the_ball(ball):
    # Inputs of a thousand with radii near their float32 spacing: every float32 iterate is off.
    weights = points(50, 2, seed=1)
    x = 1000 + points(200, 50, scale=10.0)
    labels = np.zeros(len(x), int)
    bias = [0.0, 0.0]
    radius = np.abs(linear_radius(weights, bias, x, labels, dual={L2: 2, Linf: 1}[ball]))
    model = linear(weights, bias)
    labels = np.argmax(x.astype(np.float64) @ weights, axis=1)
    tight = np.minimum(1.01 * radius, 0.01)
    result = PGD(ball(tight), keep="last", steps=10)(model, x, labels)
    distance = ball(0).norm(result.x_adv.astype(np.float64) - x)
    assert np.all(distance <= tight)
    easy = np.asarray(1.5 * radius < 1e6)
    result = PGD(ball(1.5 * radius))(model, x, labels)
    assert np.mean(result.success[easy]) == 1


def test_a_success_of_the_attack_that_the_model_denies_is_a_failure():
    class Liar(Attack):
        def _perturb(self, problem):
            return problem.x + np.float32(1e-3), np.zeros(len(problem.x), bool)

    model, x = mlp(), points(20, 6)
    result = Liar(L2(1.0))(model, x)
    assert not np.any(result.success) and np.all(np.isnan(result.distance))


def test_iterates_outside_the_radius_are_pulled_back_before_they_are_judged():
    class Far(Attack):
        def _perturb(self, problem):
            away = problem.x - 100 * np.sign(problem.x) * np.array([1, 0], np.float32)
            return away.astype(np.float32), np.zeros(len(problem.x), bool)

    model = linear([[1.0, -1.0], [0.0, 0.0]])
    result = Far(L2([0.9, 1.1]))(model, [[1.0, 5.0], [1.0, 5.0]])
    assert result.success.tolist() == [False, True]
    assert result.distance[1] <= 1.1


def test_outputs_that_become_nan_are_no_success():
    inputs = keras.Input((1,))
    outputs = keras.layers.Lambda(
        lambda t: keras.ops.concatenate([keras.ops.sqrt(t), 0 * t], axis=-1)
    )(inputs)
    model = keras.Model(inputs, outputs)
    result = PGD(L2(2.0), steps=3, step=1.5, keep="last")(model, [[1.0]])
    assert result.x_adv[0, 0] < 0 and not result.success[0] and np.isnan(result.distance[0])


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.full((2, 6), np.nan), ValueError),
        (np.full((2, 6), np.inf), ValueError),
        (np.full((2, 6), 1e300), ValueError),
        (np.zeros((0, 6)), ValueError),
        (np.zeros(6), ValueError),
        (np.zeros((2, 5)), ValueError),
        (np.zeros((2, 6, 1)), ValueError),
        (np.array([["a"] * 6]), TypeError),
        ([[1.0], [1.0, 2.0]], TypeError),
    ],
)
def test_impossible_inputs_are_refused(x, error):
    with pytest.raises(error, match="Received"):
        PGD(L2(0.1))(mlp(), x)


@pytest.mark.parametrize(
    "y", [[0, 3], [0, -1], [0.5, 1], [0], [[1, 1, 0], [1, 0, 0]], [0, np.nan], np.zeros((2, 4))]
)
def test_impossible_labels_are_refused(y):
    with pytest.raises(ValueError, match="Received"):
        PGD(L2(0.1))(mlp(), points(2, 6), y)


def test_targets_are_needed_for_targeted_attacks_and_radii_must_fit_the_data():
    with pytest.raises(ValueError, match="targets"):
        PGD(L2(0.1), targeted=True)(mlp(), points(2, 6))
    with pytest.raises(ValueError, match="one entry per sample"):
        PGD(L2([0.1, 0.2]))(mlp(), points(3, 6))


def test_models_with_broken_weights_several_heads_or_maps_are_refused():
    broken = linear([[np.nan, 0.0]])
    with pytest.raises(ValueError, match="finite"):
        PGD(L2(0.1))(broken, [[1.0]])
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(3)(inputs)
    with pytest.raises(ValueError, match="one output"):
        PGD(L2(0.1))(keras.Model(inputs, [dense, dense]), points(2, 4))
    with pytest.raises(ValueError, match="classes"):
        PGD(L2(0.1))(keras.Model(inputs, keras.layers.Reshape((3, 1))(dense)), points(2, 4))
    with pytest.raises(TypeError, match="Keras model"):
        PGD(L2(0.1))(lambda x: x, points(2, 4))


def test_the_callers_data_and_the_model_are_left_alone():
    model, x = cnn(), points(30, 6, 6, 2)
    before, weights = x.copy(), [w.copy() for w in model.get_weights()]
    PGD(L2(1.0), random_start=True, bounds=(-9, 9))(model, x)
    assert np.array_equal(x, before)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_later_training_is_seen_and_nothing_is_compiled_twice(monkeypatch):
    from tf_lyapunov.attacks import backend

    compilations = []
    original = backend.compiled
    monkeypatch.setattr(backend, "compiled", lambda *a: compilations.append(a) or original(*a))
    model, x = linear([[1.0, -1.0]]), [[1.0]]
    attack = PGD(L2(0.5))
    assert not attack(model, x, [0]).success[0]
    once = len(compilations)
    model.set_weights([np.array([[1.0, -1.0]]), np.array([-0.8, 0.8])])
    assert PGD(L2(0.5))(model, [x[0]] * 7, [0] * 7).success.all()
    assert len(compilations) == once > 0


def test_replaced_layers_are_noticed():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="softmax")])
    model.set_weights([np.array([[1.0, -1.0], [0, 0]]), np.zeros(2)])
    assert not PGD(L2(0.5))(model, [[1.0, 0.0]]).success[0]
    model.pop()
    model.add(keras.layers.Dense(2, activation="softmax"))
    model.set_weights([np.array([[1.0, -1.0], [0, 0]]), np.array([-0.8, 0.8])])
    # Keras keeps predicting with the old layer until it is told; that is refused, not attacked.
    with pytest.raises(ValueError, match="compile"):
        PGD(L2(0.5))(model, [[1.0, 0.0]])
    model.compile()
    assert PGD(L2(0.5))(model, [[1.0, 0.0]]).success[0]


@pytest.mark.parametrize("head", [None, "softmax"])
def test_attacked_models_can_be_freed(head):
    model = mlp(head=head)
    PGD(L2(0.1), steps=2)(model, points(3, 6))
    alive = weakref.ref(model)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert alive() is None


def test_summaries_hold_plain_numbers():
    import json

    result = PGD(L2(0.5))(mlp(), points(30, 6))
    summary = json.loads(json.dumps(result.summary()))
    assert summary["n"] == len(result) == 30
    assert summary["success_rate"] == result.success_rate
    assert "inputs broken" in str(result) and "PGD(L2(0.5), steps=40)" in str(result)
