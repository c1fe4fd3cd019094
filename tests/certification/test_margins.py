"""`certify`: radii, labels, data sources and refusals."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tf_lyapunov.certification import certify
from tf_lyapunov.certification.margins import certified_radii
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.losses.classes import class_numbers


def linear_model(kernel, bias=None, activation=None):
    kernel = np.asarray(kernel, dtype="float32")
    dense = layers.Dense(kernel.shape[1], activation=activation)
    model = keras.Sequential([keras.Input((kernel.shape[0],)), dense])
    dense.set_weights([kernel, np.zeros(kernel.shape[1]) if bias is None else np.asarray(bias)])
    return model


def exact_radius(x, kernel, bias, label):
    """Distance to the nearest decision boundary of a linear classifier, float64."""
    logits = x @ kernel + bias
    distances = [
        (logits[label] - logits[j]) / np.linalg.norm(kernel[:, label] - kernel[:, j])
        for j in range(len(logits))
        if j != label
    ]
    return max(min(distances), 0.0)


def test_a_linear_classifier_is_certified_up_to_its_boundary():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 5)).astype("float32").astype(np.float64)
    bias = rng.normal(size=5).astype("float32").astype(np.float64)
    x = rng.normal(size=(40, 6)).astype("float32")
    labels = rng.integers(0, 5, size=40)
    proof = certify(linear_model(kernel, bias), x, labels)
    truth = [
        exact_radius(v.astype(np.float64), kernel, bias, c) for v, c in zip(x, labels, strict=True)
    ]
    assert np.all(proof.radius <= truth)
    wins = proof.predictions == labels
    assert np.all(proof.radius[~wins] == 0)
    # 6 + 2 rounded terms per logit, norms of about 10, boundaries at least 0.1 steep.
    assert np.allclose(proof.radius, truth, atol=1e-4)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 2**31))
def test_radii_never_exceed_the_distance_to_the_boundary(features, classes, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(features, classes)) * 10.0 ** rng.integers(-3, 4)
    h = rng.normal(size=(20, features))
    labels = rng.integers(0, classes, size=20)
    logits = h @ kernel
    errors = np.full(20, 64 * 2.0**-53 * np.abs(logits).max())
    gain = np.linalg.norm(kernel, 2) * (1 + 1e-12)
    radius, _ = certified_radii(logits, labels, gain, errors, [[(np.ones(1), kernel, 0.0)]])
    truth = [exact_radius(v, kernel, 0.0, c) for v, c in zip(h, labels, strict=True)]
    assert np.all(radius <= np.array(truth) * (1 + 1e-9))
    looser, _ = certified_radii(logits, labels, gain, errors)
    assert np.all(looser <= radius)


def test_equal_columns_never_change_their_order():
    kernel = [[1.0, 1.0], [2.0, 2.0]]
    proof = certify(linear_model(kernel, [1.0, 0.0]), np.ones((1, 2)), [0])
    # All that ends it are the largest and the smallest numbers of float32.
    assert proof.radius[0] > 1e36
    assert certify(linear_model(kernel, [1.0, 0.0]), np.ones((1, 2)), [1]).radius[0] == 0
    tie = certify(linear_model(kernel), np.ones((1, 2)))
    assert tie.radius[0] == 0 and tie.verdict == "NOT_PROVED"


def test_a_single_logit_decides_by_its_sign():
    kernel = np.array([[3.0], [4.0]])
    model = linear_model(kernel, [1.0], activation="sigmoid")
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    proof = certify(model, x, [1, 0, 0])
    assert proof.predictions.tolist() == [1, 0, 1]
    assert np.all(proof.radius <= [4 / 5, 2 / 5, 0])
    assert np.allclose(proof.radius, [4 / 5, 2 / 5, 0], atol=1e-5)
    assert proof.margins[2] < 0
    assert any("single logit" in text for text in proof.assumptions)


def test_two_logits_agree_with_a_single_one():
    kernel = np.array([[3.0], [4.0]])
    x = np.random.default_rng(0).normal(size=(20, 2))
    single = certify(linear_model(kernel), x)
    double = certify(linear_model(np.hstack([-kernel, kernel]) / 2), x)
    assert np.allclose(single.radius, double.radius, atol=1e-5)


@pytest.mark.parametrize("head", ["softmax", "log_softmax", "sigmoid", "log_sigmoid"])
@pytest.mark.parametrize("separate", [False, True])
def test_probabilities_are_looked_through(head, separate):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 4)).astype("float32")
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="relu")(inputs)
    dense = layers.Dense(3)
    plain = keras.Model(inputs, dense(hidden))
    if separate:
        outputs = layers.Activation(head)(dense(hidden))
    else:
        fused = layers.Dense(3, activation=head)
        outputs = fused(hidden)
        fused.set_weights(dense.get_weights())
    through = keras.Model(inputs, outputs)
    expected, proof = certify(plain, x), certify(through, x)
    assert np.array_equal(proof.radius, expected.radius)
    assert proof.gain_upper_bound == expected.gain_upper_bound
    assert any(f"final {head}" in text for text in proof.assumptions)
    # The user's model still works and keeps its graph.
    assert through.predict(x, verbose=0).shape == (10, 3)
    assert len(plain.layers[1]._inbound_nodes) == 1


def test_a_softmax_inside_a_nested_model_is_looked_through():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Softmax()]
    )
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    outer = keras.Sequential([keras.Input((4,)), layers.Rescaling(2.0), inner, layers.Identity()])
    plain = keras.Sequential([keras.Input((4,)), layers.Rescaling(2.0), *inner.layers[:2]])
    assert np.array_equal(certify(outer, x).radius, certify(plain, x).radius)
    assert certify(outer, x).verdict == "PROVED"


def test_a_hidden_softmax_counts_with_gain_one_half():
    x = keras.Input((4,))
    h = layers.Softmax(name="middle")(layers.Dense(3)(x))
    proof = certify(keras.Model(x, layers.Dense(2)(h)), np.ones((1, 4)))
    [middle] = [c for c in proof.contributions if c.name == "middle"]
    assert middle.gain_upper_bound == 0.5


def test_without_labels_the_models_own_decisions_are_certified():
    x = np.random.default_rng(0).normal(size=(30, 4))
    model = linear_model(np.random.default_rng(1).normal(size=(4, 3)))
    proof = certify(model, x)
    assert np.array_equal(proof.labels, proof.predictions)
    assert np.all(proof.margins >= 0)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y=None):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, i):
        part = slice(4 * i, 4 * i + 4)
        return self.x[part] if self.y is None else (self.x[part], self.y[part])


def test_arrays_datasets_and_generators_give_the_same_radii():
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 4)).astype("float32")
    y = rng.integers(0, 3, size=10)
    model = linear_model(rng.normal(size=(4, 3)))
    expected = certify(model, x, y)
    tensors = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    unlabelled = tf.data.Dataset.from_tensor_slices(x).batch(4)
    sources = [
        (Batches(x, y), None),
        (Batches(x), y),
        (tensors, None),
        (unlabelled, y),
        ([list(map(float, row)) for row in x], y),
        (tf.constant(x), tf.constant(y)),
        (((x[i : i + 5], y[i : i + 5]) for i in (0, 5)), None),
        (x, np.eye(3)[y]),
        (x, y[:, None]),
    ]
    for data, labels in sources:
        proof = certify(model, data, labels)
        assert np.array_equal(proof.labels, y)
        assert np.allclose(proof.radius, expected.radius, rtol=1e-5)
    with pytest.raises(ValueError, match="once"):
        certify(model, tensors, y)
    with pytest.raises(ValueError, match="endless"):
        certify(model, tensors.repeat())
    with pytest.raises(ValueError, match="one label per input"):
        certify(model, unlabelled, np.zeros(11))
    with pytest.raises(ValueError, match="empty"):
        certify(model, iter(()))


def test_the_batch_size_does_not_matter():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 4)).astype("float32")
    model = linear_model(rng.normal(size=(4, 3)))
    assert np.allclose(certify(model, x, batch_size=3).radius, certify(model, x).radius, rtol=1e-5)


def test_inputs_that_the_model_rounds_lose_the_distance_they_are_moved():
    model = linear_model([[1.0, -1.0]])
    x = np.array([[1.0 + 2.0**-30]])
    exact, moved = certify(model, x.astype("float32")), certify(model, x)
    assert 0 < exact.radius[0] - moved.radius[0] < 2.0**-28


def test_a_thousand_classes_fit_in_memory():
    rng = np.random.default_rng(0)
    model = linear_model(rng.normal(size=(8, 1000)))
    x = rng.normal(size=(50, 8))
    proof = certify(model, x)
    kernel = np.asarray(model.layers[0].kernel, dtype=np.float64)
    truth = [exact_radius(v, kernel, 0.0, c) for v, c in zip(x, proof.predictions, strict=True)]
    assert np.all(proof.radius <= np.array(truth) + 1e-6)


BAD_INPUTS = [
    (np.full((2, 4), np.nan), None, "finite"),
    (np.full((2, 4), np.inf), None, "finite"),
    (np.full((2, 4), 1e300), None, "finite"),
    (np.zeros((2, 5)), None, "shape"),
    (np.zeros(4), None, "shape"),
    (np.zeros((0, 4)), None, "at least one"),
    (np.zeros((2, 4), dtype=complex), None, "real numbers"),
    (np.array([["a"] * 4]), None, "real numbers"),
    (np.zeros((2, 4)), [0, 3], "from 0 to 2"),
    (np.zeros((2, 4)), [0, -1], "from 0 to 2"),
    (np.zeros((2, 4)), [0.5, 1.0], "whole numbers"),
    (np.zeros((2, 4)), [np.nan, 1.0], "NaN"),
    (np.zeros((2, 4)), [0, 1, 2], r"\(2,\)"),
    (np.zeros((2, 4)), [[0.5, 0.5, 0.0]] * 2, "One-hot"),
    (np.zeros((2, 4)), ["a", "b"], "class numbers"),
]


@pytest.mark.parametrize(("x", "y", "message"), BAD_INPUTS)
def test_bad_data_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        certify(linear_model(np.ones((4, 3))), x, y)


def test_bad_settings_are_refused():
    model = linear_model(np.ones((4, 3)))
    with pytest.raises(ValueError, match="method"):
        certify(model, np.zeros((1, 4)), method="magic")
    with pytest.raises(ValueError, match="batch_size"):
        certify(model, np.zeros((1, 4)), batch_size=0)
    with pytest.raises(TypeError, match=r"keras\.Model"):
        certify(lambda x: x, np.zeros((1, 4)))
    with pytest.raises(TypeError, match="array"):
        certify(model, 3.0)
    images = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="classes"):
        certify(images, np.zeros((1, 4, 4, 1)))
    lonely = linear_model(np.ones((4, 1)), activation="softmax")
    with pytest.raises(ValueError, match="one unit"):
        certify(lonely, np.zeros((1, 4)))


def test_labels_of_a_single_logit_are_zero_or_one():
    assert class_numbers([[1], [0]], 2, 1).tolist() == [1, 0]
    assert class_numbers([[0, 1], [1, 0]], 2, 1).tolist() == [1, 0]
    assert class_numbers([True, False], 2, 1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="from 0 to 1"):
        class_numbers([2], 1, 1)


def test_integer_images_are_certified_with_rescaling_inside():
    x = np.random.default_rng(0).integers(0, 256, size=(5, 4), dtype="uint8")
    model = keras.Sequential(
        [keras.Input((4,), dtype="uint8"), layers.Rescaling(1 / 255), layers.Dense(3)]
    )
    proof = certify(model, x)
    plain = certify(keras.Sequential([keras.Input((4,)), *model.layers]), x.astype("float32"))
    assert np.allclose(proof.radius, plain.radius, rtol=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        certify(model, x + 0.5)


def test_inputs_that_bfloat16_rounds_lose_what_it_moves_them_by():
    """1 + 2⁻⁹ becomes 1: the boundary is at 0, and 1 - 2⁻⁹ around the input given is certified."""
    dense = layers.Dense(2, use_bias=False, dtype="float32")
    model = keras.Sequential([keras.Input((2,), dtype="bfloat16"), dense])
    dense.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    x = np.array([[1 + 2.0**-9, 0.0], [1.0, 0.0], [-1 - 2.0**-7 - 2.0**-9, 0.0]])
    for precision in ("model", "float64"):
        proof = certify(model, x.astype("float32"), precision=precision)
        expected = np.array([1 - 2.0**-9, 1.0, 1 + 2.0**-7 - 2.0**-9])
        assert np.all(proof.radius <= expected * (1 + 1e-12))
        assert np.allclose(proof.radius, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="finite in the model's input dtype bfloat16"):
        certify(model, np.full((1, 2), 3.4e38, "float32"))


def test_steps_without_an_allowance_are_not_said_to_be_compared():
    """Sums of 3,000 products in float16 have no bound on their rounding."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="float16"),
            layers.Dense(3000, activation="relu", dtype="float16"),
            layers.Dense(2, dtype="float16", name="too_long"),
        ]
    )
    found = certify(model, np.ones((2, 5), "float32"))
    assert not np.any(found.radius > 0)
    assert "Not validated on its own, for its rounding or its kind: too_long." in found.explain()


def test_settings_that_backends_round_to_float32_are_in_the_allowance_of_float64():
    """LeakyReLU(0.1) in float64 has slope float32(0.1), 1.5e-9 off: more than float64 rounds."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.LeakyReLU(negative_slope=0.1),
            layers.Dense(3, kernel_initializer="identity"),
        ]
    )
    x = np.array([[-3.0, -2.0, -1.0]])
    proof = certify(model, x, precision="float64")
    exact = 0.1
    assert abs(proof.margins[0] - exact) <= 2 * proof.float_allowance < 1e-5
    assert proof.radius[0] <= exact / np.sqrt(2)


def test_an_elu_that_was_changed_is_evaluated_and_digested_as_it_is():
    """Its configuration repeats the alpha that it was made with, which decides otherwise here."""
    elu = keras.layers.ELU(alpha=1.0)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), elu, keras.layers.Dense(2)])
    model.layers[0].set_weights([np.array([[1.0]]), np.zeros(1)])
    model.layers[2].set_weights([np.array([[1.0, 0.0]]), np.array([1.5, 0.0])])
    x = np.array([[-1.5]])
    before = certify(model, x, precision="float64")
    elu.alpha = 3.0
    after = certify(model, x, precision="float64")
    assert before.predictions[0] == 0 and after.predictions[0] == 1
    assert before.model_digest != after.model_digest


def test_an_input_without_a_radius_has_none_in_other_norms_either():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")]
    )
    x = np.array([[3.0, 1.0], [1.0, 1.0]])
    for norm, exact in (("l2", 2**0.5), ("linf", 1.0), ("l1", 2**0.5)):
        radius = certify(model, x, np.array([0, 0]), norm=norm).radius
        assert radius[1] == 0 and exact * 0.999 < radius[0] <= exact


@pytest.mark.parametrize("method", ["composition", "linear"])
def test_a_sigmoid_whose_settings_are_fixed_by_partial_decides_at_one_half(method):
    fixed = functools.partial(keras.activations.sigmoid)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, activation=fixed)])
    model.set_weights([np.ones((1, 1)), np.zeros(1)])
    certificate = certify(model, np.array([[-1.0], [2.0]], "float32"), method=method)
    assert certificate.predictions.tolist() == [0, 1]
    assert np.all(certificate.radius <= [1.0, 2.0]) and np.all(certificate.radius > [0.99, 1.99])


@pytest.mark.parametrize(
    "end",
    [
        lambda z: keras.layers.Flatten()(keras.ops.sigmoid(z)),
        lambda z: keras.layers.Average()([keras.ops.sigmoid(z), keras.ops.sigmoid(2.0 * z)]),
        lambda z: 1 - keras.ops.sigmoid(z),
        keras.layers.Activation("hard_sigmoid"),
    ],
)
def test_probabilities_that_do_not_end_with_their_sigmoid_are_refused(end):
    """By their sign they would be of class 1 wherever, whatever the model says."""
    x = keras.Input((1,))
    model = keras.Model(x, end(keras.layers.Dense(1, kernel_initializer="ones")(x)))
    with pytest.raises(UnsupportedLayerError, match="as a probability is"):
        certify(model, np.array([[-1.0], [2.0]], "float32"))
