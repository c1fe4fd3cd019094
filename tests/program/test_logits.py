"""Models are evaluated as they are: by their program, or by their own layers, never by copies."""

import threading

import keras
import numpy as np
import pytest

from tf_lyapunov import (
    certify,
    layers,
    localized_robustness,
    minimal_perturbation_lower_bound,
    register_gain,
)
from tf_lyapunov.certification import read_network
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.logits import Float64Logits, LogitsModel
from tf_lyapunov.theory import threads as blas


def classifier(head="softmax", dtype="float32"):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        return keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.SkewOrthogonalConv2D(4, 3, activation=layers.MaxMin()),
                layers.L2NormPooling2D(2),
                keras.layers.Flatten(),
                layers.ConvexPotentialDense(8),
                keras.layers.Dense(3, activation=head),
            ]
        )
    finally:
        keras.config.set_dtype_policy(policy)


def inputs(count=6):
    return np.random.default_rng(0).normal(size=(count, 6, 6, 2)).astype("float32")


@pytest.fixture
def no_copies(monkeypatch):
    """Nothing may make a layer from a configuration."""

    def refuse(cls, config, *args, **kwargs):
        raise AssertionError(f"{cls.__name__} was rebuilt from its configuration")

    monkeypatch.setattr(keras.Layer, "from_config", classmethod(refuse))
    monkeypatch.setattr(keras.layers.Dense, "from_config", classmethod(refuse))
    monkeypatch.setattr(layers.SkewOrthogonalConv2D, "from_config", classmethod(refuse))
    with pytest.raises(AssertionError, match="rebuilt"):
        keras.layers.Dense.from_config({"units": 2})


@pytest.mark.parametrize("precision", ["model", "float64"])
def test_no_layer_is_rebuilt_to_certify(no_copies, precision):
    model = classifier()
    proof = certify(model, inputs(), precision=precision)
    assert np.all(proof.radius > 0)


def test_no_layer_is_rebuilt_to_bound_perturbations_and_amplification(no_copies):
    model = classifier(head=None)
    lower = minimal_perturbation_lower_bound(model, inputs())
    proof = certify(model, inputs(), precision="float64")
    assert np.all(lower.bound >= proof.radius * (1 - 1e-6))
    curve = localized_robustness(model, inputs(), [0.1], outputs="logits", directions=8, steps=4)
    assert 0.1 < curve.gradient[0] <= curve.certified[0]


@pytest.mark.parametrize("head", ["softmax", None])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_logits_of_the_model_stop_before_its_head(head, dtype):
    model, x = classifier(head, dtype), inputs()
    own = LogitsModel(read_network(model)).predict(x, 4)
    outputs = keras.ops.cast(model(x), "float32")
    if head is None:
        # Processors sum the products of other batches in another order.
        room = 2.0**-20 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(own, keras.ops.convert_to_numpy(outputs), rtol=room, atol=room)
        return
    shifted = np.exp(own - own.max(axis=1, keepdims=True))
    share = shifted / shifted.sum(axis=1, keepdims=True)
    room = 1e-6 if dtype == "float32" else 2.0**-7
    assert np.allclose(share, keras.ops.convert_to_numpy(outputs), atol=room)
    assert model.layers[-1].activation is keras.activations.softmax


def test_declared_layers_are_evaluated_by_keras_and_the_certificate_says_so():
    class Shrunk(keras.layers.Layer):
        def call(self, x):
            return keras.ops.arctan(x)

    register_gain(Shrunk, 1.0, assumption="arctan is 1-Lipschitz.")
    try:
        dense = keras.layers.Dense
        model = keras.Sequential([keras.Input((4,)), dense(5), Shrunk(name="shrunk"), dense(3)])
        x = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
        network = read_network(model)
        assert network.program.declared == ("shrunk",) and not network.program.unread
        logits = Float64Logits(network).predict(x, 3)
        first, a, second, b = (np.asarray(w, np.float64) for w in model.get_weights())
        hidden = x.astype(np.float64) @ first + a
        # The layer computes in float32.
        assert np.allclose(logits, np.arctan(hidden) @ second + b, atol=1e-5)
        exact = np.asarray(keras.ops.arctan(hidden.astype("float32")), np.float64) @ second + b
        assert np.allclose(logits, exact, atol=1e-12)
        text = " ".join(certify(model, x, precision="float64").assumptions)
        assert "Keras evaluated" in text and "shrunk" in text
    finally:
        register_gain(Shrunk, None)


def test_values_of_steps_are_those_of_the_model():
    model, x = classifier(), inputs()
    names = [layer.name for layer in model.layers]
    logits, values = Float64Logits(read_network(model)).evaluate(x, 2, names[:3])
    seen = keras.Model(model.inputs, [layer.output for layer in model.layers[:3]])(x)
    for name, own in zip(names, seen, strict=False):
        assert np.allclose(values[name], keras.ops.convert_to_numpy(own), atol=1e-5)
    assert logits.shape == (6, 3)


def test_a_program_with_an_unread_step_is_refused_by_its_name():
    # Positions are followed where their number is known.
    model = keras.Sequential(
        [keras.Input((None, 2)), keras.layers.ZeroPadding1D(1, name="wider"),
         keras.layers.GlobalMaxPooling1D()]
    )  # fmt: skip
    with pytest.raises(UnsupportedLayerError, match="wider"):
        Float64Logits(read_network(model))


@pytest.mark.parametrize("count", [1, 5, 64, 65])
def test_threads_change_no_logit(monkeypatch, count):
    """In as many threads as there are rows, and in one."""
    model = classifier(dtype="float64")
    exact, x, name = Float64Logits(read_network(model)), inputs(count), model.layers[-2].name
    found = []
    for threads in (1, 3, 64):
        for module in ("tf_lyapunov.program.logits", "tf_lyapunov.theory.threads"):
            monkeypatch.setattr(f"{module}.blas_threads", lambda n=threads: n)
        found.append(exact.evaluate(x, 64, (name,)))
    whole = exact.program.evaluate(x)[0]
    for logits, kept in found:
        # Sums of 36 products of a few layers, in another order.
        assert np.allclose(logits, whole, rtol=1e-13, atol=1e-13)
        assert list(kept) == [name] and len(kept[name]) == count


def test_whoever_interrupts_leaves_no_thread_and_blas_as_it_was(monkeypatch):
    """While the error is kept, as notebooks keep the last one."""
    exact = Float64Logits(read_network(classifier(dtype="float64")))
    for module in ("tf_lyapunov.program.logits", "tf_lyapunov.theory.threads"):
        monkeypatch.setattr(f"{module}.blas_threads", lambda: 2)

    def interrupted(items, *_):
        for item in items:
            yield item
            raise KeyboardInterrupt

    monkeypatch.setattr("tf_lyapunov.program.logits.steps", interrupted)
    before, running = blas._held["count"], threading.active_count()
    with pytest.raises(KeyboardInterrupt) as kept:
        exact.evaluate(inputs(8), 2)
    assert kept.value is not None
    assert blas._held["count"] == before and threading.active_count() == running
