"""Losses: their equations in NumPy, their limits, and the Keras contract."""

import keras
import numpy as np
import pytest
from derivatives import gradient, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.losses import (
    HKR,
    KR,
    CategoricalHinge,
    CertificateRegularization,
    HingeMargin,
    LossAnnealing,
    LseHKR,
    MulticlassHinge,
    MulticlassHKR,
    MulticlassSoftHKR,
    MultiMargin,
    TemperatureCrossEntropy,
)

# One rounding of a float32 per operation on numbers of size 10, some tens of operations.
TOL = 64 * 10 * np.finfo("float32").eps
LOGITS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-10, 10, width=32))
LABELS = hnp.arrays(np.int64, (4,), elements=st.integers(0, 4))
LOSSES = [
    TemperatureCrossEntropy(0.3, 0.2),
    MultiMargin(0.4),
    LossAnnealing(0.5, 1.0, 2.0),
    LossAnnealing(beta=1.0),
    CertificateRegularization(0.3, 2.0),
    CertificateRegularization(0.3, loss=MultiMargin(0.6)),
    HingeMargin(0.8),
    KR(),
    HKR(3.0, 0.8),
    MulticlassHinge(1.5),
    MulticlassHinge(1.5, soft_hinge_tau=2.0),
    MulticlassHKR(3.0, 0.8),
    MulticlassHKR(3.0, 0.8, soft_hinge_tau=2.0),
    MulticlassSoftHKR(3.0, 5.0, 2.0),  # at that margin τ is no function of these logits
    LseHKR(3.0, 0.8, 1.5, 0.5),
    CategoricalHinge(0.9),
    CategoricalHinge(0.9, temperature=0.5),
]


def value(loss, labels, logits):
    return float(keras.ops.convert_to_numpy(loss(labels, logits)))


@given(LOGITS, LABELS, st.floats(0.05, 5.0), st.floats(0.0, 2.0))
def test_temperature_cross_entropy_is_its_equation(logits, labels, temperature, margin):
    rows = []
    for f, y in zip(logits.astype(float), labels, strict=True):
        shifted = [(f[j] - f[y] + margin * (j != y)) / temperature for j in range(5)]
        top = max(shifted)
        rows.append(temperature * (top + np.log(np.sum(np.exp(np.array(shifted) - top)))))
    loss = TemperatureCrossEntropy(temperature, margin)
    assert abs(value(loss, labels, logits) - np.mean(rows)) <= TOL


@given(LOGITS, LABELS)
def test_without_temperature_and_margin_it_is_cross_entropy(logits, labels):
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert (
        abs(value(TemperatureCrossEntropy(), labels, logits) - value(plain, labels, logits)) <= TOL
    )


@given(LOGITS, LABELS)
def test_a_cold_loss_is_the_hinge_of_the_margin(logits, labels):
    temperature, margin = 1e-3, 0.5
    own = logits[np.arange(4), labels][:, None]
    hinge = logits - own + margin * (np.arange(5) != labels[:, None])
    expected = np.mean(np.max(hinge, axis=1))
    # T·log K is the exact largest difference between a soft and a hard maximum of K numbers.
    cold = value(TemperatureCrossEntropy(temperature, margin), labels, logits)
    assert abs(cold - expected) <= temperature * np.log(5) + TOL


def test_the_gradient_is_at_most_the_root_of_two_at_every_temperature():
    logits = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    norms = []
    for temperature in (1e-3, 0.1, 1.0, 10.0):
        loss = TemperatureCrossEntropy(temperature, reduction="sum")
        slope = gradient(lambda f, loss=loss: loss(np.zeros(64), f), logits)
        norms.append(np.linalg.norm(slope, axis=1).max())
    assert max(norms) <= np.sqrt(2) * (1 + 1e-5)
    assert norms[0] > 1.4  # and it does not vanish when the temperature is low


@given(LOGITS, LABELS, st.floats(0.05, 2.0))
def test_multi_margin_is_its_equation(logits, labels, margin):
    rows = [
        sum(max(0.0, margin - f[y] + f[j]) for j in range(5) if j != y) / 5
        for f, y in zip(logits.astype(float), labels, strict=True)
    ]
    assert abs(value(MultiMargin(margin), labels, logits) - np.mean(rows)) <= TOL


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_labels_may_be_integers_columns_or_one_hot_rows(loss):
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], "float32")
    expected = value(loss, np.array([1, 2]), logits)
    assert value(loss, np.array([[1], [2]]), logits) == expected
    assert value(loss, np.eye(3)[[1, 2]], logits) == expected


@pytest.mark.parametrize(
    "loss", [*LOSSES, HKR(float("inf")), MulticlassHKR(float("inf"))], ids=lambda loss: loss.name
)
def test_a_loss_survives_serialisation(loss):
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(copy) is type(loss)
    assert copy.get_config() == loss.get_config()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_and_margins_are_refused(bad):
    with pytest.raises(ValueError, match="Received: temperature="):
        TemperatureCrossEntropy(temperature=bad)
    with pytest.raises(ValueError, match="Received: margin="):
        MultiMargin(margin=bad)
    if bad != 0.0:
        with pytest.raises(ValueError, match="Received: margin="):
            TemperatureCrossEntropy(margin=bad)


def test_a_single_logit_is_refused():
    with pytest.raises(ValueError, match="at least two logits"):
        MultiMargin()(np.array([0]), np.array([[1.0]]))


# Published definitions, row by row in float64 --------------------------------------------------


def separation(labels, logits):
    """mean_k (mean of f_k over class k - mean over the rest), empty means 0."""

    def mean(values):
        return float(np.mean(values)) if len(values) else 0.0

    f = logits.astype(np.float64)
    return np.mean([mean(f[labels == k, k]) - mean(f[labels != k, k]) for k in range(f.shape[1])])


def hinge(labels, logits, margin, tau=0.0):
    rows = []
    for f, y in zip(logits.astype(np.float64), labels, strict=True):
        rivals = [j for j in range(len(f)) if j != y]
        weights = np.full(len(rivals), 1 / len(f))
        if tau:
            weights = np.exp(tau * (f[rivals] - f[rivals].max()))
            weights /= weights.sum()
        terms = np.maximum(0, margin / 2 - f[y]) + np.maximum(0, margin / 2 + f[rivals])
        rows.append(float(weights @ terms))
    return np.mean(rows)


@settings(max_examples=40)
@given(LOGITS, LABELS, st.floats(0.0, 20.0), st.floats(0.1, 3.0), st.sampled_from([0.0, 0.5, 5.0]))
def test_the_multiclass_hkr_loss_is_deel_lip_s(logits, labels, alpha, margin, tau):
    tol = TOL * (1 + alpha)
    assert abs(value(KR(), labels, logits) + separation(labels, logits)) <= TOL
    part = value(MulticlassHinge(margin, tau), labels, logits)
    assert abs(part - hinge(labels, logits, margin, tau)) <= TOL
    expected = alpha * hinge(labels, logits, margin, tau) - separation(labels, logits)
    assert abs(value(MulticlassHKR(alpha, margin, tau), labels, logits) - expected) <= tol
    only = MulticlassHKR(float("inf"), margin, tau)
    assert abs(value(only, labels, logits) - hinge(labels, logits, margin, tau)) <= TOL


@settings(max_examples=40)
@given(
    hnp.arrays(np.float32, (6, 1), elements=st.floats(-10, 10, width=32)),
    hnp.arrays(np.int64, (6,), elements=st.integers(0, 1)),
    st.floats(0.1, 3.0),
)
def test_the_binary_losses_take_both_kinds_of_labels(logits, labels, margin):
    f, sign = logits[:, 0].astype(np.float64), 2.0 * labels - 1
    expected_hinge = np.mean(np.maximum(0, margin / 2 - sign * f))
    ends = [np.mean(f[labels == k]) if np.any(labels == k) else 0.0 for k in (1, 0)]
    entropy = np.mean(margin * np.logaddexp(0, (1 - sign * f) / margin))
    for given_labels in (labels, labels[:, None], sign[:, None]):
        found = value(TemperatureCrossEntropy(margin, margin=1.0), given_labels, logits)
        assert abs(found - entropy) <= TOL
        assert abs(value(HingeMargin(margin), given_labels, logits) - expected_hinge) <= TOL
        assert abs(value(KR(), given_labels, logits) - (ends[1] - ends[0])) <= TOL
        whole = value(HKR(2.0, margin), given_labels, logits)
        assert abs(whole - (2 * expected_hinge + ends[1] - ends[0])) <= 3 * TOL


def test_kr_reaches_the_wasserstein_distance_of_two_shifted_samples():
    # f(x) = x is an optimal 1-Lipschitz function in one dimension.
    x = np.random.default_rng(0).normal(size=50)
    samples = np.concatenate([x + 3, x]).astype("float32")[:, None]
    labels = np.repeat([1, 0], 50)
    assert value(KR(), labels, samples) == pytest.approx(-3.0, abs=1e-4)


@settings(max_examples=40)
@given(LOGITS, LABELS, st.floats(0.2, 3.0), st.floats(0.0, 3.0), st.sampled_from([0.0, 1.0, 5.0]))
def test_loss_annealing_is_its_equation(logits, labels, temperature, offset, beta):
    rows = []
    for f, y in zip(logits.astype(np.float64), labels, strict=True):
        shifted = f / temperature
        shifted[y] -= offset / temperature
        entropy = np.logaddexp.reduce(shifted) - shifted[y]
        rows.append(temperature * (1 - np.exp(-entropy)) ** beta * entropy)
    found = value(LossAnnealing(temperature, offset, beta), labels, logits)
    assert abs(found - np.mean(rows)) <= TOL * (1 + beta) / temperature


@settings(max_examples=40)
@given(LOGITS, LABELS, st.floats(0.0, 2.0), st.floats(0.5, 4.0))
def test_certificate_regularization_rewards_the_certified_radius(logits, labels, gamma, gain):
    f = logits.astype(np.float64)
    mine = f[np.arange(4), labels].copy()
    f[np.arange(4), labels] = -np.inf
    radius = np.maximum(0, mine - f.max(axis=1)) / (np.sqrt(2) * gain)
    base = value(TemperatureCrossEntropy(), labels, logits)
    found = value(CertificateRegularization(gamma, gain), labels, logits)
    assert abs(found - (base - gamma * radius.mean())) <= TOL * (1 + gamma)


@settings(max_examples=40)
@given(LOGITS, LABELS, st.floats(0.5, 20.0))
def test_the_tau_and_the_margin_calibrated_cross_entropy_are_one_loss(logits, labels, tau):
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    published = value(plain, labels, (tau * logits).astype("float32")) / tau
    assert abs(value(TemperatureCrossEntropy(1 / tau), labels, logits) - published) <= TOL
    offset, temperature = np.sqrt(2), 0.25  # almost-orthogonal layers
    moved = logits - np.float32(offset) * np.eye(5, dtype="float32")[labels]
    published = value(plain, labels, (moved / temperature).astype("float32")) * temperature
    assert (
        abs(value(TemperatureCrossEntropy(temperature, offset), labels, logits) - published) <= TOL
    )


# All of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_gradient_of_a_loss_is_its_derivative(loss):
    rng = np.random.default_rng(6)
    # No logit within a step of a kink: ±0.4, ±0.75, and the margins 0.4, 0.6, 0.
    logits, labels = rng.normal(size=(6, 4)).astype("float32"), rng.integers(0, 4, 6)
    slope = gradient(lambda f: loss(labels, f), logits)
    # Differences of float32 values of size 10 err by 1e-6/step.
    expected = numerical_gradient(lambda f: value(loss, labels, f.astype("float32")), logits, 2e-3)
    assert np.allclose(slope, expected, atol=5e-3 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("size", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_extreme_logits_give_finite_losses_and_gradients(loss, size):
    logits = size * np.eye(4, 5, dtype="float32")
    for labels in (np.arange(4), np.full(4, 4)):
        assert np.isfinite(value(loss, labels, logits))
        assert np.all(np.isfinite(gradient(lambda f, y=labels: loss(y, f), logits)))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_sample_weights_scale_the_terms_of_their_samples(loss):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)).astype("float32"), np.array([0, 1, 2, 0, 1])
    terms = keras.ops.convert_to_numpy(loss.call(labels, logits))
    weights = np.array([0.0, 1.0, 2.0, 0.5, 1.0], "float32")
    weighted = float(keras.ops.convert_to_numpy(loss(labels, logits, sample_weight=weights)))
    assert terms.shape == (5,)
    assert weighted == pytest.approx(np.mean(weights * terms), rel=1e-5, abs=1e-6)


def test_a_model_trains_with_hkr_and_its_loss_falls():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 128)
    x = (rng.normal(size=(128, 4)) + 2 * np.eye(3, 4)[y]).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(3e-2), MulticlassHKR(10.0, soft_hinge_tau=1.0))
    history = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_impossible_arguments_of_the_other_losses_are_refused():
    for make, name in [
        (lambda: LossAnnealing(beta=0.5), "beta"),
        (lambda: LossAnnealing(offset=-1.0), "offset"),
        (lambda: CertificateRegularization(gamma=-1.0), "gamma"),
        (lambda: CertificateRegularization(gain=0.0), "gain"),
        (lambda: HKR(alpha=-1.0), "alpha"),
        (lambda: MulticlassHKR(alpha=float("nan")), "alpha"),
        (lambda: HingeMargin(0.0), "min_margin"),
        (lambda: MulticlassHinge(soft_hinge_tau=-1.0), "soft_hinge_tau"),
    ]:
        with pytest.raises(ValueError, match=f"Received: {name}="):
            make()
    with pytest.raises(TypeError, match="`loss`"):
        CertificateRegularization(loss=lambda y, f: f)


# Labels that are none ----------------------------------------------------------------------------

WRONG = {
    "minus one": [0, -1],
    "one too many": [3, 1],
    "no whole number": [0.5, 1],
    "not a number": [float("nan"), 1],
    "two": [[0, 1, 2], [1, 0, 0]],
    "rows of a single minus one": [[-1, 0, 0], [1, 0, 0]],
    "a row with NaN": [[float("nan"), 0, 1], [1, 0, 0]],
}
# A sample may be in several classes, or in none, where each output is a label of its own.
OF_ONE_CLASS = {
    "no class": [[0, 0, 0], [1, 0, 0]],
    "minus one alone": [[-1, -1, -1], [1, -1, -1]],
    "two classes": [[1, 1, 0], [1, 0, 0]],
    "two of plus one": [[1, 1, -1], [1, -1, -1]],
}
SEVERAL = (KR, HKR, HingeMargin)
THREE = np.array([[-5.0, -5.1, -5.2], [0.3, 0.2, 0.1]], "float32")


def in_a_graph(loss):
    """The loss as compiled code computes it, or a skip where the backend compiles nothing."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(loss)
        return lambda labels, logits: float(compiled(tf.constant(labels), tf.constant(logits)))
    if backend == "jax":
        import jax

        compiled = jax.jit(loss)
        return lambda labels, logits: float(compiled(labels, logits))
    pytest.skip("this backend compiles nothing")


def wrong_for(loss):
    cases = dict(WRONG)
    if not isinstance(loss, SEVERAL):
        cases |= OF_ONE_CLASS
    else:
        cases.pop("rows of a single minus one")
    return {name: np.array(labels, "float32") for name, labels in cases.items()}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_labels_that_name_no_class_are_refused(loss):
    for name, labels in wrong_for(loss).items():
        with pytest.raises(ValueError, match=r"abels .*must.* Received: .*, in [12] samples"):
            pytest.fail(f"{name}: {value(loss, labels, THREE)}")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_labels_that_name_no_class_make_a_compiled_loss_nan(loss):
    compiled = in_a_graph(loss)
    assert np.isfinite(compiled(np.array([0.0, 1.0], "float32"), THREE))
    for name, labels in wrong_for(loss).items():
        assert np.isnan(compiled(labels, THREE)), name


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_rows_of_minus_one_and_one_mean_what_one_hot_rows_mean(loss):
    rows = np.eye(3, dtype="float32")[[2, 0]]
    assert value(loss, 2 * rows - 1, THREE) == value(loss, rows, THREE)


@pytest.mark.parametrize(
    "loss", [TemperatureCrossEntropy(0.5), HingeMargin(), KR(), HKR()], ids=lambda loss: loss.name
)
def test_a_single_output_takes_zero_and_one_or_minus_one_and_one_alone(loss):
    logits = np.array([[0.3], [-0.4]], "float32")
    expected = value(loss, np.array([1, 0]), logits)
    assert value(loss, np.array([[1], [-1]]), logits) == expected
    for wrong in ([2, 0], [0.3, 1.0], [-2, 1], [float("nan"), 1]):
        with pytest.raises(ValueError, match="single output must be 0 and 1, or -1 and 1"):
            loss(np.array(wrong), logits)


def test_rows_of_probabilities_are_weights_and_hinges_refuse_them():
    soft = np.array([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5]], "float32")
    loss = TemperatureCrossEntropy()
    # With p = softmax(f) the equation gives log Σ exp(f) - Σ y f for rows that sum to one.
    expected = np.log(np.exp(THREE.astype(float)).sum(axis=1)) - (soft * THREE).sum(axis=1)
    assert abs(value(loss, soft, THREE) - expected.mean()) <= TOL
    for several in (KR(), HKR(), HingeMargin()):
        with pytest.raises(ValueError, match="Rows of labels must hold 0 and 1, or -1 and 1"):
            several(soft, THREE)


def test_a_model_trains_on_no_label_that_is_none():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile("sgd", TemperatureCrossEntropy(), run_eagerly=True)
    before = model.get_weights()
    if keras.backend.backend() == "jax":
        return  # it always compiles
    with pytest.raises(ValueError, match=r"class numbers from 0 to 2.* Received: -1.0"):
        model.train_on_batch(THREE, np.array([0, -1]))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
