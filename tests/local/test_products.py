"""Products of signals, attention and recurrent layers on a region: never left, tight where it is
small, and refused by name without one."""

import keras
import numpy as np
import pytest

from tf_lyapunov.certification.margins import certify
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.boxes import Effort
from tf_lyapunov.local.outputs import gain_on, output_bounds
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.families.products import Product, by_letters
from tf_lyapunov.program.network import read_network

L = keras.layers
SMALL = Effort(box_steps=0, box_trials=(0.0, 0.3), margin_steps=3, margin_trials=(0.0, 0.3))


def _gates():
    x = keras.Input((4,))
    y = L.Multiply()([L.Dense(3, activation="sigmoid")(x), L.Dense(3, activation="tanh")(x)])
    return keras.Model(x, L.Dense(2)(y))


def _squeeze():
    x = keras.Input((3, 3, 2))
    h = L.Conv2D(2, 2, activation="relu")(x)
    s = L.Dense(2, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(h))
    return keras.Model(x, L.Dense(2)(L.Flatten()(L.Multiply()([h, s]))))


def _block(**settings):
    x = keras.Input((3, 4))
    y = L.LayerNormalization(epsilon=1e-2)(x)
    y = L.Add()([x, L.MultiHeadAttention(2, 2, **settings)(y, y)])
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


def _attention():
    x = keras.Input((3, 2))
    y = L.Attention(use_scale=True)([x, L.Dense(2)(x)])
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


def _operations():
    x = keras.Input((2, 3))
    y = keras.ops.einsum("bik,bjk->bij", x, L.Dense(3)(x))
    y = keras.ops.matmul(y, x)
    y = L.Dot(axes=(2, 1))([y, L.Permute((2, 1))(x)])
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


def _recurrent(kind, **settings):
    x = keras.Input((2, 2))
    y = getattr(L, kind)(2, bias_initializer="glorot_uniform", **settings)(x)
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


def _gated():
    x = keras.Input((2, 2, 2))
    y = L.MultiHeadAttention(1, 2, use_gate=True, attention_axes=(1, 2))(x, x)
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


MODELS = {
    "gated attention over two axes": _gated,
    "gates": _gates,
    "squeeze and excite": _squeeze,
    "transformer block": _block,
    "attention": _attention,
    "operations": _operations,
    "SimpleRNN": lambda: _recurrent("SimpleRNN"),
    "GRU": lambda: _recurrent("GRU", return_sequences=True),
    "GRU before": lambda: _recurrent("GRU", reset_after=False, go_backwards=True),
    "LSTM": lambda: _recurrent("LSTM"),
}


def built(name):
    keras.utils.set_random_seed(0)
    return MODELS[name]()


def exact(model):
    """The exact function of one sample's batches, in float64."""
    shape = model.input_shape[1:]
    program = read_network(model, [(None, *shape)], on_region=True).program
    return lambda x: program.evaluate(x.reshape(-1, *shape))[0]


def extreme(f, c, x, radius, rng):
    """Largest cᵀf found on the ball: by samples, then ascent along differences."""
    drawn = rng.normal(size=(400, x.size))
    z = x.ravel() + radius * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    best = z[np.argmax(f(z) @ c)]
    step = 1e-6 * max(radius, 1e-3)
    for _ in range(8):
        moved = best + step * np.eye(x.size)
        slope = (f(moved) - f(best[None])) @ c
        away = best + radius * slope / max(np.linalg.norm(slope), 1e-300) - x.ravel()
        best = x.ravel() + radius * away / max(np.linalg.norm(away), radius)
    return max(float((f(z) @ c).max()), float((f(best[None]) @ c)[0]))


@pytest.mark.parametrize("name", MODELS)
def test_no_attack_leaves_the_bounds_and_they_are_sharp_on_small_balls(name):
    model, rng = built(name), np.random.default_rng(1)
    x = rng.normal(size=model.input_shape[1:])
    f = exact(model)
    for radius, factor in ((0.3, np.inf), (1e-4, 1.03)):
        found = output_bounds(model, Region.ball(x, radius), effort=SMALL)
        for i, c in enumerate(np.eye(2)):
            most, least = extreme(f, c, x, radius, rng), -extreme(f, -c, x, radius, rng)
            assert least >= found.lower[i] and most <= found.upper[i]
            # On a small ball the function is its linearisation, whose range ascent finds.
            assert found.upper[i] - found.lower[i] <= factor * (most - least) + 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_local_gains_hold_between_points_and_tend_to_the_norm_of_the_jacobian(name):
    model, rng = built(name), np.random.default_rng(2)
    x = rng.normal(size=(1, *model.input_shape[1:]))
    f, step = exact(model), 1e-5
    eye = step * np.eye(x.size)
    jacobian = (f(x.ravel() + eye) - f(x.ravel() - eye)).T / (2 * step)
    norm = np.linalg.norm(jacobian, 2)
    # 1 + O(radius): the spread of slopes on the ball.
    assert norm * (1 - 1e-6) <= gain_on(model, x, 1e-6, effort=SMALL)[0] <= norm * 1.01
    radius = 0.2
    gain = gain_on(model, x, radius, effort=SMALL)[0]
    drawn = rng.normal(size=(2, 300, x.size))
    u, v = x.ravel() + radius * drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    moved = np.linalg.norm(f(u) - f(v), axis=1)
    assert np.all(moved <= gain * np.linalg.norm(u - v, axis=1))


@pytest.mark.parametrize(
    "name", ["gates", "attention", pytest.param("GRU", marks=pytest.mark.slow)]
)
def test_radii_of_models_that_multiply_signals_hold_and_are_not_small(name):
    model, rng = built(name), np.random.default_rng(3)
    x = rng.normal(size=(1, *model.input_shape[1:])).astype("float32")
    proof = certify(model, x, method="linear", time_budget=600)
    assert proof.verdict == "PROVED" and np.all(proof.radius > 0)
    assert np.isinf(proof.gain_upper_bound) and proof.float_allowance < 1e-12
    text = proof.explain()
    assert "none on all of space" in text and "exact function" in text
    f = exact(model)
    for point, radius, label in zip(x.astype(np.float64), proof.radius, proof.labels, strict=True):
        rival = np.array([-1.0, 1.0]) if label == 0 else np.array([1.0, -1.0])
        assert extreme(f, rival, point, float(radius), rng) < 0
        lead = -float((f(point[None]) @ rival)[0])
        eye = 1e-5 * np.eye(point.size)
        slope = np.linalg.norm((f(point.ravel() + eye) - f(point.ravel() - eye)) @ rival) / 2e-5
        # Against what the linearisation says, which is no bound, and saturates far away.
        assert radius > lead / slope / 8


def test_certificates_name_what_they_cannot_put_into_a_proof_file(tmp_path):
    model = built("gates")
    x = np.random.default_rng(4).normal(size=(1, 4)).astype("float32")
    proof = certify(model, x, method="linear")
    proof.save(tmp_path / "proof.json")
    assert type(proof).load(tmp_path / "proof.json").radius == pytest.approx(proof.radius)
    with pytest.raises(ValueError, match="multiplies signals"):
        proof.save(tmp_path / "proof.npz")
    with pytest.raises(UnsupportedLayerError, match="Multiply"):
        gain_on(model, x, 0.1, effort=SMALL, proof=tmp_path / "gain.npz")
    assert not list(tmp_path.glob("*.npz"))
    with pytest.raises(ValueError, match="precision='model'"):
        certify(model, x, method="linear", precision="model")


@pytest.mark.parametrize("name", MODELS)
def test_without_a_region_they_are_refused_by_name(name):
    model = built(name)
    with pytest.raises(UnsupportedLayerError, match="output_bounds") as caught:
        read_network(model)
    kinds = ("Multiply", "Attention", "Einsum", "SimpleRNN", "GRU", "LSTM")
    assert any(kind in str(caught.value) for kind in kinds)


REFUSED = {
    "stateful": (lambda x: L.LSTM(2, stateful=True)(x), "stateful=True"),
    "masks": (lambda x: L.GRU(2)(L.Masking()(x)), "Masking"),
    "initial states": (lambda x: L.GRU(2)(x, initial_state=L.Dense(2)(x[:, 0])), "initial_state"),
    "mixed precision": (lambda x: L.GRU(2, dtype="mixed_bfloat16")(x), "mixed_bfloat16"),
    "attention masks": (
        lambda x: L.MultiHeadAttention(1, 2)(x, x, attention_mask=keras.ops.abs(x)),
        "attention_mask",
    ),
    "causal masks": (
        lambda x: L.MultiHeadAttention(1, 2)(x, x, use_causal_mask=True),
        "use_causal_mask",
    ),
    "concatenated scores": (lambda x: L.Attention(score_mode="concat")([x, x]), "concat"),
    "three factors": (lambda x: L.Multiply()([x, x, x]), "3 signals"),
    "sums that repeat a factor": (
        lambda x: keras.ops.einsum("bij,bjk->bik", x[:, :, :1], x),
        "an axis of one factor alone",
    ),
    "layers around cells": (lambda x: L.RNN(L.GRUCell(2))(x), "RNN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_on_a_region_is_refused_by_name(name):
    make, words = REFUSED[name]
    x = keras.Input(batch_shape=(1, 3, 3))
    model = keras.Model(x, L.Dense(2)(L.Flatten()(make(x))))
    with pytest.raises(UnsupportedLayerError, match=words):
        read_network(model, on_region=True)


def test_factors_that_hold_an_entry_twice_are_no_products():
    """y = (a + a)·b has twice the slope by a that a product of (a, a) and (b, b) has on a ball."""
    place, index = np.zeros((1, 1, 2), np.int64), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="twice"):
        Product(place, np.array([[[1], [2]]]), index)
    with pytest.raises(ValueError, match="same length"):
        by_letters([(2, 1), (3, 2)], "xk", "ky", "xy")


def test_unknown_and_long_horizons_are_refused_by_name():
    for length, words in ((None, "Fix the input's length"), (65, "more than 64 steps")):
        x = keras.Input((length, 2))
        with pytest.raises(UnsupportedLayerError, match=words):
            read_network(keras.Model(x, L.GRU(2)(x)), on_region=True)
