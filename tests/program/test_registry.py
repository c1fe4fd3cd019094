"""Users' own layers: registered gains are used, listed and checked."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.certification import certify, lipschitz_upper_bound, register_gain
from tf_lyapunov.errors import UnsupportedLayerError


class Scaled(keras.Layer):
    def __init__(self, factor=3.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return self.factor * x


class ScaledAgain(Scaled):
    def call(self, x):
        return 100 * super().call(x)


@pytest.fixture(autouse=True)
def forget():
    yield
    register_gain(Scaled, None)


def model_with(layer):
    return keras.Sequential([keras.Input((3,)), layer, layers.Dense(2)])


class Unreadable(keras.Layer):
    def call(self, x):
        return keras.ops.sin(3 * x)


def test_an_unknown_layer_is_refused_with_the_way_out():
    with pytest.raises(UnsupportedLayerError, match=r"Sin.*register_gain\(Unreadable"):
        lipschitz_upper_bound(model_with(Unreadable()))


def test_a_registered_gain_enters_the_bound_and_its_assumption_the_certificate():
    register_gain(Scaled, lambda layer: layer.factor, assumption="It multiplies by its factor.")
    model = model_with(Scaled(2.0))
    sigma = np.linalg.norm(np.asarray(model.layers[1].kernel, dtype=np.float64), 2)
    proof = certify(model, np.eye(3))
    assert proof.gain_upper_bound == pytest.approx(2 * sigma, rel=1e-12)
    assert any("It multiplies by its factor." in text for text in proof.assumptions)
    assert "It multiplies by its factor." in proof.explain()
    assert proof.contributions[0].assumption is not None
    assert proof.verdict == "PROVED"


def test_a_rule_may_take_the_input_shape():
    seen = []

    def rule(layer, input_shape):
        seen.append(input_shape)
        return layer.factor

    register_gain(Scaled, rule, assumption="By its factor.")
    lipschitz_upper_bound(model_with(Scaled()))
    assert seen == [(None, 3)]


def test_a_rule_does_not_cover_subclasses():
    register_gain(Scaled, 3.0, assumption="By its factor.")
    lipschitz_upper_bound(model_with(Scaled()))
    # The subclass is read by what its own `call` does.
    model = model_with(ScaledAgain())
    sigma = np.linalg.norm(np.asarray(model.layers[1].kernel, dtype=np.float64), 2)
    found = lipschitz_upper_bound(model)
    assert found.gain_upper_bound == pytest.approx(300 * sigma, rel=1e-6)
    assert not any("By its factor." in text for text in found.assumptions)


@pytest.mark.parametrize("gain", [np.nan, np.inf, -1.0, None, "two", [1.0, 2.0]])
def test_a_rule_that_gives_no_gain_is_refused(gain):
    register_gain(Scaled, lambda layer: gain, assumption="Wrong.")
    with pytest.raises(ValueError, match="finite"):
        lipschitz_upper_bound(model_with(Scaled()))


def test_wrong_registrations_are_refused():
    for wrong in (Scaled(), "Scaled", int, keras.Layer, keras.Model):
        with pytest.raises(TypeError, match="layer_class"):
            register_gain(wrong, 1.0, assumption="x")
    for wrong in (None, "", "  "):
        with pytest.raises(ValueError, match="assumption"):
            register_gain(Scaled, 1.0, assumption=wrong)
    with pytest.raises(TypeError, match="rule"):
        register_gain(Scaled, "1.0", assumption="x")
    with pytest.raises(TypeError, match="3 arguments"):
        register_gain(Scaled, lambda a, b, c: 1.0, assumption="x")
    with pytest.raises(ValueError, match="finite"):
        register_gain(Scaled, -1.0, assumption="x")
    with pytest.raises(ValueError, match="proven rule"):
        register_gain(layers.Dense, 0.1, assumption="x")
