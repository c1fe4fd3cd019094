"""Sequences through a model in float64, with a proven bound on the rounding.

Every step computed from the computed state errs by a small r_t; from there on exact trajectories
differ by no more than their storage lets them: ‖Δx_t‖_P ≤ Σ_k<t ‖r_k‖_P, and ‖Δy_t‖² ≤ V(Δx_t) in
the scale of the supply rate θ‖Δu‖² - ‖Δy‖².
"""

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.verification import activations
from tf_lyapunov.verification.arithmetic import gamma, norm_up, row_norms_up, sqrt_up

_SLACK = 1 + 2.0**-20
# Parameters that Keras' functions have by default, where the table's are others.
_DEFAULTS = {"leaky_relu": {"negative_slope": 0.2}}


def activated(activation, values, errors):
    """`(φ(values), errors)` of a Keras activation, function or layer."""
    if isinstance(activation, keras.layers.Layer):
        kind = type(activation)
        if kind is keras.layers.Activation:
            return activated(activation.activation, values, errors)
        if kind is keras.layers.LeakyReLU:
            slope = {"negative_slope": float(activation.negative_slope)}
            return activations.evaluate("leaky_relu", slope, values, errors)
        if kind is keras.layers.ELU:
            return activations.evaluate("elu", {"alpha": float(activation.alpha)}, values, errors)
        if kind is keras.layers.ReLU and _is_plain(activation):
            return activations.evaluate("relu", {}, values, errors)
        raise UnsupportedLayerError(
            f"{kind.__name__} {activation.name!r} is not evaluated with a rounding bound. Use a "
            "plain ReLU, LeakyReLU, ELU or Activation."
        )
    name = getattr(activation, "__name__", "linear")
    if name not in activations.TABLE:
        raise UnsupportedLayerError(
            f"The activation {name!r} is not evaluated with a rounding bound. Supported: "
            f"{', '.join(activations.TABLE)}."
        )
    return activations.evaluate(name, _DEFAULTS.get(name, {}), values, errors)


def _is_plain(relu):
    return not relu.negative_slope and not relu.threshold and relu.max_value is None


def recurrent(system, storage, inputs):
    """Outputs (n, steps, outputs) of zero initial states, and bounds on their l2 errors (n,).

    Args:
        system: `System` of a layer.
        storage: P in the scale of the supply rate.
        inputs: float64 (n, steps, inputs).
    """
    cell = system.layer if not hasattr(system.layer, "cell") else system.layer.cell
    backwards = getattr(system.layer, "go_backwards", False)
    inputs = inputs[:, ::-1] if backwards else inputs
    n, q, p = system.states, system.units, system.outputs
    bias = np.zeros(q + n + p)
    if cell.bias is not None:
        bias = np.asarray(keras.ops.convert_to_numpy(cell.bias), dtype=np.float64)
    rows = np.vstack([system.neurons, system.step])
    by_state, by_neuron, by_input = rows[:, :n].T, rows[:, n : n + q].T, rows[:, n + q :].T
    unit = gamma(n + q + system.inputs + p + 16)
    size = sqrt_up(norm_up(storage))
    state = np.zeros((len(inputs), n))
    drift, spread, largest, outputs = np.zeros(len(inputs)), 0.0, 0.0, []
    for t in range(inputs.shape[1]):
        u = inputs[:, t]
        rest = u @ by_input + bias[: q + n] + state @ by_state
        reach = np.abs(u) @ np.abs(by_input) + np.abs(bias[: q + n])
        error = unit * (reach + np.abs(state) @ np.abs(by_state))
        w, w_error = np.zeros((len(u), q)), np.zeros((len(u), q))
        for start, end in zip(cell._bounds, cell._bounds[1:], strict=False):
            found = activated(cell.activation, rest[:, start:end], error[:, start:end])
            w[:, start:end], w_error[:, start:end] = found
            part = by_neuron[start:end]
            own = unit * (np.abs(found[0]) @ np.abs(part) + np.abs(rest))
            rest = rest + found[0] @ part
            error = error + found[1] @ np.abs(part) + own
        signal, weight = np.hstack([state, w, u]), system.output.T
        y = signal @ weight + bias[q + n :]
        y_error = unit * (np.abs(signal) @ np.abs(weight) + np.abs(bias[q + n :]))
        y_error = y_error + w_error @ np.abs(weight[n : n + q])
        outputs.append(y)
        spread = spread + (drift + row_norms_up(y_error)) ** 2
        largest = drift + row_norms_up(y_error)
        drift = (drift + size * row_norms_up(error[:, q:])) * _SLACK
        state = rest[:, q:]
    outputs = np.stack(outputs, axis=1)
    if getattr(system.layer, "return_sequences", True):
        return outputs, np.sqrt(spread) * _SLACK
    return outputs[:, -1], largest * _SLACK


def static(stage, values, error):
    """A `StaticStage` of values with l2 errors (n,)."""
    if stage.kind == "flatten":
        return values.reshape(len(values), -1), error
    if stage.kind == "average":
        steps = values.shape[1]
        own = gamma(steps + 4) * np.abs(values).sum(axis=1) / steps
        return values.mean(axis=1), (error * stage.gain + row_norms_up(own)) * _SLACK
    own = np.zeros_like(values)
    if stage.kind == "dense":
        bias = 0.0 if stage.bias is None else stage.bias
        reach = np.abs(values) @ np.abs(stage.kernel) + np.abs(bias)
        values = values @ stage.kernel + bias
        own = gamma(len(stage.kernel) + 4) * reach
    values, own = activated(stage.activation, values, own)
    flat = row_norms_up(own.reshape(len(own), -1))
    return values, (error * stage.gain + flat) * _SLACK


def margins(stages, storages, gains, inputs):
    """`(logits, errors)` of a chain whose last stage gives one vector a sequence.

    Args:
        stages: of `stages_of`.
        storages: P of every recurrent stage, in order.
        gains: of every stage.
        inputs: float64 (n, steps, inputs).
    """
    values, error = inputs, np.zeros(len(inputs))
    storages = iter(storages)
    for stage, gain in zip(stages, gains, strict=True):
        if hasattr(stage, "step"):
            values, own = recurrent(stage, next(storages), values)
            error = (gain * error + own) * _SLACK
        else:
            values, error = static(stage, values, error)
    if values.ndim != 2 or not np.all(np.isfinite(error)):
        raise ValueError(
            "Radii need a model that ends in one row of finite logits per sequence. Received: "
            f"outputs of shape {values.shape}. Use return_sequences=False in the last recurrent "
            "layer, or an average over time behind it."
        )
    return values, error


__all__ = ["margins"]
