"""Reading models: every way of wiring layers gives a bound that no Jacobian exceeds."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.certification import certify, lipschitz_upper_bound, read_network
from tf_lyapunov.errors import UnsupportedLayerError

FLOAT32 = 1 + 1e-4


def residual():
    x = keras.Input((4,))
    h = layers.Dense(4, activation="tanh")(x)
    return keras.Model(x, layers.Add()([x, h]))


def doubled():
    x = keras.Input((4,))
    h = layers.Dense(4, use_bias=False)(x)
    return keras.Model(x, layers.Add()([h, h]))


def concatenated():
    x = keras.Input((4,))
    h = layers.Dense(3)(x)
    return keras.Model(x, layers.Concatenate()([h, h, layers.Dense(2)(x)]))


def shared():
    x = keras.Input((4,))
    dense = layers.Dense(4, activation="leaky_relu")
    return keras.Model(x, dense(dense(x)))


def shared_at_two_sizes():
    x = keras.Input((8, 8, 1))
    conv = layers.Conv2D(1, 3, padding="same")
    h = layers.Flatten()(conv(x))
    small = layers.Flatten()(conv(layers.AveragePooling2D(4)(x)))
    return keras.Model(x, layers.Concatenate()([h, small]))


def broadcast():
    x = keras.Input((3, 3, 2))
    return keras.Model(x, layers.Add()([x, layers.GlobalAveragePooling2D(keepdims=True)(x)]))


def extremes():
    x = keras.Input((4,))
    branches = [layers.Dense(3)(x) for _ in range(3)]
    parts = [layers.Maximum()(branches), layers.Minimum()(branches[:2])]
    parts += [layers.Subtract()(branches[1:]), layers.Average()(branches)]
    return keras.Model(x, layers.Concatenate()(parts))


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, "relu"), layers.Dense(4)])
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(3)(inner(inner(x)) + x))


def nested_with_two_tensors():
    a, b = keras.Input((4,)), keras.Input((3,))
    inner = keras.Model([a, b], [layers.Dense(2)(a), layers.Dense(2)(b)])
    x = keras.Input((4,))
    p, q = inner([x, layers.Dense(3)(x)])
    return keras.Model(x, layers.Subtract()([p, q]))


def nested_at_another_size():
    inner = keras.Sequential([keras.Input((None, None, 1)), layers.Conv2D(1, 3, padding="same")])
    x = keras.Input((6, 6, 1))
    return keras.Model(x, inner(layers.MaxPooling2D(2)(inner(x))))


def operations():
    x = keras.Input((4,))
    h = ops.relu(2.0 * x - np.arange(4.0, dtype="float32")) / 3.0
    h = -ops.concatenate([h, ops.leaky_relu(x, 0.3)], axis=-1)
    h = ops.maximum(ops.reshape(h, (-1, 2, 4))[:, 1:, ::2], 0.1)
    return keras.Model(x, ops.squeeze(ops.transpose(h, (0, 2, 1)), -1))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = layers.Dense(6, activation="gelu")
        self.inner = keras.Sequential([layers.Dense(6, activation="relu"), layers.Dense(6)])
        self.norm = layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)
        self.last = layers.Dense(3)

    def call(self, x, training=None):
        h = self.first(x)
        h = h + self.inner(h)
        return self.last(self.drop(self.norm(h), training=training))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), dtype="float32"))
    return model


def spectral_wrapper():
    wrapped = layers.SpectralNormalization(layers.Dense(3))
    return keras.Sequential([keras.Input((4,)), wrapped])


BUILDERS = [
    residual,
    doubled,
    concatenated,
    shared,
    shared_at_two_sizes,
    broadcast,
    extremes,
    nested,
    nested_with_two_tensors,
    nested_at_another_size,
    operations,
    subclassed,
    spectral_wrapper,
]


@pytest.mark.parametrize("build", BUILDERS)
def test_no_jacobian_exceeds_the_bound(build, jacobian_norm):
    model = build()
    shape = tuple(read_network(model).graph.inputs[0].shape[1:])
    bound = lipschitz_upper_bound(model).gain_upper_bound
    found = jacobian_norm(lambda x: model(x, training=False), shape, points=50)
    assert found <= bound * FLOAT32
    assert found >= bound / 20


def test_adding_a_tensor_to_itself_doubles_its_gain():
    model = doubled()
    sigma = np.linalg.norm(np.asarray(model.layers[1].kernel, dtype=np.float64), 2)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(2 * sigma, rel=1e-12)


def test_a_residual_block_has_gain_one_plus_that_of_its_branch():
    model = residual()
    sigma = np.linalg.norm(np.asarray(model.layers[1].kernel, dtype=np.float64), 2)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(1 + sigma, rel=1e-12)


def test_relu_minus_shifted_relu_is_not_reported_below_one():
    # f(x) = relu(x) - relu(x - 1): Lipschitz constant 1, although LipSDP-Network says 5e-6.
    dense = layers.Dense(2, activation="relu")
    model = keras.Sequential([keras.Input((1,)), dense, layers.Dense(1)])
    dense.kernel.assign([[1.0, 1.0]])
    dense.bias.assign([0.0, -1.0])
    model.layers[1].kernel.assign([[1.0], [-1.0]])
    assert float(model(np.ones((1, 1)))[0, 0]) == 1.0
    assert lipschitz_upper_bound(model).gain_upper_bound >= 1.0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_scaling_any_layer_scales_the_bound(index):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "relu"), layers.Dense(5, "tanh"), layers.Dense(2)]
    )
    before = lipschitz_upper_bound(model).gain_upper_bound
    kernel = model.layers[index].kernel
    kernel.assign(8.0 * kernel)
    after = lipschitz_upper_bound(model).gain_upper_bound
    assert after == pytest.approx(8 * before, rel=1e-12)


def test_two_inputs_are_measured_by_their_concatenation():
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], layers.Concatenate()([a, b]))
    assert 1.0 <= lipschitz_upper_bound(model).gain_upper_bound <= 1 + 1e-12
    with pytest.raises(TypeError, match="one array per input of the model"):
        certify(model, np.zeros((2, 3)))


def test_several_outputs_are_refused():
    x = keras.Input((3,))
    model = keras.Model(x, [layers.Dense(2)(x), layers.Dense(2)(x)])
    with pytest.raises(UnsupportedLayerError, match="one output"):
        read_network(model)


def test_reading_a_subclassed_model_leaves_no_trace_in_its_layers():
    model = subclassed()
    before = len(model.first._inbound_nodes)
    read_network(model)
    certify(model, np.zeros((2, 4)))
    assert len(model.first._inbound_nodes) == before


def test_a_subclassed_model_that_leaves_keras_is_refused():
    class Foreign(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x) * np.asarray(x).mean()

    model = Foreign()
    model(np.ones((1, 3), dtype="float32"))
    with pytest.raises(UnsupportedLayerError, match="Foreign"):
        read_network(model)


def test_a_model_that_computes_something_else_on_data_is_noticed():
    class TwoFaced(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            symbolic = isinstance(x, keras.KerasTensor)
            return self.dense(x) if symbolic else 5 * self.dense(x) + 1

    model = TwoFaced()
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model(x)
    with pytest.raises(ValueError, match="something else"):
        certify(model, x)


def test_layers_made_inside_call_are_refused():
    class Forgetful(keras.Model):
        def call(self, x):
            return layers.Dense(2)(x)

    model = Forgetful()
    model.built = True
    with pytest.raises(UnsupportedLayerError, match="__init__"):
        read_network(model, [(None, 3)])


def test_operations_that_mix_samples_are_refused():
    x = keras.Input((4,))
    for y in (ops.reshape(x, (-1, 2)), ops.flip(x), ops.mean(x, axis=0), x * x, 1.0 / x):
        with pytest.raises(UnsupportedLayerError):
            read_network(keras.Model(x, y))


def test_an_unbuilt_model_is_refused():
    with pytest.raises(ValueError, match="built"):
        read_network(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(TypeError, match=r"keras\.Model"):
        read_network(layers.Dense(2))


def test_infinite_weights_are_refused_by_the_layers_name():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="broken")])
    model.layers[0].kernel.assign([[np.nan, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="broken"):
        read_network(model)


def test_an_open_image_size_is_bounded_for_all_sizes_and_taken_from_data():
    model = keras.Sequential(
        [keras.Input((None, None, 1)), layers.Conv2D(3, 3), layers.GlobalAveragePooling2D()]
    )
    model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(3, 3, 1, 3)))
    every_size = lipschitz_upper_bound(model).gain_upper_bound
    one_size = lipschitz_upper_bound(model, input_shapes=[(None, 8, 8, 1)]).gain_upper_bound
    assert one_size < every_size
    proof = certify(model, np.random.default_rng(0).normal(size=(3, 8, 8, 1)))
    assert proof.gain_upper_bound == one_size


def test_the_digest_follows_the_weights_and_not_the_names():
    def build(name):
        return keras.Sequential([keras.Input((3,)), layers.Dense(2, "relu", name=name)])

    first, second = build("a"), build("b")
    second.set_weights(first.get_weights())
    assert read_network(first).digest() == read_network(second).digest()
    second.layers[0].bias.assign([0.0, 1e-7])
    assert read_network(first).digest() != read_network(second).digest()
    linear = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    linear.set_weights(first.get_weights())
    assert read_network(first).digest() != read_network(linear).digest()


def test_stages_of_a_chain_multiply_to_the_networks_gain():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(0.5),
            layers.Conv2D(2, 3),
            layers.BatchNormalization(),
            layers.Activation("gelu"),
            layers.MaxPooling2D(3, 2),
            layers.SeparableConv2D(3, 2, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(4, activation="softmax"),
        ]
    )
    model.layers[-3].gamma.assign([0.5, -3.0, 1.0])
    network = read_network(model)
    assert network.is_chain
    cascade = stages(network)
    assert [type(s.layer).__name__ for s in cascade] == ["Conv2D", "SeparableConv2D", "Dense"]
    assert [len(s.maps) for s in cascade] == [1, 2, 1]
    assert [len(s.batch_norms) for s in cascade] == [1, 0, 0]
    assert [len(s.post_batch_norms) for s in cascade] == [0, 1, 0]
    assert cascade[0].pre_gain == 0.5 and cascade[0].post_gain == 2.0
    product = 1.0
    for stage in cascade:
        product *= stage.surrounding_gain
        for node in network.nodes:
            if node.call == stage.name and node.kind == "linear":
                product *= node.gain_upper_bound
    assert product == pytest.approx(lipschitz_upper_bound(model).gain_upper_bound, rel=1e-12)


def test_stages_of_a_branched_graph_end_at_branches():
    x = keras.Input((4,))
    h = layers.Dense(4, activation="relu", name="stem")(x)
    f = layers.Dense(4, activation="tanh", name="branch")(h)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.ReLU()(layers.Add()([h, f]))))
    network = read_network(model)
    assert not network.is_chain
    names = [stage.name for stage in stages(network)]
    assert names == ["stem", "branch", "head"]
    assert [s.sector.beta for s in stages(network)] == [1.0, 1.0, 1.0]


def test_sums_of_tensors_of_different_ranks_are_refused():
    """(n, 3) and (n, 3, 1) broadcast to (n, 3, n): samples would meet."""
    x = keras.Input((3,))
    model = keras.Model(x, keras.ops.add(x, keras.layers.Reshape((3, 1))(x)))
    with pytest.raises(UnsupportedLayerError, match="across samples"):
        read_network(model)


def test_the_structure_alone_is_the_same_with_infinite_gains_for_linear_nodes():
    """So that a gain that was never computed can prove nothing."""
    inputs = [keras.Input((8, 8, 2)), layers.SeparableConv2D(3, 3), layers.BatchNormalization()]
    model = keras.Sequential([*inputs, layers.ReLU(), layers.Flatten(), layers.Dense(2)])
    full, bare = read_network(model), read_network(model, bounded=False)
    assert [(n.name, n.kind, n.inputs) for n in full.nodes] == [
        (n.name, n.kind, n.inputs) for n in bare.nodes
    ]
    for known, unknown in zip(full.nodes, bare.nodes, strict=True):
        is_linear = known.kind == "linear"
        expected = np.inf if is_linear else known.gain_upper_bound
        assert unknown.gain_upper_bound == expected and np.isfinite(known.gain_upper_bound)
