"""Plants and controllers that several tests use."""

import keras
import numpy as np

from tf_lyapunov.control import Plant, SineGap

STEP, GRAVITY, MASS, LENGTH, FRICTION = 0.02, 10.0, 0.15, 0.5, 0.05
INERTIA = MASS * LENGTH**2
# Of the linear-quadratic regulator for the weights diag(1, 0.1) and 1, rounded.
FEEDBACK = np.array([[1.86, 0.42]])


def network(weights, activation="tanh", biases=None):
    """Dense layers with these (out, in) weights, an activation between them."""
    layers = [
        keras.layers.Dense(
            len(w), activation if k < len(weights) - 1 else None, use_bias=biases is not None
        )
        for k, w in enumerate(weights)
    ]
    model = keras.Sequential([keras.Input((np.shape(weights[0])[1],)), *layers])
    values = []
    for k, w in enumerate(weights):
        values.append(np.asarray(w, np.float64).T)
        if biases is not None:
            values.append(np.asarray(biases[k], np.float64))
    model.set_weights(values)
    return model


def pendulum():
    """A pendulum held upright, with x = (angle, speed) and the torque as input."""
    a = [[1, STEP], [GRAVITY / LENGTH * STEP, 1 - FRICTION / INERTIA * STEP]]
    return Plant(a, [0, STEP / INERTIA], gaps=[SineGap([1, 0], [0, -GRAVITY / LENGTH * STEP])])


def regulator(units=4):
    """A tanh network close to -FEEDBACK·x for small x."""
    spread = np.linspace(0.95, 1.05, units)[:, None]
    first = np.repeat(0.25 * FEEDBACK, units, axis=0) * spread
    return network([first, -np.full((1, units), 4.0 / units)])
