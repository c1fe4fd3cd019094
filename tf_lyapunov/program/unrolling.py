"""Attention and recurrent layers as the operations that they compute at inference.

Each is written out with the layer's own maps and weights, on symbolic tensors: a graph of steps
that are read one by one. What is written here is compared with the layer itself when the reading is
validated. They are read on a region alone (`read_network(on_region=True)`).
"""

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import registry

_layers = keras.layers
# Steps of a sequence that are written out at most.
LONGEST = 64


def is_opened(operation):
    """Whether a layer is one of those here, and no gain of its class was declared."""
    return type(operation) in _OPENED and registry.registered_gain(operation) is None


def inputs_of(layer, args, kwargs):
    """The signals of one call, as a list.

    Raises:
        UnsupportedLayerError: for masks, initial states and settings among the arguments.
    """
    given = list(args)
    if type(layer) is _layers.Attention and given:
        given = list(given[0]) if isinstance(given[0], (list, tuple)) else given
    # The key is the third of both attention layers.
    names = ("query", "value", "key") if type(layer) is _layers.MultiHeadAttention else ()
    kwargs = {k: v for k, v in kwargs.items() if v is not None and k != "training"}
    for name in names[len(given) :]:
        if name in kwargs:
            given.append(kwargs.pop(name))
    given = [a for a in given if a is not None]
    if not args and not names and len(kwargs) == 1:
        ((name, value),) = kwargs.items()
        if name in ("inputs", "sequences", "sequence"):
            given, kwargs = list(value) if isinstance(value, (list, tuple)) else [value], {}
    most = 3 if type(layer) in (_layers.MultiHeadAttention, _layers.Attention) else 1
    if kwargs or len(given) > most or not given:
        what = ", ".join(map(repr, kwargs)) or f"{len(given)} tensors"
        raise _refused(layer, f"called with {what}", "Call it without masks and initial states.")
    return given


def opened(layer, inputs):
    """The layer's output on symbolic tensors, by operations that are read one by one.

    Args:
        layer: one that `is_opened`.
        inputs: list of KerasTensors, as `inputs_of` orders them.

    Raises:
        UnsupportedLayerError: naming the setting that is not read.
    """
    if layer.compute_dtype != layer.variable_dtype:
        raise _refused(layer, f"of dtype policy {layer.dtype_policy.name!r}", "Use a single dtype.")
    for tensor in inputs:
        if None in tensor.shape[1:]:
            raise _refused(
                layer, f"on shape {tuple(tensor.shape)}", "Fix the input's length and width."
            )
    return _OPENED[type(layer)](layer, *inputs)


def _refused(layer, what, advice):
    return UnsupportedLayerError(
        "Attention and recurrent layers are read at inference, without masks and states of before, "
        f"over a known length. Received: layer {layer.name!r} of type {type(layer).__name__}, "
        f"{what}. {advice}"
    )


def _multi_head(layer, query, value, key=None):
    """softmax(q kᵀ/√d) v in every head, between the layer's own projections."""
    key = value if key is None else key
    if getattr(layer, "_sliding_window", None) is not None:
        raise _refused(layer, "with a sliding window", "Leave `sliding_window` out.")
    gate = _mapped(layer._gate_dense, query) if getattr(layer, "_use_gate", False) else None
    query, key = _mapped(layer._query_dense, query), _mapped(layer._key_dense, key)
    value = _mapped(layer._value_dense, value)
    query = keras.ops.multiply(query, float(layer._inverse_sqrt_key_dim))
    scores = keras.ops.einsum(layer._dot_product_equation, key, query)
    weights = layer._softmax(scores)  # over several axes at once, too
    found = keras.ops.einsum(layer._combine_equation, weights, value)
    if gate is not None:
        found = keras.ops.multiply(found, gate)
    return _mapped(layer._output_dense, found)


def _mapped(dense, x):
    """A projection, whose own call leaves the length open."""
    found = keras.ops.einsum(dense.equation, x, dense.kernel)
    found = found if dense.bias is None else keras.ops.add(found, dense.bias)
    # That of a gate is a sigmoid.
    return found if dense.activation is keras.activations.linear else dense.activation(found)


def _attention(layer, query, value=None, key=None):
    """softmax(s q kᵀ) v."""
    if value is None or len(query.shape) != 3:
        raise _refused(
            layer,
            f"on shape {tuple(query.shape)}",
            "Call it on [query, value] of (n, steps, width).",
        )
    if layer.score_mode != "dot":
        raise _refused(layer, f"with score_mode={layer.score_mode!r}", "Use 'dot'.")
    key = value if key is None else key
    scores = keras.ops.matmul(query, keras.ops.swapaxes(key, -2, -1))
    if layer.scale is not None:
        scores = keras.ops.multiply(scores, layer.scale)
    return keras.ops.matmul(keras.ops.softmax(scores, axis=-1), value)


def _recurrent(layer, sequence):
    """One step of the layer's own cell after the other, from a state of zeros."""
    if layer.stateful:
        raise _refused(layer, "with stateful=True", "Use stateful=False.")
    if layer.return_state:
        raise _refused(layer, "with return_state=True", "Return the sequence or its end alone.")
    if len(sequence.shape) != 3:
        raise _refused(layer, f"on shape {tuple(sequence.shape)}", "Call it on (n, steps, width).")
    count = sequence.shape[1]
    if not 1 <= count <= LONGEST:
        raise _refused(
            layer, f"over {count} steps", f"Bounds over more than {LONGEST} steps say nothing."
        )
    cell = layer.cell
    if type(cell) is not _CELLS[type(layer)] or "call" in vars(cell):
        raise _refused(layer, f"with a cell of type {type(cell).__name__}", "Keep its own cell.")
    zeros = keras.ops.zeros((1, cell.units), layer.compute_dtype)
    states = [zeros] * (2 if type(layer) is _layers.LSTM else 1)
    outputs = []
    order = range(count)[::-1] if layer.go_backwards else range(count)
    for t in order:
        x = sequence[:, t]
        if type(layer) is _layers.SimpleRNN:
            found = _simple(cell, x, states[0])
            states = [found]
        else:
            found, states = cell.call(x, states, training=False)
        outputs.append(found)
    if not layer.return_sequences:
        return outputs[-1]
    parts = [keras.ops.reshape(found, (-1, 1, cell.units)) for found in outputs]
    return parts[0] if count == 1 else keras.ops.concatenate(parts, axis=1)


def _simple(cell, x, state):
    """activation(xW + b + hU), whose own call draws masks of dropout at inference, too."""
    found = keras.ops.matmul(x, cell.kernel)
    if cell.bias is not None:
        found = found + cell.bias
    return cell.activation(found + keras.ops.matmul(state, cell.recurrent_kernel))


_CELLS = {
    _layers.SimpleRNN: _layers.SimpleRNNCell,
    _layers.GRU: _layers.GRUCell,
    _layers.LSTM: _layers.LSTMCell,
}
_OPENED = {
    _layers.MultiHeadAttention: _multi_head,
    _layers.Attention: _attention,
    **dict.fromkeys(_CELLS, _recurrent),
}
