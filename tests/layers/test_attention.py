"""Softmax over memories: its gain for all weights, where it is reached, in models and on files."""

import keras
import numpy as np
import pytest
from keras import ops

import tf_lyapunov as tfl
from tf_lyapunov.layers import SoftmaxPotential

FLOAT32 = 1 + 1e-5


def exact(layer, x):
    """The layer in float64 from its effective weights."""
    values = layer.effective_values()
    kernel, scale = (np.asarray(values[k], np.float64) for k in ("kernel", "scale"))
    hidden = x @ kernel + np.asarray(ops.convert_to_numpy(layer.bias), np.float64)
    powers = np.exp(layer.sharpness * (hidden - hidden.max(axis=-1, keepdims=True)))
    chosen = powers / powers.sum(axis=-1, keepdims=True)
    return x - scale * chosen @ kernel.T, chosen, kernel, scale


def test_the_jacobian_of_a_softmax_is_at_most_half_its_sharpness():
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(500):
        beta, n = 10.0 ** rng.uniform(-1, 2), rng.integers(2, 9)
        p = rng.dirichlet(np.full(n, 10.0 ** rng.uniform(-1, 1)))
        norm = np.linalg.norm(beta * (np.diag(p) - np.outer(p, p)), 2)
        worst = max(worst, norm / (beta / 2))
    assert 0.8 < worst <= 1 + 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("beta", [0.01, 1.0, 50.0])
def test_no_weights_exceed_the_gain(beta, scale):
    layer = SoftmaxPotential(7, beta, max_gain=0.8)
    layer.build((None, 5))
    rng = np.random.default_rng(1)
    layer.kernel.assign(scale * rng.standard_normal((5, 7)))
    layer.bias.assign(rng.standard_normal(7))
    assert layer.gain_upper_bound() <= 0.8 * (1 + 1e-9)
    for x in rng.standard_normal((20, 5)) / scale:
        _, p, kernel, step = exact(layer, x)
        jacobian = np.eye(5) - step * kernel @ (
            layer.sharpness * (np.diag(p) - np.outer(p, p)) @ kernel.T
        )
        values = np.linalg.eigvalsh((jacobian + jacobian.T) / 2)
        assert -1 - 1e-9 <= values[0] and values[-1] <= 1 + 1e-9


def test_both_ends_of_the_step_are_reached():
    layer = SoftmaxPotential(2, 3.0)
    layer.build((None, 1))
    layer.kernel.assign([[1.0, -1.0]])
    # At 0 both memories weigh ½, and the step turns differences around; far away nothing moves.
    y = np.asarray(ops.convert_to_numpy(layer(np.array([[-1e-3], [1e-3], [40.0], [41.0]], "f4"))))
    assert (y[1] - y[0])[0] / 2e-3 == pytest.approx(-1, abs=1e-3)
    assert (y[3] - y[2])[0] == pytest.approx(1, abs=1e-5)


def test_the_layer_computes_its_equation():
    layer = SoftmaxPotential(6, 2.5)
    x = np.random.default_rng(0).standard_normal((4, 3, 5))
    y = np.asarray(ops.convert_to_numpy(layer(x.astype("float32"))))
    layer.kernel.assign(2 * layer.kernel)
    np.testing.assert_allclose(y, exact_again(layer, x), atol=1e-5)
    again = SoftmaxPotential.from_config(layer.get_config())
    assert again.beta == 2.5 and "activation" not in again.get_config()


def exact_again(layer, x):
    layer.kernel.assign(layer.kernel / 2)
    return exact(layer, x)[0]


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, 1e9, "sharp"])
def test_a_sharpness_that_is_none_is_refused(beta):
    with pytest.raises((ValueError, TypeError), match="beta"):
        SoftmaxPotential(4, beta)
    with pytest.raises(TypeError, match="activation"):
        SoftmaxPotential(4, activation="relu")


def mixer(tokens=4, channels=6, classes=3):
    """A Mixer of gain 1 and a last layer: tokens, then channels, by softmax over memories."""
    layers = [keras.layers.Permute((2, 1)), SoftmaxPotential(8, 4.0)]
    layers += [keras.layers.Permute((2, 1)), SoftmaxPotential(12, 4.0)]
    return keras.Sequential(
        [
            keras.Input((tokens, channels)),
            *layers,
            keras.layers.Flatten(),
            tfl.layers.SpectralDense(classes),
        ]
    )


def inputs(count):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, count)
    x = rng.standard_normal((count, 4, 6)) * 0.5
    x[np.arange(count), y, y] += 3.0
    return x.astype("float32"), y


def test_a_mixer_keeps_the_gain_of_its_last_layer():
    model = mixer()
    bound = tfl.lipschitz_upper_bound(model).gain_upper_bound
    assert 0.9 < bound <= FLOAT32
    x, _ = inputs(8)
    labels = np.argmax(ops.convert_to_numpy(model(x)), axis=1)
    proof = tfl.certify(model, x, labels)
    assert np.all(proof.radius > 0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        step = rng.standard_normal(x.shape)
        step /= np.linalg.norm(step.reshape(8, -1), axis=1)[:, None, None]
        moved = x + (0.999 * proof.radius)[:, None, None] * step
        found = ops.convert_to_numpy(model(moved.astype("float32")))
        assert np.array_equal(np.argmax(found, axis=1), labels)


@pytest.mark.slow
def test_no_attack_beats_the_certificate_of_a_trained_mixer():
    model, (x, y) = mixer(), inputs(96)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss)
    model.fit(np.tile(x, (10, 1, 1)), np.tile(y, 10), batch_size=96, verbose=0)
    proof = tfl.certify(model, x, y)
    assert proof.gain_upper_bound <= FLOAT32 and proof.certified_accuracy(0.2) > 0.5
    found = tfl.attacks.PGD(radius=tfl.L2(1.0), steps=20)(model, x, y)
    distance = np.asarray(found.distance)
    broken = np.asarray(found.success, bool) & (distance > 0)
    assert np.all(distance[broken] >= proof.radius[broken] * (1 - 1e-4))


def test_local_gains_of_a_mixer_hold_and_are_no_larger():
    model, (x, _) = mixer(), inputs(1)
    gain = tfl.gain_on(model, x[:1].astype(np.float64), 0.1)
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((2, 64, 4, 6))
    steps *= 0.1 / np.linalg.norm(steps.reshape(2, 64, -1), axis=-1)[..., None, None]
    u, v = (x[:1] + s for s in steps.astype("float32"))
    moved = np.asarray(ops.convert_to_numpy(model(u) - model(v)), np.float64)
    apart = np.linalg.norm((u - v).reshape(64, -1).astype(np.float64), axis=1)
    assert np.max(np.linalg.norm(moved, axis=1) / apart) <= gain[0] * (1 + 1e-4)
    assert gain[0] <= FLOAT32
