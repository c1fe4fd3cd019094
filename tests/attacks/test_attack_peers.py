"""Cross-check against foolbox, and a power test: an attack that breaks nothing proves nothing."""

import keras
import numpy as np
import pytest
from models_to_attack import linear_radius, mlp, points

from tf_lyapunov.attacks import PGD
from tf_lyapunov.theory.balls import L2, Linf


def trained():
    x, y = points(600, 6), np.argmax(points(600, 6)[:, :3], axis=1)
    model = mlp()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(x, y, epochs=5, batch_size=50, verbose=0)
    return model, x


@pytest.mark.parametrize("ball", [L2(0.4), Linf(0.15)])
def test_pgd_succeeds_as_often_as_foolbox_at_equal_steps(ball):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is an optional peer")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("foolbox's Keras bridge is TensorFlow's")
    import tensorflow as tf

    model, x = trained()
    labels = np.argmax(model.predict(x, verbose=0), axis=1)
    name = "L2" if isinstance(ball, L2) else "Linf"
    peer = getattr(foolbox.attacks, f"{name}ProjectedGradientDescentAttack")(
        rel_stepsize=2.5 / 20, steps=20, random_start=False
    )
    bridge = foolbox.TensorFlowModel(model, bounds=(-99, 99))
    _, _, theirs = peer(bridge, tf.constant(x), tf.constant(labels, tf.int64), epsilons=ball.radius)
    ours = PGD(ball, steps=20)(model, x, labels).success
    assert 0.1 < np.mean(ours) < 0.9
    # Keep-best can only add; rounding at the boundary moves a few per thousand.
    assert np.sum(theirs.numpy() & ~ours) <= 0.005 * len(x)
    assert abs(np.mean(ours) - np.mean(theirs.numpy())) < 0.02


def test_no_attack_breaks_a_margin_certificate_but_twice_its_radius_is_broken():
    model, x = trained()
    first, last = model.layers[0].kernel, model.layers[-1].kernel
    features = np.linalg.norm(np.asarray(keras.ops.convert_to_numpy(first), np.float64), 2)
    kernel = np.asarray(keras.ops.convert_to_numpy(last), np.float64)
    logits = model.predict(x, verbose=0).astype(np.float64)
    order = np.argmax(logits, axis=1)
    # tanh is 1-Lipschitz, so margins shrink at most by ‖w_c - w_j‖·σ(W₁) per unit.
    hidden = keras.Model(model.inputs, model.layers[0].output).predict(x, verbose=0)
    bias = keras.ops.convert_to_numpy(model.layers[-1].bias)
    radius = linear_radius(kernel, bias, hidden, order, dual=2) / features
    for options in ({}, {"loss": "margin", "random_start": True, "restarts": 2}):
        assert not np.any(PGD(L2(radius * (1 - 1e-4)), **options)(model, x).success)
    assert np.any(PGD(L2(2 * radius))(model, x).success)
