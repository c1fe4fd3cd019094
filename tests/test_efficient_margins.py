"""Losses with gains of pairs: their equations, what is differentiated, and the ramp."""

import keras
import numpy as np
import pytest
from derivatives import gradient

from tf_lyapunov.callbacks import MarginRamp
from tf_lyapunov.layers import SpectralDense
from tf_lyapunov.losses import EfficientMargin, MultiMargin, OffsetCrossEntropy

# Roundings of float32 on numbers of size 10, and of the Gram matrix of columns of size 1.
TOL = 64 * 10 * np.finfo("float32").eps
KINDS = [EfficientMargin, OffsetCrossEntropy]


def classifier(units=4, last=None):
    last = keras.layers.Dense(units, name="last") if last is None else last
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, "relu"), last])


def sample(units=4, n=6):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, units)).astype("float32"), np.arange(n) % units


def value(loss, labels, logits):
    return float(keras.ops.convert_to_numpy(loss(labels, logits)))


def expected(logits, labels, gains, radius, temperature, efficient):
    """The equation in float64, sample by sample; `gains` (classes, classes)."""
    losses = []
    for f, y in zip(logits.astype(float), labels, strict=True):
        shifted = []
        for j in range(len(f)):
            k = gains[y, j]
            away = np.clip((f[y] - f[j]) / k, 0.01 * radius, radius) if j != y else 0.0
            margin = k * (away if efficient else 2 * radius) if j != y else 0.0
            shifted.append((f[j] - f[y] + margin) / temperature)
        losses.append(temperature * np.logaddexp.reduce(shifted))
    return np.mean(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_equation_with_the_gains_of_the_last_layer(kind):
    logits, labels = sample()
    model = classifier()
    kernel = model.layers[-1].kernel.numpy().astype(float)
    gains = 1.5 * np.linalg.norm(kernel[:, :, None] - kernel[:, None], axis=0)
    loss = kind(0.3, model, gain=1.5, temperature=0.5)
    want = expected(logits, labels, gains, 0.3, 0.5, kind is EfficientMargin)
    assert abs(value(loss, labels, logits) - want) <= TOL


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_model_every_pair_has_the_root_of_two(kind):
    logits, labels = sample()
    want = expected(
        logits, labels, np.full((4, 4), 2.0 * 2**0.5), 0.3, 0.5, kind is EfficientMargin
    )
    assert abs(value(kind(0.3, gain=2.0, temperature=0.5), labels, logits) - want) <= TOL
    coded = 2 * np.eye(4)[labels] - 1
    assert value(kind(0.3), coded, logits) == value(kind(0.3), labels, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_logit_has_its_own_gain(kind):
    model = classifier(1)
    size = float(np.linalg.norm(model.layers[-1].kernel.numpy()))
    loss = kind(0.3, model, temperature=0.5)
    away = np.clip(0.2 / size, 0.003, 0.3) if kind is EfficientMargin else 0.6
    want = 0.5 * np.log1p(np.exp((size * away - 0.2) / 0.5))
    for labels in ([1], [[1]]):
        assert abs(value(loss, np.array(labels), np.array([[0.2]], "float32")) - want) <= TOL
    for labels in ([0], [-1]):
        assert abs(value(loss, np.array(labels), np.array([[-0.2]], "float32")) - want) <= TOL


def test_the_distances_are_constants_to_the_gradient_and_the_gains_are_not():
    labels = np.array([0])
    logits = np.array([[1.0, 0.5, -1.0, 0.0]], "float32")
    # Within (0.01·ε, ε): held constant, the margins shift the logits of plain cross-entropy by
    # what they lead by, and all pairs look equal.
    loss = EfficientMargin(10.0, gain=1.0)
    found = gradient(lambda f: loss(labels, f), logits)
    assert np.allclose(found, [[-0.75, 0.25, 0.25, 0.25]], atol=1e-6)
    scale = np.array(1.0, "float32")

    def of_gain(g):
        return EfficientMargin(10.0, gain=lambda: g)(labels, keras.ops.convert_to_tensor(logits))

    # Σ_j p_j·√2·ε_j over the rivals, with √2·ε_j = f_y - f_j.
    assert np.isclose(gradient(of_gain, scale), 0.25 * (0.5 + 2.0 + 1.0), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_columns_and_the_label_s_own_have_finite_gradients(kind):
    model = classifier()
    kernel = np.ones((5, 4), "float32")
    kernel[:, 3] = 2.0
    model.layers[-1].kernel.assign(kernel)
    model.compile(keras.optimizers.SGD(0.1), kind(0.5, model))
    model.fit(np.ones((4, 3)), np.arange(4), verbose=0)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.parametrize("last", [None, "normalised"])
def test_training_shrinks_the_share_of_samples_below_the_radius(last):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    x = (np.eye(3)[labels] + 0.1 * rng.normal(size=(96, 3))).astype("float32")
    layer = SpectralDense(3) if last else keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((3,)), layer])
    loss = EfficientMargin(0.3, model)
    model.compile(keras.optimizers.SGD(0.5), loss)

    def certified():
        kernel = layer.effective_values()["kernel"] if last else layer.kernel.numpy()
        f = model.predict(x, verbose=0)
        lead = f[np.arange(96), labels][:, None] - f
        gains = np.linalg.norm(kernel[:, labels, None] - kernel[:, None], axis=0)
        radii = np.where(gains > 0, lead / np.maximum(gains, 1e-9), np.inf)
        return np.mean(radii.min(axis=1) > 0.3)

    before = certified()
    history = model.fit(x, labels, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < history[0] and certified() > max(before, 0.9)


def test_a_ramp_of_levels_changes_the_radius_so_often():
    loss = EfficientMargin(0.5)
    ramp, steady = MarginRamp(loss, levels=10), MarginRamp(loss)
    radii = [ramp.radius_at(epoch, 200) for epoch in range(200)]
    assert len(set(radii)) == 11 and radii == sorted(radii)
    assert (radii[0], radii[-1]) == (steady.radius_at(0, 200), steady.radius_at(199, 200))
    for epoch in range(0, 101, 10):
        assert radii[epoch] == pytest.approx(steady.radius_at(epoch, 200))
    for levels in (0, 2.5, True):
        with pytest.raises(ValueError, match="levels"):
            MarginRamp(loss, levels=levels)


def test_the_ramp_raises_the_radius_and_a_resumed_run_goes_on():
    loss = EfficientMargin(0.5)
    model = classifier()
    model.compile("sgd", loss)
    x, y = np.ones((4, 3)), np.arange(4)
    history = model.fit(x, y, epochs=8, verbose=0, callbacks=[MarginRamp(loss, 0.5)]).history
    want = 0.5 * (0.1 + 2.9 * np.minimum(1, np.arange(8) / 4))
    assert np.allclose(history["margin_radius"], want, rtol=1e-6)
    again = model.fit(
        x, y, epochs=8, initial_epoch=3, verbose=0, callbacks=[MarginRamp(loss, 0.5)]
    ).history
    assert np.allclose(again["margin_radius"], want[3:], rtol=1e-6)
    assert history["loss"][-1] > history["loss"][0]  # larger margins, not stale ones


def test_a_loaded_loss_asks_for_its_model(tmp_path):
    model = classifier()
    model.compile("sgd", EfficientMargin(0.5, model, gain=lambda: 1.0))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    logits, labels = sample()
    with pytest.raises(ValueError, match="bind"):
        loaded.loss(labels, logits)
    with pytest.raises(ValueError, match="was a function"):
        loaded.loss.bind(loaded)
    loaded.loss.bind(loaded, gain=1.0)
    assert np.isclose(value(loaded.loss, labels, logits), value(model.loss, labels, logits))
    whole = EfficientMargin.from_config(EfficientMargin(0.25, gain=2.0).get_config())
    assert whole.radius == 0.25 and np.isfinite(value(whole, labels, logits))


def test_impossible_arguments_are_refused_by_name():
    for kind in KINDS:
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            for name in ("radius", "gain", "temperature"):
                with pytest.raises(ValueError, match=f"`{name}`"):
                    kind(**{name: bad})
        with pytest.raises(ValueError, match="ends the model"):
            kind(0.5, classifier(last=keras.layers.Dense(4, "softmax")))
        with pytest.raises(ValueError, match="ends the model"):
            kind(0.5, classifier(last=keras.layers.ReLU()))
        with pytest.raises(ValueError, match="bound to"):
            kind(0.5, classifier(3))(np.array([0]), np.zeros((1, 4), "float32"))
        with pytest.raises(ValueError, match="Labels must be"):
            kind(0.5)(np.array([7]), np.zeros((1, 4), "float32"))
    loss = EfficientMargin()
    with pytest.raises(ValueError, match="`radius`"):
        loss.radius = -1.0
    with pytest.raises(TypeError, match="EfficientMargin"):
        MarginRamp(MultiMargin())
    with pytest.raises(ValueError, match="`share`"):
        MarginRamp(loss, share=1.5)
    model = classifier()
    model.compile("sgd", EfficientMargin())
    with pytest.raises(ValueError, match="very loss"):
        model.fit(np.ones((4, 3)), np.arange(4), verbose=0, callbacks=[MarginRamp(loss)])
