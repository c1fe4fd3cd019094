"""Recurrent equilibrium layers with drawn weights, and what they do to differences."""

import keras
import numpy as np

from tf_lyapunov.dynamics import Contracting, L2Gain, Supply
from tf_lyapunov.layers import RecurrentEquilibrium
from tf_lyapunov.theory.sectors import Indices

SUPPLIES = {
    "gain": lambda p, m: L2Gain(0.7),
    "indices": lambda p, m: Indices(0.6, -0.4),
    "strict": lambda p, m: Indices(0.5, 0.2 if p >= m else -0.2),
    "general": lambda p, m: Supply(-np.eye(p) - 0.1, 0.3 * np.ones((m, p)), 3 * np.eye(m)),
    "contracting": lambda p, m: Contracting(0.8),
}


def built(supply, inputs=2, units=2, states=3, neurons=4, **arguments):
    """A built layer that returns sequences."""
    arguments = {"return_sequences": True, **arguments}
    layer = RecurrentEquilibrium(units, states, supply, neurons=neurons, **arguments)
    layer.build((None, 5, inputs))
    return layer


def draw(layer, rng, spread=2.0):
    """Random values of every weight, of sizes over 10^±spread, some of low rank or zero."""
    for variable in layer.trainable_variables:
        value = rng.normal(size=variable.shape) * 10.0 ** rng.uniform(-spread, spread)
        kind = rng.integers(6)
        if kind == 0 and value.ndim == 2:
            value = np.outer(value[:, 0], value[0])
        if kind == 1:
            value = value * 0
        variable.assign(value.astype(variable.dtype))
    return layer


def responses(system, inputs, initial=None, activation=None):
    """Outputs (steps, outputs) of a `System` in float64; φ is the layer's, block by block."""
    n, q = system.states, system.units
    phi = activation or (lambda v: np.maximum(v, 0.0))
    state, outputs = np.zeros(n) if initial is None else initial, []
    for u in inputs:
        w = np.zeros(q)
        for _ in range(q):  # D₁₁ is nilpotent: q passes are exact
            w = phi(system.neurons @ np.concatenate([state, w, u]))
        signal = np.concatenate([state, w, u])
        outputs.append(system.output @ signal)
        state = system.step @ signal
    return np.array(outputs)


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), dtype=np.float64)
