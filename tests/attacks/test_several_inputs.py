"""Attacks on models with several inputs: together, or one while the others are held fixed."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov import attacks
from tf_lyapunov.theory.balls import L2, Linf

ROWS = {None: slice(None), "a": slice(0, 3), "b": slice(3, 7)}


def joined(head="softmax"):
    """A linear classifier of a (3) and the image b (2, 2), and its matrix."""
    a, b = keras.Input((3,), name="a"), keras.Input((2, 2, 1), name="b")
    dense = layers.Dense(4, activation=head)
    model = keras.Model({"a": a, "b": b}, dense(layers.Concatenate()([a, layers.Flatten()(b)])))
    return model, np.asarray(keras.ops.convert_to_numpy(dense.kernel), np.float64)


def sample(n=12, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(n, 2, 2, 1))
    return {"a": a.astype("float32"), "b": b.astype("float32")}


def exact(matrix, x, perturbed, order=2):
    """Distance to the nearest other class, in the coordinates that may change."""
    flat = np.concatenate([x["a"], x["b"].reshape(len(x["b"]), -1)], axis=1).astype(np.float64)
    logits, part = flat @ matrix, matrix[ROWS[perturbed]]
    best = logits.argmax(axis=1)
    gaps = logits[np.arange(len(logits)), best][:, None] - logits
    steps = part[:, best].T[:, :, None] - part[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = gaps / np.linalg.norm(steps, order, axis=1)
    distance[np.arange(len(logits)), best] = np.inf
    return distance.min(axis=1)


_BOX = (-20, 20)
# Attack, what it changes, its box, and its largest excess over the exact distance, if any is known.
MINIMAL = {
    "DeepFool": (attacks.DeepFool, "b", _BOX, 1e-4),
    "DDN": (attacks.DDN, "a", None, None),
    "FMN": (lambda **o: attacks.FMN(steps=50, **o), "b", None, 1e-3),
    "FAB": (lambda **o: attacks.FAB(steps=20, **o), "a", _BOX, 1e-3),
    "CarliniWagner": (lambda **o: attacks.CarliniWagner(steps=60, **o), "a", _BOX, 1e-3),
    "LBFGS": (attacks.LBFGS, "b", _BOX, None),
    "MinimalFGS": (attacks.MinimalFGS, "a", None, None),
    "HotCold": (attacks.HotCold, "b", None, None),
}


@pytest.mark.parametrize("name", MINIMAL)
def test_minimal_attacks_find_the_boundary_and_leave_what_is_held(name):
    make, perturbed, bounds, tol = MINIMAL[name]
    model, matrix = joined()
    x = sample()
    held = "b" if perturbed == "a" else "a"
    found = make(bounds=bounds)(model, x, perturbed=perturbed)
    assert list(found.x_adv) == ["a", "b"] and found.x_adv["b"].shape == x["b"].shape
    assert np.array_equal(found.x_adv[held], x[held])
    assert found.success.all()
    order = np.inf if found.norm is Linf else 2
    change = (found.x_adv[perturbed] - x[perturbed].astype(np.float64)).reshape(12, -1)
    assert np.allclose(found.distance, np.linalg.norm(change, order, axis=1), rtol=1e-9)
    nearest = exact(matrix, x, perturbed, 1 if found.norm is Linf else 2)
    assert np.all(found.distance >= nearest * (1 - 1e-4) - 1e-6)
    if tol is not None:
        assert np.all(found.distance <= nearest * (1 + tol) + 1e-5)


BALLS = {
    "PGD": lambda ball: attacks.PGD(ball, steps=20, loss="margin"),
    "PGD at random": lambda ball: attacks.PGD(
        ball, steps=20, loss="margin", random_start=True, restarts=2
    ),
    "FGM": lambda ball: attacks.FGM(ball, loss="margin"),
    "APGD": lambda ball: attacks.APGD(ball, loss="dlr", classes=3, steps=20),
    "Square": lambda ball: attacks.Square(ball, queries=400),
    "AutoAttack": lambda ball: attacks.AutoAttack(ball, steps=10, queries=20),
}


@pytest.mark.parametrize("name", BALLS)
def test_attacks_in_balls_break_what_is_outside_and_nothing_inside(name):
    model, matrix = joined()
    x = sample()
    # One query of Square changes a window: it finds what gradients find at twice the radius.
    outside = 3.0 if name == "Square" else 1.02
    for perturbed in (None, "b") if name == "PGD" else ("b",):
        nearest = exact(matrix, x, perturbed)
        attack = BALLS[name](L2(nearest * 0.999))
        assert not attack(model, x, perturbed=perturbed).success.any()
        found = BALLS[name](L2(nearest * outside))(model, x, perturbed=perturbed)
        # FGM's one step in the margin's direction reaches the nearest class of a linear model
        # only where it is the likeliest; the others find every class.
        share = {"FGM": 0.1, "PGD": 0.1, "PGD at random": 0.1, "Square": 0.5}.get(name, 1.0)
        assert found.success.mean() >= share
        for held in {"a", "b"} - {perturbed} if perturbed else ():
            assert np.array_equal(found.x_adv[held], x[held])


def test_holding_an_input_is_attacking_the_model_of_the_other():
    """With b held, logits are those of a alone with another bias: attacks find the same."""
    model, matrix = joined(head=None)
    x = sample(n=6)
    together = attacks.DeepFool()(model, x, perturbed="a")
    alone = keras.Sequential([keras.Input((3,)), layers.Dense(4)])
    for i in range(6):
        bias = x["b"][i].ravel().astype(np.float64) @ matrix[3:]
        alone.set_weights([matrix[:3], bias])
        found = attacks.DeepFool()(alone, x["a"][i : i + 1])
        assert together.distance[i] == pytest.approx(found.distance[0], rel=1e-3, abs=1e-6)


def test_lists_and_dicts_in_any_order_are_attacked_alike():
    model, _ = joined()
    x = sample()
    named = attacks.DeepFool()(model, {"b": x["b"], "a": x["a"]}, perturbed="b")
    listed = attacks.DeepFool()(model, (x["a"], x["b"]), perturbed=1)
    assert list(named.x_adv) == ["b", "a"] and isinstance(listed.x_adv, tuple)
    assert np.array_equal(named.x_adv["b"], listed.x_adv[1])
    assert np.array_equal(named.distance, listed.distance)


def test_boxes_are_by_input_and_concern_what_may_change():
    model, _ = joined()
    x = sample()
    x["a"] = np.clip(x["a"], -1, 1)
    box = ({"a": -1.0, "b": np.full((2, 2, 1), -4.0)}, {"a": 1.0, "b": 4.0})
    found = attacks.PGD(L2(3.0), steps=5, bounds=box)(model, x)
    assert np.abs(found.x_adv["a"]).max() <= 1 and np.abs(found.x_adv["b"]).max() <= 4
    # What is held may lie anywhere.
    x["b"] = 10 * x["b"]
    held = attacks.PGD(L2(3.0), steps=5, bounds=(-1, 1))(model, x, perturbed="a")
    assert np.abs(held.x_adv["a"]).max() <= 1 and np.array_equal(held.x_adv["b"], x["b"])
    with pytest.raises(ValueError, match="must lie within `bounds`"):
        attacks.PGD(L2(3.0), bounds=(-1, 1))(model, x)
    with pytest.raises(ValueError, match=r"`bounds`.*'a'"):
        attacks.PGD(L2(3.0), bounds=({"c": -1.0}, {"c": 1.0}))(model, x, perturbed="a")
    with pytest.raises(ValueError, match="with the same names"):
        attacks.PGD(L2(3.0), bounds=({"a": -1.0}, {"b": 1.0}))
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="models with several inputs"):
        attacks.PGD(L2(1.0), bounds=({"a": -9.0}, 9.0))(plain, x["a"])


def test_an_ensemble_resumes_and_tells_apart_what_was_perturbed(tmp_path):
    model, _ = joined()
    x, state = sample(), tmp_path / "state.npz"
    ensemble = attacks.Ensemble([attacks.MinimalFGV(), attacks.DeepFool()])
    first = ensemble(model, x, perturbed="a", state=state, chunk_size=5)
    again = ensemble(model, x, perturbed="a", state=state, chunk_size=5)
    assert np.array_equal(first.distance, again.distance)
    assert np.array_equal(first.x_adv["a"], again.x_adv["a"])
    with pytest.raises(ValueError, match="`state` belongs to another"):
        ensemble(model, x, perturbed="b", state=state, chunk_size=5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x["a"], TypeError, "one array per input"),
        (lambda x: {"a": x["a"]}, ValueError, "missing 'b'"),
        (lambda x: [x["a"], x["b"], x["b"]], ValueError, "3 arrays for 2 inputs"),
        (lambda x: [x["a"], x["b"][:5]], ValueError, "equally many"),
        (lambda x: [x["a"], x["b"][:, :1]], ValueError, r"`x\['b'\]` must have the shape"),
        (lambda x: [x["a"] * np.inf, x["b"]], ValueError, r"`x\['a'\]` must be finite"),
        (lambda x: [x["a"].astype(str), x["b"]], TypeError, r"`x\['a'\]` must hold numbers"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    model, _ = joined()
    with pytest.raises(error, match=message) as raised:
        attacks.FGM(L2(1.0))(model, change(sample()))
    assert "Received: " in str(raised.value)


def test_one_input_takes_perturbed_too():
    model = keras.Sequential([keras.Input((3,), name="a"), layers.Dense(2)])
    x = sample()["a"]
    whole = attacks.DeepFool()(model, x)
    named = attacks.DeepFool()(model, x, perturbed="a")
    assert np.array_equal(whole.x_adv, named.x_adv)
    with pytest.raises(ValueError, match="`perturbed` must be an input"):
        attacks.DeepFool()(model, x, perturbed="b")


def test_several_outputs_are_refused():
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], [layers.Dense(2)(a), layers.Dense(2)(b)])
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match="one output"):
        tfl.attacks.FGM(L2(1.0))(model, [x, x])
