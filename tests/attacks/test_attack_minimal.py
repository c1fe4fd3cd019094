"""Minimal perturbations: closed forms of linear models, the contract, and honest failures."""

import keras
import numpy as np
import pytest
from models_to_attack import cnn, linear, linear_radius, mlp, points

from tf_lyapunov.attacks import (
    DDN,
    FMN,
    CarliniWagner,
    DeepFool,
    HotCold,
    IterativePerturbation,
    MinimalFGS,
    MinimalFGV,
)
from tf_lyapunov.theory.balls import L2, Ball, Linf

DUAL = {L2: 2, Linf: 1}
EVERY = [
    MinimalFGS(),
    MinimalFGV(),
    HotCold(),
    DDN(steps=30),
    FMN(Linf, steps=30),
    DeepFool(),
    CarliniWagner(candidates=2, searches=2, steps=30),
]
every = pytest.mark.parametrize("attack", EVERY, ids=repr)


def boxed(attack, low, high):
    options = {k: v for k, v in vars(attack).items() if k in ("steps", "searches")}
    return type(attack)(attack.norm, bounds=(low, high), **options)


# A landing within 1e-6 of the gap, then float32 rounding of logits of size 1 to 10.
@pytest.mark.parametrize(
    ("attack", "tol"),
    [
        (DeepFool(), 2e-5),
        (DeepFool(Linf), 2e-5),
        (CarliniWagner(), 2e-5),
        (FMN(), 2e-5),
        (FMN(Linf), 2e-5),
        (DDN(), 2e-5),
        (MinimalFGS(), 2e-5),
        (MinimalFGV(), 2e-5),
    ],
    ids=repr,
)
def test_two_class_linear_models_are_broken_at_the_closed_form_distance(attack, tol):
    weights, bias, x = points(7, 2, seed=3), [0.3, -0.2], points(60, 7)
    model = linear(weights, bias)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    result = attack(model, x)
    expected = linear_radius(weights, np.float32(bias), x, labels, DUAL[result.norm])
    logits = np.abs(x.astype(np.float64) @ weights + bias).max(axis=1)
    slope = np.linalg.norm(weights[:, 0] - weights[:, 1], DUAL[result.norm])
    rounding = 16 * np.finfo(np.float32).eps * logits / slope
    assert np.all(result.success)
    assert np.all(result.distance >= expected - rounding)
    assert np.all(result.distance <= expected * (1 + tol) + rounding)


def test_inputs_of_one_number_are_attacked():
    model = linear(np.array([[0.0, 1.0]]), np.array([0.1, 0.0]))
    for attack in (DeepFool(), DDN(steps=30), MinimalFGV()):
        found = attack(model, np.array([[0.5]], "float32")).distance
        np.testing.assert_allclose(found, 0.4, rtol=1e-5)


@pytest.mark.parametrize("attack", [DeepFool(), DeepFool(Linf), CarliniWagner()], ids=repr)
def test_with_many_classes_the_nearest_boundary_is_found_not_the_likeliest_class(attack):
    weights = points(5, 4, seed=1) * np.array([1.0, 0.2, 3.0, 1.0], np.float32)
    x, bias = points(60, 5), np.zeros(4)
    model = linear(weights, bias)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    result = attack(model, x)
    expected = linear_radius(weights, bias, x, labels, DUAL[result.norm])
    assert np.all(result.distance <= 1.001 * expected + 1e-6)
    assert np.all(result.distance >= expected * (1 - 1e-5) - 1e-6)


@every
def test_success_means_wrong_by_the_models_own_verdict_at_the_reported_distance(attack):
    model, x = cnn(), points(40, 6, 6, 2)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    labels[::5] = (labels[::5] + 1) % 3
    result = attack(model, x, labels)
    wrong = np.argmax(model.predict(result.x_adv, verbose=0), axis=1) != labels
    distance = result.norm(0).norm(result.x_adv.astype(np.float64) - x.astype(np.float64))
    assert np.array_equal(result.success, wrong) and result.success_rate > 0.8
    assert np.array_equal(result.distance[wrong], distance[wrong])
    assert np.all(np.isnan(result.distance[~wrong]))
    assert np.all(result.distance[::5] == 0) and np.array_equal(result.x_adv[::5], x[::5])
    assert result.ball is None


def test_the_box_is_respected_and_inputs_outside_it_are_refused():
    model, x = mlp(), np.clip(points(40, 6), -1, 1)
    for attack in EVERY:
        inside = boxed(attack, -1, 1)
        result = inside(model, x)
        assert np.all(np.abs(result.x_adv) <= 1) and result.success_rate > 0.5
        with pytest.raises(ValueError, match="within `bounds`"):
            inside(model, 2 + x)


def test_a_ball_limits_what_counts_as_found():
    model, x = mlp(), points(30, 6)
    for attack in EVERY:
        free = attack(model, x)
        limited = type(attack)(free.norm(np.nanmedian(free.distance)))(model, x)
        assert 0 < limited.success_rate < 1
        assert np.all(limited.distance[limited.success] <= limited.ball.radius)


def test_constant_models_and_nan_gradients_are_reported_at_once():
    for model in (linear(np.zeros((3, 4)), [0.0, 1.0, -1.0, 0.5]), nan_slopes()):
        for attack in EVERY:
            result = attack(model, 5 + np.abs(points(5, 3)))
            assert not np.any(result.success) and np.all(result.zero_gradient)
            assert np.all(np.isfinite(result.x_adv)) and np.all(np.isnan(result.distance))


def nan_slopes():
    inputs = keras.Input((3,))
    root = keras.layers.Lambda(lambda t: keras.ops.sqrt(0.0 * t))(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()([inputs, root])))


@pytest.mark.parametrize("classes", [1, 2])
def test_models_with_two_classes_and_saturated_heads(classes):
    head = "sigmoid" if classes == 1 else "softmax"
    model, x = linear(100 * points(4, classes, seed=2), activation=head), points(20, 4)
    assert np.median(np.max(np.abs(model.predict(x, verbose=0) - 0.5), axis=1)) == 0.5
    for attack in EVERY:
        result = attack(model, x)
        assert result.success_rate == 1 and np.all(result.distance > 0)


@pytest.mark.parametrize(
    "attack",
    [kind(targeted=True) for kind in (DDN, FMN, DeepFool, CarliniWagner, MinimalFGV)],
    ids=repr,
)
def test_targets_are_reached(attack):
    model, x = linear(points(5, 4, seed=1)), points(40, 5)
    own = np.argmax(model.predict(x, verbose=0), axis=1)
    result = attack(model, x, (own + 1) % 4)
    assert np.mean(result.success) > (0.5 if isinstance(attack, MinimalFGV) else 0.95)
    assert np.array_equal(result.predictions_adv[result.success], result.labels[result.success])


def test_units_of_inputs_and_logits_do_not_matter():
    scale, gain = 1e-4, 1e4
    weights, x = points(4, 3, seed=1), points(12, 4)
    for attack, factor in (
        (DDN(steps=50), 1.0),  # the cross-entropy's direction depends on the gain
        (FMN(steps=50), gain),
        (CarliniWagner(candidates=1, searches=1, steps=50), gain),
    ):
        base = attack(linear(weights), x).distance
        scaled = attack(linear(factor / scale * weights), scale * x).distance / scale
        assert np.all(np.abs(scaled - base) <= 0.01 * base + 1e-5)


def test_batching_changes_no_result_beyond_rounding():
    model, x = mlp(), points(21, 6)
    for attack in (DDN, DeepFool, CarliniWagner, MinimalFGS):
        one, many = attack()(model, x).distance, attack(batch_size=8)(model, x).distance
        assert np.allclose(one, many, rtol=1e-2, atol=1e-5)


def test_the_published_bisection_misses_what_lies_beyond_its_limit_and_says_so():
    model, x = linear([[1.0, -1.0]]), np.array([[0.5], [2.0]], np.float32)
    result = MinimalFGS(limit=1.0)(model, x)
    assert result.success.tolist() == [True, False] and np.isnan(result.distance[1])
    assert not np.any(result.zero_gradient)


def test_fgv_moves_along_the_gradient_and_fgs_along_its_signs():
    model, x = linear([[3.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0]], np.float32)
    value, sign = MinimalFGV()(model, x), MinimalFGS()(model, x)
    assert np.allclose((value.x_adv - x)[0], [-1.2, -0.4], atol=1e-5)
    assert np.allclose((sign.x_adv - x)[0], [-1.0, -1.0], atol=1e-5)


def test_the_published_hot_cold_vector_points_back_where_the_cold_logit_is_negative():
    model = linear([[1.0, 0.1, 0.0], [0.0, 0.0, -1.0]], [-3.0, -5.0, -9.0])
    x = np.array([[1.0, 0.0]], np.float32)
    assert HotCold()(model, x).success[0]
    assert not HotCold(rule="published")(model, x).success[0]
    with pytest.raises(ValueError, match="`rank` must be less"):
        HotCold(rank=3)(model, x)


def test_iterated_perturbations_cross_the_boundary_again_and_again():
    model, x = mlp(classes=2), points(10, 6)
    path = IterativePerturbation(MinimalFGV(), steps=4)(model, x)
    first = np.stack([step.labels for step in path])
    assert np.all(first[1:] == 1 - first[:-1])
    assert np.median(path[1].distance) < 0.01 * np.median(path[0].distance)
    assert np.array_equal(path[1].labels, path[0].predictions_adv)


def test_progress_is_told_batch_by_batch():
    lines = []
    DDN(steps=2, batch_size=4)(mlp(), points(10, 6), progress=lines.append)
    assert lines == [f"DDN(L2, steps=2): {n} of 10 inputs" for n in (4, 8, 10)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DDN(Linf), "works in L2"),
        (lambda: DDN(Ball), "must be a ball"),
        (lambda: DDN(0.5), "must be a ball"),
        (lambda: DDN(gamma=1.0), "less than 1"),
        (lambda: DDN(steps=0), "`steps`"),
        (lambda: FMN(step=-1.0), "`step`"),
        (lambda: MinimalFGS(limit=np.inf), "`limit`"),
        (lambda: HotCold(rule="best"), "`rule`"),
        (lambda: CarliniWagner(weight=0.0), "`weight`"),
        (lambda: DeepFool(overshoot="much"), "`overshoot`"),
        (lambda: IterativePerturbation("fgs"), "`attack`"),
    ],
)
def test_arguments_out_of_range_are_refused(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()
