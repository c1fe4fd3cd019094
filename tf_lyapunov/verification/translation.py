"""Whether a model computes what was read: layer by layer, on inputs of a file and on probes.

Every layer is called on what the model's own layers before it computed, and its output compared
with NumPy's evaluation of the step that was read, within the rounding of its dtype; so errors start
anew at every layer, and an allowance is never wider than one layer's. Then the model itself is
called, eagerly, and must give what its layers gave. This tests the reading; it proves nothing.
"""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.verification.checking import cast, evaluate
from tf_lyapunov.verification.network import forward
from tf_lyapunov.verification.rounding import computed

SAMPLE, PROBES, SCALES = 64, 8, (1 / 16, 1.0, 16.0)
_WIDTHS = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
_HALF = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Layers called one after the other, and the steps that stand for them.

    Attributes:
        layers: one layer, or a linear one and the normalization folded into it; none for a cast.
        inputs: names of the steps that are read.
        steps: tuple of `network.Step`.
        plural: whether the first layer takes a list.
    """

    layers: tuple
    inputs: tuple
    steps: tuple
    plural: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Tried:
    """Inputs on which a model is tried: arrays (n, …), labels (n,), and radii (n,) claimed."""

    inputs: np.ndarray
    labels: np.ndarray
    radius: np.ndarray


def contradictions(model, network, calls, claim):
    """Sentences on where a model contradicts what was read of it.

    Args:
        model: the Keras model.
        network: `network.Network` read from it.
        calls: tuple of `Call`.
        claim: `contents.Claim`, or `Tried`; a sample of its inputs is used, which cannot be
            foreseen.

    Returns:
        List of sentences, empty if there is none.
    """
    # Drawn anew every time: a file cannot be made to fit the sample.
    rng = np.random.default_rng()
    count = len(claim.radius)
    rows = rng.choice(count, min(count, SAMPLE), replace=False)
    inputs = cast(network, claim.inputs[rows])
    found, own = _compared(model, network, calls, inputs, "inputs of the file")
    if found:
        return found
    wrong = _wrong_decisions(network, own, claim.labels[rows]) & (claim.radius[rows] > 0)
    if np.any(wrong):
        return [
            f"The model itself decides against the label of input {int(rows[np.argmax(wrong)])}, "
            "for which the file claims a positive radius."
        ]
    size = float(np.sqrt(np.mean(inputs**2))) or 1.0
    for scale in SCALES:
        drawn = rng.normal(size=(PROBES, *network.steps[0].shape)) * scale * size
        probes = _as_inputs(network, drawn)
        found, _ = _compared(model, network, calls, probes, "random probes")
        if found:
            return found
    return []


def _as_inputs(network, drawn):
    for dtype in network.casts:
        if "int" in dtype:
            limits = np.iinfo(dtype)
            drawn = np.clip(np.rint(np.abs(drawn)), limits.min, min(limits.max, 2**20))
        elif dtype == "float16":
            drawn = np.clip(drawn, -6e4, 6e4)
    return cast(network, drawn)


def _compared(model, network, calls, inputs, where):
    """`(sentences, the model's outputs)` on these inputs."""
    dtype = network.casts[-1] if network.casts else "float32"
    try:
        given = keras.ops.cast(keras.ops.convert_to_tensor(_carrier(inputs, dtype)), dtype)
        outputs, values = {network.steps[0].name: given}, {network.steps[0].name: inputs}
        if not np.array_equal(_numpy(given), inputs):
            return [_sentence(f"the input in {dtype}", where)], None
        for call in calls:
            read = [(values[n], np.zeros_like(values[n])) for n in call.inputs]
            output = _called(call, [outputs[n] for n in call.inputs])
            held, last = _numpy(output), call.steps[-1]
            why = _differs(call, read, output, held)
            if why:
                return [_sentence(f"step {last.name!r} ({why})", where)], None
            outputs[last.name], values[last.name] = output, held
        own = keras.tree.flatten(model(given, training=False))
        last = calls[-1].steps[-1].name if calls else network.steps[0].name
        if len(own) != 1:
            return [_sentence("the number of outputs", where)], None
        own, alone = _numpy(own[0]), values[last]
    except Exception as error:  # a backend raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return [f"The model cannot be called on {where}: {reason!r}."], None
    if own.shape != alone.shape or not _close(own, alone, network, inputs, last):
        return [_sentence("the whole model, whose layers alone give something else", where)], None
    return [], own


def _sentence(step, where):
    return (
        f"The model contradicts what was read of it, at {step}, on {where}: its own results differ "
        "by more than the rounding of its dtype. Its device may compute in a lower precision."
    )


def _carrier(inputs, dtype):
    """NumPy array that a backend can take without rounding."""
    return inputs.astype("float32" if dtype in _HALF else dtype)


def _numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype(np.float64)


def _called(call, tensors):
    if not call.layers:
        return keras.ops.cast(tensors[0], call.steps[-1].dtype)
    output = call.layers[0](list(tensors) if call.plural else tensors[0])
    for layer in call.layers[1:]:
        output = layer(output)
    return output


def _differs(call, read, output, held):
    """What differs between a layer's output and the steps read of it, or None."""
    last = call.steps[-1]
    dtype = keras.backend.standardize_dtype(output.dtype)
    if _WIDTHS.get(dtype, 3) < _WIDTHS.get(last.dtype, 0):
        return f"it is computed in {dtype}, where its dtype says {last.dtype}"
    if held.shape[1:] != last.shape:
        return f"its shape is {held.shape[1:]}, not {last.shape}"
    with np.errstate(all="ignore"):
        for step in call.steps:
            value, error = _step(step, read)
            read = [(value, error)]
        # Beyond the largest number of the dtype, a model's results say nothing.
        safe = np.abs(value) + error <= computed(last.dtype).largest / 2
        rows = safe.reshape(len(safe), -1).all(axis=1)
        fits = np.abs(held - value) <= error
    if not np.all(fits[rows]):
        off = np.abs(held - value)[rows]
        return f"by up to {float(np.nanmax(off, initial=0.0)):.3g}"
    return None


def _step(step, read):
    kind = getattr(step.operation, "decides", None)
    if kind is None:
        return forward(step, read, computed)
    value, error = read[0]
    unit = 64 * computed(step.dtype).settings
    error = error.max(axis=-1, keepdims=True)
    top = value.max(axis=-1, keepdims=True)
    total = np.exp(value - top).sum(axis=-1, keepdims=True)
    if kind == "softmax":
        size = unit * (1 + np.abs(value).max(axis=-1, keepdims=True) * 2.0**-6)
        return np.exp(value - top) / total, error + size + np.zeros_like(value)
    result = value - top - np.log(total)
    return result, 2 * error + unit * (1 + np.abs(value) + np.abs(result))


def _close(own, alone, network, inputs, last):
    """Whether the model gives what its layers give, up to how devices order their sums."""
    finite = np.isfinite(alone)
    size = float(np.max(np.abs(alone[finite]), initial=0.0))
    dtype = next(step.dtype for step in network.steps if step.name == last)
    half = any(step.dtype in _HALF for step in network.steps)
    share = 0.05 if half else 1e-3 if dtype != "float64" else 1e-6
    room = share * size
    if last == network.logits:
        with np.errstate(all="ignore"):
            _, error = evaluate(network, inputs, computed)
        room = np.fmin(2 * error, room)
    return bool(np.all((np.abs(own - alone) <= room)[finite]))


def _wrong_decisions(network, own, labels):
    """Where the model's own outputs decide for another class than the label."""
    if own.ndim != 2:
        return np.ones(len(own), dtype=bool)
    if own.shape[1] > 1:
        return own.argmax(axis=1) != labels
    name = getattr(network.steps[-1].operation, "name", None)
    after = network.steps[-1].name != network.logits
    threshold = {"sigmoid": 0.5, "log_sigmoid": np.log(0.5)}.get(name, 0.0) if after else 0.0
    return np.where(labels == 1, own[:, 0] <= threshold, own[:, 0] >= threshold)
