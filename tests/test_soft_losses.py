"""Losses of the strongest rivals: their equations in NumPy, limits, and labels of every coding."""

import keras
import numpy as np
import pytest
from derivatives import gradient, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.losses import CategoricalHinge, LseHKR, MulticlassSoftHKR

# One rounding of a float32 per operation on numbers of size 10, some tens of operations.
TOL = 64 * 10 * np.finfo("float32").eps
LOGITS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-10, 10, width=32))
LABELS = hnp.arrays(np.int64, (4,), elements=st.integers(0, 4))
ALPHAS = st.sampled_from([0.0, 1.0, 20.0, float("inf")])


def value(loss, labels, logits):
    return float(keras.ops.convert_to_numpy(loss(labels, logits)))


def rows(logits, labels):
    """Own logit and rivals of each sample, float64."""
    for f, y in zip(logits.astype(np.float64), labels, strict=True):
        yield f[y], np.delete(f, y)


def hinged(alpha, separation, hinge):
    return hinge if alpha == np.inf else alpha * hinge - separation


def scale(alpha):
    return 1 + (1 if alpha == np.inf else alpha)


@settings(max_examples=40)
@given(LOGITS, LABELS, ALPHAS, st.floats(0.1, 3.0), st.floats(0.1, 5.0))
def test_soft_hkr_is_its_equation(logits, labels, alpha, margin, temperature):
    mean = np.abs(logits.astype(np.float64)).mean()
    tau = np.clip(temperature * margin / max(mean, margin), 0.005, 250)
    expected = []
    for own, rivals in rows(logits, labels):
        weights = np.exp(tau * (rivals - rivals.max()))
        weights /= weights.sum()
        hinge = max(0, margin / 2 - own) + weights @ np.maximum(0, margin / 2 + rivals)
        expected.append(hinged(alpha, own - weights @ rivals, hinge))
    found = value(MulticlassSoftHKR(alpha, margin, temperature), labels, logits)
    # τ itself is rounded, and acts on differences of up to 20.
    assert abs(found - np.mean(expected)) <= 2 * TOL * scale(alpha) * (1 + tau)


@settings(max_examples=40)
@given(LOGITS, LABELS, ALPHAS, st.floats(0.1, 3.0), st.floats(0.2, 4.0), st.floats(0.1, 3.0))
def test_lse_hkr_is_its_equation(logits, labels, alpha, margin, temperature, penalty):
    t = 2 * np.log(4) / (margin * penalty)
    expected = []
    for own, rivals in rows(temperature * logits.astype(np.float64), labels):
        strongest = np.logaddexp.reduce(t * rivals) / t
        assert rivals.max() - 1e-12 <= strongest <= rivals.max() + penalty * margin / 2 + 1e-12
        hinge = max(0, margin / 2 - own) + max(0, margin / 2 + strongest)
        expected.append(hinged(alpha, own - strongest, hinge))
    found = value(LseHKR(alpha, margin, temperature, penalty), labels, logits)
    assert abs(found - np.mean(expected)) <= TOL * scale(alpha) * (1 + temperature)


@settings(max_examples=40)
@given(LOGITS, LABELS, st.floats(0.1, 3.0), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_categorical_hinge_is_its_equation(logits, labels, margin, temperature):
    expected = []
    for own, rivals in rows(logits, labels):
        soft = np.logaddexp.reduce(rivals / (temperature or 1)) * temperature
        expected.append(max(0, margin - own + (soft if temperature else rivals.max())))
    found = value(CategoricalHinge(margin, temperature), labels, logits)
    assert abs(found - np.mean(expected)) <= TOL


def test_two_classes_have_one_rival_and_no_soft_maximum():
    logits = np.array([[2.0, -1.0], [0.25, 0.5]], "float32")
    # m = 1: separations 3 and 0.25; hinges 0 + 0 and 0 + (0.5 + 0.25).
    for loss in (LseHKR(2.0, penalty=0.5), MulticlassSoftHKR(2.0)):
        assert value(loss, [0, 1], logits) == pytest.approx((-3 - 0.25 + 2 * 0.75) / 2, abs=1e-6)


def test_a_rival_below_zero_is_no_rival_at_zero():
    # deel-lip's maximum over (1 - y)·f has a 0 in the label's place.
    logits = np.array([[-3.0, -5.0, -6.0]], "float32")
    assert value(CategoricalHinge(1.0), [0], logits) == 0.0


def test_what_the_strongest_rival_cannot_be_is_refused():
    for make, name in [
        (lambda: MulticlassSoftHKR(alpha=-1.0), "alpha"),
        (lambda: LseHKR(alpha=float("nan")), "alpha"),
        (lambda: MulticlassSoftHKR(temperature=0.0), "temperature"),
        (lambda: LseHKR(penalty=0.0), "penalty"),
        (lambda: LseHKR(min_margin=0.0), "min_margin"),
        (lambda: CategoricalHinge(min_margin=-1.0), "min_margin"),
        (lambda: CategoricalHinge(temperature=-1.0), "temperature"),
    ]:
        with pytest.raises(ValueError, match=f"Received: {name}="):
            make()


@pytest.mark.parametrize("make", [MulticlassSoftHKR, LseHKR, CategoricalHinge])
def test_a_model_compiled_with_it_is_saved_and_trains_on_after_loading(make, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 64)
    x = (rng.normal(size=(64, 4)) + 2 * np.eye(3, 4)[y]).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(3e-2), make(min_margin=0.7))
    before = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.fit(x, y, epochs=5, verbose=0).history["loss"][-1] < before
    # ±1 rows mean what numbers mean, in a compiled step too.
    assert model.evaluate(x, 2 * np.eye(3)[y] - 1, verbose=0) == pytest.approx(before, rel=1e-5)


def test_the_sharpness_of_soft_hkr_is_a_constant_to_the_gradient():
    # At mean |f| above the margin: the derivative at a fixed τ, by differences.
    logits = np.array([[1.5, -2.0, 0.7], [0.3, 2.5, -1.8]])
    margin, own = 0.4, [0, 1]
    tau = margin / np.abs(logits).mean()

    def fixed(f):
        weights = np.exp(tau * f) * (np.arange(3) != np.array(own)[:, None])
        weights /= weights.sum(axis=1, keepdims=True)
        return np.mean((weights * f).sum(axis=1) - f[[0, 1], own])

    slope = gradient(lambda f: MulticlassSoftHKR(0.0, margin)(np.array(own), f), logits)
    assert np.allclose(slope, numerical_gradient(fixed, logits, 1e-4), atol=1e-5)
