"""Counts of a model's graph against Keras, XLA, TensorFlow's profiler and hand computation."""

import math

import keras
import numpy as np
import pytest
from keras import layers as k

from tf_lyapunov import models
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.planning.counting import layer_costs, traced_flops


def _network(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def _forward(model):
    return sum(c.forward for c in layer_costs(model))


def test_a_dense_layer_costs_two_flops_per_weight_and_one_per_bias():
    (cost,) = layer_costs(_network((30,), k.Dense(20)))
    assert (cost.forward, cost.parameters) == (2 * 30 * 20 + 20, 30 * 20 + 20)
    # The input of the first layer needs no gradient.
    assert cost.backward == 2 * 30 * 20 + 20


def test_a_dense_layer_on_a_sequence_is_applied_at_every_position():
    (cost,) = layer_costs(_network((7, 30), k.Dense(20, use_bias=False)))
    assert cost.forward == 7 * 2 * 30 * 20


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (k.Conv2D(8, 3, padding="valid", use_bias=False), 9 * 4 * 8 * 36),
        (k.Conv2D(8, 3, strides=2, padding="same", use_bias=False), 9 * 4 * 8 * 16),
        (k.Conv2D(8, 3, groups=2, padding="same", use_bias=False), 9 * 2 * 8 * 64),
        (k.Conv2D(8, 3, dilation_rate=2, padding="valid", use_bias=False), 9 * 4 * 8 * 16),
        (k.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), 9 * 4 * 2 * 36),
        (k.SeparableConv2D(6, 3, use_bias=False), 9 * 4 * 36 + 4 * 6 * 36),
        (k.Conv2DTranspose(5, 3, strides=2, use_bias=False), 9 * 4 * 5 * 64),
    ],
)
def test_convolutions_use_every_kernel_entry_once_per_position(layer, macs):
    (cost,) = layer_costs(_network((8, 8, 4), layer))
    assert cost.forward == 2 * macs


def test_parameters_are_those_of_keras():
    for model in (
        models.alexnet_cifar(),
        models.build({"name": "cnn", "batch_norm": True, "dropout": 0.1}, (28, 28, 1), 10),
        models.build({"name": "residual_mlp"}, (6,), 3),
    ):
        costs = layer_costs(model)
        assert sum(c.parameters for c in costs) == model.count_params()
        trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
        assert sum(c.trainable for c in costs) == trainable


def test_a_layer_called_twice_computes_twice_and_stores_its_weights_once():
    inputs = keras.Input((6,))
    layer = k.Dense(6)
    costs = layer_costs(keras.Model(inputs, layer(layer(inputs))))
    assert [c.parameters for c in costs] == [42, 0]
    assert costs[0].forward == costs[1].forward


def test_frozen_layers_have_no_gradient():
    first, second = k.Dense(5), k.Dense(3)
    model = _network((4,), first, second)
    first.trainable = False
    costs = layer_costs(model)
    assert costs[0].backward == 0 and costs[0].trainable == 0 and costs[0].kept == 0
    assert costs[1].backward == 2 * 5 * 3 + 3


def test_flattening_keeps_nothing_twice():
    convolution = layer_costs(
        _network((4, 4, 2), k.Conv2D(3, 3), k.ReLU(), k.Flatten(), k.Dense(2))
    )
    kept = {c.kind: c.kept for c in convolution}
    # The dense layer reads what the ReLU has kept.
    assert kept == {"Conv2D": 32, "ReLU": 2 * 12, "Flatten": 0, "Dense": 0}


def _xla_flops(function, *shapes):
    jax = pytest.importorskip("jax")
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_dense_and_unpadded_convolutions_count_as_in_xla():
    jax = pytest.importorskip("jax")
    model = _network(
        (12, 12, 3), k.Conv2D(8, 3), k.Conv2D(16, 3, strides=2), k.Flatten(), k.Dense(5)
    )
    shapes = [tuple(v.shape) for v in model.trainable_variables]

    def forward(x, a, b, c, d, e, f):
        order = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, a, (1, 1), "VALID", dimension_numbers=order) + b
        x = jax.lax.conv_general_dilated(x, c, (2, 2), "VALID", dimension_numbers=order) + d
        return x.reshape(x.shape[0], -1) @ e + f

    assert _forward(model) == _xla_flops(forward, (1, 12, 12, 3), *shapes)


def test_products_of_a_training_step_count_as_in_xla():
    jax = pytest.importorskip("jax")
    batch, widths = 16, (64, 48, 32)
    model = _network((64,), k.Dense(48, use_bias=False), k.Dense(32, use_bias=False))

    def loss(weights, x):
        return jax.numpy.sum(x @ weights[0] @ weights[1])

    weights = [
        jax.ShapeDtypeStruct((m, n), "float32")
        for m, n in zip(widths[:-1], widths[1:], strict=True)
    ]
    x = jax.ShapeDtypeStruct((batch, 64), "float32")
    found = jax.jit(jax.value_and_grad(loss)).lower(weights, x).cost_analysis()["flops"] / batch
    counted = sum(c.forward + c.backward for c in layer_costs(model))
    # XLA adds the loss and its seed, some operations per output.
    assert counted <= found <= counted + 4 * widths[-1]


def test_padded_convolutions_count_as_in_tensorflows_profiler():
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a TensorFlow graph of the Keras model")
    model = _network(
        (14, 14, 3), k.Conv2D(8, 5, padding="same"), k.Conv2D(4, 3, strides=2, padding="same")
    )
    spec = tf.TensorSpec((1, 14, 14, 3), "float32")
    graph = tf.function(lambda x: model(x)).get_concrete_function(spec).graph
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    found = profiler.profile(graph, options=options.with_empty_output().build()).total_float_ops
    assert _forward(model) == found


def test_layers_bounded_by_construction_are_counted_by_the_backend():
    if keras.backend.backend() == "torch":
        pytest.skip("torch counts nothing")
    from tf_lyapunov.layers import CayleyDense

    (cost,) = layer_costs(_network((16,), CayleyDense(16)))
    assert cost.how == "traced" and cost.is_map
    # Whatever it computes beside, it multiplies by a 16×16 matrix.
    assert cost.forward >= 2 * 16 * 16


def test_unknown_layers_are_refused_by_name():
    class Strange(k.Layer):
        def call(self, x):
            return np.asarray(keras.ops.convert_to_numpy(x)) + 1.0

    layer = Strange(name="strange_one")
    with pytest.raises(UnsupportedLayerError, match="strange_one"):
        traced_flops(layer, [(None, 4)])


def test_resnet50_has_the_published_multiply_adds():
    costs = layer_costs(models.resnet50((224, 224, 3)))
    macs = sum(c.forward for c in costs if c.is_map) / 2
    # Goyal et al.'s variant, stride in the 3×3 convolutions: 4.1·10⁹, 25.6·10⁶ parameters.
    assert macs == pytest.approx(4.1e9, rel=0.02)
    assert sum(c.trainable for c in costs) == pytest.approx(25.6e6, rel=0.01)
