"""Attention by distances: its constants, its gain for all inputs, and where it is refused."""

import keras
import numpy as np
import pytest
from keras import ops

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import L2Attention, SpectralDense
from tf_lyapunov.theory.attention import l2_attention_gain, mean_distance_upper_bound


def means(y, s):
    """`(h, J)` of one head at y (N, d), with its Jacobian as derived."""
    count, d = y.shape
    u = y[None] - y[:, None]
    p = np.exp(-np.sum(u * u, axis=2) / s)
    p /= p.sum(axis=1, keepdims=True)
    jacobian = np.zeros((count, d, count, d))
    for i in range(count):
        away = u[i] - p[i] @ u[i]
        jacobian[i, :, i] += 2 / s * (p[i][:, None] * away).T @ away
        for j in range(count):
            jacobian[i, :, j] += p[i, j] * (np.eye(d) - 2 / s * np.outer(away[j], u[i, j]))
    return p @ y, jacobian.reshape(count * d, count * d)


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_the_mean_distance_under_its_own_softmax_reaches_its_bound(count):
    c = mean_distance_upper_bound(count)
    assert c * np.exp(c + 1) >= count - 1
    rng = np.random.default_rng(count)
    t = rng.gamma(rng.uniform(0.2, 5, (2000, 1)), 1.0, (2000, count)) * rng.uniform(0, 2, (2000, 1))
    t[:, 0] = 0.0
    t[0, 1:] = c + 1
    p = np.exp(-t) / np.exp(-t).sum(axis=1, keepdims=True)
    found = (p * t).sum(axis=1)
    assert found.max() <= c and found[0] == pytest.approx(c, rel=1e-6)


def test_the_derivative_is_that_of_differences():
    rng, d = np.random.default_rng(0), 1e-6
    y = rng.standard_normal((4, 3))
    _, jacobian = means(y, 1.7)
    for k in range(12):
        e = np.zeros(12)
        e[k] = d
        moved = means(y + e.reshape(4, 3), 1.7)[0] - means(y - e.reshape(4, 3), 1.7)[0]
        np.testing.assert_allclose(jacobian[:, k], moved.ravel() / (2 * d), atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_no_tokens_are_steeper_than_the_constant(count):
    rng, bound, worst = np.random.default_rng(count), l2_attention_gain(count), 0.0
    published = np.sqrt(count) * (4 * mean_distance_upper_bound(count) + 1)
    assert 1 <= bound <= published * (1 + 1e-6)
    for _ in range(150):
        width = int(rng.integers(1, 3))
        y = rng.standard_normal((count, width)) * 10.0 ** rng.uniform(-1.5, 1.5)
        if rng.random() < 0.5:  # one token amid many far ones
            y = np.sqrt(mean_distance_upper_bound(count) + 1) * np.sign(y)
            y[0] *= rng.uniform(0, 0.2)
        worst = max(worst, np.linalg.norm(means(y, 1.0)[1], 2))
    # Where all move alike the gain is 1; the bound is loose, and said so.
    assert 1 - 1e-9 <= worst <= bound and worst > bound / 6


def test_the_layer_computes_its_equation_head_by_head():
    layer, rng = L2Attention(2, 0.7, 1.3), np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 4))
    y = np.asarray(ops.convert_to_numpy(layer(x.astype("float32"))))
    for i in range(3):
        heads = [means(part, 1.3)[0] for part in np.split(x[i], 2, axis=1)]
        want = 0.7 / l2_attention_gain(5) * np.concatenate(heads, axis=1)
        np.testing.assert_allclose(y[i], want, atol=1e-5)
    again = L2Attention.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


def test_a_model_of_it_is_certified_and_no_step_beats_the_radius(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            SpectralDense(6),
            L2Attention(2, max_gain=4.0),
            SpectralDense(3),
            keras.layers.Flatten(),
            SpectralDense(3),
        ]
    )
    assert 1.0 < tfl.lipschitz_upper_bound(model).gain_upper_bound <= 4.0 * (1 + 1e-5)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 4, 3)).astype("float32")
    proof = tfl.certify(model, x)
    assert np.all(proof.radius > 0)
    for _ in range(20):
        step = rng.standard_normal(x.shape)
        step *= (proof.radius / np.linalg.norm(step.reshape(6, -1), axis=1))[:, None, None]
        found = ops.convert_to_numpy(model((x + 0.999 * step).astype("float32")))
        assert np.array_equal(np.argmax(found, axis=1), proof.labels)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, again)))
    alone = keras.Sequential([keras.Input((4, 3)), L2Attention(), keras.layers.Flatten()])
    with pytest.raises(UnsupportedLayerError, match="L2Attention"):
        tfl.certify(alone, x).save(tmp_path / "proof.npz")
    with pytest.raises(UnsupportedLayerError, match="L2Attention"):
        tfl.export_plain(alone)


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (lambda: L2Attention(3), (None, 5, 4), "divide"),
        (lambda: L2Attention(), (None, None, 4), "known"),
        (lambda: L2Attention(), (None, 4), "tokens"),
        (lambda: L2Attention(0), None, "heads"),
        (lambda: L2Attention(max_gain=-1.0), None, "max_gain"),
        (lambda: L2Attention(temperature=0.0), None, "temperature"),
    ],
)
def test_what_has_no_bound_is_refused(make, shape, words):
    with pytest.raises(ValueError, match=words):
        make().build(shape)
