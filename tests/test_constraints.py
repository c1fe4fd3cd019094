"""Constraints in Keras: guaranteed after every step, never enlarging, saved and reloaded."""

import fresh_processes
import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_maps import true_norm

from tf_lyapunov.constraints import ConicBound, SpectralBound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.spectral.reading import linear_maps

RNG = np.random.default_rng(0)


def norm(kernel):
    return np.linalg.norm(ops.convert_to_numpy(ops.cast(kernel, "float64")), 2)


def train(model, shape, classes, optimizer=None, **options):
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **options)
    x = np.random.default_rng(0).standard_normal((64, *shape)).astype("float32")
    y = np.random.default_rng(1).integers(0, classes, 64)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)


LAYERS = {
    "dense": (layers.Dense(5), (7,)),
    "conv1d": (layers.Conv1D(3, 3, strides=2, padding="same"), (9, 2)),
    "causal": (layers.Conv1D(3, 3, dilation_rate=2, padding="causal"), (9, 2)),
    "conv2d": (layers.Conv2D(4, 3, padding="same"), (6, 6, 2)),
    "strided": (layers.Conv2D(4, 3, strides=2, padding="valid"), (7, 7, 2)),
    "grouped": (layers.Conv2D(4, 3, groups=2, padding="same"), (6, 6, 4)),
    "dilated": (layers.Conv2D(3, 3, dilation_rate=2, padding="same"), (6, 6, 2)),
    "conv3d": (layers.Conv3D(2, 2), (4, 4, 4, 2)),
    "transposed1d": (layers.Conv1DTranspose(2, 3, strides=2), (5, 2)),
    "transposed2d": (layers.Conv2DTranspose(2, 3, strides=2, padding="same"), (4, 4, 2)),
    "depthwise1d": (layers.DepthwiseConv1D(3, depth_multiplier=2), (8, 2)),
    "depthwise2d": (layers.DepthwiseConv2D(3, strides=2, padding="same"), (6, 6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("geometry", ["bare", "known"])
def test_after_training_at_a_large_rate_the_true_norm_is_within_the_bound(name, geometry):
    template, shape = LAYERS[name]
    layer = type(template).from_config({**template.get_config(), "use_bias": False})
    layer.build((None, *shape))
    layer.kernel.constraint = (
        SpectralBound(0.8) if geometry == "bare" else SpectralBound.for_layer(layer, 0.8)
    )
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(3)])
    train(model, shape, 3)
    truth = true_norm(layer, shape)
    # Reading the matrix off the layer involves products with 0 and 1 alone: no rounding.
    assert truth <= 0.8 * (1 + 1e-12)
    assert truth > 0.4  # and training did push against it


def test_separable_parts_are_bounded_each():
    layer = layers.SeparableConv2D(
        4,
        3,
        padding="same",
        use_bias=False,
        depthwise_constraint=SpectralBound(0.9),
        pointwise_constraint=SpectralBound(0.7),
    )
    model = keras.Sequential([keras.Input((6, 6, 3)), layer, layers.Flatten(), layers.Dense(3)])
    train(model, (6, 6, 3), 3)
    assert true_norm(layer, (6, 6, 3)) <= 0.9 * 0.7
    with pytest.raises(UnsupportedLayerError, match="for_map"):
        SpectralBound.for_layer(layer, 1.0)
    (_, depthwise), (_, pointwise) = linear_maps(layer)
    for linear_map, shape in ((depthwise, (3, 3, 3, 1)), (pointwise, (1, 1, 3, 4))):
        read = SpectralBound.for_map(linear_map, 1.0).linear_map(shape)
        assert (read.kind, read.input_shape) == (linear_map.kind, linear_map.input_shape)
        assert read.output_shape(shape) == linear_map.output_shape(shape)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}])
def test_guarantee_holds_compiled_and_eagerly(options, traced_twice):
    dense = layers.Dense(4, kernel_constraint=SpectralBound(0.5))
    train(keras.Sequential([keras.Input((6,)), dense]), (6,), 4, **options)
    assert norm(dense.kernel) <= 0.5


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_bounds_the_master_kernel(policy):
    dense = layers.Dense(8, kernel_constraint=SpectralBound(0.5), dtype=policy)
    train(keras.Sequential([keras.Input((6,)), dense]), (6,), 4)
    assert keras.backend.standardize_dtype(dense.kernel.dtype) == "float32"
    assert norm(dense.kernel) <= 0.5


def test_kernel_inside_keeps_every_bit_and_outside_never_grows():
    kernel = RNG.standard_normal((9, 5)).astype("float32")
    for bound, same in ((norm(kernel) * 1.01, True), (norm(kernel) * 0.5, False)):
        result = ops.convert_to_numpy(SpectralBound(bound)(kernel))
        assert np.array_equal(result, kernel) == same
        assert norm(result) <= norm(kernel)


def test_no_bound_leaves_the_kernel_alone():
    kernel = ops.convert_to_tensor(RNG.standard_normal((3, 3)).astype("float32"))
    np.testing.assert_array_equal(SpectralBound(None)(kernel), kernel)
    np.testing.assert_array_equal(SpectralBound(None).project(kernel), kernel)


def test_upper_bound_and_project_agree_with_each_other():
    kernel = RNG.standard_normal((9, 5)).astype("float32")
    for mode in ("step", "monitor"):
        constraint = SpectralBound(0.5, guarantee=mode)
        projected = constraint.project(kernel)
        # By the float64 bound, which is tighter than the float32 one of training.
        assert 0.5 * (1 - 1e-6) <= norm(projected) <= 0.5
        assert norm(projected) <= float(constraint.upper_bound(projected)) <= 0.5 * 1.01


def test_amortised_mode_steers_from_below_and_project_enforces():
    kernel = RNG.standard_normal((60, 40)).astype("float32")
    constraint = SpectralBound(1.0, guarantee="monitor")
    assert norm(constraint(kernel)) > 1.0  # negative control: an estimate is no bound
    constraint.warm_up(keras.Variable(kernel))
    assert 1.0 <= norm(constraint(kernel)) * (1 + 1e-6) <= 1.02
    assert norm(constraint.project(kernel)) <= 1.0
    inside = 0.5 * kernel / norm(kernel)
    np.testing.assert_array_equal(constraint(inside), inside)


def test_amortised_training_stays_near_the_bound(traced_twice):
    constraint = SpectralBound(0.5, guarantee="monitor")
    dense = layers.Dense(8, kernel_constraint=constraint)
    model = keras.Sequential([keras.Input((20,)), dense])
    constraint.warm_up(dense.kernel)
    train(model, (20,), 8, keras.optimizers.SGD(0.05))
    assert norm(dense.kernel) <= 0.5 * 1.2
    dense.kernel.assign(constraint.project(dense.kernel))
    assert norm(dense.kernel) <= 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_kernel_raises_eagerly_and_stays_nan_when_compiled(bad):
    kernel = np.ones((4, 3), "float32")
    kernel[0, 0] = bad
    for constraint in (SpectralBound(1.0), SpectralBound(1.0, guarantee="monitor")):
        with pytest.raises(ValueError, match="must be finite"):
            constraint(kernel)
        with pytest.raises(ValueError, match="must be finite"):
            constraint.project(kernel)
    with pytest.raises(ValueError, match="must be finite"):
        ConicBound(0.0, 1.0)(np.full((3, 3), bad, "float32"))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        traced = tf.function(SpectralBound(1.0))(tf.constant(kernel))
        assert np.isnan(traced.numpy()).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_gain": 0.0}, "`max_gain` must be positive"),
        ({"max_gain": -1.0}, "Pass `None`"),
        ({"max_gain": float("nan")}, "finite"),
        ({"max_gain": 1e30}, "between"),
        ({"max_gain": 1.0, "padding": "reflect"}, "`padding`"),
        ({"max_gain": 1.0, "kind": "attention"}, "`kind`"),
        ({"max_gain": 1.0, "strides": 0}, "`strides`"),
        ({"max_gain": 1.0, "groups": 2, "kind": "depthwise"}, "`groups`"),
        ({"max_gain": 1.0, "guarantee": "always"}, "`guarantee`"),
        ({"max_gain": 1.0, "every": 0}, "`every`"),
        ({"max_gain": 1.0, "squarings": 99}, "`squarings`"),
        ({"max_gain": 1.0, "data_format": "NHWC"}, "`data_format`"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralBound(**arguments)


def test_wrong_types_are_refused():
    for value in ("1", True, [1.0]):
        with pytest.raises(TypeError, match="must be a number"):
            SpectralBound(value)


@pytest.mark.parametrize(
    "arguments, shape, message",
    [
        ({}, (5,), "2 \\(dense\\) to 5"),
        ({"kind": "conv"}, (5, 4), "does not fit"),
        ({"kind": "dense"}, (3, 3, 2, 2), "does not fit"),
        ({"input_shape": (8,)}, (3, 3, 2, 2), "must hold 2 sizes"),
        ({"input_shape": (8, 8, 5)}, (3, 3, 2, 2), "must have 2 channels"),
        ({"strides": (1, 2, 3)}, (3, 3, 2, 2), "`strides`"),
    ],
)
def test_kernels_that_contradict_the_arguments_are_refused(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        SpectralBound(1.0, **arguments)(np.ones(shape, "float32"))


def test_spatial_sizes_may_come_with_channels_in_either_place():
    expected = SpectralBound(1.0, input_shape=(8, 9)).linear_map((3, 3, 2, 4))
    for shape, data_format in (((8, 9, 2), None), ((2, 8, 9), "channels_first")):
        constraint = SpectralBound(1.0, input_shape=shape, data_format=data_format)
        assert constraint.linear_map((3, 3, 2, 4)) == expected
    assert expected.input_shape == (8, 9, 2)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2])
def test_unstated_padding_is_bounded_over(padding, strides):
    for seed in range(5):
        layer = layers.Conv2D(2, 3, strides=strides, padding=padding, use_bias=False)
        layer.build((None, 6, 6, 2))
        layer.kernel.assign(np.random.default_rng(seed).integers(-3, 4, (3, 3, 2, 2)))
        constraint = SpectralBound(1.0, input_shape=(6, 6), strides=strides)
        assert true_norm(layer, (6, 6, 2)) <= float(constraint.upper_bound(layer.kernel))


def test_config_round_trip_and_unknown_keys():
    layer = layers.Conv2D(4, 3, strides=2, groups=2, padding="same")
    layer.build((None, 8, 8, 4))
    for constraint in (
        SpectralBound.for_layer(layer, 0.7, guarantee="monitor", every=7),
        SpectralBound(None),
        ConicBound(0.5, 0.25),
    ):
        config = keras.constraints.serialize(constraint)
        again = keras.constraints.deserialize(config)
        assert again.get_config() == constraint.get_config()
        with pytest.raises(ValueError, match="must hold only"):
            type(constraint).from_config({**constraint.get_config(), "evil": 1})
    with pytest.raises(ValueError, match="positive"):
        SpectralBound.from_config({"max_gain": -1.0})


def test_saved_model_keeps_its_constraint_in_a_new_process(tmp_path):
    dense = layers.Dense(4, kernel_constraint=SpectralBound(0.5))
    model = keras.Sequential([keras.Input((6,)), dense])
    train(model, (6,), 4, keras.optimizers.Adam(0.1))
    path = tmp_path / "model.keras"
    model.save(path)
    code = (
        "import sys, numpy as np, keras, tf_lyapunov.constraints\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "x = np.random.default_rng(0).standard_normal((64, 6))\n"
        "model.fit(x, np.arange(64) % 4, epochs=2, verbose=0)\n"
        "kernel = keras.ops.convert_to_numpy(model.layers[-1].kernel).astype(float)\n"
        "assert np.linalg.norm(kernel, 2) <= 0.5\n"
        "assert model.layers[-1].kernel_constraint.max_gain == 0.5\n"
    )
    fresh_processes.output(code, path)


def test_conic_bound_holds_after_training():
    dense = layers.Dense(5, use_bias=False, kernel_constraint=ConicBound(0.6, 0.4))
    model = keras.Sequential([keras.Input((5,)), dense, layers.Dense(3)])
    train(model, (5,), 3)
    kernel = ops.convert_to_numpy(dense.kernel).astype(float)
    assert np.linalg.norm(kernel - 0.6 * np.eye(5), 2) <= 0.4
    assert norm(ConicBound(0.0, 0.4).project(kernel.astype("float32"))) <= 0.4
    with pytest.raises(ValueError, match="`radius` must be positive"):
        ConicBound(0.5, 0.0)
    with pytest.raises(ValueError, match="square"):
        ConicBound(0.5, 0.1)(np.ones((2, 3), "float32"))


def test_keras_own_spectral_normalization_does_not_hold_a_convolution():
    """Negative control: dividing by the reshaped kernel's norm leaves a true norm above 1."""
    kernel = np.ones((3, 3, 1, 1), "float32")
    reshaped = kernel / np.linalg.norm(kernel.reshape(-1, 1), 2)
    layer = layers.Conv2D(1, 3, padding="same", use_bias=False)
    layer.build((None, 8, 8, 1))
    layer.kernel.assign(reshaped)
    assert true_norm(layer, (8, 8, 1)) > 2.0
    layer.kernel.assign(SpectralBound(1.0)(reshaped))
    assert true_norm(layer, (8, 8, 1)) <= 1.0
