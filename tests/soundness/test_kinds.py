"""Kinds of false readings of a graph and its activations, each by its name.

The rule: an odd but legal model is either read rightly, and no perturbation within a certified
radius changes its decision nor does a secant exceed its proven gain, or it is refused by an error
that names what could not be read. `xfail` marks faults that are known and not yet removed.
"""

import functools

import keras
import numpy as np
import pytest
from soundness import oracles
from soundness.expectations import (
    L,
    assert_gain_sound_or_refused,
    assert_margins_are_the_models,
    assert_sound_or_refused,
    dense,
    inputs_near_boundaries,
)

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError

# The graph that is read is the graph that computes -----------------------------------------------


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("given", ["float32", "float16"])
def test_augmentation_is_off_at_inference_whatever_is_cast(policy, given):
    # Keras records no `training` where a call casts its inputs; the layers' default is True.
    augment = [L.RandomInvert(value_range=(0, 1), dtype=policy), L.MixUp(dtype=policy)]
    end = [L.Flatten(dtype=policy), L.Dense(2, dtype="float32")]
    model = keras.Sequential([keras.Input((4, 4, 1), dtype=given), *augment, *end])
    x = np.random.default_rng(0).uniform(size=(4, 4, 4, 1)).astype(given)
    certificate = tfl.certify(model, x)  # no step contradicts its reading
    kernel = np.asarray(model.layers[-1].kernel, dtype=np.float64)
    assert certificate.gain_upper_bound >= np.linalg.norm(kernel, 2)
    assert certificate.gain_upper_bound <= np.linalg.norm(kernel, 2) * 1.001


@pytest.mark.parametrize("first_use", ["certify", "predict", "both"])
def test_an_attribute_changed_after_a_first_use_counts(first_use):
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(4, "sigmoid"), L.LeakyReLU(0.1), L.Dense(2)]
    )
    x = inputs_near_boundaries((3,), scale=0.5)
    if first_use in ("predict", "both"):
        model.predict(x, verbose=0)
    if first_use in ("certify", "both"):
        tfl.certify(model, x)
    model.layers[0].activation = keras.activations.relu
    assert_margins_are_the_models(model, x)
    assert_sound_or_refused(model, x)
    assert_gain_sound_or_refused(model)


def test_a_slope_changed_after_a_first_use_counts():
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.LeakyReLU(0.1), L.Dense(2)])
    x = inputs_near_boundaries((3,), scale=0.5)
    model.predict(x, verbose=0)
    tfl.certify(model, x)
    model.layers[1].negative_slope = 7.0
    assert_margins_are_the_models(model, x)
    assert_sound_or_refused(model, x)
    assert_gain_sound_or_refused(model)


class Scaled(keras.Model):
    """A subclassed model whose call takes a keyword."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = L.Dense(3)

    def call(self, x, scale=1.0):
        return self.dense(x) * scale


def test_keyword_of_a_nested_subclassed_model_counts():
    x = keras.Input((3,))
    model = keras.Model(x, Scaled()(x, scale=10.0))
    assert_sound_or_refused(model, inputs_near_boundaries((3,)))
    assert_gain_sound_or_refused(model)


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_cast_by_the_input_of_a_nested_model_counts(dtype):
    inner = keras.Input((2,), dtype=dtype)
    nested = keras.Model(inner, dense(np.eye(2), [0.0, 0.3])(inner))
    x = keras.Input((2,))
    model = keras.Model(x, nested(x))
    points = np.array([[0.99, 0.0], [1.01, 0.6], [2.4, 1.9], [0.2, 0.1]], dtype="float32")
    assert_sound_or_refused(model, points)
    assert_gain_sound_or_refused(model, scales=(0.9, 2.1))


def test_constant_mask_of_softmax_counts():
    x = keras.Input((3,))
    y = L.Softmax()(dense(np.eye(3))(x), mask=np.array([[True, False, True]]))
    assert_sound_or_refused(keras.Model(x, y), inputs_near_boundaries((3,)))


def test_constant_mask_of_average_pooling_counts():
    x = keras.Input((4, 2))
    y = L.GlobalAveragePooling1D()(x, mask=np.array([[1, 0, 0, 0]], dtype=bool))
    model = keras.Model(x, y)
    assert_sound_or_refused(model, inputs_near_boundaries((4, 2)))
    assert_gain_sound_or_refused(model)


@pytest.mark.parametrize("merge", [L.Add, L.Subtract, L.Multiply, L.Maximum, L.Average])
def test_array_constants_in_merging_layers_count(merge):
    x = keras.Input((3,))
    constant = np.array([[5.0, 0.0, 7.0]], dtype="float32")
    model = keras.Model(x, merge()([dense(np.eye(3))(x), constant]))
    assert_sound_or_refused(model, inputs_near_boundaries((3,), scale=4))
    assert_gain_sound_or_refused(model)


@pytest.mark.parametrize("scale", [1e9, 3e7])
def test_huge_array_constants_are_rounded_as_the_model_rounds(scale):
    x = keras.Input((2,))
    constant = np.array([[scale, scale]], dtype="float32")
    y = L.Subtract()([L.Add()([x, constant]), constant])
    points = np.array([[0.9, 0.6], [3.1, 2.9], [0.4, 0.2]], dtype="float32") * scale * 2**-24
    assert_sound_or_refused(keras.Model(x, y), points)


@pytest.mark.parametrize(
    "dtype",
    [
        *("int32", "bool", "uint8"),
        "float16",
        "bfloat16",
    ],
)
def test_cast_operation_in_the_graph_counts(dtype):
    x = keras.Input((2,))
    y = keras.ops.cast(keras.ops.cast(x, dtype), "float32")
    model = keras.Model(x, dense(np.eye(2), [0.0, 0.3])(y))
    points = np.array([[0.99, 0.0], [1.01, 0.6], [2.4, 1.9], [1.998, 1.65]], dtype="float32")
    assert_sound_or_refused(model, points)
    assert_gain_sound_or_refused(model, scales=(0.9, 2.1))


@pytest.mark.parametrize(
    "merge",
    [
        *(L.Subtract, L.Multiply),
        L.Add,
        L.Average,
    ],
)
def test_integers_that_wrap_in_merging_layers_count(merge):
    x = keras.Input((2,), dtype="int8")
    y = merge()([x, x])
    model = keras.Model(x, L.Rescaling(1.0)(y))
    assert_sound_or_refused(model, np.array([[100, 40], [60, 63], [-100, 3]], dtype="int8"))


def test_normalization_cloned_then_given_weights_is_read_as_it_computes():
    first = L.Normalization(mean=[0.0, 0.0], variance=[1.0, 1.0])
    adapted = L.Normalization()
    adapted.adapt(np.array([[0.0, 10.0], [1.0, 30.0]], dtype="float32"))
    for layer in (first, adapted):
        model = keras.Sequential([keras.Input((2,)), layer, dense(np.eye(2))])
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        x = inputs_near_boundaries((2,), scale=3)
        assert_sound_or_refused(copy, x)
        assert_gain_sound_or_refused(copy)


def test_an_instance_whose_call_was_replaced_is_read_as_it_computes():
    for layer in (L.ReLU(), L.Dense(3), L.Flatten()):
        original = layer.call
        layer.call = lambda x, original=original: 10.0 * original(x)
        model = keras.Sequential([keras.Input((3,)), layer, L.Dense(2)])
        assert_sound_or_refused(model, inputs_near_boundaries((3,)), layer.name)
        assert_gain_sound_or_refused(model, layer.name)


# Activations -------------------------------------------------------------------------------------


def steep(x):
    return 25.0 * keras.ops.relu(x)


def wrapped_names():
    """Functions that carry another activation's name, or other arguments of it."""
    pretender = functools.wraps(keras.activations.relu)(lambda x: 25.0 * keras.ops.relu(x))
    return {
        "functools.wraps": pretender,
        "partial of relu": functools.partial(keras.activations.relu, negative_slope=9.0),
        "partial of leaky_relu": functools.partial(
            keras.activations.leaky_relu, negative_slope=30.0
        ),
        "partial of gelu": functools.partial(keras.activations.gelu, approximate=True),
        "ops.gelu": keras.ops.gelu,
        "ops.leaky_relu": keras.ops.leaky_relu,
        "ops.elu": functools.partial(keras.ops.elu, alpha=12.0),
        "lambda": lambda x: 25.0 * x,
        "own function": steep,
    }


@pytest.mark.parametrize("name", list(wrapped_names()))
def test_wrapped_activation_functions_are_what_they_compute(name, request):
    activation = wrapped_names()[name]
    model = keras.Sequential([keras.Input((3,)), L.Dense(5, activation), L.Dense(2)])
    assert_sound_or_refused(model, inputs_near_boundaries((3,)), methods=("composition", "lipsdp"))
    assert_gain_sound_or_refused(model)


@pytest.mark.parametrize("form", ["ops", "layer", "string", "function"])
def test_gelu_is_computed_in_the_form_that_the_model_uses(form):
    forms = {
        "ops": keras.ops.gelu,
        "layer": L.Activation(keras.ops.gelu),
        "string": "gelu",
        "function": keras.activations.gelu,
    }
    chosen = forms[form]
    layers = [L.Dense(2, chosen)] if form != "layer" else [L.Dense(2), chosen]
    model = keras.Sequential([keras.Input((2,)), *layers])
    kernel = np.eye(2, dtype="float32")
    model.layers[0].set_weights([kernel, np.array([0, 0.01], dtype="float32")])
    angles = np.linspace(0, 6, 40)
    x = np.stack([np.cos(angles), np.cos(angles) - 0.0102], axis=1).astype("float32")
    assert_sound_or_refused(model, 2 * x, precision="float64")


def test_saturated_sigmoids_that_tie_in_float32_are_not_certified():
    model = keras.Sequential(
        [keras.Input((2,)), dense(np.eye(2), activation="sigmoid"), dense(np.eye(2))]
    )
    x = np.array([[40.0, 45.0], [45.0, 40.0], [25.0, 24.0]], dtype="float32")
    assert_sound_or_refused(model, x)


# Legal, rarely fed: right or refused -------------------------------------------------------------


def rare_layers():
    """Layer classes that a reader may refuse, with inputs they take."""
    return {
        "RandomFlip": (lambda: L.RandomFlip(), (4, 4, 1)),
        "RandomRotation": (lambda: L.RandomRotation(0.2), (4, 4, 1)),
        "Resizing": (lambda: L.Resizing(3, 3), (4, 4, 1)),
        "CenterCrop": (lambda: L.CenterCrop(2, 2), (4, 4, 1)),
        "CenterCrop above": (lambda: L.CenterCrop(6, 6), (4, 4, 1)),
        "bilinear": (lambda: L.UpSampling2D(2, interpolation="bilinear"), (3, 3, 1)),
        "TimeDistributed": (lambda: L.TimeDistributed(L.Dense(3)), (3, 2)),
        "EinsumDense": (lambda: L.EinsumDense("abc,cd->abd", (3, 4)), (3, 2)),
        "LayerNormalization": (lambda: L.LayerNormalization(epsilon=0.1), (5,)),
        "RMSNormalization": (lambda: L.RMSNormalization(epsilon=0.1), (5,)),
        "GroupNormalization": (lambda: L.GroupNormalization(2), (4,)),
        "UnitNormalization": (lambda: L.UnitNormalization(), (4,)),
        "AdaptiveAveragePooling1D": (
            lambda: getattr(L, "AdaptiveAveragePooling1D", L.AveragePooling1D)(3),
            (7, 2),
        ),
        "SpectralNormalization": (lambda: L.SpectralNormalization(L.Dense(3)), (4,)),
        "Dropout": (lambda: L.Dropout(0.5), (4,)),
        "Discretization": (lambda: L.Discretization(bin_boundaries=[0.0, 1.0]), (4,)),
    }


@pytest.mark.parametrize("name", list(rare_layers()))
def test_rare_layers_are_read_rightly_or_refused(name):
    make, shape = rare_layers()[name]
    model = keras.Sequential([keras.Input(shape), make(), L.Flatten(), L.Dense(3)])
    assert_sound_or_refused(model, inputs_near_boundaries(shape, count=6))
    assert_gain_sound_or_refused(model)


def rare_operations():
    ops = keras.ops
    return {
        "flip": lambda x: ops.flip(x, axis=1),
        "stack": lambda x: ops.stack([x, 2 * x], axis=1),
        "split": lambda x: ops.split(x, 2, axis=1)[1],
        "mean": lambda x: ops.mean(x, axis=1, keepdims=True),
        "sum": lambda x: ops.sum(x, axis=1, keepdims=True),
        "clip": lambda x: ops.clip(x, -0.5, 0.5),
        "max": lambda x: ops.max(x, axis=1, keepdims=True),
        "matmul": lambda x: ops.matmul(x, 3 * np.ones((4, 3), dtype="float32")),
        "pad reflect": lambda x: ops.pad(x, [[0, 0], [2, 2]], mode="reflect"),
        "pad symmetric": lambda x: ops.pad(x, [[0, 0], [4, 4]], mode="symmetric"),
        "pad constant": lambda x: ops.pad(x, [[0, 0], [1, 1]], constant_values=5),
        "where": lambda x: ops.where(x > 0, 5 * x, x),
        "multiply": lambda x: x * np.array([1.0, 2.0, 30.0, 4.0], dtype="float32"),
        "square": lambda x: x * x,
        "divide": lambda x: x / np.float32(0.01),
        "sort": lambda x: ops.sort(x, axis=1),
        "norm": lambda x: ops.normalize(x),
        "cumsum": lambda x: ops.cumsum(x, axis=1),
        "repeat": lambda x: ops.repeat(x, 5, axis=1),
        "tile": lambda x: ops.tile(x, [1, 5]),
        "roll": lambda x: ops.roll(x, 1, axis=1),
        "swapaxes": lambda x: ops.reshape(ops.swapaxes(ops.reshape(x, (-1, 2, 2)), 1, 2), (-1, 4)),
        "slice": lambda x: x[:, 1:3],
        "abs": lambda x: ops.abs(x),
        "exp": lambda x: ops.exp(x),
    }


@pytest.mark.parametrize("name", list(rare_operations()))
def test_operations_in_the_graph_are_read_rightly_or_refused(name):
    x = keras.Input((4,))
    y = L.Dense(3)(L.Flatten()(rare_operations()[name](x)))
    model = keras.Model(x, y)
    assert_sound_or_refused(model, inputs_near_boundaries((4,), count=6))
    assert_gain_sound_or_refused(model)


@pytest.mark.parametrize("shape, other", [((4,), (1,)), ((4, 4, 1), (1, 1, 1)), ((4, 3), (1, 1))])
@pytest.mark.parametrize("add", [lambda a, b: a + b, lambda a, b: L.Add()([a, b])])
def test_a_sum_that_keras_takes_for_a_bias_does_not_mix_samples(shape, other, add):
    """Keras on TensorFlow adds (4, 1) to (4, 4) along the channels, for batches of four alone."""
    x = keras.Input(shape)
    side = L.Reshape(other)(L.Dense(1)(L.Flatten()(x)))
    model = keras.Model(x, L.Dense(3)(L.Flatten()(add(x, side))))
    points = inputs_near_boundaries(shape, count=4)
    try:
        certificate = tfl.certify(model, points)
    except (UnsupportedLayerError, ValueError) as error:
        assert "bias" in str(error)
        return
    alone = [oracles.evaluate(model, points[i : i + 1])[0] for i in range(4)]
    assert np.array_equal(certificate.labels, np.argmax(alone, axis=1))


def computes(model, x):
    try:
        model(x)
    except Exception as error:
        return "only supports the NHWC" not in str(error)
    return True


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a habit of TensorFlow's `add`")
@pytest.mark.parametrize("kind", ["conv", "separable", "einsum"])
def test_a_bias_that_keras_adds_along_another_axis_is_not_read_as_if_it_were_not(kind):
    rng = np.random.default_rng(0)
    options = {"bias_initializer": "random_normal"}
    for width, fits in ((3, False), (4, True)):
        if kind == "einsum":
            layer = L.EinsumDense("abc,cd->abd", (3, width), bias_axes="b", **options)
            shape = (3, 5)
        else:
            make = {"conv": L.Conv2D, "separable": L.SeparableConv2D}[kind]
            layer, shape = make(3, 1, data_format="channels_first", **options), (2, 4, width)
        model = keras.Sequential([keras.Input(shape), layer, L.Flatten()])
        x = rng.normal(size=(5, *shape)).astype("float32")
        if kind == "conv" and not computes(model, x):
            pytest.skip("this build of TensorFlow convolves channels first on no such processor")
        assert_gain_sound_or_refused(model)
        assert_margins_are_the_models(model, x)
        if fits:
            tfl.certify(model, x, precision="float64")
        else:
            with pytest.raises(UnsupportedLayerError, match=r"adds a bias.*Leave the bias out"):
                tfl.certify(model, x, precision="float64")
