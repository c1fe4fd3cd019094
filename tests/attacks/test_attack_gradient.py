"""FGM, FGSM and PGD: optimality where it is known, and the options they promise."""

import numpy as np
import pytest
from models_to_attack import cnn, linear, linear_radius, mlp, points

from tf_lyapunov.attacks import FGM, FGSM, PGD
from tf_lyapunov.theory.balls import L2, Linf

# Attacks work in float32: a relative excess of a thousand of its ulps is decisive.
HAIR = 1e3 * np.finfo(np.float32).eps
balls = pytest.mark.parametrize("ball", [L2, Linf])


def binary_problem(n=200):
    weights, bias = points(5, 2, seed=1), np.array([0.1, -0.2], np.float32)
    x = points(n, 5, seed=2)
    model = linear(weights, bias)
    labels = np.argmax(x @ weights + bias, axis=1)
    return model, x, labels, weights, bias


@balls
@pytest.mark.parametrize("attack", [FGM, PGD])
def test_linear_models_break_exactly_at_their_closed_form_distance(ball, attack):
    model, x, labels, weights, bias = binary_problem()
    radius = linear_radius(weights, bias, x, labels, dual={L2: 2, Linf: 1}[ball])
    assert not np.any(attack(ball(radius * (1 - HAIR)))(model, x, labels).success)
    assert np.all(attack(ball(radius * (1 + HAIR)))(model, x, labels).success)


@balls
def test_targeted_pgd_reaches_each_class_of_a_linear_model_exactly_when_it_can(ball):
    weights, bias, x = points(5, 4, seed=1), points(4, seed=3), points(60, 5, seed=2)
    model = linear(weights, bias)
    labels = np.argmax(x @ weights + bias, axis=1)
    radius = linear_radius(weights, bias, x, labels, dual={L2: 2, Linf: 1}[ball])
    broken = np.zeros(len(x), bool)
    for target in range(4):
        run = PGD(ball(radius * 1.02), targeted=True, loss="margin", steps=100)
        result = run(model, x, np.full(len(x), target))
        assert np.all(result.predictions_adv[result.success] == target)
        broken |= result.success & (labels != target)
        run = PGD(ball(radius * (1 - HAIR)), targeted=True)
        assert not np.any(run(model, x, np.full(len(x), target)).success & (labels != target))
    assert np.all(broken)


def test_fgm_is_the_dual_maximizer_of_the_gradient():
    model, x, labels, weights, _ = binary_problem(8)
    ascent = np.where(labels[:, None] == 0, 1, -1) * (weights[:, 1] - weights[:, 0])
    for ball in (L2(1e-2), Linf(1e-2)):
        step = FGM(ball)(model, x).x_adv - x
        slack = 4 * np.finfo(np.float32).eps * np.abs(x).max()
        np.testing.assert_allclose(step, ball.maximizer(ascent), rtol=1e-4, atol=slack)


def test_fgsm_is_fgm_in_the_maximum_norm():
    model, x = mlp(), points(10, 6)
    assert np.array_equal(FGSM(0.1)(model, x).x_adv, FGM(Linf(0.1))(model, x).x_adv)
    with pytest.raises(TypeError, match="FGM"):
        FGSM(L2(0.1))


@balls
def test_bounds_hold_for_every_result_and_radii_too(ball):
    model, x = cnn(), np.clip(points(40, 6, 6, 2), -0.5, 0.5)
    for start in (False, True):
        attack = PGD(ball(0.4), bounds=(-0.5, 0.5), random_start=start, keep="last", steps=8)
        result = attack(model, x)
        assert result.x_adv.min() >= -0.5 and result.x_adv.max() <= 0.5
        assert np.any(result.x_adv != x)
        change = result.x_adv.astype(np.float64) - x.astype(np.float64)
        assert np.all(ball(0).norm(change) <= 0.4)


def test_bounds_can_differ_between_features_and_make_the_attack_weaker():
    model, x, labels, weights, bias = binary_problem()
    radius = L2(1.5 * linear_radius(weights, bias, x, labels, dual=2))
    high = np.abs(x).max(axis=0) + 1e-3
    # The last feature is frozen between the least and greatest of the data.
    boxed = PGD(radius, bounds=(-high, high))(model, x, labels)
    free = PGD(radius)(model, x, labels)
    assert np.all(np.abs(boxed.x_adv) <= high.astype(np.float32))
    assert np.all(free.success) and boxed.success_rate <= 1
    with pytest.raises(ValueError, match="within `bounds`"):
        PGD(radius, bounds=(-0.1, 0.1))(model, x)


def test_pgd_is_at_least_as_strong_as_fgm_and_finds_larger_losses():
    model, x = mlp(), points(300, 6)
    for ball in (L2(0.5), Linf(0.2)):
        weak, strong = FGM(ball)(model, x), PGD(ball, keep="loss")(model, x)
        assert strong.success_rate >= weak.success_rate > 0
        assert np.mean(strong.loss) > np.mean(weak.loss)


def test_restarts_only_add_successes():
    model, x = cnn(), points(120, 6, 6, 2)
    first = PGD(L2(0.25), steps=2, random_start=True)(model, x)
    more = PGD(L2(0.25), steps=2, random_start=True, restarts=6)(model, x)
    assert np.all(more.success >= first.success)
    assert more.success.sum() > first.success.sum()
    assert np.all(more.loss[~more.success] >= first.loss[~more.success])


def test_random_starts_depend_on_the_seed_and_the_position_but_not_on_batches():
    model, x = mlp(), points(30, 6)
    run = {"steps": 1, "random_start": True, "keep": "last"}
    one = PGD(L2(0.3), batch_size=7, seed=3, **run)(model, x)
    two = PGD(L2(0.3), batch_size=64, seed=3, **run)(model, x)
    other = PGD(L2(0.3), batch_size=64, seed=4, **run)(model, x)
    np.testing.assert_allclose(one.x_adv, two.x_adv, atol=HAIR)
    assert np.abs(one.x_adv - other.x_adv).max() > 0.01


@balls
def test_searching_on_after_the_first_success_finds_nearer_ones(ball):
    model, x = mlp(), points(300, 6)
    fast = PGD(ball(1.0), steps=20, random_start=True)(model, x)
    full = PGD(ball(1.0), steps=20, random_start=True, stop_early=False, restarts=3)(model, x)
    both = fast.success & full.success
    assert np.all(full.success >= fast.success)
    assert np.all(full.distance[both] <= fast.distance[both] * (1 + HAIR))
    assert np.any(full.distance[both] < 0.9 * fast.distance[both])


def test_the_kept_iterate_is_the_last_or_the_worst_as_asked():
    model, x = mlp(), points(50, 6)
    steps = {"steps": 12, "step": 0.7}  # too long a step: the last iterate is not the worst
    last = PGD(L2(0.5), keep="last", **steps)(model, x)
    loss = PGD(L2(0.5), keep="loss", **steps)(model, x)
    assert np.all(loss.loss >= last.loss - HAIR)
    on_sphere = L2(0).norm(last.x_adv.astype(np.float64) - x)
    np.testing.assert_allclose(on_sphere, 0.5, rtol=HAIR)


def test_steps_can_be_given_per_sample():
    model, x = mlp(), points(4, 6)
    step = np.array([0.01, 0.02, 0.03, 0.04])
    result = PGD(L2(1.0), steps=1, step=step, keep="last", batch_size=3)(model, x)
    moved = L2(0).norm(result.x_adv.astype(np.float64) - x)
    np.testing.assert_allclose(moved, step, rtol=1e-4)
    with pytest.raises(ValueError, match="one entry per sample, 4"):
        PGD(L2(1.0), step=step[:2])(model, x)


def test_stages_and_batches_do_not_change_what_is_found():
    model, x = cnn(), points(90, 6, 6, 2)
    small = PGD(L2(0.5), steps=23, batch_size=16)(model, x)
    large = PGD(L2(0.5), steps=23, batch_size=128)(model, x)
    assert np.array_equal(small.success, large.success)
    assert 0 < small.success_rate < 1
    np.testing.assert_allclose(small.x_adv, large.x_adv, atol=1e-3)


def test_saturated_softmax_hides_no_gradient():
    # Logit gaps of 400 make every float32 softmax gradient exactly zero.
    model = linear([[400.0, -400.0]])
    result = PGD(L2(1.1))(model, [[1.0]], [0])
    assert result.success[0] and not result.zero_gradient[0]


def test_gradients_far_outside_the_float32_square_range_still_count():
    for scale in (1e-25, 1e25):
        model = linear(scale * np.array([[1.0, -1.0], [0.5, 0.0]]))
        result = PGD(L2(3.0), steps=10)(model, [[1.0, 0.0]], [0])
        assert result.success[0], scale


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 1.5}, TypeError),
        ({"steps": True}, TypeError),
        ({"restarts": 0}, ValueError),
        ({"step": -1.0}, ValueError),
        ({"step": "long"}, TypeError),
        ({"loss": "mse"}, ValueError),
        ({"keep": "first"}, ValueError),
        ({"bounds": (1.0, 0.0)}, ValueError),
        ({"bounds": 3.0}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"seed": -1}, ValueError),
    ],
)
def test_impossible_options_are_refused_with_what_was_received(options, error):
    with pytest.raises(error, match="Received"):
        PGD(L2(0.1), **options)


def test_a_bare_number_is_no_ball():
    for attack in (PGD, FGM):
        with pytest.raises(TypeError, match=r"L2\(0.3\)"):
            attack(0.3)
