"""The verifier believes Keras's own objects by identity: look-alikes are refused."""

import functools

import keras
import numpy as np
import pytest
from small_proofs import filled

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.verification.checking import evaluate
from tf_lyapunov.verification.reading import read

layers, ops = keras.layers, keras.ops


def after(layer, shape=(4,), units=2):
    """A built model with the layer before its logits."""
    return keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(units)])


def refused(model, match="Received"):
    with pytest.raises(UnsupportedLayerError, match=match):
        read(model)


@pytest.mark.parametrize("name", ["call", "__call__", "compute_mask", "convert_weight"])
def test_a_method_replaced_on_an_instance_is_refused(name):
    layer = layers.Normalization(mean=[0.0] * 4, variance=[1.0] * 4)
    model = after(layer)
    read(model)
    setattr(layer, name, lambda x, *args, **kwargs: 10.0 * x)
    refused(model, f"`{name}` is not its class's own")


def test_a_method_replaced_on_a_model_or_its_graph_is_refused():
    for pick in (lambda m: m, lambda m: m._functional):
        for name in ("call", "__call__", "_run_through_graph", "_standardize_inputs"):
            model = after(layers.ReLU())
            if name == "_run_through_graph":
                setattr(pick(model), name, lambda *args, **kwargs: None)
                if pick(model) is model:
                    continue
            else:
                setattr(pick(model), name, lambda *args, **kwargs: None)
            if hasattr(type(pick(model)), name):
                refused(model, "its class's own")


def test_a_method_replaced_on_a_layer_used_as_activation_is_refused():
    activation = layers.ReLU()
    model = after(layers.Dense(3, activation=activation))
    read(model)
    activation.call = lambda x: 10.0 * x
    refused(model, "its class's own")


def test_a_subclass_of_a_layer_is_refused_whatever_its_name_and_module():
    class Dense(layers.Dense):
        def call(self, x):
            return 10.0 * super().call(x)

    class Tripled(layers.Dense):
        @property
        def kernel(self):
            return 3.0 * self._kernel

    class Plain(layers.Dense):
        pass

    for cls in (Dense, Tripled, Plain):
        cls.__module__ = layers.Dense.__module__
        cls.__name__ = cls.__qualname__ = "Dense"
        refused(after(cls(3)))


def test_a_subclass_of_a_model_that_computes_otherwise_is_refused():
    class Call(keras.Model):
        def call(self, x, **kwargs):
            return 10.0 * super().call(x, **kwargs)

    class Inputs(keras.Model):
        def _standardize_inputs(self, x):
            return [10.0 * v for v in super()._standardize_inputs(x)]

    class Stack(keras.Sequential):
        def __call__(self, x, **kwargs):
            return 10.0 * super().__call__(x, **kwargs)

    x = keras.Input((3,))
    y = layers.Dense(2)(x)
    for cls in (Call, Inputs):
        cls.__module__ = "keras.src.models.functional"
        cls.__name__ = "Functional"
        refused(cls(x, y))
    refused(Stack([keras.Input((3,)), layers.Dense(2)]))


def test_a_subclass_that_only_trains_otherwise_is_read():
    class Trained(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    x = keras.Input((3,))
    model = Trained(x, layers.Dense(2)(x))
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0)
    model.predict(np.ones((2, 3)), verbose=0)
    assert read(model).logits


@pytest.mark.parametrize("name", ["call", "compute_output_shape"])
def test_a_class_whose_method_was_replaced_is_refused(name, monkeypatch):
    model = after(layers.ReLU())
    monkeypatch.setattr(layers.ReLU, name, lambda self, x: x)
    refused(model, f"ReLU.{name} has been replaced")
    monkeypatch.undo()
    monkeypatch.setattr(layers.ReLU.call, "__code__", (lambda self, inputs: inputs).__code__)
    refused(model, "ReLU.call has been replaced")
    monkeypatch.undo()
    monkeypatch.setattr(keras.Layer, "__call__", lambda self, x: x)
    refused(model, "Layer.__call__ has been replaced")
    monkeypatch.undo()
    read(model)


@functools.wraps(keras.activations.relu)
def wrapped(x):
    return 10.0 * x


def renamed(x):
    return 10.0 * x


renamed.__name__ = renamed.__qualname__ = "tanh"
renamed.__module__ = "keras.src.activations.activations"


class Equal:
    """Compares as equal to everything, and is called relu."""

    __name__ = "relu"

    def __call__(self, x):
        return 10.0 * x

    def __eq__(self, other):
        return True

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "function",
    [
        wrapped,
        renamed,
        Equal(),
        functools.partial(keras.activations.relu, negative_slope=9.0),
        functools.partial(keras.activations.gelu, approximate=True),
        ops.gelu,  # the approximation by tanh, unlike `keras.activations.gelu`
        ops.relu,
        ops.leaky_relu,
        lambda x: 10.0 * x,
    ],
    ids=["wraps", "renamed", "equal", "partial", "gelu", "ops_gelu", "ops_relu", "ops_leaky", "fn"],
)
def test_activations_that_are_not_the_functions_of_keras_are_refused(function):
    for layer in (layers.Activation("relu"), layers.Dense(3, activation="relu")):
        model = after(layer)
        read(model)
        layer.activation = function
        refused(model, "activation")


def test_an_activation_whose_code_or_defaults_were_replaced_is_refused(monkeypatch):
    model = after(layers.Dense(3, activation="relu"))
    monkeypatch.setattr(keras.activations.relu, "__defaults__", (9.0, None, 0.0))
    refused(model, "activation")
    monkeypatch.undo()
    code = (lambda x, negative_slope=0.0, max_value=None, threshold=0.0: 9.0 * x).__code__
    monkeypatch.setattr(keras.activations.relu, "__code__", code)
    refused(model, "activation")
    monkeypatch.undo()
    read(model)


def test_operations_of_keras_in_the_graph_are_refused_with_their_names():
    for operation in (
        lambda x: ops.cast(ops.cast(x, "int32"), "float32"),
        lambda x: ops.gelu(x),
        lambda x: x * 3.0,
    ):
        x = keras.Input((3,))
        refused(keras.Model(x, layers.Dense(2)(operation(x))), "does not know it")


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16", "bool"])
def test_an_inner_input_that_casts_is_refused(dtype):
    inside = keras.Input((3,), dtype=dtype)
    inner = keras.Model(inside, layers.Dense(3)(inside))
    x = keras.Input((3,))
    y = inner(x)
    refused(keras.Model(x, layers.Dense(2)(y)), "casts what arrives")


def test_an_inner_input_that_widens_is_read():
    inside = keras.Input((3,), dtype="float64")
    inner = keras.Model(inside, layers.Dense(3)(inside))
    x = keras.Input((3,))
    assert read(keras.Model(x, layers.Dense(2)(inner(x)))).logits


def nested():
    inside = keras.Input((3,))
    return keras.Model(inside, layers.Dense(3)(inside), name="inner")


@pytest.mark.parametrize(
    "keywords",
    [{"scale": 10.0}, {"scale": False}, {"training": True}, {"training": 1}, {"mask": np.ones(3)}],
    ids=str,
)
def test_keywords_of_nested_calls_are_refused(keywords):
    x = keras.Input((3,))
    try:
        y = nested()(x, **keywords)
    except (TypeError, ValueError, AttributeError):
        node = None
    else:
        node = y._keras_history
    if node is None:  # Keras itself refuses this one; the graph may hold it all the same
        y = nested()(x)
        history = y._keras_history
        history.operation._inbound_nodes[history.node_index].arguments.kwargs.update(keywords)
    refused(keras.Model(x, layers.Dense(2)(y)), "more than tensors|without casts")


def test_masks_of_arrays_and_tensors_are_refused():
    x = keras.Input((3, 2))
    mask = np.array([[1, 0, 1]], dtype=bool)
    pooled = layers.GlobalAveragePooling1D()(x, mask=mask)
    refused(keras.Model(x, layers.Dense(2)(pooled)), "mask")
    x = keras.Input((2,))
    y = layers.Dense(2)(x)
    for held in (np.array([[True, False]]), layers.Dense(2)(x)):
        refused(keras.Model(x, layers.Softmax()(y, mask=held)), "mask")


@pytest.mark.parametrize("merge", [layers.Add, layers.Subtract, layers.Average, layers.Concatenate])
def test_constants_in_merges_are_refused(merge):
    x = keras.Input((2,))
    constant = np.full((1, 2), 100.0, dtype="float32")
    try:
        y = merge()([x, constant])
    except (TypeError, ValueError, AttributeError):
        pytest.skip("Keras refuses it")
    refused(keras.Model(x, layers.Dense(2)(y)), "constant")


def test_a_normalization_that_computes_with_other_than_its_stored_numbers_is_refused():
    layer = layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(size=(50, 4)))
    model = after(layer)
    read(model)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    refused(twin, "finalize_state")
    twin.layers[0].finalize_state()
    x = np.ones((1, 4))
    assert np.array_equal(evaluate(read(twin), x)[0], evaluate(read(model), x)[0])
    layer.variance = layer.variance * 1e-4
    refused(model, "finalize_state")
    given = layers.Normalization(mean=[0.0] * 4, variance=[1.0] * 4)
    model = after(given)
    given.mean = given.mean + 5.0
    refused(model, "finalize_state")


def test_attributes_that_changed_after_the_model_was_built_are_read_anew():
    dense, leaky, norm = layers.Dense(4, activation="relu"), layers.LeakyReLU(), None
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), dense, leaky, norm, layers.Dense(2)])
    filled(model)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    read(model)
    dense.activation = keras.activations.tanh
    leaky.negative_slope = -3.0
    norm.epsilon = 0.5
    for scale, center in ((True, True), (False, True), (True, False)):
        norm.scale, norm.center = scale, center
        logits, _ = evaluate(read(model), x)
        assert np.allclose(logits, model(x), atol=1e-5)
    convolution = layers.Conv1D(3, 2)
    model = keras.Sequential(
        [keras.Input((6, 2)), convolution, layers.GlobalAveragePooling1D(), layers.Dense(2)]
    )
    filled(model)
    convolution.use_bias = False
    x = np.random.default_rng(1).normal(size=(5, 6, 2)).astype("float32")
    assert np.allclose(evaluate(read(model), x)[0], model(x), atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_integers_are_refused_where_they_wrap_around(dtype):
    x = keras.Input((2,), dtype=dtype)
    for merge in (layers.Add, layers.Average, layers.Subtract):
        y = layers.Dense(2)(merge()([x, layers.Flatten()(x)]))
        refused(keras.Model(x, y), "integers")
    for first in (layers.Rescaling(0.5), layers.Dense(3)):
        assert read(keras.Model(x, layers.Dense(2)(first(layers.Flatten()(x))))).logits


def test_layers_and_activations_of_odd_dtypes_are_refused():
    refused(after(layers.ReLU(dtype="int32")), "computes in int32")
    inner = layers.ReLU(dtype="float16")
    refused(after(layers.Dense(3, activation=inner)), "another dtype")
    model = after(layers.ReLU())

    class Policy(keras.dtype_policies.DTypePolicy):
        def convert_input(self, x, autocast, dtype):
            return 10.0 * x

    model.layers[0]._dtype_policy = Policy("float32")
    refused(model, "polic")
    model = after(layers.ReLU())
    policy = keras.dtype_policies.DTypePolicy("float32")
    policy.convert_input = lambda x, *args: 10.0 * x
    model.layers[0]._dtype_policy = policy
    refused(model, "polic")


def test_a_softmax_of_keras_is_still_read_at_the_end():
    x = keras.Input((3,))
    for last in (layers.Dense(2, activation="softmax"), layers.Dense(2, activation="log_softmax")):
        assert read(keras.Model(x, last(x))).logits.startswith("dense")


def test_a_subclass_that_intercepts_attributes_is_refused():
    class Odd(keras.Model):
        def __getattribute__(self, name):
            return super().__getattribute__(name)

    x = keras.Input((3,))
    refused(Odd(x, layers.Dense(2)(x)), "__getattribute__")
