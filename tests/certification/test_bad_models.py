"""Models and inputs about which nothing can be claimed: what is wrong, and what to do."""

import sys
import threading
import types

import keras
import numpy as np
import pytest

from tf_lyapunov import certify, constrain, lipschitz_upper_bound
from tf_lyapunov.certification import margins
from tf_lyapunov.errors import UnfaithfulReading, UnsupportedLayerError

layers = keras.layers
X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(4, "relu", name="hidden"), layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((3,)), *stack], name="mine")


@pytest.mark.parametrize("what", ["weights", "settings"])
def test_a_model_that_changed_during_certification_gets_no_certificate(what, monkeypatch):
    """Another thread, or an iterator of inputs that trains it meanwhile."""
    model = network()
    true = margins.network_gain

    def meanwhile(*arguments, **options):
        def change():
            if what == "weights":
                kernel = model.get_layer("head").kernel
                kernel.assign(2 * kernel)
            else:
                model.get_layer("hidden").activation = keras.activations.tanh

        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
        return true(*arguments, **options)

    monkeypatch.setattr(margins, "network_gain", meanwhile)
    with pytest.raises(
        (ValueError, UnfaithfulReading),
        match=r"Received: model 'mine', whose weights or settings changed .*Certify it again",
    ):
        certify(model, X)
    monkeypatch.undo()
    assert np.all(certify(model, X).radius >= 0)  # as it is now


@pytest.mark.parametrize(
    "call",
    [
        lipschitz_upper_bound,
        lambda model: constrain(model, [0.5]),
    ],
    ids=["lipschitz_upper_bound", "constrain"],
)
def test_an_unbuilt_model_is_refused_with_what_to_do_where_no_inputs_say_its_shape(call):
    model = keras.Sequential([layers.Dense(2)], name="mine")
    with pytest.raises(ValueError, match=r"Received: unbuilt model 'mine'.*`model\.build\("):
        call(model)
    assert not model.built


@pytest.mark.parametrize("method", ["call", "__call__"])
@pytest.mark.parametrize("name", ["hidden", "head"])
def test_a_layer_patched_on_the_instance_is_refused_by_name(name, method):
    model = network()
    layer = model.get_layer(name)
    own = type(layer).call
    setattr(layer, method, types.MethodType(lambda self, x, **_: 10 * own(self, x), layer))
    for claim in (lambda: certify(model, X), lambda: lipschitz_upper_bound(model)):
        with pytest.raises(
            UnsupportedLayerError,
            match=rf"Received: layer '{name}' of type Dense, whose `{method}` was replaced on the "
            r"instance\..*`register_gain`",
        ):
            claim()


def test_a_method_replaced_in_the_class_is_contradicted_by_the_model(monkeypatch):
    """No instance shows it; what the model computes does."""
    own = layers.Dense.call
    monkeypatch.setattr(layers.Dense, "call", lambda self, x, training=None: 10 * own(self, x))
    with pytest.raises(UnfaithfulReading, match=r"Received: .*'hidden'.*[Nn]o claim"):
        certify(network(), X)


def test_integer_inputs_that_would_wrap_are_refused_by_the_layer_that_adds_them():
    x = keras.Input((3,), dtype="uint8")
    doubled = layers.Add(name="sum", dtype="uint8")([x, x])
    model = keras.Model(x, layers.Dense(2)(layers.Rescaling(1 / 255)(doubled)))
    given = np.array([[200, 100, 3]], "uint8")  # 200 + 200 = 144 modulo 256
    for claim in (lambda: certify(model, given), lambda: lipschitz_upper_bound(model)):
        with pytest.raises(
            UnsupportedLayerError, match=r"wrap around; put a Rescaling .*Received: layer 'sum'"
        ):
            claim()


@pytest.mark.parametrize("value", [-1, 256, 0.5])
def test_inputs_that_the_models_integers_cannot_hold_are_refused(value):
    x = keras.Input((3,), dtype="uint8")
    model = keras.Model(x, layers.Dense(2)(layers.Rescaling(1 / 255)(x)))
    with pytest.raises(ValueError, match=r"dtype uint8 can hold.* Received: values from"):
        certify(model, np.array([[1, 2, value]], "float64"))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ([[1.0, 2.0, 3.0], [1.0]], None, r"same length\. Received: a ragged list.* Pad or cut"),
        (np.array([["a", "b", "c"]]), None, r"real numbers\. Received: dtype"),
        (np.ones((2, 4), "float32"), None, r"input shape .*Received: shape \(2, 4\)"),
        (np.ones((0, 3), "float32"), None, r"at least one input\. Received"),
        (np.full((1, 3), np.nan), None, r"finite .*Received: NaN"),
        (X, [0, 1], r"`y` must have shape .*Received: shape \(2,\)"),
        (X, [0, 1, 2, 0, 1, 0], r"whole numbers from 0 to 1.*Received: values from 0 to 2"),
    ],
    ids=["ragged", "text", "shape", "empty", "nan", "too few labels", "label out of range"],
)
def test_bad_inputs_are_refused_with_what_was_received(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        certify(network(), inputs, labels)


def test_a_reading_that_the_model_contradicts_names_the_step(monkeypatch):
    module = sys.modules[layers.Dense.__module__]
    own = module.ops
    other = types.SimpleNamespace(matmul=lambda a, b: 1.01 * own.matmul(a, b), add=own.add)
    monkeypatch.setattr(module, "ops", other)
    for claim in (lambda: certify(network(), X), lambda: lipschitz_upper_bound(network())):
        with pytest.raises(UnfaithfulReading, match=r"Received: step 'hidden'"):
            claim()
