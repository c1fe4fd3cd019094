"""The certified Mixer: gain one for all weights, and radii that no attack beats."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import layers, models


def small(seed=0):
    return models.build(
        {"name": "potential_mixer", "size": [2, 8, 6], "patch": 2, "head": "bounded"},
        (5, 4, 1),
        2,
        seed=seed,
    )


def images(count=24):
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    x = 0.3 * rng.standard_normal((count, 5, 4, 1))
    x[y == 1, :2] += 1.0
    x[y == 0, 2:4, 2:] += 1.0
    return x.astype("float32"), y


@pytest.mark.slow
def test_no_attack_beats_the_certificate_of_a_trained_mixer_and_one_comes_near():
    model, (x, y) = small(), images()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(np.tile(x, (6, 1, 1, 1)), np.tile(y, 6), batch_size=24, epochs=6, verbose=0)
    proof = tfl.certify(model, x, y)
    # Gain one whatever training did, and not far below.
    assert 0.9 < proof.gain_upper_bound <= 1 + 1e-4
    assert proof.certified_accuracy(0.1) > 0.5
    found = tfl.attacks.PGD(radius=tfl.L2(2.0), steps=15)(model, x, y)
    distance, broken = np.asarray(found.distance), np.asarray(found.success, bool)
    broken &= distance > 0
    assert np.any(broken)
    assert np.all(distance[broken] >= proof.radius[broken] * (1 - 1e-4))


def test_radii_hold_on_the_way_to_inputs_of_the_other_class_which_is_not_far():
    model, (x, _) = small(1), images(12)
    logits = keras.ops.convert_to_numpy(model(x))
    model.get_layer("logits").bias.assign(-np.median(logits, axis=0))  # both classes are chosen
    proof = tfl.certify(model, x)
    assert 0.9 < proof.gain_upper_bound <= 1 + 1e-4 and np.all(proof.radius > 0)

    def decided(points):
        return np.argmax(keras.ops.convert_to_numpy(model(points.astype("float32"))), axis=1)

    first, second = np.nonzero(proof.labels[:, None] != proof.labels)
    assert len(first)
    low, high = np.zeros((2, len(first)))
    high += 1.0
    for _ in range(16):
        middle = (low + high) / 2
        there = x[first] + middle[:, None, None, None] * (x[second] - x[first])
        same = decided(there) == proof.labels[first]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    apart = np.linalg.norm((x[second] - x[first]).reshape(len(first), -1), axis=1)
    ratio = high * apart / proof.radius[first]
    assert ratio.min() > 1 - 1e-5 and ratio.min() < 10


def test_it_is_made_of_shifts_and_memories_and_refuses_other_sizes():
    model = small()
    kinds = [type(layer) for layer in model.layers]
    assert kinds.count(layers.ShiftMixing) == kinds.count(layers.SoftmaxPotential) == 2
    with pytest.raises(ValueError, match="size"):
        models.potential_mixer((8, 8, 1), 2, size="XXL")
