"""Layers made of known ones are opened, time steps are samples, and refusals name every step."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov import export_plain
from tf_lyapunov.certification import certify, lipschitz_upper_bound, register_gain
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

RNG = np.random.default_rng(0)


def drawn(model):
    for weight in model.weights:
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(weight.dtype)):
            weight.assign(RNG.normal(size=weight.shape) / 2)
    return model


def called(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)), np.float64)


def bounds_samples(model, shape, scale=1.0):
    """Largest quotient over random pairs, which no bound may undercut."""
    x = RNG.normal(size=(200, *shape)).astype("float32") * scale
    step = RNG.normal(size=x.shape).astype("float32") * scale / 10
    moved = called(model, x + step) - called(model, x)
    size = np.linalg.norm((x + step - x).reshape(200, -1), axis=1)
    return float(np.max(np.linalg.norm(moved.reshape(200, -1), axis=1) / size))


class Block(keras.Layer):
    """A residual block with a scale of its own."""

    def __init__(self, width, rate=0.2, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization(epsilon=0.1, dtype=self.dtype_policy)
        self.inner = layers.Dense(width, activation="gelu", dtype=self.dtype_policy)
        self.drop = layers.Dropout(rate, dtype=self.dtype_policy)

    def build(self, shape):
        self.norm.build(shape)
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, training=None):
        return x + self.drop(self.inner(self.norm(x)), training=training) * self.scale


class Deep(keras.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(4), Block(4)]

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return ops.clip(x, -5.0, 5.0)


@pytest.mark.parametrize("make", [lambda: Block(4), Deep])
def test_a_users_layer_of_known_ones_is_opened(make):
    model = drawn(keras.Sequential([keras.Input((4,)), make(), layers.Dense(3)]))
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == len(network.graph.calls)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert bounds_samples(model, (4,)) <= bound
    x = RNG.normal(size=(10, 4)).astype("float32")
    assert certify(model, x).verdict == "PROVED"
    # The plain program computes what the model does.
    np.testing.assert_allclose(network.program.logits(x), called(model, x), atol=1e-4)


def test_the_opened_layers_weights_are_part_of_the_digest():
    model = drawn(keras.Sequential([keras.Input((4,)), Block(4), layers.Dense(3)]))
    before = read_network(model).digest()
    model.layers[0].scale.assign([1.0, 1.0, 1.0, 1.5])
    assert read_network(model).digest() != before


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_an_opened_layer_computes_in_its_own_precision(policy):
    model = keras.Sequential(
        [keras.Input((4,)), Block(4, dtype=policy), layers.Dense(3, dtype=policy)]
    )
    drawn(model)
    network = read_network(model)
    assert not network.program.unread
    validate_on_probes(network)


def test_a_subclass_of_a_known_layer_is_read_by_its_own_call():
    class Twice(layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    model = drawn(keras.Sequential([keras.Input((4,)), Twice(3, use_bias=True)]))
    sigma = np.linalg.norm(np.asarray(ops.convert_to_numpy(model.layers[0].kernel), float), 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert bound == pytest.approx(2 * sigma, rel=1e-6)


def test_a_declared_gain_comes_before_opening():
    class Half(keras.Layer):
        def call(self, x):
            return x / 2

    model = keras.Sequential([keras.Input((4,)), Half()])
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(0.5)
    register_gain(Half, 0.75, assumption="Stated.")
    assert lipschitz_upper_bound(model).gain_upper_bound == 0.75
    register_gain(Half, None)


TIMED = {
    "dense": (lambda: layers.Dense(3, activation="tanh"), (5, 4)),
    "convolution": (lambda: layers.Conv2D(2, 3, padding="same"), (2, 4, 4, 1)),
    "normalization": (lambda: layers.LayerNormalization(epsilon=0.1), (3, 4)),
    "flatten": (lambda: layers.Flatten(), (3, 2, 2)),
    "nested": (lambda: layers.TimeDistributed(layers.Dense(2)), (2, 3, 4)),
}


@pytest.mark.parametrize("name", TIMED)
def test_time_steps_are_samples_of_the_layer_inside(name):
    make, shape = TIMED[name]
    model = drawn(keras.Sequential([keras.Input(shape), layers.TimeDistributed(make())]))
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == len(network.graph.calls)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    inside = drawn(keras.Sequential([keras.Input(shape[1:]), make()]))
    for mine, weight in zip(inside.weights, model.weights, strict=True):
        mine.assign(weight)
    assert bound == pytest.approx(lipschitz_upper_bound(inside).gain_upper_bound, rel=1e-9)
    assert bounds_samples(model, shape, 0.3) <= bound * (1 + 1e-5)


def test_a_model_at_every_time_step_adds_its_biases_once_per_step():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.ReLU(), layers.Dense(2)])
    inner.layers[0].bias.assign([1.0, 2.0, 3.0])
    model = keras.Sequential(
        [keras.Input((9, 4)), layers.TimeDistributed(inner), layers.Flatten(), layers.Dense(3)]
    )
    node = next(n for n in read_network(model).nodes if n.kind == "linear")
    # ‖bias‖ over nine steps.
    assert node.affine.offset == pytest.approx(3 * np.sqrt(14), rel=1e-9)
    x = RNG.normal(size=(5, 9, 4)).astype("float32")
    proof = certify(model, x)
    assert proof.verdict == "PROVED"
    logits = read_network(model).program.logits
    for _ in range(50):
        step = RNG.normal(size=x.shape)
        size = np.linalg.norm(step.reshape(5, -1), axis=1)
        step *= (np.asarray(proof.radius) * 0.999 / size)[:, None, None]
        assert np.array_equal(logits(x + step).argmax(1), logits(x).argmax(1))


def test_time_steps_and_parts_are_exported():
    x = keras.Input((3, 4))
    a, b = ops.split(layers.TimeDistributed(layers.Dense(6))(x), 2, axis=-1)
    model = drawn(keras.Model(x, ops.maximum(a, b)))
    plain = export_plain(model)
    given = RNG.normal(size=(7, 3, 4)).astype("float32")
    np.testing.assert_allclose(called(plain, given), called(model, given), atol=1e-5)


# Training and images ----------------------------------------------------------------------------


def test_layers_that_augment_images_are_the_identity_at_inference():
    from tf_lyapunov.program.families.preprocessing import AUGMENTING

    settings = {
        "RandomCrop": {"height": 4, "width": 4},
        "RandomTranslation": {"height_factor": 0.5, "width_factor": 0.5},
        "RandomZoom": {"height_factor": 0.5},
        "RandomPosterization": {"factor": 4},
        "MaxNumBoundingBoxes": {"max_number": 2},
    }
    for name in ("RandomBrightness", "RandomColorDegeneration", "RandomContrast", "RandomHue",
                 "RandomRotation", "RandomSaturation", "RandomSharpness"):  # fmt: skip
        settings[name] = {"factor": 0.4}
    x = RNG.uniform(size=(2, 4, 4, 3)).astype("float32")
    for kind in AUGMENTING:
        if kind.__name__ == "Equalization":
            continue  # no Functional model can hold it
        layer = kind(**settings.get(kind.__name__, {}))
        model = keras.Sequential([keras.Input((4, 4, 3)), layer])
        assert np.array_equal(called(model, x), x.astype("float64")), kind
        network = read_network(model)
        assert [node.gain_upper_bound for node in network.nodes] == [1.0, 1.0]
        assert network.program.logits(x).shape == x.shape


def test_a_subclassed_model_that_augments_is_read_at_inference():
    class Augmented(keras.Model):
        def __init__(self):
            super().__init__()
            self.flip, self.flat, self.end = layers.RandomFlip(), layers.Flatten(), layers.Dense(2)

        def call(self, x):
            return self.end(self.flat(self.flip(x)))

    model = Augmented()
    model(np.zeros((1, 4, 4, 1), "float32"))
    model.build((None, 4, 4, 1))
    assert validate_on_probes(read_network(model)).steps == 3


def test_a_random_crop_that_changes_the_size_is_refused():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.RandomCrop(4, 4)])
    with pytest.raises(UnsupportedLayerError, match="CenterCrop"):
        lipschitz_upper_bound(model)


def test_constant_training_flags():
    x = keras.Input((3,))
    assert lipschitz_upper_bound(
        keras.Model(x, layers.Dropout(0.5)(x, training=False))
    ).gain_upper_bound == 1.0  # fmt: skip
    for layer in (layers.Dropout(0.5), layers.BatchNormalization()):
        with pytest.raises(UnsupportedLayerError, match=r"training=True.*may compute as in train"):
            lipschitz_upper_bound(keras.Model(x, layer(x, training=True)))


# Refusals ---------------------------------------------------------------------------------------


def test_a_refusal_lists_every_step_with_its_reason_and_its_way_out():
    class Wavy(keras.Layer):
        def call(self, x):
            return ops.sin(x)

    x = keras.Input((4,))
    y = layers.Multiply()([layers.Dense(4)(x), x])
    y = ops.exp(Wavy()(layers.Dropout(0.1)(y, training=True)))
    model = keras.Model(x, layers.UnitNormalization()(y))
    with pytest.raises(UnsupportedLayerError) as caught:
        lipschitz_upper_bound(model)
    text = str(caught.value)
    assert "cannot include 5 steps" in text
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == 5
    for line, part in zip(
        lines,
        ("product of two inputs", "training=True", "register_gain(Wavy", "not bounded", "epsilon"),
        strict=True,
    ):
        assert part in line
    # What has no gain is offered no declaration.
    assert sum("register_gain" in line for line in lines) == 1


@pytest.mark.parametrize(
    "function",
    [ops.exp, ops.square, ops.sign, ops.round, lambda x: x * x, lambda x: 1 / (x + 1), ops.sqrt],
)
def test_no_declaration_is_offered_for_an_operation_without_gain(function):
    x = keras.Input((4,))
    with pytest.raises(UnsupportedLayerError) as caught:
        lipschitz_upper_bound(keras.Model(x, function(x)))
    assert "register_gain" not in str(caught.value)


def test_a_call_that_cannot_be_followed_is_refused_by_name():
    class Looping(keras.Layer):
        def call(self, x):
            return x * float(np.asarray(ops.convert_to_numpy(x)).max())

        def compute_output_shape(self, shape):
            return shape

    x = keras.Input((4,))
    model = keras.Model(x, Looping()(x))
    with pytest.raises(UnsupportedLayerError, match=r"Looping.*cannot be read"):
        lipschitz_upper_bound(model)


# Activations ------------------------------------------------------------------------------------


def test_a_partial_of_a_known_activation_is_read_with_its_settings():
    steep = functools.partial(keras.activations.leaky_relu, negative_slope=3.0)
    model = keras.Sequential([keras.Input((4,)), layers.Activation(steep)])
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(3.0, rel=1e-12)
    assert not read_network(model).program.unread
    bare = keras.Sequential([keras.Input((4,)), layers.Activation(ops.gelu)])
    network = read_network(bare)
    assert not network.program.unread
    assert validate_on_probes(network).steps == 1


def test_a_softmax_behind_a_wrapper_is_looked_through():
    class End(keras.Layer):
        def call(self, x):
            return ops.softmax(x, axis=-1)

    dense = layers.Dense(3)
    model = drawn(keras.Sequential([keras.Input((4,)), dense, End()]))
    assert read_network(model).decision == "softmax"
    sigma = np.linalg.norm(np.asarray(ops.convert_to_numpy(dense.kernel), float), 2)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(sigma, rel=1e-7)


def test_attacks_look_through_a_softmax_behind_a_wrapper_as_certificates_do():
    from tf_lyapunov import L2, attacks

    class End(keras.Layer):
        def call(self, x):
            return ops.softmax(x, axis=-1)

    class Whole(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return ops.softmax(self.dense(x), axis=-1)

    wrapped = keras.Sequential([keras.Input((4,)), layers.Dense(3), End()])
    whole = Whole()
    whole(np.zeros((1, 4), "float32"))
    whole.build((None, 4))
    x = RNG.normal(size=(12, 4)).astype("float32")
    for model in (wrapped, whole):
        drawn(model)
        labels = called(model, x).argmax(axis=1)
        proof = certify(model, x)
        radius = np.asarray(proof.radius)
        # Within the radius nothing is found, and beyond a few of them everything.
        inside = attacks.PGD(radius=L2(float(radius.min()) * 0.99), steps=20)(model, x, labels)
        beyond = attacks.PGD(radius=L2(float(radius.max()) * 4), steps=40)(model, x, labels)
        assert not np.any(inside.success)
        assert np.all(beyond.success)


def test_a_monitors_stage_refuses_gains_that_training_moves():
    from tf_lyapunov.bounds.stages import stages

    def built(*inside):
        return keras.Sequential([keras.Input((4,)), layers.Dense(4), *inside, layers.Dense(2)])

    class Scale(keras.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.scale

    moving = (layers.LayerNormalization(epsilon=0.1), layers.EinsumDense("ab,bc->ac", 4), Scale())
    for layer in moving:
        model = built(layer)
        with pytest.raises(UnsupportedLayerError, match="stays as it is in training"):
            stages(model)
        layer.trainable = False
        assert len(stages(model)) == 2
