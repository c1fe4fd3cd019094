"""The gain of every supported layer bounds what the layer does, and is attained where exact."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.certification import lipschitz_upper_bound, read_network
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.families.pooling import average_pooling_gain, max_pooling_gain
from tf_lyapunov.verification.reading import read

# A float32 Jacobian of these sizes is off by a few hundred units in the last place at most.
FLOAT32 = 1 + 1e-4


def model_of(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer])
    for weight in model.weights:
        if "variance" not in weight.path and "count" not in weight.path:
            value = np.random.default_rng(1).normal(size=weight.shape)
            weight.assign(value.astype("float32"))
    return model


LINEAR = [
    (layers.Dense(3), (5,)),
    (layers.Dense(3), (4, 5)),
    (layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (7, 2)),
    (layers.Conv2D(3, 3, strides=2, padding="same"), (6, 5, 2)),
    (layers.Conv2D(4, 3, groups=2), (5, 5, 2)),
    (layers.Conv3D(2, 2), (3, 3, 3, 1)),
    (layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 2)),
    (layers.Conv2DTranspose(2, 3, strides=2, padding="same"), (3, 3, 2)),
    (layers.AveragePooling2D(3, 2), (7, 7, 2)),
    (layers.AveragePooling2D(3, 2, padding="same"), (6, 6, 2)),
    (layers.AveragePooling1D(2, 1, padding="same"), (5, 2)),
    (layers.GlobalAveragePooling2D(), (4, 4, 2)),
    (layers.UpSampling2D((2, 3)), (3, 3, 2)),
    (layers.RepeatVector(3), (4,)),
    (layers.ZeroPadding2D(1), (3, 3, 2)),
    (layers.Cropping1D(1), (5, 2)),
    (layers.Permute((2, 1)), (3, 4)),
    (layers.Reshape((6,)), (2, 3)),
    (layers.Flatten(), (2, 3)),
    (layers.Rescaling(-3.0, offset=2.0), (4,)),
    (layers.Rescaling([1.0, -2.5]), (3, 2)),
    (layers.Normalization(mean=[1.0, 2.0], variance=[4.0, 0.25]), (2,)),
    (layers.Normalization(mean=[1.0, 2.0], variance=[4.0, 0.25], invert=True), (2,)),
    (layers.BatchNormalization(), (4,)),
    (layers.BatchNormalization(scale=False, center=False), (3, 3, 2)),
    (layers.Dropout(0.5), (4,)),
    (layers.GaussianNoise(0.5), (4,)),
]


@pytest.mark.parametrize(("layer", "shape"), LINEAR, ids=lambda v: getattr(v, "name", str(v)))
def test_the_gain_of_a_linear_layer_is_the_norm_of_its_jacobian(layer, shape, jacobian_norm):
    model = model_of(layer, shape)
    truth = jacobian_norm(lambda x: model(x, training=False), shape)
    bound = lipschitz_upper_bound(model, outputs="model").gain_upper_bound
    assert truth <= bound * FLOAT32
    assert bound <= truth * FLOAT32


NONLINEAR = [
    (layers.SeparableConv2D(3, 3), (5, 5, 2)),
    (layers.MaxPooling2D(3, 2), (7, 7, 1)),
    (layers.MaxPooling1D(2, 1, padding="same"), (5, 1)),
    (layers.GlobalMaxPooling2D(), (4, 4, 2)),
    (layers.ReLU(), (4,)),
    (layers.LeakyReLU(negative_slope=3.0), (4,)),
    (layers.ELU(alpha=2.5), (4,)),
    (layers.PReLU(), (4,)),
    (layers.Softmax(), (4,)),
    (layers.Softmax(axis=(1, 2)), (2, 3)),
    *[
        (layers.Dense(6, activation=name), (5,))
        for name in (
            "relu leaky_relu elu selu celu tanh sigmoid gelu silu softplus softsign mish hard_silu "
            "hard_sigmoid relu6 log_sigmoid softmax log_softmax squareplus tanh_shrink"
        ).split()
    ],
]


@pytest.mark.parametrize(("layer", "shape"), NONLINEAR, ids=lambda v: getattr(v, "name", str(v)))
def test_no_jacobian_exceeds_the_gain_of_a_nonlinear_layer(layer, shape, jacobian_norm):
    model = model_of(layer, shape)
    bound = lipschitz_upper_bound(model, outputs="model").gain_upper_bound
    found = jacobian_norm(lambda x: model(x, training=False), shape, points=200)
    assert found <= bound * FLOAT32
    assert found >= bound / 40  # the bound is not a placeholder


def test_an_overlapping_max_pool_reaches_its_gain_of_two():
    # One large cell that four windows share moves four outputs by its own change.
    model = keras.Sequential([keras.Input((5, 5, 1)), layers.MaxPooling2D(3, 2)])
    x = np.zeros((1, 5, 5, 1), dtype="float32")
    moved = x.copy()
    moved[0, 2, 2, 0] = 1.0
    change = np.asarray(model(moved)) - np.asarray(model(x))
    assert np.linalg.norm(change) == 2.0
    assert lipschitz_upper_bound(model).gain_upper_bound == 2.0


def test_small_inputs_overlap_less_than_the_general_rule_says():
    assert max_pooling_gain((3,), (2,), "valid", (4,)) == 1.0
    assert max_pooling_gain((3,), (2,), "valid", (None,)) >= np.sqrt(2.0)
    assert max_pooling_gain((2, 2), (2, 2), "same", (None, None)) == 1.0


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("q", "s"), [(2, 2), (3, 2), (3, 1), (2, 3), (5, 2)])
def test_the_gain_for_unknown_sizes_covers_every_size(q, s, padding):
    unknown_average = average_pooling_gain((q,), (s,), padding, (None,))
    unknown_max = max_pooling_gain((q,), (s,), padding, (None,))
    for n in range(q, 24):
        assert average_pooling_gain((q,), (s,), padding, (n,)) <= unknown_average * (1 + 1e-12)
        assert max_pooling_gain((q,), (s,), padding, (n,)) <= unknown_max


def test_average_pooling_on_edges_divides_by_valid_cells(jacobian_norm):
    # A 'same' window of size 3 at the edge of 2 cells averages 2 cells, not 3.
    model = keras.Sequential([keras.Input((2, 1)), layers.AveragePooling1D(3, 1, padding="same")])
    assert jacobian_norm(model, (2, 1)) == pytest.approx(1.0, rel=1e-6)
    assert lipschitz_upper_bound(model).gain_upper_bound >= 1.0


def test_batch_normalization_after_a_convolution_is_folded(jacobian_norm):
    model = keras.Sequential(
        [keras.Input((5, 5, 2)), layers.Conv2D(3, 3), layers.BatchNormalization()]
    )
    rng = np.random.default_rng(0)
    norm = model.layers[1]
    norm.gamma.assign(rng.normal(size=3))
    norm.moving_variance.assign(rng.uniform(0.01, 4.0, size=3))
    norm.moving_mean.assign(rng.normal(size=3))
    truth = jacobian_norm(lambda x: model(x, training=False), (5, 5, 2))
    result = lipschitz_upper_bound(model)
    assert [c.kind for c in result.contributions] == ["linear"]
    assert truth / FLOAT32 <= result.gain_upper_bound <= truth * FLOAT32
    split = lipschitz_upper_bound(
        keras.Sequential([keras.Input((5, 5, 2)), model.layers[0]])
    ).gain_upper_bound
    scale = np.max(np.abs(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon))
    assert result.gain_upper_bound < split * scale


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Dense(3), (4,)),
        (layers.DepthwiseConv2D(2, depth_multiplier=2), (4, 4, 2)),
        (layers.Conv2DTranspose(3, 2), (3, 3, 2)),
        (layers.SeparableConv1D(3, 2), (5, 2)),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_batch_normalization_folds_along_the_right_axis(layer, shape, jacobian_norm):
    model = keras.Sequential([keras.Input(shape), layer, layers.BatchNormalization()])
    gamma = model.layers[1].gamma
    gamma.assign(np.linspace(-2.0, 0.1, gamma.shape[0]))
    truth = jacobian_norm(lambda x: model(x, training=False), shape)
    result = lipschitz_upper_bound(model)
    assert "folded" in result.contributions[-1].method
    assert truth <= result.gain_upper_bound * FLOAT32
    if len(result.contributions) == 1:
        assert result.gain_upper_bound <= truth * FLOAT32


def test_batch_normalization_is_not_folded_across_a_branch_or_activation():
    x = keras.Input((4,))
    h = layers.Dense(4)(x)
    branched = keras.Model(x, layers.Add()([h, layers.BatchNormalization()(h)]))
    activated = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, activation="relu"), layers.BatchNormalization()]
    )
    for model in (branched, activated):
        kinds = [node.kind for node in read_network(model).nodes]
        assert "batch normalization" in kinds


REFUSED = [
    (layers.LayerNormalization(epsilon=0.0), (4,)),
    (layers.GroupNormalization(1, epsilon=0.0), (4,)),
    (layers.UnitNormalization(), (4,)),
    (layers.LSTM(3), (4, 2)),
    (layers.TimeDistributed(layers.LSTM(3)), (2, 4, 2)),
    (layers.Masking(), (4, 2)),
    (layers.AutoContrast(), (4, 4, 1)),
    (layers.RandomCrop(2, 2), (4, 4, 1)),
    (layers.Activation("exponential"), (4,)),
    (layers.Dense(4, activation="hard_shrink"), (4,)),
    (layers.ReLU(threshold=1.0), (4,)),
    (layers.Softmax(axis=0), (4,)),
]


@pytest.mark.parametrize(("layer", "shape"), REFUSED, ids=lambda v: getattr(v, "name", str(v)))
def test_a_layer_without_a_proven_gain_is_refused(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer])
    with pytest.raises(UnsupportedLayerError, match="Received"):
        read_network(model)


def test_a_refusal_names_the_layer_and_says_why():
    model = keras.Sequential([keras.Input((4,)), layers.UnitNormalization(name="my_norm")])
    with pytest.raises(UnsupportedLayerError, match=r"norm of.*'my_norm'.*UnitNormalization"):
        read_network(model)


def test_products_of_inputs_are_refused():
    x = keras.Input((4,))
    for layer in (layers.Multiply(), layers.Dot(axes=1)):
        model = keras.Model(x, layer([x, layers.Dense(4)(x)]))
        with pytest.raises(UnsupportedLayerError, match="product"):
            read_network(model)


def test_a_subclass_or_an_impostor_is_not_taken_for_the_original():
    class Tripled(layers.Dense):
        def call(self, x, training=None):
            return 3 * super().call(x)

    def relu(x):
        return 10 * x

    def softmax(x):
        return 10 * x

    # A subclass is read by what its own `call` does.
    model = keras.Sequential([keras.Input((4,)), Tripled(2)])
    kernel = np.asarray(keras.ops.convert_to_numpy(model.layers[0].kernel), np.float64)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert bound == pytest.approx(3 * np.linalg.norm(kernel, 2), rel=1e-6)
    for layer in (layers.Dense(2, activation=relu), layers.Activation(softmax)):
        model = keras.Sequential([keras.Input((4,)), layer])
        with pytest.raises(UnsupportedLayerError):
            read_network(model)


def test_training_mode_in_the_graph_is_refused():
    x = keras.Input((4,))
    for layer in (layers.Dropout(0.5), layers.BatchNormalization()):
        model = keras.Model(x, layer(x, training=True))
        with pytest.raises(UnsupportedLayerError, match="training=True"):
            read_network(model)


def test_low_precision_certifies_the_cast_kernel():
    layer = layers.Dense(3, dtype="mixed_bfloat16", use_bias=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    kernel = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    layer.kernel.assign(kernel)
    cast = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(kernel, "bfloat16")))
    truth = np.linalg.norm(cast.astype(np.float64), 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert truth <= bound <= truth * (1 + 1e-12)
    assert abs(bound - np.linalg.norm(kernel.astype(np.float64), 2)) > 1e-6


@pytest.mark.parametrize("scale", [[1.0] * 4, [[2.0] * 4], [[[1.0]], [[1.0]]]])
def test_rescaling_that_repeats_its_input_is_refused(scale):
    """Keras records the input's shape, and the output is larger: its gain is 2 times the scale."""
    model = keras.Sequential([keras.Input((1, 1)), keras.layers.Rescaling(np.array(scale))])
    with pytest.raises(UnsupportedLayerError, match="do not fit"):
        lipschitz_upper_bound(model)


def test_a_layer_that_may_or_may_not_cast_its_kernel_is_refused():
    """Alone it computes with 1.0, the kernel in float16; in a mixed precision model with 1.0004."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        dense = keras.layers.Dense(1, use_bias=False, autocast=False)
        model = keras.Sequential([keras.Input((1,), dtype="float32"), dense])
    finally:
        keras.config.set_dtype_policy(policy)
    dense.set_weights([np.array([[1.0004]])])
    with pytest.raises(UnsupportedLayerError, match="autocast"):
        lipschitz_upper_bound(model)
    with pytest.raises(UnsupportedLayerError, match="autocast"):
        read(model)
