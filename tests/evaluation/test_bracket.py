"""Brackets: no attack gets below a bound, and what contradicts one is loud."""

import dataclasses
import functools
import json
import math
import types

import fresh_processes
import keras
import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.attacks import DDN, FMN, DeepFool, Ensemble, MinimalFGV
from tf_lyapunov.evaluation import bracket as module
from tf_lyapunov.evaluation.bracket import UnsoundBound, bracket
from tf_lyapunov.layers import LocalResponseNormalization
from tf_lyapunov.theory.balls import L2, Linf

layers = keras.layers
# Every attack is compiled for every model; most tests need one.
ONE = {"DeepFool": DeepFool()}


@functools.cache
def mlp(activation, sizes=(4, 6, 5, 3)):
    model = keras.Sequential(
        [keras.Input((sizes[0],))]
        + [layers.Dense(width, activation) for width in sizes[1:-1]]
        + [layers.Dense(sizes[-1])]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) / math.sqrt(len(w)) for w in model.get_weights()])
    return model


def cnn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, padding="same"),
            LocalResponseNormalization(2, 1.0, 0.1, 0.75),
            layers.MaxPooling2D(3, 2),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def linear(kernel, bias):
    model = keras.Sequential([keras.Input((len(kernel),)), layers.Dense(len(bias))])
    model.set_weights([np.array(kernel, "float32"), np.array(bias, "float32")])
    return model


@functools.cache
def identity():
    return linear(np.eye(2), np.zeros(2))


@pytest.mark.parametrize("name", ["tanh", "relu", "cnn"])
def test_the_bracket_of_every_input_is_closed_from_both_sides(name):
    model = cnn() if name == "cnn" else mlp(name)
    x = np.random.default_rng(1).normal(size=(24, *model.input_shape[1:]))
    found = bracket(model, x, attacks=None if name == "relu" else ONE, time_budget=2.0)
    assert np.all(found.lower <= found.upper)
    assert np.all(found.lower == np.maximum(found.bound, found.certified))
    assert np.all(found.lower > 0) and found.found.mean() > 0.4
    # The perturbed inputs are at the reported distance and do change the model's decision.
    size = np.linalg.norm((found.x_adv.astype(np.float64) - x).reshape(len(x), -1), axis=1)
    ok = found.found
    np.testing.assert_allclose(found.upper[ok], size[ok], rtol=1e-12)
    decided = np.argmax(model.predict(found.x_adv, verbose=0), axis=1)
    assert np.all(decided[ok] != found.labels[ok])
    assert set(found.attack[ok]) <= {"FGV", "DeepFool", "DDN", "FMN"}


def test_brackets_of_linear_models_are_tight():
    model = linear(np.random.default_rng(2).normal(size=(5, 4)), np.zeros(4))
    found = bracket(model, np.random.default_rng(3).normal(size=(40, 5)), attacks=ONE)
    assert np.all(found.ratio[found.found] < 1 + 1e-4)


def test_misclassified_inputs_have_radius_zero():
    x = np.array([[3.0, 1.0], [3.0, 1.0]])
    found = bracket(identity(), x, np.array([0, 1]), attacks=ONE)
    assert found.lower[1] == found.upper[1] == 0 < found.lower[0]
    assert found.attack[1] == "clean" and np.isnan(found.ratio[1])
    assert found.wrong.tolist() == [False, True]
    one_hot = bracket(identity(), x, np.eye(2), attacks=ONE)
    np.testing.assert_array_equal(one_hot.lower, found.lower)


@pytest.mark.parametrize("classes", [1, 2])
def test_saturated_heads_are_looked_through(classes):
    kernel, head = ([[300.0], [0.0]], "sigmoid") if classes == 1 else (300 * np.eye(2), "softmax")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(classes, activation=head)])
    model.set_weights([np.array(kernel, "float32"), np.zeros(classes, "float32")])
    found = bracket(model, np.array([[2.0, 0.0]]), attacks=ONE)
    expected = 2.0 if classes == 1 else math.sqrt(2)
    assert found.lower[0] == pytest.approx(expected) and found.ratio[0] < 1 + 1e-4


def test_a_constant_model_is_reported_not_looped_over():
    found = bracket(linear(np.zeros((2, 3)), [1.0, 0.0, 0.0]), np.ones((3, 2)), attacks=ONE)
    assert np.all(np.isinf(found.upper)) and np.all(found.attack == "")
    assert np.all(found.zero_gradient)
    summary = found.summary()
    assert summary["not_found"] == 3 and summary["upper"] is None
    assert all(row["upper"] is None for row in found.rows())
    json.dumps(found.rows(), allow_nan=False)
    assert "0 of 3 inputs perturbed" in found.table()


@pytest.mark.parametrize("activation", ["tanh", "softplus", "relu"])
def test_a_network_that_does_not_depend_on_its_inputs_has_infinite_bounds(activation):
    head = layers.Dense(3, kernel_initializer="zeros", bias_initializer="random_normal")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation), head])
    found = bracket(model, np.ones((3, 4), "float32"), attacks=DeepFool())
    assert np.all(np.isposinf(found.bound)) and np.all(np.isposinf(found.lower))
    assert np.all(np.isinf(found.upper)) and not found.rounding.any()


def test_points_that_exact_arithmetic_moves_stay_in_the_box():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, dtype="bfloat16")])
    model.layers[0].set_weights([np.array([[1.0, 0.0]]), np.array([-1.0, 2.0**-20])])
    attack = DDN(bounds=(1.003, 1.01))
    found = bracket(model, np.array([[1.005]], "float32"), attacks=attack)
    inside = (found.x_adv >= 1.003 - 1e-6) & (found.x_adv <= 1.01 + 1e-6)
    assert np.all(inside) and np.all(found.upper >= found.lower)
    if found.rounding.any():
        assert "by rounding alone" in found.table()


def test_what_only_rounding_changes_does_not_contradict_a_bound():
    # f = (.07, (u + 10⁶) - 10⁶): float32 has steps of 1/16 at 10⁶, so that the model's decision
    # changes at u = 3/32, and the exact one at u = .07.
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1), layers.Dense(2)])
    arrays = [[1.0]], [1e6], [[0.0, 1.0]], [0.07, -1e6]
    model.set_weights([np.array(v, "float32") for v in arrays])
    x, attack = np.array([[0.1]], "float32"), MinimalFGV()
    found = bracket(model, x, attacks=[attack])
    assert attack(model, x).distance[0] < 0.01 < found.lower[0]
    assert found.rounding.tolist() == [True] and "1 decisions changed below" in found.table()
    assert found.predictions_adv.tolist() == [0]
    assert found.lower[0] == pytest.approx(0.03, rel=1e-3)
    assert found.lower[0] <= found.upper[0] < 0.04
    assert abs(found.x_adv[0, 0] - x[0, 0]) == pytest.approx(found.upper[0], rel=1e-6)


@pytest.mark.parametrize("name", ["minimal_perturbation_lower_bound", "certify"])
def test_a_bound_that_is_too_large_is_a_loud_error(monkeypatch, name):
    """Negative control: a bound enlarged by 1% on a model where it is exact."""
    honest = getattr(module, name)

    def enlarged(*arguments, **options):
        result, factor = honest(*arguments, **options), np.array([1.0, 1.01])
        if name == "certify":
            return types.SimpleNamespace(radius=result.radius * factor)
        return dataclasses.replace(result, bound=result.bound * factor)

    monkeypatch.setattr(module, name, enlarged)
    with pytest.raises(UnsoundBound, match=r"Input 1: .* below the proven bound") as caught:
        bracket(identity(), np.array([[3.0, 1.0], [2.0, 1.0]]), attacks=ONE)
    assert caught.value.index == (1,) and caught.value.upper[0] < caught.value.lower[0]


def test_published_claims_stay_beside_the_lower_bound():
    model = mlp("relu")
    x = np.random.default_rng(4).normal(size=(30, 4))
    found = bracket(model, x, rules="published", attacks=ONE, time_budget=0)
    plain = bracket(model, x, attacks=ONE, time_budget=0)
    np.testing.assert_array_equal(found.lower, plain.lower)
    assert plain.published is None and plain.violations is None
    assert found.violations.sum() == found.summary()["violations"]
    assert np.all(found.violations == (found.upper < found.published) & found.found)
    assert any("relu" in note.lower() for note in found.notes)


def test_data_sets_are_read_in_order():
    model, x = mlp("tanh"), np.random.default_rng(5).normal(size=(20, 4)).astype("float32")
    y = np.argmax(model.predict(x, verbose=0), axis=1)
    batches = datasets.Batches(x, y, 8, shuffle=False)
    attacks = [MinimalFGV()]
    whole = bracket(model, x, y, attacks=attacks, time_budget=0)
    found = bracket(model, batches, attacks=attacks, time_budget=0)
    np.testing.assert_allclose(found.upper, whole.upper)
    assert set(whole.attack[whole.found]) == {repr(attacks[0])}


def test_attacks_in_other_norms_are_refused():
    model, x = mlp("tanh"), np.ones((1, 4))
    with pytest.raises(ValueError, match="untargeted l2"):
        bracket(model, x, attacks=[FMN(Linf)])
    with pytest.raises(ValueError, match="untargeted l2"):
        bracket(model, x, [1], attacks=Ensemble([DDN(L2, targeted=True)]))
    with pytest.raises(ValueError, match="`rules`"):
        bracket(model, x, rules="both")
    with pytest.raises(ValueError, match="default attacks"):
        bracket(model, x, attacks=[DDN()], bounds=(0, 1))
    with pytest.raises(ValueError, match="within `bounds`"):
        bracket(model, x, bounds=(0, 0.5))
    with pytest.raises(ValueError, match="NaN"):
        bracket(model, x * np.nan)


JAX = """
import keras, numpy as np
from tf_lyapunov.attacks import DeepFool
from tf_lyapunov.evaluation.bracket import bracket

keras.utils.set_random_seed(0)
dense = keras.layers.Dense
model = keras.Sequential([keras.Input((4,)), dense(5, "tanh"), dense(3)])
x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
found = bracket(model, x, attacks=DeepFool())
assert np.all(found.bound > 0) and np.all(found.upper >= found.lower), found
assert model.predict(x, verbose=0).dtype == "float32"
assert keras.ops.zeros((1,), "float64").dtype == "float32"  # as it was before
print("bracketed")
"""


def test_jax_computes_in_float64_where_bounds_need_it():
    pytest.importorskip("jax")
    found = fresh_processes.output(JAX, backend="jax", warnings="ignore")
    assert found.strip() == "bracketed"
