"""Training through bounds: the loss it states, its schedules, and what it certifies."""

import importlib.util
import json
import pathlib

import fresh_processes
import keras
import numpy as np
import pytest
from box_models import inputs, rectified
from keras import layers
from sklearn.datasets import load_digits

from tf_lyapunov import L2, Linf, certify
from tf_lyapunov.attacks import PGD
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.training import (
    AdversarialModel,
    BoundTraining,
    OutputMarginModel,
    initialize_for_bounds,
)

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TOL = 1e-4


def labelled(n=24):
    model = rectified()
    return model, inputs(model, n), np.arange(n) % 3


def unchanged_fit(robust, x, y, **options):
    """Losses and metrics of one step that changes nothing."""
    robust.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY, run_eagerly=True)
    history = robust.fit(x, y, batch_size=len(x), verbose=0, shuffle=False, **options).history
    return {name: float(values[0]) for name, values in history.items()}


def test_the_loss_is_the_mixture_that_is_stated_and_no_point_has_a_larger_one():
    model, x, y = labelled()
    settings = dict(warmup=(0, 0), clean_share=(0.25, 0.25), regularizer=0.0)
    robust = BoundTraining(model, Linf(0.1), bounds=(0, 1), **settings)
    found = unchanged_fit(robust, x, y)
    clean = robust.evaluate(x, y, batch_size=24, verbose=0, return_dict=True)
    mixture = 0.25 * clean["loss"] + 0.75 * found["bound_loss"]
    assert np.isclose(found["loss"], mixture, rtol=TOL)
    # At the whole radius training and evaluation bound alike.
    assert np.isclose(clean["bound_loss"], found["bound_loss"], rtol=TOL)
    assert clean["certified_estimate"] == found["certified_estimate"]
    assert np.isclose(clean["bound_radius"], 0.1) and np.isclose(found["bound_radius"], 0.1)
    attack = PGD(Linf(0.1), steps=10, bounds=(0, 1))
    moved = attack(model, x, y).x_adv
    attacked = CROSS_ENTROPY(y, model.predict(moved, verbose=0))
    assert found["bound_loss"] >= float(attacked) - TOL
    assert found["bound_loss"] > clean["loss"]


def test_the_estimate_is_the_share_that_boxes_prove():
    model, x, y = labelled()
    y = model.predict(x, verbose=0).argmax(1)
    radii = certify(model, x, y, method="box", norm="linf").radius
    radius = float(np.median(radii))
    robust = BoundTraining(model, Linf(radius), warmup=(0, 0))
    share = unchanged_fit(robust, x, y)["certified_estimate"]
    # The two in the middle may be decided by the rounding of float32.
    assert abs(share - np.mean(radii >= radius)) <= 2 / 24 + 1e-6 and 0.3 < share < 0.7


def test_crown_moves_from_lines_to_boxes_and_small_boxes_bound_less():
    model, x, y = labelled()
    settings = dict(warmup=(0, 0), clean_share=(0, 0), regularizer=0.0)
    losses = {}
    for name, method, more in (
        ("boxes", "ibp", {}),
        ("lines", "crown_ibp", {"crown_share": (1, 1)}),
        ("both", "crown_ibp", {"crown_share": (0.5, 0.5)}),
        ("ended", "crown_ibp", {}),
        ("small", "small_box", {"small_share": 0.2}),
        ("whole", "small_box", {"small_share": 1.0}),
    ):
        robust = BoundTraining(model, Linf(0.05), method, **settings, **more)
        losses[name] = unchanged_fit(robust, x, y)["bound_loss"]
    assert losses["lines"] < losses["both"] < losses["boxes"]
    assert np.isclose(losses["ended"], losses["boxes"], rtol=TOL)
    clean = float(CROSS_ENTROPY(y, model.predict(x, verbose=0)))
    assert clean < losses["small"] < losses["boxes"]
    assert np.isclose(losses["whole"], losses["boxes"], rtol=TOL)


def test_the_warm_up_is_a_function_of_the_step():
    robust = BoundTraining(rectified(), Linf(0.2), warmup=(10, 110), clean_share=(0.8, 0.4))
    smooth = BoundTraining(rectified(), Linf(0.2), warmup=(10, 110), schedule="smooth")
    linear, curved, shares = [], [], []
    for step in (0, 10, 35, 60, 110, 500):
        for model in (robust, smooth):
            model.step.assign(step)
        linear.append(float(robust.radius()))
        curved.append(float(smooth.radius()))
        shares.append(float(robust._between(robust.clean_share)))
    assert np.allclose(linear, [0, 0, 0.05, 0.1, 0.2, 0.2], atol=1e-7)
    assert np.allclose(shares, [0.8, 0.8, 0.7, 0.6, 0.4, 0.4], atol=1e-6)
    assert curved[0] == curved[1] == 0 and 0 < curved[2] < 0.03 and curved[3] < linear[3]
    assert np.allclose(curved[4:], 0.2, atol=1e-6)


def test_the_regularizers_fade_with_the_warm_up():
    model, x, y = labelled()
    settings = dict(clean_share=(1, 1), warmup=(0, 10))
    plain = unchanged_fit(BoundTraining(model, Linf(0.1), regularizer=0.0, **settings), x, y)
    begun = BoundTraining(model, Linf(0.1), regularizer=2.0, **settings)
    begun.step.assign(5)
    half = unchanged_fit(begun, x, y)["loss"] - plain["loss"]
    ended = BoundTraining(model, Linf(0.1), regularizer=2.0, **settings)
    ended.step.assign(10)
    assert half > 0.01
    assert np.isclose(unchanged_fit(ended, x, y)["loss"], plain["loss"], rtol=TOL)


def digits():
    data = load_digits()
    return (data.images / 16).astype("float32")[..., None], data.target


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, "relu"),
            layers.Dense(10),
        ]
    )


def test_a_saved_run_resumes_its_warm_up_and_what_it_trained_is_certified(tmp_path):
    x, y = digits()
    shares = {}
    plain = convolutional()
    plain.compile(keras.optimizers.Adam(5e-3), CROSS_ENTROPY)
    plain.fit(x[:1500], y[:1500], batch_size=50, epochs=4, verbose=0)
    shares["plain"] = certify(plain, x[1500:], y[1500:], method="box", norm="linf")
    model = initialize_for_bounds(convolutional())
    robust = BoundTraining(model, Linf(0.05), bounds=(0.0, 1.0), warmup=(0, 90))
    robust.compile(keras.optimizers.Adam(5e-3), CROSS_ENTROPY, metrics=["accuracy"])
    robust.fit(x[:1500], y[:1500], batch_size=50, epochs=2, verbose=0)
    robust.save(tmp_path / "robust.keras")
    again = keras.saving.load_model(tmp_path / "robust.keras")
    assert float(again.step) == 60 and again.method == "ibp" and again.region == Linf(0.05)
    history = again.fit(x[:1500], y[:1500], batch_size=50, epochs=4, verbose=0).history
    assert np.isclose(history["bound_radius"][0], 0.05 * np.mean(np.arange(60, 90)) / 90)
    assert history["bound_radius"][-1] == pytest.approx(0.05)
    proof = certify(again.plain, x[1500:], y[1500:], method="box", norm="linf", bounds=(0, 1))
    proved, before = (p.certified_accuracy(0.05) for p in (proof, shares["plain"]))
    assert proved > 0.4 and proved > before + 0.2
    measured = again.evaluate(x[1500:], y[1500:], verbose=0, return_dict=True)
    # A few inputs lie where the rounding allowance or float32 decides.
    assert abs(measured["certified_estimate"] - proved) < 0.02


def test_labels_mean_the_same_everywhere_and_one_output_has_two_classes():
    model, x, y = labelled()
    settings = dict(warmup=(0, 0), regularizer=0.0)
    rows = unchanged_fit_rows(BoundTraining(model, Linf(0.05), **settings), x, np.eye(3)[y])
    numbers = unchanged_fit(BoundTraining(model, Linf(0.05), **settings), x, y)
    assert np.isclose(rows["bound_loss"], numbers["bound_loss"], rtol=TOL)
    single = keras.Sequential([keras.Input((5,)), layers.Dense(8, "relu"), layers.Dense(1)])
    robust = BoundTraining(single, L2(0.1), **settings)
    robust.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    history = robust.fit(x, (y > 0).astype("float32"), verbose=0).history
    logits = single.predict(x, verbose=0)
    assert np.isfinite(history["bound_loss"][0]) and logits.shape == (24, 1)


def unchanged_fit_rows(robust, x, rows):
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    robust.compile(keras.optimizers.SGD(0.0), loss)
    history = robust.fit(x, rows, batch_size=len(x), verbose=0).history
    return {name: float(values[0]) for name, values in history.items()}


def test_another_training_method_may_be_inside_and_none_around():
    model, x, y = labelled()
    robust = BoundTraining(OutputMarginModel(model, 0.1), Linf(0.05), warmup=(0, 0))
    assert robust.plain is model and np.isfinite(unchanged_fit(robust, x, y)["loss"])
    with pytest.raises(ValueError, match="outermost"):
        AdversarialModel(robust, PGD(Linf(0.1), steps=1))


def test_impossible_settings_are_refused_by_name():
    model = rectified()
    for arguments, error, word in (
        ({"region": 0.1}, TypeError, "`region`"),
        ({"region": Linf(0.0)}, ValueError, "`region`"),
        ({"region": Linf(np.array([0.1, 0.2]))}, ValueError, "`region`"),
        ({"method": "box"}, ValueError, "`method`"),
        ({"method": "small_box", "region": L2(0.1)}, ValueError, "l∞"),
        ({"warmup": (5, 2)}, ValueError, "`warmup`"),
        ({"warmup": 5}, ValueError, "`warmup`"),
        ({"schedule": "cosine"}, ValueError, "`schedule`"),
        ({"clean_share": (0.5, 1.5)}, ValueError, "`clean_share`"),
        ({"clean_share": 0.5}, ValueError, "`clean_share`"),
        ({"crown_share": (float("nan"), 1)}, ValueError, "`crown_share`"),
        ({"small_share": 0.0}, ValueError, "`small_share`"),
        ({"regularizer": float("nan")}, ValueError, "`regularizer`"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
    ):
        with pytest.raises(error, match=word):
            BoundTraining(model, **{"region": Linf(0.1), **arguments})
    with pytest.raises(ValueError):
        Linf(float("nan"))
    shares = keras.Sequential([keras.Input((5,)), layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match="logits"):
        BoundTraining(shares, Linf(0.1))
    unknown = keras.Sequential(
        [keras.Input((5,)), layers.LayerNormalization(name="levels"), layers.Dense(3)]
    )
    with pytest.raises(UnsupportedLayerError, match="levels"):
        BoundTraining(unknown, Linf(0.1))
    robust = BoundTraining(model, Linf(0.1))
    robust.compile("sgd", CROSS_ENTROPY)
    with pytest.raises(ValueError, match="need labels"):
        robust.fit(np.zeros((4, 5)), verbose=0)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_under_mixed_precision_bounds_are_those_of_the_float32_weights(policy):
    model, x, y = labelled()
    keras.config.set_dtype_policy(policy)
    try:
        half = rectified()
        half.set_weights(model.get_weights())
        settings = dict(warmup=(0, 0), clean_share=(0.5, 0.5), regularizer=0.5)
        found = [
            unchanged_fit(BoundTraining(m, Linf(0.05), bounds=(0, 1), **settings), x, y)
            for m in (model, half)
        ]
        # Bounds are computed in float32 from the stored weights.
        assert np.isclose(found[0]["bound_loss"], found[1]["bound_loss"], rtol=TOL)
        assert found[0]["certified_estimate"] == found[1]["certified_estimate"]
        assert np.isclose(found[0]["loss"], found[1]["loss"], rtol=0.02)
        robust = BoundTraining(half, Linf(0.05), warmup=(0, 4))
        robust.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY)
        losses = robust.fit(x, y, batch_size=8, epochs=6, verbose=0).history["loss"]
        assert isinstance(robust.optimizer, keras.optimizers.LossScaleOptimizer) == (
            policy == "mixed_float16"
        )
        assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
        assert certify(half, x, y, method="box", norm="linf").radius.shape == (len(x),)
    finally:
        keras.config.set_dtype_policy("float32")


BACKEND_SCRIPT = """
import json, sys
import keras, numpy as np
from box_models import convolved, inputs, rectified
from tf_lyapunov import Linf
from tf_lyapunov.callbacks import MarginRamp
from tf_lyapunov.losses import EfficientMargin
from tf_lyapunov.training import BoundTraining

keras.utils.set_random_seed(0)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
found = {}
for method in ("ibp", "crown_ibp", "small_box"):
    model = convolved() if method == "ibp" else rectified(depth=1)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / 4)
    x, y = inputs(model, 12), np.arange(12) % 3
    robust = BoundTraining(model, Linf(0.02), method, warmup=(0, 2), clean_share=(0.5, 0.5))
    robust.compile(keras.optimizers.SGD(0.05), loss)
    history = robust.fit(x, y, batch_size=6, epochs=2, verbose=0, shuffle=False).history
    result = robust.evaluate(x, y, batch_size=12, verbose=0, return_dict=True)
    found[method] = [history["loss"][-1], history["bound_radius"][-1], result["bound_loss"]]
    found[method].append(float(keras.ops.convert_to_numpy(robust.step.value)))
model = rectified(depth=1)
loss = EfficientMargin(0.5, model)
model.compile("sgd", loss)
history = model.fit(
    inputs(model, 12), np.arange(12) % 3, epochs=4, verbose=0, callbacks=[MarginRamp(loss)]
).history
found["ramp"] = [history["margin_radius"][-1], history["loss"][-1] - history["loss"][0]]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_backends_train_alike(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    here, own = pathlib.Path(__file__).parent, {}
    exec(BACKEND_SCRIPT, own)
    printed = fresh_processes.output(BACKEND_SCRIPT, backend=backend, path=[here])
    found = {"own": own["found"], backend: json.loads(printed.split("FOUND")[1])}
    for name in ("ibp", "crown_ibp"):
        want = own["found"][name]
        assert np.allclose(found[backend][name], want, rtol=1e-3), name
    for values in found.values():
        assert values["small_box"][1:2] == pytest.approx([0.02]) and values["small_box"][3] == 4
        assert values["ramp"][0] == pytest.approx(1.5) and values["ramp"][1] > 0.02
