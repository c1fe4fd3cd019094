"""Stacks of smooth dense layers inside a network, and the signals that they read."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.program.activations import activation_name
from tf_lyapunov.program.logits import Float64Logits
from tf_lyapunov.program.weights import inference_value

# Covers the rounding of norms in float64.
SLACK = 1 + 1e-9
# Inputs × entries of a Jacobian held at once.
_BLOCK = 2**22
_SLOPES = {
    "linear": np.ones_like,
    "sigmoid": lambda a: np.exp(-np.logaddexp(0, a) - np.logaddexp(0, -a)),
    "tanh": lambda a: 1 - np.tanh(a) ** 2,
    "softplus": lambda a: np.exp(-np.logaddexp(0, -a)),
    "log_sigmoid": lambda a: np.exp(-np.logaddexp(0, a)),
    "relu": lambda a: (a > 0).astype(np.float64),
}
_VALUES = {
    "linear": lambda a: a,
    "sigmoid": lambda a: np.exp(-np.logaddexp(0, -a)),
    "tanh": np.tanh,
    "softplus": lambda a: np.logaddexp(0, a),
    "log_sigmoid": lambda a: -np.logaddexp(0, -a),
    "relu": lambda a: np.maximum(a, 0),
}


class Signals:
    """Float64 logits together with the values that some calls read."""

    def __init__(self, network, calls):
        known = {call.name: call for call in network.graph.calls}
        self.read = {name: known[name].inputs[0].producer for name in calls}
        self.logits = Float64Logits(network)

    def evaluate(self, x):
        """`(logits (n, K), {call: float64 array})` of a list with one array per input."""
        logits, values = self.logits.evaluate(x, len(x[0]), tuple(set(self.read.values())))
        return logits, {name: values[source] for name, source in self.read.items()}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Dense layers z_l = g_l(V_l z_{l-1} + b_l) in a row."""

    nodes: tuple
    weights: tuple
    biases: tuple
    activations: tuple

    @property
    def call(self):
        return self.nodes[0].call

    def jacobian_norms(self, z):
        """Norms (n,) of the Jacobians at z (n, inputs), as computed, rounded up."""
        norms = np.empty(len(z))
        entries = max(w.size for w in self.weights) + z.shape[1] * len(self.weights[-1])
        rows = max(_BLOCK // entries, 1)
        for start in range(0, len(z), rows):
            value = z[start : start + rows]
            jacobian = None
            for weight, bias, name in zip(self.weights, self.biases, self.activations, strict=True):
                a = value @ weight.T + bias
                through = weight[None] if jacobian is None else weight @ jacobian
                jacobian = _SLOPES[name](a)[:, :, None] * through
                value = _VALUES[name](a)
            norms[start : start + rows] = np.linalg.norm(jacobian, 2, axis=(1, 2))
        return norms * SLACK


def dense_stacks(network, run, known):
    """Maximal stacks of dense layers with an activation of `known` after each, by first node."""
    stacks, i = {}, 0
    while i < len(run):
        taken, weights, biases, names = [], [], [], []
        while i + 1 < len(run) and _is_dense(run[i]) and run[i + 1].kind == "activation":
            name = activation_of(run[i + 1])
            if name not in known:
                break
            taken += [run[i], run[i + 1]]
            weights.append(np.ascontiguousarray(run[i].matrix.T))
            held = run[i].layer.bias
            biases.append(
                np.zeros(len(weights[-1])) if held is None
                else inference_value(held, run[i].layer.compute_dtype)
            )  # fmt: skip
            names.append(name)
            i += 2
        if taken:
            stacks[taken[0].name] = Stack(tuple(taken), tuple(weights), tuple(biases), tuple(names))
        else:
            i += 1
    return stacks


def _is_dense(node):
    is_plain = node.matrix is not None and len(node.output_shape) == 2 and not node.batch_norms
    return is_plain and type(node.layer) is keras.layers.Dense


def activation_of(node):
    layer = node.layer
    if type(layer) in (keras.layers.Dense, keras.layers.Activation):
        return activation_name(layer.activation)
    plain = type(layer) is keras.layers.ReLU and layer.max_value is None
    if plain and layer.negative_slope == 0 and layer.threshold == 0:
        return "relu"
    return type(layer).__name__
