"""The model itself is asked: a reading that it contradicts is refused, whatever the cause."""

import sys
import textwrap
import types

import fresh_processes
import keras
import numpy as np
import pytest
from forging import array, forged
from small_proofs import convolution_model, dense_model, filled, inputs_of, saved

from tf_lyapunov.certification import certify
from tf_lyapunov.verification import layers as rules
from tf_lyapunov.verification import verify
from tf_lyapunov.verification.contents import Claim
from tf_lyapunov.verification.operations import Activation
from tf_lyapunov.verification.reading import read_with_calls
from tf_lyapunov.verification.translation import Call, contradictions

layers = keras.layers


def asked(model, x=None, labels=None, radius=None):
    """Contradictions of a model on some inputs, without a proof file."""
    model, network, calls = read_with_calls(model)
    x = inputs_of(model) if x is None else x
    zeros = np.zeros(len(x))
    labels = zeros.astype("int64") if labels is None else labels
    radius = zeros if radius is None else radius
    claim = Claim(radius, labels, labels, zeros, x, 0.0, 1.0, (), "NOT_PROVED")
    return contradictions(model, network, tuple(Call(*call) for call in calls), claim)


def zoo():
    activations = ("relu", "relu6", "leaky_relu", "elu", "selu", "tanh", "sigmoid", "log_sigmoid",
                   "hard_sigmoid", "softplus", "softsign", "silu", "gelu", "mish")  # fmt: skip
    for policy in ("float32", "float64", "mixed_float16", "float16", "bfloat16"):
        x = inputs = keras.Input((6, 5, 2))
        x = layers.Rescaling(1 / 3, 0.1, dtype=policy)(x)
        x = layers.Conv2D(4, 3, strides=2, padding="same", dtype=policy)(x)
        x = layers.BatchNormalization(dtype=policy)(x)
        x = layers.PReLU(dtype=policy)(x)
        y = layers.SeparableConv2D(4, 2, padding="same", dtype=policy)(x)
        x = layers.Average(dtype=policy)([x, layers.Dropout(0.5, dtype=policy)(y)])
        x = layers.AveragePooling2D(2, 1, padding="same", dtype=policy)(x)
        x = layers.MaxPooling2D(2, 1, dtype=policy)(x)
        x = layers.GlobalAveragePooling2D(dtype=policy)(x)
        for name in activations:
            x = layers.Dense(5, activation=name, dtype=policy)(x)
        yield policy, keras.Model(inputs, layers.Dense(3, "softmax", dtype=policy)(x))


@pytest.mark.parametrize(("policy", "model"), list(zoo()), ids=lambda v: str(v)[:9])
def test_ordinary_models_of_every_dtype_do_not_contradict_their_reading(policy, model):
    for seed in range(3):
        assert asked(filled(model, seed)) == []


def test_small_models_do_not_contradict_their_reading():
    for model in (dense_model(), convolution_model()):
        assert asked(model) == []
    x = keras.Input((4,), dtype="uint8")
    y = layers.Dense(2, "log_softmax")(layers.Rescaling(1 / 255)(layers.Reshape((2, 2))(x)))
    y = layers.Flatten()(y)
    model = filled(keras.Model(x, layers.Dense(2)(layers.Rescaling(1 / 255)(x))))
    assert asked(model, np.random.default_rng(0).integers(0, 255, (9, 4))) == []


@pytest.fixture
def path(tmp_path):
    saved(dense_model(), tmp_path / "proof.npz", "eclipse")
    return tmp_path / "proof.npz"


def test_a_function_changed_deep_inside_keras_is_noticed(path, monkeypatch):
    """An unknown kind: no object that was read differs, but what computes does."""
    module = sys.modules[layers.Dense.__module__]
    own = module.ops

    def matmul(a, b):
        return 1.01 * own.matmul(a, b)

    assert verify(path, dense_model()).holds
    monkeypatch.setattr(module, "ops", types.SimpleNamespace(matmul=matmul, add=own.add))
    found = verify(path, dense_model())
    assert not found.holds and "contradicts what was read" in found.reasons[0]
    assert "'first/relu'" in found.reasons[0]


def test_a_wrong_reading_of_one_layer_is_named(monkeypatch):
    wrong = dict(rules._ACTIVATION_LAYERS)
    wrong[layers.LeakyReLU] = lambda layer, shape: Activation("relu", {"negative_slope": 0.1001})
    monkeypatch.setattr(rules, "_ACTIVATION_LAYERS", wrong)
    assert "'leak'" in asked(dense_model())[0]


def test_a_small_change_in_the_middle_of_a_deep_network_is_noticed(monkeypatch):
    """An allowance for the outputs alone would exceed them many times over at this depth."""
    stack = [layers.Dense(64, "relu", kernel_initializer="he_normal", name=f"d{i}") for i in
             range(20)]  # fmt: skip
    model = keras.Sequential([keras.Input((64,)), *stack, layers.Dense(3)])
    assert asked(model) == []
    _, network, calls = read_with_calls(model)
    operation = calls[10][2][0].operation
    operation.weight[...] += 0.002  # everywhere: single units may be silent on all probes
    x = inputs_of(model)
    zeros = np.zeros(len(x))
    claim = Claim(zeros, zeros.astype(int), zeros.astype(int), zeros, x, 0.0, 1.0, (), "")
    found = contradictions(model, network, tuple(Call(*call) for call in calls), claim)
    assert found and "'d10/relu'" in found[0]


def test_a_model_that_calls_its_layers_otherwise_is_noticed():
    """Its layers are sound and its graph is read, but what runs is another graph."""
    x = keras.Input((4,))
    first, second = layers.Dense(4), layers.Dense(4)
    model = filled(keras.Model(x, layers.Dense(2)(second(first(x)))))
    other = filled(keras.Model(x, layers.Dense(2)(first(first(x)))), 1)
    assert asked(model) == []
    model._nodes_by_depth, model._operations = other._nodes_by_depth, other._operations
    assert asked(model)


def test_a_cached_predict_function_is_not_what_is_asked(path):
    model = dense_model.__wrapped__()
    model.predict(inputs_of(model), verbose=0)
    stale = model.predict_function
    model.layers[1].activation = keras.activations.tanh
    assert model.predict_function is stale
    assert not verify(path, model).holds
    assert asked(model) == []  # what was read is what computes now


def test_the_models_own_decision_must_be_the_label():
    model = filled(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    x = inputs_of(model)
    labels = np.asarray(model(x)).argmax(axis=1)
    assert asked(model, x, labels, np.ones(len(x))) == []
    assert "decides against the label" in asked(model, x, 1 - labels, np.ones(len(x)))[0]
    for activation, threshold in ((None, 0.0), ("sigmoid", 0.5)):
        model = filled(keras.Sequential([keras.Input((3,)), layers.Dense(1, activation)]))
        labels = (np.asarray(model(x))[:, 0] > threshold).astype(int)
        assert asked(model, x, labels, np.ones(len(x))) == []
        assert asked(model, x, 1 - labels, np.ones(len(x)))


def test_a_tie_of_saturated_sigmoids_is_no_decision_for_the_second_class():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, activation="sigmoid")])
    model.set_weights([np.array([[30.0, 40.0]]), np.zeros(2)])
    x = np.ones((1, 1), "float32")
    assert "decides against" in asked(model, x, np.array([1]), np.ones(1))[0]


SCRIPT = """
    import keras, numpy as np
    from tf_lyapunov.verification.contents import Claim
    from tf_lyapunov.verification.reading import read_with_calls
    from tf_lyapunov.verification.checking import evaluate
    from tf_lyapunov.verification.translation import Call, contradictions
    for dtype in ("float32", "float64"):
        stack = [keras.layers.Dense(7, "relu", dtype=dtype), keras.layers.Dense(3, dtype=dtype)]
        model = keras.Sequential([keras.Input((5,), dtype=dtype), *stack])
        model, network, calls = read_with_calls(model)
        x = np.random.default_rng(0).normal(size=(9, 5))
        z = np.zeros(9)
        claim = Claim(z, z.astype(int), z.astype(int), z, x, 0.0, 1.0, (), "")
        found = contradictions(model, network, tuple(Call(*c) for c in calls), claim)
        logits, errors = evaluate(network, x)
        a, b, c, d = (np.asarray(keras.ops.convert_to_numpy(w), "float64") for w in model.weights)
        x = x.astype(dtype).astype("float64")
        exact = np.maximum(x @ a + b, 0) @ c + d
        assert logits.dtype == np.float64 and np.abs(logits - exact).max() < 1e-14, dtype
        print(dtype, found)
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends_are_asked_and_their_float64_is_not_believed(backend):
    pytest.importorskip(backend)
    out = fresh_processes.output(textwrap.dedent(SCRIPT), backend=backend).splitlines()
    assert out[0] == "float32 []"
    assert out[1].startswith("float64 [") and "The model contradicts" in out[1]


def underflowing(policy, first, second, bias):
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(2, use_bias=False, dtype=policy),
            layers.Dense(2, dtype=policy),
        ]
    )
    model.set_weights([first * np.eye(2), second * np.eye(2), np.array([0.0, bias])])
    return model


@pytest.mark.parametrize(
    ("policy", "first", "second"), [("mixed_float16", 1e-4, 6e4), ("float32", 1.2e-38, 5e37)]
)
def test_underflow_verifies_no_radius_for_the_class_that_the_model_does_not_choose(
    policy, first, second, tmp_path
):
    x = np.array([[2.68e-4, 0.0]], dtype="float32")
    exact = 2.68e-4 * first * second
    model = underflowing(policy, first, second, exact * 0.93)
    assert np.argmax(np.asarray(model(x))) == 1  # the exact function decides for class 0
    ordinary = underflowing("float32", 1.0, 1.0, exact * 0.93)
    certify(ordinary, x, precision="float64").save(tmp_path / "p.npz")

    def change(header, arrays):
        network = read_with_calls(model)[1]
        header["layers"] = [[r.name, r.settings, r.weights] for r in network.layers]
        header["certificate"]["contributions"] = []
        header["certificate"]["gain_upper_bound"] = 1e9
        header["certificate"]["float_allowance"] = 1.0
        header["certificate"]["verdict"] = "PROVED"
        header["chain"] = {"start": None, "methods": []}
        for name, value in (("labels", 0), ("predictions", 0)):
            arrays[name] = np.array([value])
        arrays["radius"] = np.array([1e-12])
        arrays["margins"] = np.array([exact * 0.07])

    found = forged(tmp_path / "p.npz", change, model)
    assert not found.holds and found.radius[0] == 0.0, found
    assert "radii are larger" in str(found.reasons)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_underflow_costs_ordinary_models_next_to_nothing(policy, tmp_path):
    model = filled(
        keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(6, activation="relu", dtype=policy),
                layers.Dense(3, dtype=policy),
            ]
        )
    )
    x = inputs_of(model)
    certificate = certify(model, x, precision="float64")
    certificate.save(tmp_path / "p.npz")
    found = verify(tmp_path / "p.npz", model)
    assert found.holds, found
    assert np.allclose(found.radius, certificate.radius, rtol=1e-3, atol=1e-5)


def test_float16_values_beyond_its_largest_number_are_refused(tmp_path):
    model = underflowing("float16", 1.0, 6e4, 0.0)
    certify(model, np.ones((1, 2), "float32"), precision="float64").save(tmp_path / "p.npz")
    found = forged(tmp_path / "p.npz", array("inputs", np.full((1, 2), 3.0)), model)
    assert not found.holds and "beyond the largest of float16" in str(found.reasons)


def test_float64_inputs_of_a_float32_model_are_moved_by_their_rounding(tmp_path):
    """The model decides on the rounded input: what rounding moves is taken off the radius."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    model.set_weights([np.array([[1.0, -1.0]]), np.array([-1.0, 1.0])])
    x = np.array([[1.0 + 2.0**-25]])
    certify(model, np.full((1, 1), 2.0), precision="float64").save(tmp_path / "p.npz")

    def change(header, arrays):
        arrays["inputs"] = x
        arrays["radius"] = np.array([2.0**-26])

    found = forged(tmp_path / "p.npz", change, model)
    assert not found.holds and found.radius[0] == 0.0


def test_what_the_verifier_would_refuse_is_said_when_the_proof_is_saved(tmp_path, monkeypatch):
    """The certificate was true of the model; what computes has changed underneath it since."""
    module = sys.modules[layers.Dense.__module__]
    own = module.ops
    proof = certify(dense_model(), inputs_of(dense_model()))
    proof.save(tmp_path / "proof.npz")
    matmul = lambda a, b: 1.01 * own.matmul(a, b)  # noqa: E731
    monkeypatch.setattr(module, "ops", types.SimpleNamespace(matmul=matmul, add=own.add))
    with pytest.raises(ValueError, match=r"contradicts what was read of it, .*Save it as \.json"):
        proof.save(tmp_path / "second.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["proof.npz"]
    proof.save(tmp_path / "second.json")  # a record, which claims no proof
