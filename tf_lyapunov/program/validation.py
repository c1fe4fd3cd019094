"""Translation validation: the model itself must compute what was read of it, step by step.

Every call of the model is repeated with the model's own layers on the values that the calls before
it gave, and compared with the step's float64 evaluation on the same values, within a bound on its
rounding alone. What the calls give together is compared with the model, called the way its user
calls it. A check of the reading, not a proof.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.operation import Signal
from tf_lyapunov.program.program import precision_of, run
from tf_lyapunov.program.replay import Replay
from tf_lyapunov.program.tensors import as_array

# Inputs that are compared at most, and random probes at each of several scales beside them.
SAMPLE = 64
PROBES = 8
SCALES = (0.1, 1.0, 10.0)
# Entries of inputs that are compared at once, at most (one input at least).
_ENTRIES = 2**20
# Entries of the largest signal in the probes of one scale, about: each of them is compared.
_PROBED = 2**15
# Allowances above these shares of a step's spread hide mistakes, and all but gross ones.
_COARSE, _BLIND = 1e-3, 1 / 3
_HALF = ("float16", "bfloat16")
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Validation:
    """What was compared.

    Attributes:
        inputs: number of inputs, probes included.
        steps: number of steps that agreed.
        blind: names of steps whose rounding allowance is above a third of their values' spread, or
            which are not evaluated apart from the model: nothing, or no more than gross mistakes,
            would show there.
        coarse: dict of names of steps whose allowance is above a thousandth of their values' spread
            and that share of it. A mistake below it would not show; steps in 16 bits are such.
    """

    inputs: int
    steps: int
    blind: tuple
    coarse: dict = dataclasses.field(default_factory=dict)

    def sentence(self):
        """For `Certificate.assumptions`."""
        if not self.inputs:
            return f"The reading of the model was not compared with it: {self.blind[0]}."
        text = (
            f"The reading of the model was compared with the model itself on {self.inputs} inputs "
            f"and probes, at each of {self.steps} steps: a check, not a proof."
        )
        if self.blind:
            names = ", ".join(self.blind[:5]) + (", …" if len(self.blind) > 5 else "")
            text += f" Not validated on its own, for its rounding or its kind: {names}."
        if self.coarse:
            name = max(self.coarse, key=self.coarse.get)
            count = len(self.coarse)
            text += (
                f" Rounding hides differences below {self.coarse[name]:.2g} of the spread of the "
                f"values at {name}" + (f", below less at {count - 1} others." if count > 1 else ".")
            )
        return text


def own_outputs(model, inputs):
    """What the model gives when it is called eagerly at inference, as a list of tensors."""
    argument = Inputs.of(model).called(inputs)
    return keras.tree.flatten(model(argument, training=False))


def validate(network, inputs, *, probes=True, rng=None):
    """Compares a network's model with what was read of it.

    Args:
        network: `network.Network`.
        inputs: list of arrays (n, …), one per input of the model; their first rows are compared.
        probes: whether to compare random inputs of several scales too.
        rng: `numpy.random.Generator`, or None for one that cannot be foreseen.

    Returns:
        `Validation`.

    Raises:
        UnfaithfulReading: naming the first step that differs.
    """
    rng = np.random.default_rng() if rng is None else rng
    if any(t.size is None for t in network.graph.inputs):
        return Validation(0, 0, ("all steps, since the input's size is unknown",))
    size = sum(t.size for t in network.graph.inputs)
    count = int(np.clip(_ENTRIES // max(size, 1), 1, SAMPLE))
    sample = [np.asarray(x)[:count] for x in inputs]
    largest = max([size, *(t.size or 0 for call in network.graph.calls for t in call.outputs)])
    few = int(np.clip(min(count // 4, _PROBED // max(largest, 1)), 1, PROBES))
    given = len(sample[0])
    for scale in SCALES if probes else ():
        for i, tensor in enumerate(network.graph.inputs):
            x = inputs[i]
            drawn = _probe(rng, (few, *x.shape[1:]), tensor.dtype, scale * _typical(x[:count]))
            sample[i] = np.concatenate([sample[i], drawn.astype(sample[i].dtype)])
    steps, hidden = _compared(network, sample, given)
    blind = tuple(name for name, share in hidden.items() if share > _BLIND)
    coarse = {name: share for name, share in hidden.items() if _COARSE < share <= _BLIND}
    return Validation(len(sample[0]), steps, blind, coarse)


def _typical(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))) or 1.0


def _probe(rng, shape, dtype, scale):
    drawn = rng.normal(size=shape) * scale
    if "int" in dtype:
        limits = np.iinfo(dtype)
        return np.clip(np.rint(drawn), max(limits.min, -(2**20)), min(limits.max, 2**20))
    return drawn


def validate_on_probes(network, *, rng=None):
    """As `validate`, on random inputs of several scales alone."""
    rng = np.random.default_rng() if rng is None else rng
    tensors = network.graph.inputs
    if any(t.size is None for t in tensors):
        return Validation(0, 0, ("all steps, since the input's size is unknown",))
    return validate(network, [_probe(rng, (1, *t.shape[1:]), t.dtype, 1.0) for t in tensors])


def _compared(network, inputs, given):
    """`(steps, hidden)`: what rounding hides of a step's spread on the first `given` inputs."""
    with np.errstate(all="ignore"):
        known = Replay(network)(inputs)
        own = own_outputs(
            network.model,
            [known[t.producer][0] for t in network.graph.inputs],
        )
        steps, hidden = 0, {}
        calls = {call.name: call for call in network.graph.calls}
        for step in network.program.steps:
            call, outputs = calls[step.name], known[step.name]
            if step.operations is None or step.is_declared or len(outputs) != 1:
                hidden[step.name] = np.inf
                continue
            read = [known[t.producer][t.index] for t in call.inputs]
            hidden[step.name] = _hidden(step, read, outputs[0], given)
            steps += 1
        _check_whole(network, known, own)
    return steps, hidden


def _hidden(step, read, output, given):
    """A step's allowance as a share of its values' spread; raises where the step differs."""
    dtype = keras.backend.standardize_dtype(output.dtype)
    if _SIZES.get(dtype, 9) < _SIZES.get(step.dtype, 0):
        raise UnfaithfulReading(
            f"The model computes in {dtype} at step {step.name!r}, whose dtype says {step.dtype}. "
            "No claim is made. Use a dtype that this backend computes in.",
            step.name,
        )
    signals = []
    precision = precision_of(step)
    for tensor in read:
        value = as_array(tensor)
        error = np.zeros_like(value)
        if keras.backend.standardize_dtype(tensor.dtype) != step.dtype:
            error = precision.unit * np.abs(value) + precision.tiny
        signals.append(Signal(value, error))
    held = as_array(output)
    signal = run(step, signals, precision)
    value, error = signal.value, signal.error
    if value.shape != held.shape:
        raise _unfaithful(step, f"its shape is {held.shape}, that of its reading {value.shape}")
    # Beyond the largest number of the format a model's results say nothing.
    largest = 6e4 if step.dtype == "float16" else 1e38
    rows = np.isfinite(value) & np.isfinite(held) & (np.abs(value) + error < largest)
    off = np.where(rows, np.abs(held - value) - error, 0.0)
    if np.any(off > 0):
        worst = np.unravel_index(np.argmax(off), off.shape)
        raise _unfaithful(
            step,
            f"it gives {held[worst]:.8g} where its reading gives {value[worst]:.8g}, with a "
            f"rounding allowance of {error[worst]:.2g} for {step.dtype}",
        )
    rows[given:] = False
    if not np.any(rows):  # what overflows, or has no allowance, is compared with nothing
        return math.inf
    spread = float(np.std(value[rows]))
    return float(np.median(error[rows])) / spread if spread > 0 else 0.0


def _unfaithful(step, text):
    return UnfaithfulReading(
        f"The model contradicts what was read of it. Received: step {step.name!r}, {text}. No "
        "claim about this model is made: use the layer as Keras defines it, or declare its gain by "
        "`register_gain`.",
        step.name,
    )


def _check_whole(network, known, own):
    """The model must give what its calls give together, up to the order of its sums."""
    target = network.graph.output
    alone = as_array(known[target.producer][target.index])
    if len(own) != 1:
        raise UnfaithfulReading(
            f"The model gives {len(own)} outputs, its reading one. Received: model "
            f"{network.model.name!r}."
        )
    whole = as_array(own[0])
    half = any(call.outputs[0].dtype in _HALF for call in network.graph.calls)
    sizes = np.where(np.isfinite(alone), np.abs(alone), 0.0)
    rows = sizes.max(axis=tuple(range(1, alone.ndim)), keepdims=True, initial=0.0)
    # The same operations on the same values: only how a device orders its sums may differ.
    room = (0.05 if half else 1e-4) * rows + 1e-6 * sizes.max(initial=0.0) + 1e-30
    finite = np.isfinite(alone)
    if whole.shape != alone.shape or np.any((np.abs(whole - alone) > room)[finite]):
        raise UnfaithfulReading(
            f"The model {network.model.name!r} computes something else than its layers, called one "
            "by one as its graph says. Received: different outputs. No claim about it is made: "
            "build it as a Functional model of the layers that it calls.",
            target.producer,
        )
