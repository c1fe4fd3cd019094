"""Softmax and sigmoid heads are looked through, or refused."""

import keras
import numpy as np
import pytest
from models_to_attack import mlp, points

from tf_lyapunov.attacks import PGD
from tf_lyapunov.attacks.logits import logits_view
from tf_lyapunov.theory.balls import L2

layers = keras.layers


def on_top(*heads, classes=3, width=16):
    """A functional model with the given head; heads share nothing but their initial weights."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    tensor = layers.Dense(width, activation="tanh")(inputs)
    for head in heads:
        tensor = head(tensor)
    return keras.Model(inputs, tensor)


def nested(head):
    inner = keras.Sequential([keras.Input((16,)), layers.Dense(3), *head])
    return on_top(inner)


HEADS = {
    "activation argument": lambda: on_top(layers.Dense(3, activation="softmax")),
    "activation layer": lambda: on_top(layers.Dense(3), layers.Activation("softmax")),
    "softmax layer": lambda: on_top(layers.Dense(3), layers.Softmax()),
    "softmax layer as activation": lambda: on_top(layers.Dense(3, activation=layers.Softmax())),
    "operation": lambda: on_top(layers.Dense(3), keras.ops.softmax),
    "linear after softmax": lambda: on_top(
        layers.Dense(3), layers.Softmax(), layers.Activation("linear")
    ),
    "nested": lambda: nested([layers.Softmax()]),
    "twice": lambda: on_top(layers.Dense(3), layers.Softmax(), layers.Softmax()),
}


@pytest.mark.parametrize("head", HEADS)
def test_attacks_look_through_softmax_heads_to_the_same_result(head):
    plain, model, x = on_top(layers.Dense(3)), HEADS[head](), points(40, 6)
    model.set_weights(plain.get_weights())
    attack = PGD(L2(0.4), steps=10)
    expected, result = attack(plain, x), attack(model, x)
    assert 0 < expected.success_rate < 1
    assert np.array_equal(expected.success, result.success)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-4)
    np.testing.assert_allclose(result.margins, expected.margins, atol=1e-4)


def test_looking_through_sees_later_training_and_shares_the_weights():
    model, x = mlp(head="softmax"), points(4, 6)
    view = logits_view(model)
    before = keras.ops.convert_to_numpy(view.function(keras.ops.convert_to_tensor(x)))
    model.layers[-1].bias.assign(model.layers[-1].bias + 2.0)
    after = keras.ops.convert_to_numpy(view.function(keras.ops.convert_to_tensor(x)))
    np.testing.assert_allclose(after - before, 2.0, rtol=1e-5)
    assert logits_view(model) is view
    assert model.layers[-1].activation is keras.activations.softmax


def test_a_saturated_softmax_model_is_broken_through_its_logits():
    model = mlp(head="softmax")
    model.layers[-1].kernel.assign(model.layers[-1].kernel * 1e4)
    x = points(50, 6)
    probabilities = model.predict(x, verbose=0)
    # Some processors round the quotient by itself below 1.
    assert np.mean(probabilities.max(axis=1) >= 1 - 2.0**-22) > 0.9
    result = PGD(L2(2.0))(model, x)
    assert result.success_rate > 0.9 and not np.any(result.zero_gradient)


@pytest.mark.parametrize("head", ["sigmoid", None])
def test_binary_models_with_one_output_are_supported(head):
    model, x = mlp(classes=1, head=head), points(60, 6)
    result = PGD(L2(0.6))(model, x)
    outputs = model.predict(result.x_adv, verbose=0)[:, 0]
    positive = outputs > (0.5 if head else 0)
    assert 0 < result.success_rate < 1 and set(result.labels) == {0, 1}
    assert np.array_equal(positive != result.labels, result.success)
    with pytest.raises(ValueError, match="from 0 to 1"):
        PGD(L2(0.6))(model, x, np.full(60, 2))


def test_sigmoids_over_several_classes_are_looked_through():
    result = PGD(L2(0.6))(on_top(layers.Dense(3, activation="sigmoid")), points(60, 6))
    assert 0 < result.success_rate < 1


class Subclassed(keras.Model):
    def __init__(self, head):
        super().__init__()
        self.hidden, self.last = layers.Dense(8, activation="tanh"), layers.Dense(3)
        self.head = keras.activations.get(head)

    def call(self, x):
        return self.head(self.last(self.hidden(x)))


def test_subclassed_models_are_attacked_at_their_logits():
    result = PGD(L2(1.0))(Subclassed("linear"), points(40, 6))
    assert result.success_rate > 0


def shares(x):
    return keras.ops.square(x) / keras.ops.sum(keras.ops.square(x), axis=-1, keepdims=True)


def test_the_softmax_of_a_subclassed_model_is_looked_through():
    model, x = Subclassed("softmax"), points(40, 6)
    result = PGD(L2(1.0))(model, x)
    assert result.success_rate > 0
    view = logits_view(model)
    assert view.heads == ("softmax",)
    logits = np.asarray(keras.ops.convert_to_numpy(view.function(keras.ops.convert_to_tensor(x))))
    outputs = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), outputs, atol=1e-5)


def test_probabilities_that_cannot_be_looked_through_are_refused():
    with pytest.raises(ValueError, match="probabilities"):
        PGD(L2(1.0))(Subclassed(shares), points(40, 6))
    with pytest.raises(ValueError, match="probabilities"):
        PGD(L2(1.0))(on_top(layers.Dense(3), layers.Softmax(), layers.Reshape((3,))), points(40, 6))


def test_logits_that_lie_in_the_unit_interval_by_chance_are_no_probabilities():
    class Chance(keras.Model):
        def call(self, x):
            return keras.ops.concatenate([x, 1 - x], axis=-1)

    result = PGD(L2(0.3))(Chance(), [[0.1], [0.4]])
    assert result.success.tolist() == [False, True]


def test_mixed_precision_models_are_attacked():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = mlp(head="softmax")
    finally:
        keras.config.set_dtype_policy("float32")
    result = PGD(L2(1.0))(model, points(40, 6))
    assert result.success_rate > 0 and result.x_adv.dtype == np.float32


def test_the_automatic_names_of_later_layers_do_not_depend_on_attacks():
    model = on_top(layers.Dense(3, activation="softmax"))
    before = int(keras.Sequential([keras.Input((1,))]).name.rsplit("_", 1)[-1])
    PGD(L2(0.1), steps=1)(model, points(2, 6))
    after = int(keras.Sequential([keras.Input((1,))]).name.rsplit("_", 1)[-1])
    assert after == before + 1
