"""Brackets of models with several inputs."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov import attacks
from tf_lyapunov.evaluation.accuracy import logits

ROWS = {None: slice(None), "a": slice(0, 3), "b": slice(3, 7)}


def linear():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    first, second = layers.Dense(4), layers.Dense(4)
    model = keras.Model([a, b], layers.Add()([first(a), second(b)]))
    kernels = [np.asarray(keras.ops.convert_to_numpy(d.kernel), np.float64)
               for d in (first, second)]  # fmt: skip
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(10, n)).astype("float32") for n in (3, 4)]
    return model, np.concatenate(kernels), x


@pytest.mark.parametrize("perturbed", ROWS)
def test_a_linear_model_is_bracketed_at_its_exact_distance(perturbed):
    model, matrix, x = linear()
    part, flat = matrix[ROWS[perturbed]], np.concatenate(x, axis=1).astype(np.float64)
    values = flat @ matrix
    best = values.argmax(axis=1)
    exact = [
        min((v[c] - v[j]) / np.linalg.norm(part[:, c] - part[:, j]) for j in range(4) if j != c)
        for v, c in zip(values, best, strict=True)
    ]
    found = tfl.bracket(model, tuple(x), perturbed=perturbed, attacks=attacks.DeepFool())
    assert np.all(found.lower <= found.upper) and np.all(found.found)
    # Below by the rounding allowance of float32 alone.
    assert np.all(found.lower <= np.multiply(exact, 1 + 1e-12))
    assert np.allclose(found.lower, exact, rtol=1e-3, atol=1e-5)
    assert np.allclose(found.upper, exact, rtol=1e-3, atol=1e-5)
    assert isinstance(found.x_adv, tuple)
    for name, own, adv in zip("ab", x, found.x_adv, strict=True):
        if perturbed not in (None, name):
            assert np.array_equal(own, adv)
    assert found.perturbed == (None if perturbed is None else (perturbed,))
    assert found.summary().get("perturbed") == (None if perturbed is None else [perturbed])
    assert "images" not in found.record(x) and len(found.rows()) == 10


def test_measured_logits_and_labels_are_those_of_keras():
    model, _, x = linear()
    assert np.allclose(logits(model, x), model.predict(x, verbose=0), atol=1e-5)
    wrong = (model.predict(x, verbose=0).argmax(axis=1) + 1) % 4
    found = tfl.bracket(model, {"b": x[1], "a": x[0]}, wrong, attacks=attacks.MinimalFGV())
    assert found.wrong.all() and np.all(found.upper == 0) and list(found.x_adv) == ["b", "a"]


def test_published_rules_and_localized_robustness_take_one_input():
    model, _, x = linear()
    with pytest.raises(ValueError, match="chains that end with a dense layer"):
        tfl.bracket(model, x, rules="published", attacks=attacks.MinimalFGV())
    with pytest.raises(ValueError, match=r"one array. Received: model.*'a', 'b'"):
        tfl.localized_robustness(model, x, [0.1])
