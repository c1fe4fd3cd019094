"""A deel-lip user finds the tasks of their notebooks done here, under our names, with proofs.

Demo 1: the Wasserstein distance of synthetic images; demo 2 and 3: HKR between two classes; demo 4:
robust decisions among all classes; throughout `vanilla_export`.
"""

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import tf_lyapunov as tfl
from tf_lyapunov import layers as lip
from tf_lyapunov import losses

SIZE = 12


def network(inputs, outputs, widths=(16,)):
    """`lip.Sequential([Input, Flatten, SpectralDense(GroupSort2), …, FrobeniusDense])`."""
    keras.utils.set_random_seed(0)
    hidden = [lip.BjorckDense(width, activation=lip.GroupSort(2)) for width in widths]
    layers = [keras.Input(inputs), keras.layers.Flatten(), *hidden, lip.NormalizedDense(outputs)]
    return keras.Sequential(layers)


def square(value):
    image = np.zeros((SIZE, SIZE, 1), "float32")
    image[3:-3, 3:-3] = value
    return image


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return (x / 16).reshape(-1, 8, 8, 1).astype("float32"), y


def accuracy(model, x, y):
    logits = model.predict(x, verbose=0)
    found = logits[:, 0] > 0 if logits.shape[1] == 1 else np.argmax(logits, axis=1)
    return np.mean(found == y)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param((1.0,), id="one square", marks=pytest.mark.slow),
        pytest.param((1.0, -1.0), id="two squares"),  # no linear function separates them
    ],
)
def test_the_wasserstein_distance_is_estimated_to_95_percent_and_from_below(values):
    # All mass of one side is a black image, that of the other squares at one distance from it.
    distance = np.linalg.norm(square(1.0))
    x = np.stack([square(0.0)] * 4 + [square(values[i % len(values)]) for i in range(4)])
    y = np.repeat([-1, 1], 4)
    model = network((SIZE, SIZE, 1), 1)
    model.compile(keras.optimizers.Adam(0.01), losses.KR())
    model.fit(x, y, batch_size=8, epochs=80, verbose=0)
    outputs = model.predict(x, verbose=0)[:, 0]
    estimate = outputs[y == 1].mean() - outputs[y == -1].mean()
    gain = float(tfl.lipschitz_upper_bound(model))
    # Kantorovich-Rubinstein: no function of that gain separates further, float32 sums aside.
    assert 0.95 * distance <= estimate <= distance * gain * (1 + 1e-5)
    assert gain <= 1 + 1e-6


def test_hkr_separates_two_digits_with_proved_radii_and_exports_plain_layers(digits):
    x, y = (a[np.isin(digits[1], (0, 8))] for a in digits)
    signs = np.where(y == 8, 1, -1)
    model = network((8, 8, 1), 1)
    model.compile(keras.optimizers.Adam(0.01), losses.HKR(alpha=10.0, min_margin=1.0))
    model.fit(x[:250], signs[:250], batch_size=50, epochs=15, verbose=0)
    x, signs = x[250:], signs[250:]
    assert accuracy(model, x, signs == 1) >= 0.97
    proof = tfl.certify(model, x, signs)
    assert proof.certified_accuracy(0.5) >= 0.8
    plain = tfl.export_plain(model)  # their vanilla_export
    assert np.abs(plain.predict(x, verbose=0) - model.predict(x, verbose=0)).max() < 1e-5
    assert {type(v).__module__.split(".")[0] for v in plain.layers} == {"keras"}


@pytest.mark.parametrize(
    "loss",
    [
        losses.MulticlassSoftHKR(alpha=20.0, min_margin=0.4),
        # Each takes ten seconds to compile.
        *(
            pytest.param(loss, marks=pytest.mark.slow)
            for loss in (
                losses.MulticlassHKR(alpha=100.0, min_margin=0.4),
                losses.LseHKR(alpha=20.0, min_margin=0.4),
                losses.CategoricalHinge(min_margin=0.6),
            )
        ),
    ],
    ids=lambda loss: loss.name,
)
def test_all_digits_are_decided_with_proved_radii_that_no_attack_contradicts(digits, loss):
    x, y = digits
    model = network((8, 8, 1), 10, (64,))
    model.compile(keras.optimizers.Adam(0.01), loss)
    # One-hot rows, as their notebooks have them.
    model.fit(x[:1200], np.eye(10)[y[:1200]], batch_size=100, epochs=12, verbose=0)
    x, y = x[1500:], y[1500:]
    assert accuracy(model, x, y) >= 0.85
    proof = tfl.certify(model, x, y)
    assert proof.certified_accuracy(0.15) >= 0.6
    attacked = tfl.attacks.PGD(radius=tfl.L2(0.15), steps=5)(model, x, y)
    proved = np.asarray(proof.radius) >= 0.15
    assert not np.any(np.asarray(attacked.success) & proved)
