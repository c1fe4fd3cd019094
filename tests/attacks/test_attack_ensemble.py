"""APGD, FAB, Square, L-BFGS and AutoAttack: closed forms, survivors, and runs that continue."""

import importlib.util

import keras
import numpy as np
import pytest
from models_to_attack import cnn, linear, linear_radius, mlp, points

from tf_lyapunov.attacks import (
    APGD,
    DDN,
    FAB,
    FMN,
    LBFGS,
    PGD,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    Ensemble,
    MinimalFGV,
    Square,
)
from tf_lyapunov.layers import SpectralDense
from tf_lyapunov.layers.condensing import condense
from tf_lyapunov.theory.balls import L2, Linf

DUAL = {L2: 2, Linf: 1}


def four_classes():
    weights, x = points(5, 4, seed=1), points(40, 5)
    model = linear(weights)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    return model, x, {k: linear_radius(weights, np.zeros(4), x, labels, DUAL[k]) for k in DUAL}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("ball", [L2, pytest.param(Linf, marks=SLOW)])
@pytest.mark.parametrize(
    "make",
    [
        lambda r, **o: APGD(r, **o),
        lambda r, **o: APGD(r, loss="dlr", classes=9, **o),
        lambda r, **o: FAB(r, steps=30, **o),
        lambda r, **o: FAB(r, steps=30, classes=9, **o),
    ],
    ids=["APGD-CE", "APGD-T", "FAB", "FAB-T"],
)
def test_linear_models_break_just_above_the_closed_form_radius_and_never_below(ball, make):
    model, x, radius = four_classes()
    above, below = make(ball(1.02 * radius[ball] + 1e-4)), make(ball(radius[ball] * (1 - 1e-3)))
    # The cross-entropy leads to the likeliest class, the others to the nearest.
    assert np.mean(above(model, x).success) > (0.3 if "cross" in repr(above) else 0.97)
    assert not np.any(below(model, x).success)


@pytest.mark.parametrize(
    "attack", [FAB(), FAB(Linf), pytest.param(FAB(classes=9), marks=SLOW), LBFGS()], ids=repr
)
def test_fab_and_lbfgs_reach_the_minimum_of_linear_models(attack):
    weights, x = points(5, 2, seed=1), points(30, 5)
    model = linear(weights)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    exact = linear_radius(weights, np.zeros(2), x, labels, DUAL[attack.norm])
    result = attack(model, x)
    assert np.all(result.success) and np.all(result.distance >= exact * (1 - 1e-5) - 1e-6)
    assert np.all(result.distance <= exact * (1 + 2e-5) + 1e-5)


@pytest.mark.parametrize(
    "attack",
    [LBFGS, FAB, FMN, *(pytest.param(a, marks=SLOW) for a in (DDN, DeepFool, CarliniWagner))],
)
def test_the_box_binds_and_the_minimum_inside_it_is_found(attack):
    model = linear([[2.0, -2.0], [1.0, -1.0]])
    x = np.array([[0.2, 0.9]], np.float32)
    result = attack(bounds=(-0.1, 1.0))(model, x)
    # 2a + b = 0 with a ≥ -0.1: a = -0.1, b = 0.2.
    assert np.isclose(result.distance[0], np.hypot(0.3, 0.7), rtol=1e-5)
    assert np.all((result.x_adv >= np.float32(-0.1)) & (result.x_adv <= 1))


@pytest.mark.parametrize("ball", [L2(0.5), Linf(0.2)])
def test_square_breaks_inputs_without_gradients_and_stays_inside(ball):
    hard = keras.layers.Lambda(lambda t: keras.ops.sign(t) * keras.ops.abs(t) ** 0.5)
    inputs = keras.Input((6, 6, 2))
    blocked = keras.layers.Lambda(keras.ops.stop_gradient)(hard(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(blocked)))
    x = np.clip(points(30, 6, 6, 2), -1, 1)
    assert np.all(PGD(ball)(model, x).zero_gradient)
    result = Square(ball, queries=300, bounds=(-1, 1))(model, x)
    assert result.success_rate > 0.3 and not np.any(result.zero_gradient)
    distance = type(ball)(0).norm(result.x_adv.astype(np.float64) - x)
    assert np.all(distance <= ball.radius) and np.all(np.abs(result.x_adv) <= 1)


@pytest.mark.parametrize("shape", [(7,), (5, 4), (5, 4, 3)])
def test_square_takes_lines_and_images_and_depends_on_the_seed_alone(shape):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    x = points(12, *shape)
    for ball in (L2(0.7), Linf(0.2)):
        once = Square(ball, queries=60)(model, x)
        again = Square(ball, queries=60, batch_size=5)(model, x)
        # Rounding may turn an acceptance over.
        assert np.mean(once.success == again.success) >= 0.9
        assert 0 < once.success_rate


def test_the_logit_ratio_gives_way_to_the_margin_in_small_models_and_the_result_says_so():
    for classes, texts in ((2, ["needs 3", "1 instead"]), (3, ["needs 4", "2 instead"])):
        model, x = linear(points(4, classes, seed=3)), points(10, 4)
        plain = APGD(L2(5.0), loss="dlr")(model, x)
        assert bool(plain.notes) == (classes == 2) and plain.success_rate == 1
        result = APGD(L2(5.0), loss="dlr", classes=9)(model, x)
        assert result.success_rate == 1 and all(t in str(result) for t in ["margin", texts[1]])
    result = AutoAttack(L2(5.0), queries=10)(linear(points(4, 2)), points(10, 4))
    assert result.success_rate == 1


def test_autoattack_finds_all_that_pgd_finds_and_says_who_did():
    model, x = mlp(), points(60, 6)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    labels[:6] = (labels[:6] + 1) % 3
    for ball in (L2(0.4), Linf(0.2)):
        simple = PGD(ball)(model, x, labels)
        lines = []
        result = AutoAttack(ball, queries=100)(model, x, labels, progress=lines.append)
        assert 0.2 < result.success_rate < 1
        assert np.sum(simple.success & ~result.success) == 0
        assert np.all(result.found_by[:6] == "clean") and np.all(result.distance[:6] == 0)
        assert np.array_equal(result.found_by == "", ~result.success)
        assert sum(result.counts.values()) == len(x) == result.summary()["n"]
        wrong = np.argmax(model.predict(result.x_adv, verbose=0), axis=1) != labels
        assert np.array_equal(wrong, result.success)
        assert any(line.startswith("Square") for line in lines)


def test_constant_models_survive_everything_and_the_zero_gradient_is_reported():
    model, x = linear(np.zeros((3, 4)), [0.0, 1.0, -1.0, 0.5]), points(5, 3)
    result = AutoAttack(L2(1.0), queries=20)(model, x)
    assert not np.any(result.success) and np.all(result.zero_gradient)
    assert not np.any(LBFGS()(model, x).success) and np.all(LBFGS()(model, x).zero_gradient)


def test_the_nearest_of_several_attacks_is_kept():
    model, x = mlp(), points(25, 6)
    parts = [MinimalFGV(), DDN(steps=20), DeepFool()]
    best = np.min([attack(model, x).distance for attack in parts], axis=0)
    result = Ensemble(parts)(model, x)
    assert np.allclose(result.distance, best, rtol=1e-6)
    assert set(result.counts) <= {repr(attack) for attack in parts}


class Killed(Exception):
    pass


def test_a_killed_run_continues_where_it_was_with_the_same_result(tmp_path):
    model, x = mlp(), points(30, 6)
    attack, file = (
        AutoAttack(Linf(np.linspace(0.05, 0.3, 30)), queries=40, steps=15),
        tmp_path / "s.npz",
    )
    expected = attack(model, x, chunk_size=12)
    calls = []

    def kill_at(n):
        def progress(text):
            calls.append(text)
            if len(calls) >= n and "chunk" in text:
                raise Killed

        return progress

    for n in (4, 12):
        calls.clear()
        with pytest.raises(Killed):
            attack(model, x, chunk_size=12, state=file, progress=kill_at(n))
    calls.clear()
    result = attack(model, x, chunk_size=12, state=file, progress=kill_at(10**6))
    assert calls and not any(text.startswith("APGD-CE: 12 inputs, chunk 1") for text in calls)
    for name in ("x_adv", "success", "distance", "found_by", "margins", "labels"):
        assert np.array_equal(
            getattr(result, name), getattr(expected, name), equal_nan=name == "distance"
        )
    done = attack(model, x, chunk_size=12, state=file, progress=kill_at(0))
    assert np.array_equal(done.x_adv, expected.x_adv)


def test_chunks_change_neither_radii_nor_random_numbers():
    model, x = mlp(), points(20, 6)
    attack = APGD(L2(np.linspace(0.05, 0.5, 20)), steps=10, seed=3)
    whole, parts = (Ensemble([attack])(model, x, chunk_size=size) for size in (100, 7))
    assert np.mean(whole.success == parts.success) >= 0.95
    assert np.allclose(whole.x_adv, parts.x_adv, atol=1e-3)


def test_a_state_of_other_weights_data_or_attacks_or_a_damaged_one_is_refused(tmp_path):
    model, x = mlp(), points(6, 6)
    file = tmp_path / "state.npz"
    attack = Ensemble([PGD(L2(0.3), steps=3)])
    attack(model, x, state=file)
    others = [
        (Ensemble([PGD(L2(0.3), steps=4)]), model, x),
        (Ensemble([PGD(L2(0.4), steps=3)]), model, x),
        (attack, mlp(), x),
        (attack, model, x + 1),
    ]
    for other, network, inputs in others:
        with pytest.raises(ValueError, match="belongs to another"):
            other(network, inputs, state=file)
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"PK" + content[:40]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="no attack state"):
            attack(model, x, state=file)


def small(activation="relu", max_gain=1.0, crossed=False):
    """Networks of the same weights that compute different maps."""
    inputs = keras.Input((6,))
    dense = [keras.layers.Dense(6, activation), SpectralDense(6, max_gain=max_gain)]
    x = inputs
    for layer in reversed(dense) if crossed else dense:
        x = layer(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    for layer in (*dense, model.layers[-1]):
        layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    return model


def test_a_state_of_the_same_weights_in_another_network_is_refused(tmp_path):
    file, x = tmp_path / "state.npz", points(6, 6)
    attack = Ensemble([DeepFool()])
    found = attack(small(), x, state=file)
    # Built again, with other names: the same network.
    assert np.array_equal(attack(small(), x, state=file).x_adv, found.x_adv)
    fixed = condense(small())
    fixed.layers[2]._cache[0].assign(fixed.layers[2]._cache[0] * 0.5)
    for other in (small("tanh"), small(max_gain=8.0), small(crossed=True), fixed):
        with pytest.raises(ValueError, match="belongs to another"):
            attack(other, x, state=file)


def test_equal_attacks_are_kept_apart():
    low, high = (DeepFool(bounds=(0.0, top)) for top in (1.0, 2.0))
    assert len(Ensemble([low, high]).attacks) == 2
    assert list(Ensemble(low).attacks) == [repr(low)]


def test_attacks_on_convolutions_use_the_image_shape():
    model, x = cnn(), points(20, 6, 6, 2)
    result = AutoAttack(L2(0.6), queries=60, steps=20)(model, x)
    assert result.x_adv.shape == x.shape and result.success_rate > 0.3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AutoAttack(0.3), "must be a ball"),
        (lambda: Ensemble([]), "must be attacks"),
        (lambda: Ensemble(["pgd"]), "must be attacks"),
        (lambda: Ensemble([DDN(), PGD(L2(1.0))]), "must share"),
        (lambda: Ensemble([DDN(), DDN(targeted=True)]), "must share"),
        (lambda: APGD(L2(1.0), loss="hinge"), "`loss`"),
        (lambda: APGD(L2(1.0), classes=3), "`classes` needs"),
        (lambda: FAB(classes=3, targeted=True), "`classes` needs"),
        (lambda: Square(L2(1.0), share=1.5), "at most 1"),
        (lambda: Square(L2), "must be a ball"),
        (lambda: LBFGS(Linf), "works in L2"),
        (lambda: APGD(L2(1.0), seed=-1), "`seed`"),
    ],
)
def test_arguments_out_of_range_are_refused(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_robust_accuracy_equals_pyautoattacks_within_half_a_point():
    for name in ("autoattack", "torch"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip("the original attacks torch models: set KERAS_BACKEND=torch")
    import autoattack
    import torch

    model, x = mlp(classes=5), np.clip(0.5 + 0.2 * points(500, 6), 0, 1)
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    ours = AutoAttack(L2(0.1), bounds=(0, 1))(model, x, labels).robust_accuracy
    peer = autoattack.AutoAttack(model, norm="L2", eps=0.1, version="standard", device="cpu")
    found = peer.run_standard_evaluation(torch.tensor(x), torch.tensor(labels))
    predictions = np.argmax(model.predict(found.numpy(), verbose=0), axis=1)
    assert abs(ours - np.mean(predictions == labels)) <= 0.005
