"""Adversarial training minimises the loss it states, on inputs that lie where they should."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov import L2, Linf, constrain, lipschitz_upper_bound
from tf_lyapunov.attacks import FGM, FGSM, PGD, DeepFool
from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.constraints import ParsevalFrame, SpectralBound
from tf_lyapunov.layers import ConvexCombination
from tf_lyapunov.training import AdversarialModel, LaplacianModel

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(dtype="float32", **options):
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", name="a", dtype=dtype, **options),
            layers.Dense(8, "relu", name="b", dtype=dtype, **options),
            layers.Dense(3, dtype="float32"),
        ]
    )


def data(n=24):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return (np.eye(6)[y] + 0.3 * rng.random((n, 6))).astype("float32"), y


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def log_softmax(f):
    f = np.asarray(f, float)
    return f - f.max(1, keepdims=True) - np.log(np.exp(f - f.max(1, keepdims=True)).sum(1))[:, None]


def unchanged_fit(robust, x, y, **options):
    """Losses of one epoch that changes nothing."""
    robust.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY, metrics=["accuracy"])
    return robust.fit(x, y, batch_size=len(x), verbose=0, **options).history


@pytest.mark.parametrize("ball", [L2(0.5), Linf(0.1)])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.3)])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_perturbed_inputs_fill_the_ball_respect_the_box_and_raise_the_loss(ball, bounds, loss):
    (x, y), model = data(), classifier()
    attack = PGD(ball, steps=5, random_start=True, bounds=bounds, loss=loss)
    moved = numpy_of(AdversarialModel(model, attack).perturbed(keras.ops.convert_to_tensor(x), y))
    sizes = ball.norm(moved.astype(float) - x)
    # x + v is rounded in float32, every entry by half an ulp of values below 2.
    assert np.all(sizes <= ball.radius + 6 * np.finfo("float32").eps)
    assert np.max(sizes) > 0.9 * ball.radius
    if bounds is not None:
        assert moved.min() >= bounds[0] and moved.max() <= bounds[1]
    before, after = (
        -log_softmax(model.predict(z, verbose=0))[np.arange(24), y] for z in (x, moved)
    )
    assert after.mean() > before.mean() + 0.01


def test_a_single_step_is_the_fast_gradient_method():
    (x, y), model = data(), classifier()
    for attack in (FGM(L2(0.3)), FGSM(0.05)):
        found = attack(model, x, y)
        right = model.predict(x, verbose=0).argmax(1) == y
        moved = numpy_of(
            AdversarialModel(model, attack).perturbed(keras.ops.convert_to_tensor(x), y)
        )
        assert right.any()
        assert np.allclose(moved[right], found.x_adv[right], atol=1e-6)


def test_softmax_heads_are_looked_through():
    (x, y), model = data(), classifier()
    probable = keras.Sequential([keras.Input((6,)), *model.layers, layers.Softmax()])
    attack, tensor = PGD(L2(0.5), steps=3), keras.ops.convert_to_tensor(x)
    moved = [numpy_of(AdversarialModel(m, attack).perturbed(tensor, y)) for m in (model, probable)]
    assert np.allclose(*moved, atol=1e-6)


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_the_loss_is_the_mixture_that_is_stated(mix):
    (x, y), model = data(), classifier()
    robust = AdversarialModel(model, PGD(L2(0.5), steps=3), mix=mix)
    moved = numpy_of(robust.perturbed(keras.ops.convert_to_tensor(x), y))
    history = unchanged_fit(robust, x, y)
    clean, adversarial = (robust.evaluate(z, y, batch_size=24, verbose=0) for z in (x, moved))
    assert adversarial[0] > clean[0] + 0.01
    assert np.isclose(history["loss"][0], mix * adversarial[0] + (1 - mix) * clean[0], rtol=1e-4)
    assert np.isclose(history["accuracy"][0], adversarial[1])


def test_trades_adds_the_divergence_between_clean_and_perturbed_outputs():
    (x, y), model = data(), classifier()
    robust = AdversarialModel(model, PGD(Linf(0.2), steps=4), trades_beta=2.0, seed=3)
    twin = AdversarialModel(model, PGD(Linf(0.2), steps=4), trades_beta=2.0, seed=3)
    moved = numpy_of(twin.perturbed(keras.ops.convert_to_tensor(x), y))
    history = unchanged_fit(robust, x, y, shuffle=False)
    p, q = (log_softmax(model.predict(z, verbose=0)) for z in (x, moved))
    divergence = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
    assert divergence > 1e-3
    clean = robust.evaluate(x, y, batch_size=24, verbose=0)[0]
    assert np.isclose(history["loss"][0], clean + 2.0 * divergence, rtol=1e-4)


def test_sample_weights_of_zero_leave_nothing():
    (x, y), attack = data(), PGD(L2(0.5), steps=2)
    for options in ({}, {"mix": 0.5}, {"trades_beta": 1.0}):
        robust = AdversarialModel(classifier(), attack, **options)
        history = unchanged_fit(robust, x, y, sample_weight=np.zeros(24))
        assert history["loss"][0] == 0.0


def test_it_drops_a_fragile_feature_that_plain_training_relies_on():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    sign = 2.0 * y - 1
    strong = sign + 0.8 * rng.normal(size=400)
    fragile = 0.1 * sign  # always right, and within reach of the attack
    x = np.stack([strong, fragile], axis=1).astype("float32")
    shares = []
    for wrap in (lambda m: m, lambda m: AdversarialModel(m, FGM(Linf(0.2)))):
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2, kernel_initializer="zeros")])
        trained = wrap(model)
        trained.compile(keras.optimizers.SGD(5.0), CROSS_ENTROPY)
        # 200 steps on the whole of it.
        trained.fit(np.tile(x, (200, 1)), np.tile(y, 200), batch_size=400, shuffle=False, verbose=0)
        strong_weight, fragile_weight = np.abs(np.diff(model.get_weights()[0], axis=1)[:, 0])
        shares.append(fragile_weight / (strong_weight + fragile_weight))
    assert shares[0] > 0.4 and shares[1] < 0.1


def test_constraints_monitor_and_budgets_hold_as_in_plain_training():
    x, y = data()
    model = constrain(classifier(), [0.8, 0.7, 1.5])
    model.layers[0].kernel.assign(10 * np.ones((6, 8)))
    robust = AdversarialModel(model, PGD(L2(0.2), steps=2), mix=0.5)
    robust.compile(keras.optimizers.SGD(5.0), CROSS_ENTROPY)
    monitor = LyapunovMonitor(on_violation="ignore", verbose=0)
    history = robust.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[monitor]).history
    assert history["gain_upper_bound"][-1] <= 0.8 * 0.7 * 1.5 * (1 + 1e-12)
    for layer, budget in zip(model.layers, (0.8, 0.7, 1.5), strict=True):
        assert np.linalg.norm(numpy_of(layer.kernel).astype(float), 2) <= budget


def test_it_wraps_other_training_methods_and_must_be_outermost(tmp_path):
    x, y = data()
    both = AdversarialModel(LaplacianModel(classifier(), ["a", "b"]), FGM(L2(0.3)), mix=0.5)
    history = unchanged_fit(both, x, y)
    alone = unchanged_fit(AdversarialModel(both.plain, FGM(L2(0.3)), mix=0.5), x, y)
    assert history["loss"][0] > alone["loss"][0]
    with pytest.raises(ValueError, match="outermost"):
        LaplacianModel(both, ["a", "b"])
    both.save(tmp_path / "w.keras")
    again = keras.models.load_model(tmp_path / "w.keras")
    assert again.mix == 0.5 and again.attack.steps == 1 and again.attack.ball == L2(0.3)
    assert np.allclose(again.predict(x, verbose=0), both.predict(x, verbose=0), atol=1e-6)


def test_the_inner_model_is_saved_as_an_ordinary_one(tmp_path):
    x, y = data()
    robust = AdversarialModel(classifier(), PGD(L2(0.2), steps=1))
    unchanged_fit(robust, x, y)
    robust.plain.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is keras.Sequential
    assert np.allclose(loaded.predict(x, verbose=0), robust.predict(x, verbose=0), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"trades_beta": 1.0}])
def test_low_precision_trains_with_finite_weights(options):
    x, y = data()
    robust = AdversarialModel(classifier("mixed_bfloat16"), PGD(L2(0.2), steps=2), **options)
    robust.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    robust.fit(x, y, epochs=2, verbose=0)
    assert all(np.all(np.isfinite(w)) for w in robust.get_weights())


@pytest.mark.parametrize(
    ("attack", "options", "error", "message"),
    [
        (PGD(L2(0.1), restarts=2), {}, ValueError, "restarts"),
        (PGD(L2(0.1), targeted=True), {}, ValueError, "targeted"),
        (PGD(L2([0.1, 0.2])), {}, ValueError, "per sample"),
        (PGD(L2(0.1), step=[0.1, 0.2]), {}, ValueError, "per sample"),
        (PGD(L2(0.0)), {}, ValueError, "positive"),
        (DeepFool(), {}, TypeError, "PGD"),
        (None, {}, TypeError, "PGD"),
        (PGD(L2(0.1)), {"mix": 0}, ValueError, "mix"),
        (PGD(L2(0.1)), {"mix": 1.5}, ValueError, "mix"),
        (PGD(L2(0.1)), {"trades_beta": -1}, ValueError, "trades_beta"),
        (PGD(L2(0.1)), {"trades_beta": 1, "mix": 0.5}, ValueError, "TRADES"),
    ],
)
def test_attacks_and_mixtures_without_meaning_are_refused(attack, options, error, message):
    with pytest.raises(error, match=message):
        AdversarialModel(classifier(), attack, **options)


def test_trades_refuses_softmax_heads_and_training_refuses_missing_labels():
    probable = keras.Sequential([keras.Input((6,)), *classifier().layers, layers.Softmax()])
    with pytest.raises(ValueError, match="softmax head"):
        AdversarialModel(probable, PGD(L2(0.1)), trades_beta=1.0)
    robust = AdversarialModel(classifier(), PGD(L2(0.1)))
    robust.compile("sgd", CROSS_ENTROPY)
    with pytest.raises(ValueError, match="label"):
        robust.fit(data()[0], verbose=0)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"steps_per_execution": 3}])
def test_attack_penalty_and_constraints_compile_into_one_step(options):
    if keras.backend.backend() == "torch":
        pytest.skip("Keras compiles nothing on torch")
    x, y = data()
    inner = LaplacianModel(classifier(kernel_constraint=ParsevalFrame()), ["a", "b"])
    robust = AdversarialModel(inner, PGD(L2(0.3), steps=3, random_start=True), mix=0.5)
    robust.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY, **options)
    losses = robust.fit(x, y, batch_size=8, epochs=5, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_averaged_residual_branches_with_frames_are_certified_by_the_norms_of_their_layers():
    inputs = h = keras.Input((4,))
    for average in (layers.Average(), ConvexCombination(0.5)):
        branch = layers.Dense(4, "relu", kernel_constraint=ParsevalFrame(0.5), use_bias=False)(h)
        h = average([h, branch])
    model = keras.Model(inputs, layers.Dense(2, kernel_constraint=ParsevalFrame(0.5))(h))
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            kernel = layer.kernel
            for _ in range(60):  # what many steps with gradients near zero do
                kernel = layer.kernel_constraint(kernel)
            layer.kernel.assign(kernel)
    gain = lipschitz_upper_bound(model).gain_upper_bound
    # Frames to float32; without the averages it would be 2² = 4.
    assert 0.99 <= gain <= 1 + 1e-4


def test_a_bare_constraint_keeps_its_bound():
    x, y = data()
    model = classifier(kernel_constraint=SpectralBound(0.6))
    robust = AdversarialModel(model, FGM(L2(0.3)))
    robust.compile(keras.optimizers.SGD(10.0), CROSS_ENTROPY)
    robust.fit(x, y, verbose=0)
    for layer in model.layers[:2]:
        assert np.linalg.norm(numpy_of(layer.kernel).astype(float), 2) <= 0.6
