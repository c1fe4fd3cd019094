"""Training for larger minimal perturbations: the penalties are what they say, and `fit` runs."""

import fresh_processes
import keras
import numpy as np
import pytest
from keras import ops

from tf_lyapunov.theory.perturbation import output_lower_bound
from tf_lyapunov.training.adversarial import AdversarialModel
from tf_lyapunov.training.perturbation import (
    ContractiveModel,
    OutputMarginModel,
    StabilityModel,
    fgs_regularized,
    output_distance,
)

layers = keras.layers
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(units=3, activation="tanh"):
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(6, activation, name="hidden"), layers.Dense(units)]
    )


def blobs(n=96, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    centres = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    return (centres[y] + 0.3 * rng.normal(size=(n, 2))).astype("float32"), y


def penalty(wrapped, x, y):
    """What a training method adds to the compiled loss, by its own hook."""
    wrapped.compile("sgd", CROSS_ENTROPY)
    found = wrapped({"clean": ops.convert_to_tensor(x)}, training=True)
    loss = wrapped.compute_loss({"clean": ops.convert_to_tensor(x)}, y, found)
    plain = CROSS_ENTROPY(y, wrapped.plain(x, training=True))
    return float(loss) - float(plain)


def test_the_output_distance_is_the_exact_bound_with_a_sign():
    rng = np.random.default_rng(1)
    logits, kernel = rng.normal(size=(50, 4)), rng.normal(size=(5, 4))
    labels = rng.integers(0, 4, 50)
    found = ops.convert_to_numpy(output_distance(logits, kernel, labels))
    right = logits.argmax(axis=1) == labels
    assert np.all((found > 0) == right)
    # A backend without float64 computes in float32: four classes, five features, 2⁻²³ each.
    np.testing.assert_allclose(
        np.maximum(found, 0), output_lower_bound(logits, kernel, labels), atol=2**-18
    )
    one_hot = ops.convert_to_numpy(output_distance(logits, kernel, np.eye(4)[labels]))
    np.testing.assert_array_equal(one_hot, found)


def test_equal_columns_have_no_boundary_and_no_gradient_of_nan():
    same = output_distance(np.array([[1.0, 0.5]], "float32"), np.ones((3, 2), "float32"), [0])
    assert float(same[0]) == 0.0
    model = classifier()
    model.layers[-1].kernel.assign(np.ones((6, 3)))
    wrapped = OutputMarginModel(model, 0.5)
    wrapped.compile("sgd", CROSS_ENTROPY)
    wrapped.fit(*blobs(), verbose=0)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.parametrize("decided", [False, True])
def test_the_margin_penalty_is_minus_the_mean_distance(decided):
    model, (x, y) = classifier(), blobs()
    logits = model.predict(x, verbose=0)
    kernel = model.layers[-1].get_weights()[0]
    labels = logits.argmax(axis=1) if decided else y
    gaps = logits[np.arange(len(x)), labels][:, None] - logits
    sizes = np.linalg.norm(kernel[:, labels].T[:, :, None] - kernel[None], axis=1)
    rows = np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf).min(axis=1)
    found = penalty(OutputMarginModel(model, 0.3, decided=decided), x, y)
    assert found == pytest.approx(-0.3 * rows.mean(), abs=1e-5)
    capped = penalty(OutputMarginModel(model, 0.3, cap=0.1, decided=decided), x, y)
    assert capped == pytest.approx(-0.3 * np.minimum(rows, 0.1).mean(), abs=1e-5)


def test_training_for_the_margin_enlarges_it():
    x, y = blobs()
    sizes = {}
    for weight in (None, 1.0):
        keras.utils.set_random_seed(0)
        model = classifier()
        trained = model if weight is None else OutputMarginModel(model, weight)
        trained.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY)
        trained.fit(x, y, batch_size=32, epochs=25, verbose=0)
        logits = model.predict(x, verbose=0)
        kernel = model.layers[-1].get_weights()[0]
        sizes[weight] = np.median(output_lower_bound(logits, kernel, y))
    assert sizes[1.0] > 1.1 * sizes[None]


def test_a_single_logit_has_the_distance_of_its_sign():
    model = classifier(units=1)
    x, y = blobs()
    wrapped = OutputMarginModel(model, 1.0)
    wrapped.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    found = wrapped({"clean": ops.convert_to_tensor(x)}, training=True)
    truth = (y > 0).astype("float32")[:, None]
    loss = wrapped.compute_loss({"clean": ops.convert_to_tensor(x)}, truth, found)
    plain = keras.losses.BinaryCrossentropy(from_logits=True)(truth, model(x))
    logits, kernel = model.predict(x, verbose=0)[:, 0], model.layers[-1].get_weights()[0]
    expected = np.mean(np.where(truth[:, 0] > 0, logits, -logits)) / np.linalg.norm(kernel)
    assert float(plain) - float(loss) == pytest.approx(expected, abs=1e-5)


def jacobian_norms(layer, x):
    """Oracle: central differences of the layer, entry by entry."""
    step, flat = 1e-2, x.reshape(len(x), -1)
    total = np.zeros(len(x))
    for k in range(flat.shape[1]):
        e = np.zeros_like(flat)
        e[:, k] = step
        up, down = (np.asarray(layer((flat + s * e).reshape(x.shape))) for s in (1, -1))
        total += np.sum(((up - down) / (2 * step)).reshape(len(x), -1) ** 2, axis=1)
    return np.sqrt(total)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dense(5, "tanh"),
        layers.Dense(5, "sigmoid"),
        layers.Dense(4, "softplus"),
        layers.Dense(4),
        layers.Conv2D(3, 3, padding="same", activation="tanh"),
        layers.Conv2D(3, 2, strides=2, activation="sigmoid"),
        layers.Conv1D(3, 3, dilation_rate=2, padding="same"),
    ],
    ids=lambda layer: f"{layer.name}-{layer.activation.__name__}",
)
def test_the_contractive_penalty_is_the_norm_of_the_jacobian(layer):
    shape = {"Dense": (4,), "Conv1D": (7, 2), "Conv2D": (5, 5, 2)}[type(layer).__name__]
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layer(inputs))))
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, *shape)).astype("float32"), rng.integers(0, 3, 6)
    found = penalty(ContractiveModel(model, [layer.name], 0.5), x, y)
    # Differences with a step of 1e-2: third derivatives (≤ 2) times 1e-4/6, per entry.
    assert found == pytest.approx(0.5 * jacobian_norms(layer, x).mean(), rel=2e-3)


def test_contraction_shrinks_the_layers():
    x, y = blobs()
    norms = []
    for weight in (None, 1.0):
        keras.utils.set_random_seed(0)
        model = classifier()
        trained = model if weight is None else ContractiveModel(model, ["hidden"], weight)
        trained.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY)
        trained.fit(x, y, batch_size=32, epochs=15, verbose=0)
        norms.append(np.linalg.norm(model.layers[0].get_weights()[0]))
    assert norms[1] < 0.9 * norms[0]


def test_fgs_regularization_is_a_mixture_of_clean_and_perturbed_loss():
    model, (x, y) = classifier(), blobs()
    wrapped = fgs_regularized(model, 0.2, alpha=0.25)
    assert isinstance(wrapped, AdversarialModel) and wrapped.mix == 0.75
    moved = ops.convert_to_numpy(wrapped.perturbed(ops.convert_to_tensor(x), y)) - x
    np.testing.assert_allclose(np.abs(moved), 0.2, atol=1e-6)
    for alpha in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`alpha`"):
            fgs_regularized(model, 0.2, alpha=alpha)


@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_stability_training_makes_the_answers_alike(distance):
    x, y = blobs()
    noise = 0.5 * np.random.default_rng(3).normal(size=x.shape).astype("float32")
    apart = []
    for weight in (None, 5.0):
        keras.utils.set_random_seed(0)
        model = classifier()
        trained = model if weight is None else StabilityModel(model, 0.5, weight, distance)
        trained.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY)
        trained.fit(x, y, batch_size=32, epochs=15, verbose=0)
        logits, moved = (model.predict(v, verbose=0) for v in (x, x + noise))
        apart.append(np.mean(np.linalg.norm(logits - moved, axis=1)))
    assert apart[1] < 0.8 * apart[0]


def test_methods_combine_and_survive_saving(tmp_path):
    x, y = blobs()
    model = classifier()
    wrapped = StabilityModel(
        OutputMarginModel(ContractiveModel(model, ["hidden"], 0.01), 0.1, cap=2.0), 0.1
    )
    wrapped.compile("adam", CROSS_ENTROPY, metrics=["accuracy"])
    wrapped.fit(x, y, sample_weight=np.ones(len(x)), batch_size=32, verbose=0)
    wrapped.save(tmp_path / "wrapped.keras")
    loaded = keras.saving.load_model(tmp_path / "wrapped.keras")
    assert loaded.get_config() == wrapped.get_config() or loaded.noise == wrapped.noise
    np.testing.assert_allclose(loaded.predict(x, verbose=0), wrapped.predict(x, verbose=0))
    assert loaded.model.cap == 2.0 and loaded.model.model.penalties == [0.01]


def test_models_without_what_a_method_needs_are_refused():
    probabilities = keras.Sequential([keras.Input((2,)), layers.Dense(3, "softmax")])
    pooled = keras.Sequential([keras.Input((4, 4, 1)), layers.GlobalAveragePooling2D()])
    for build in (OutputMarginModel, lambda m: StabilityModel(m, 0.1)):
        with pytest.raises(ValueError, match="returns logits"):
            build(probabilities)
    with pytest.raises(ValueError, match="must end with a linear"):
        OutputMarginModel(pooled)
    with pytest.raises(ValueError, match="contractive penalty knows"):
        ContractiveModel(classifier(activation="gelu"), ["hidden"])
    with pytest.raises(ValueError, match="one per layer"):
        ContractiveModel(classifier(), ["hidden"], [0.1, 0.2])
    with pytest.raises(ValueError, match="`distance`"):
        StabilityModel(classifier(), 0.1, distance="cosine")
    with pytest.raises(ValueError, match="`noise`"):
        StabilityModel(classifier(), 0.0)


PROGRAM = """
import keras, numpy as np
from tf_lyapunov.training.perturbation import *
from tf_lyapunov.training import perturbation as p
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 2)).astype("float32"), rng.integers(0, 3, 32)
for wrap in (lambda m: p.OutputMarginModel(m, 0.1), lambda m: p.ContractiveModel(m, ["hidden"]),
             lambda m: p.StabilityModel(m, 0.1), lambda m: p.fgs_regularized(m, 0.1)):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh", name="hidden"),
                              keras.layers.Dense(3)])
    before = model.get_weights()
    wrapped = wrap(model)
    wrapped.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = wrapped.fit(x, y, batch_size=16, verbose=0).history["loss"][0]
    assert np.isfinite(loss) and not np.allclose(before[0], model.get_weights()[0])
print("trained")
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_every_method_trains_on_other_backends(backend):
    pytest.importorskip(backend)
    assert fresh_processes.output(PROGRAM, backend=backend).strip() == "trained"
