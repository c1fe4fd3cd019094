"""Evaluates the logits of a network in batches."""

import contextlib
import dataclasses
import importlib
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.activations import innermost, is_exact, settings_of
from tf_lyapunov.program.families.scaling import BatchNormScale
from tf_lyapunov.program.graph import is_graph
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.replay import Replay, arguments, without_activation
from tf_lyapunov.program.rounding import UNIT_ROUNDOFF
from tf_lyapunov.program.tensors import as_array, as_tensor
from tf_lyapunov.progress import steps
from tf_lyapunov.theory.threads import blas_threads, each_in_threads

PRECISIONS = ("auto", "model", "float64")


def with_rounded_settings(network):
    """The network with error models of a float64 evaluation that include its float32 settings.

    Backends round numbers in layers' settings (slopes of LeakyReLU, bounds of ReLU, Rescaling,
    epsilon of batch normalizations, constants of GELU) to float32 whatever the layer's dtype:
    relative to the operation's output, and to the numbers themselves, by one unit each.
    """
    extra = 2 * UNIT_ROUNDOFF["float32"]
    nodes = []
    for node in network.nodes:
        name = node.method.split(",")[0]
        capped = settings_of(innermost(node.layer)).get("max_value", 0.0)
        norms = [n for n in (*node.batch_norms, node.layer) if _is_norm(n)]
        is_rounded = node.kind == "scaling" or norms or (
            node.kind == "activation" and not is_exact(name, node.layer)
        )  # fmt: skip
        if is_rounded:
            size = math.prod(n or math.inf for n in node.output_shape[1:]) * node.copies
            shift = math.sqrt(size) * capped
            for norm in norms:
                bound = BatchNormScale.of(norm).shift_bound
                shift += float(np.max(bound, initial=0.0)) * math.sqrt(size)
            widened = [
                dataclasses.replace(
                    own,
                    slope=own.slope + extra * max(own.gain, 1.0),
                    constant=own.constant + extra * (own.offset + shift),
                )
                for own in (node.affine64, node.affine)
            ]
            node = dataclasses.replace(node, affine64=widened[0])
            if getattr(node.layer, "compute_dtype", "float64") == "float64":
                node = dataclasses.replace(node, affine=widened[1])
        nodes.append(node)
    return dataclasses.replace(network, nodes=tuple(nodes))


def _is_norm(layer):
    return type(layer) is keras.layers.BatchNormalization


@contextlib.contextmanager
def no_gradients():
    """Keeps PyTorch from recording what is called inside; the others record nothing."""
    if keras.backend.backend() != "torch":
        yield
        return
    with importlib.import_module("torch").no_grad():
        yield


# Samples whose float64 signals stay in the cache from one step to the next.
_IN_CACHE = 256


class Float64Logits:
    """Logits of a program in float64 by NumPy, whatever the backend.

    Users' own layers with a declared gain are evaluated by Keras, in their own precision.

    Args:
        network: `Network`.

    Raises:
        UnsupportedLayerError: if a step has no evaluation apart from the model.
    """

    precision = "float64"

    def __init__(self, network):
        self.program = network.program
        self.program.check_read()

    def predict(self, x, batch_size):
        """Logits as float64 (n, K), K = 1 for a single unit; `x` as for `LogitsModel.predict`."""
        return self.evaluate(x, batch_size)[0]

    def evaluate(self, x, batch_size, kept=()):
        """`(logits, {name: float64 array})` with the values of the steps `kept`."""
        arrays = x if isinstance(x, list) else [x]

        def evaluated(rows):
            return self.program.evaluate([a[rows] for a in arrays], kept)

        # As many samples at once as without threads. Keras' own are not safe in several.
        threads = 1 if self.program.declared else blas_threads()
        size = max(min(batch_size // threads, _IN_CACHE), 1)
        slices = _slices(len(arrays[0]), size)
        # Closed here: an error that is kept, as notebooks do, keeps what it went through.
        run = each_in_threads(evaluated, slices, threads)
        with no_gradients(), contextlib.closing(run) as found:
            parts = list(steps(found, "batches", len(slices)))
        logits = np.concatenate([p[0] for p in parts])
        return logits, {n: np.concatenate([p[1][n] for p in parts]) for n in kept}


class LogitsModel:
    """The user's own model up to its logits at inference, in its own precision.

    A model without a final softmax or sigmoid computes its logits itself. Otherwise its own layers
    are called one by one up to the logits.

    Args:
        network: `Network`.
    """

    precision = "model"

    def __init__(self, network):
        self.network = network
        self.is_whole = network.decision is None and is_graph(network.model, also="predict_step")
        self.replay = Replay(network)

    def __call__(self, x):
        """Logits of a tensor, or of a list with one for each input; also in a traced function."""
        network, x = self.network, x if isinstance(x, list) else [x]
        if self.is_whole:
            given = Inputs.of(network.model).called(x)
            return keras.tree.flatten(network.model(given, training=False))[0]
        if network.decision is None:
            known = self.replay.of_tensors(x)
            target = network.graph.output
            return known[target.producer][target.index]
        stop = network[network.decision_node].call
        call = next(c for c in network.graph.calls if c.name == stop)
        known = self.replay.of_tensors(x, until=stop)
        if network[network.logits].call != stop:
            return known[call.inputs[0].producer][call.inputs[0].index]
        # The decision is the layer's own activation.
        args, kwargs = arguments(call, known)
        return without_activation(call.operation)(*args, **kwargs)

    def predict(self, x, batch_size):
        """Logits as float64 (n, K), K = 1 for a single unit.

        Args:
            x: array (n, …), or a list with one for each of the network's inputs.
            batch_size: rows evaluated at once.
        """
        parts, dtypes = [], [t.dtype for t in self.network.graph.inputs]
        arrays = x if isinstance(x, list) else [x]
        with no_gradients():
            # Never through `predict`, which keeps a compiled function and rounds to floatx.
            for rows in steps(_slices(len(arrays[0]), batch_size), "batches"):
                given = [as_tensor(a[rows], d) for a, d in zip(arrays, dtypes, strict=True)]
                parts.append(as_array(self(given)))
        values = np.concatenate(parts)
        return values[:, None] if values.ndim == 1 else values


def _slices(count, size):
    return [slice(start, start + size) for start in range(0, count, size)]


def check_single_output(network, own, x, logits):
    """Refuses single outputs that are probabilities, but for a final sigmoid, which is known.

    Their sign is that of one class wherever they are evaluated: here at `x` and at random inputs of
    several sizes.

    Args:
        network: `Network`.
        own: `LogitsModel` of it.
        x: list of arrays as the model receives them.
        logits: float64 (n, K), at more inputs.

    Raises:
        UnsupportedLayerError: if all outputs lie between 0 and 1, and are not all the same.
    """
    if logits.shape[1] != 1 or network.decision is not None:
        return
    values, rng = [logits.ravel()], np.random.default_rng(0)
    for scale in (1e-2, 1.0, 1e2, 1e4) if all(a.dtype.kind == "f" for a in x) else ():
        with np.errstate(over="ignore"):
            probes = [(scale * rng.normal(size=(16, *a.shape[1:]))).astype(a.dtype) for a in x]
        values.append(own.predict(probes, 16).ravel())
    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    if len(values) and 0 <= values.min() < values.max() <= 1:
        raise UnsupportedLayerError(
            "A single output decides by its sign, or behind a final sigmoid by 1/2. Received: "
            f"model {network.model.name!r}, whose output is between 0 and 1 wherever it was "
            "evaluated, as a probability is. Let the model end with the sigmoid itself, or with "
            "the logit."
        )
