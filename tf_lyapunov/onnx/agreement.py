"""Translation validation: onnxruntime must give what was read of a file, value by value.

Every value within the graph is compared with the program's float64 evaluation, which starts anew
from onnxruntime's own values at each of them, within the bound on the rounding of the steps between
two values alone. A check of the reading, not a proof.
"""

import dataclasses

import numpy as np

from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.onnx.foreign import first_line, needed
from tf_lyapunov.onnx.opening import packages
from tf_lyapunov.onnx.signals import BATCH
from tf_lyapunov.program.operation import Signal
from tf_lyapunov.program.program import precision_of, run

SCALES = (0.1, 1.0, 10.0)
PROBES = 3
# Entries that are compared at once, at most (one sample at least).
_ENTRIES = 2**22
# onnxruntime's tanh, sigmoid and erf err by up to 2⁻²² of 1 where their slopes are flat.
_FUNCTION = 2.0**-21
# The weights of its interpolations are computed in float32, by sums that cancel.
_INTERPOLATION = 2.0**-18
_LARGEST = {"float32": 1e38, "float64": 1e300}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        inputs: number of probes.
        values: number of the graph's values that agreed on all of them.
    """

    inputs: int
    values: int


class Runtime:
    """A graph as onnxruntime runs it, sample by sample where the file fixes one.

    Args:
        graph: `foreign.OnnxGraph`.
        ports: its inputs, `foreign.Port`.
        fixed: number of samples that the file fixes, or `signals.BATCH`.
        names: of the values to give.
        optimized: whether onnxruntime may rewrite the graph first.
    """

    def __init__(self, graph, ports, fixed, names, optimized=False):
        _, runtime = packages()
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.ports, self.fixed = ports, fixed
        model = narrowed(graph.model, names)
        try:
            self.session = runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many kinds
            raise ValueError(
                "onnxruntime does not run this graph, so that its reading cannot be compared. "
                f"Received: {first_line(error)}. Correct the file."
            ) from error

    def __call__(self, arrays, batches):
        """Values by name, each a list over groups of samples.

        Args:
            arrays: one per input, samples first.
            batches: position of the batch axis per name, or None.

        Returns:
            dict from names to arrays with the samples first.
        """
        count = len(arrays[0])
        group = count if self.fixed == BATCH else self.fixed
        if any(port.batch is None for port in self.ports):
            group = 1
        found = {name: [] for name in batches}
        for start in range(0, count, group):
            feed = {}
            for port, array in zip(self.ports, arrays, strict=True):
                part = array[start : start + group]
                part = part[0] if port.batch is None else np.moveaxis(part, 0, port.batch)
                feed[port.name] = np.ascontiguousarray(part)
            try:
                results = self.session.run(list(batches), feed)
            except Exception as error:  # onnxruntime raises many kinds
                raise ValueError(
                    "onnxruntime does not run this graph, so that its reading cannot be compared. "
                    f"Received: {first_line(error)}. Correct the file."
                ) from error
            for (name, batch), value in zip(batches.items(), results, strict=True):
                value = value[None] if batch is None else np.moveaxis(value, batch, 0)
                found[name].append(value)
        return {name: np.concatenate(parts) for name, parts in found.items()}


def narrowed(model, names):
    """A `ModelProto` that gives these values, without the nodes that they do not depend on."""
    onnx, _ = packages()
    graph = model.graph
    kept = needed(graph.node, names)
    read = {name for node in kept for name in node.input} | set(names)
    declared = {value.name: value for value in graph.output}
    constants = {tensor.name for tensor in graph.initializer}
    made = onnx.helper.make_graph(
        kept,
        graph.name or "graph",
        [v for v in graph.input if v.name in read or v.name not in constants],
        [declared.get(name, onnx.ValueInfoProto(name=name)) for name in names],
        [tensor for tensor in graph.initializer if tensor.name in read],
        value_info=graph.value_info,
    )
    found = onnx.ModelProto()
    found.ir_version = model.ir_version
    found.opset_import.extend(model.opset_import)
    found.graph.CopyFrom(made)
    return found


def probes(ports, fixed, rng):
    """Random inputs of several scales: one array per input, samples first."""
    group = 1 if fixed == BATCH else fixed
    size = sum(int(np.prod(p.sample_shape)) for p in ports)
    count = int(np.clip(_ENTRIES // max(size, 1), 1, PROBES * len(SCALES)))
    count = -(-count // group) * group
    arrays = []
    for port in ports:
        x = rng.normal(size=(count, *port.sample_shape))
        x *= np.resize(SCALES, count).reshape(-1, *[1] * (x.ndim - 1))
        if "int" in port.dtype:
            limits = np.iinfo(port.dtype)
            x = np.clip(np.rint(x * 10), max(limits.min, -(2**20)), min(limits.max, 2**20))
        arrays.append(x.astype(port.dtype))
    return arrays


def compare(graph, built, network, fixed, *, rng=None):
    """Compares a program with onnxruntime.

    Args:
        graph: `foreign.OnnxGraph`.
        built: `building.Built`.
        network: `program.network.Network` of its model.
        fixed: number of samples that the file fixes, or `signals.BATCH`.
        rng: `numpy.random.Generator`, or None for one that cannot be foreseen.

    Returns:
        `Agreement`.

    Raises:
        UnfaithfulReading: naming the first node whose result differs.
    """
    rng = np.random.default_rng() if rng is None else rng
    arrays = probes(built.inputs, fixed, rng)
    held = _held(graph, built, network)
    target = built.outputs[0].name
    compared = [*(n for found in held.values() for n in found), target]
    summed = [n for n in map(built.givers.get, compared) if n is not None and n.kind == "LRN"]
    given = {port.name: x for port, x in zip(built.inputs, arrays, strict=True)}
    read = [n.inputs[0] for n in summed if n.inputs[0] not in given]
    names = list(dict.fromkeys([*compared, *read]))
    batches = {name: built.signals[name].batch for name in names}
    own = Runtime(graph, built.inputs, fixed, names)(arrays, batches)
    known = {name: in_order(built.signals[name], own[name]) for name in names}
    with np.errstate(all="ignore"):
        _walk(built, network, arrays, held, known, {**given, **own})
    last = {target: built.signals[target].batch}
    run = Runtime(graph, built.inputs, fixed, (target,), optimized=True)
    whole = run(arrays, last)[target]
    _check_same(own[target], whole, target, "where it optimises the graph")
    if fixed == BATCH:
        for k in (1, 2):
            alone = run([x[:k] for x in arrays], last)[target]
            _check_same(whole[:k], alone, target, "for other numbers of samples")
    return Agreement(len(arrays[0]), len(set(compared)))


def in_order(signal, value):
    """Values of samples, first axis, in the order of a signal's tensor."""
    return np.transpose(value, [0, *(1 + axis for axis in signal.order)])


def _held(graph, built, network):
    """Names of the graph's values that each step of the program gives, in the graph's order."""
    given = {name for node in graph.nodes for name in node.outputs}
    by_operation = {}
    for call in network.graph.calls:
        by_operation.setdefault(id(call.operation), call.name)
    found = {}
    for name, signal in built.signals.items():
        if name not in built.givers:
            continue
        operation = signal.tensor._keras_history.operation
        step = by_operation.get(id(operation))
        # Values that compositions left out, or that the file does not hold.
        if step is not None and name in given:
            found.setdefault(step, []).append(name)
    return found


def _walk(built, network, arrays, held, known, own):
    signals = {
        tensor.producer: Signal(np.asarray(x, np.float64), np.zeros(np.shape(x)))
        for tensor, x in zip(network.graph.inputs, arrays, strict=True)
    }
    for step in network.program.steps:
        if step.operations is None:
            raise UnfaithfulReading(
                f"A step is not evaluated apart from the model: {step.why} Received: {step.name!r}."
            )
        signal = run(step, [signals[n] for n in step.inputs], precision_of(step))
        for name in held.get(step.name, ()):
            _check(built, step, name, signal, known[name], own)
        if step.name in held:
            value = np.asarray(known[held[step.name][0]], np.float64)
            signal = Signal(value, np.zeros_like(value))
        signals[step.name] = signal


def _running_sums(node, x):
    """What the differences of onnxruntime's `LRN` lose; x: (samples, channels, …).

    It makes the sum s_c = k + (α/n)·Σ x² of channel c from that of channel c - 1, adding a square
    and subtracting one. So the 2c + n + 2 roundings until then are of values up to 2·max_{i≤c} s_i,
    d in all, and |x|·s^-β is off by at most |x|·s^-β·((1 - d/s)^-β - 1).
    """
    size, bias, beta = node.get("size"), node.get("bias", 1.0), node.get("beta", 0.75)
    squares = np.moveaxis(np.asarray(x, np.float64), 1, 0) ** 2 * (node.get("alpha", 1e-4) / size)
    places = np.arange(len(squares))
    sums = bias + np.stack([squares[abs(places - c) <= size // 2].sum(0) for c in places])
    count = (2 * places + size + 2).reshape(-1, *[1] * (np.ndim(x) - 1))
    lost = np.minimum(2.0**-24 * count * 2 * np.maximum.accumulate(sums, axis=0) / sums, 1 - 1e-6)
    exact = np.abs(np.moveaxis(np.asarray(x, np.float64), 1, 0)) * sums**-beta
    return np.moveaxis(exact * ((1 - lost) ** -beta - 1), 0, 1)


def _check(built, step, name, signal, held, own):
    node = built.givers[name]
    value, error = signal.value, signal.error
    if value.shape != held.shape:
        raise _unfaithful(node, name, f"shape {held.shape}, that of its reading {value.shape}")
    room = 2 * error + _FUNCTION * (1 if step.dtype == "float32" else 2.0**-29)
    if node.kind in ("Resize", "Upsample") and step.dtype == "float32":
        room = room + _INTERPOLATION * np.max(np.abs(value), initial=0.0)
    if node.kind == "LRN":
        room = room + in_order(built.signals[name], _running_sums(node, own[node.inputs[0]]))
    if node.get("of_sigmoid"):  # its logarithm: the sigmoid errs by as much as it is at -15
        room = room + _FUNCTION * np.exp(np.minimum(-value, 80.0))
    rows = np.isfinite(value) & np.isfinite(held)
    rows &= np.abs(value) + error < _LARGEST.get(step.dtype, 1e38)
    off = np.where(rows, np.abs(np.asarray(held, np.float64) - value) - room, 0.0)
    if np.any(off > 0):
        worst = np.unravel_index(np.argmax(off), off.shape)
        raise _unfaithful(
            node,
            name,
            f"{held[worst]:.8g} where its reading gives {value[worst]:.8g}, with a rounding "
            f"allowance of {room[worst]:.2g} for {step.dtype}",
        )


def _unfaithful(node, name, text):
    return UnfaithfulReading(
        f"onnxruntime contradicts what was read of the file. Received: value {name!r} of "
        f"{node.what}: onnxruntime gives {text}. No claim about this network is made. Report the "
        "file, or rewrite this node.",
        node.name,
    )


def _check_same(own, whole, name, where):
    """onnxruntime gives its own values, up to how it orders sums."""
    if own.shape != whole.shape:
        raise UnfaithfulReading(
            f"onnxruntime gives results of another shape {where}. Received: output {name!r} of "
            f"{whole.shape[1:]} and {own.shape[1:]}. No claim about this network is made.",
            name,
        )
    finite = np.isfinite(own)
    size = np.max(np.abs(np.where(finite, own, 0.0)), initial=0.0)
    if np.any(np.abs(whole[finite] - own[finite]) > 1e-3 * size + 1e-30):
        raise UnfaithfulReading(
            f"onnxruntime gives other results {where}. Received: output {name!r}. No claim "
            "about this network is made.",
            name,
        )


__all__ = ["Agreement", "Runtime", "compare", "probes"]
