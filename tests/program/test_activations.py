"""What float32 rounds beside a piecewise linear function is found wherever it is set."""

import functools

import keras
import numpy as np
import pytest

from tf_lyapunov import layers as ours
from tf_lyapunov.program.activations import activation_name, is_exact, settings_of
from tf_lyapunov.program.families.effective import activation_model
from tf_lyapunov.program.network import read_network

relu = keras.activations.relu
SLOPE, CAP = {"negative_slope": 0.1}, {"max_value": 6.0}
# What holds a function, and the settings in it.
HOLDERS = {
    "plain": (relu, {}),
    "bent": (functools.partial(relu, **SLOPE), SLOPE),
    "capped": (functools.partial(relu, **CAP), CAP),
    "both, one after the other": (
        functools.partial(functools.partial(relu, **CAP), **SLOPE),
        {**SLOPE, **CAP},
    ),
    "set to nothing again": (
        functools.partial(functools.partial(relu, **SLOPE), negative_slope=0),
        {},
    ),
    "leaky": (keras.layers.LeakyReLU(0.1, dtype="float64"), SLOPE),
    "layer": (keras.layers.ReLU(negative_slope=0.1, dtype="float64"), SLOPE),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_settings_are_found_in_functions_partials_and_layers(name):
    holder, settings = HOLDERS[name]
    assert settings_of(holder) == settings
    if not isinstance(holder, keras.layers.Layer):
        holder = keras.layers.Activation(holder, dtype="float64")
        assert settings_of(holder) == settings
    assert is_exact("relu", holder) == (not settings)
    assert not is_exact("elu", holder)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_fused_function_in_float64_errs_by_its_settings_in_float32(name):
    holder, settings = HOLDERS[name]
    layer = ours.SpectralDense(9, activation=holder, dtype="float64")
    model = keras.Sequential([keras.Input((4,), dtype="float64"), layer])
    tensor = read_network(model).graph.calls[-1].outputs[0]
    error, unit = activation_model(layer, tensor, "float64"), 2.0**-24
    assert (error.slope >= unit) == bool(settings)
    # √n·cap of what a cap moves.
    assert error.constant >= unit * 3 * settings.get("max_value", 0.0)
    assert activation_name(layer.activation) and np.isfinite(error.constant)
