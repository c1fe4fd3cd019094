"""Reading a model leaves it as it was."""

import contextlib
import functools

import keras

from tf_lyapunov.interruption import Undo, uninterrupted
from tf_lyapunov.layers.base import EffectiveLayer
from tf_lyapunov.program.inputs import built_on


def leaves_unchanged(function):
    """Decorates a function of a model and of inputs, its first arguments, that only reads it.

    A model that is not built yet is built on the inputs first, as `keras.Model.predict` does it.
    Where it fails, or Ctrl-C ends it, the caches of Lipschitz layers are as before; else they are
    up to date. Neither makes a difference to what the model computes.
    """

    @functools.wraps(function)
    def reading(model, *args, **kwargs):
        built_on(model, args[0] if args else kwargs.get("x"))
        with Undo() as undo, without_nodes(model):
            note_caches(model, undo)
            return function(model, *args, **kwargs)

    return reading


@contextlib.contextmanager
def without_nodes(model):
    """Takes out the nodes that symbolic calls within it leave in the model's layers."""
    found = {}
    for layer in _layers(model):
        for operation in (layer, *getattr(layer, "operations", ())):
            found[id(operation)] = operation
    counts = [(op, len(op._inbound_nodes), len(op._outbound_nodes)) for op in found.values()]
    try:
        yield
    finally:
        with uninterrupted():
            for operation, inbound, outbound in counts:
                del operation._inbound_nodes[inbound:], operation._outbound_nodes[outbound:]


def note_caches(model, undo):
    """Has an `Undo` put back the caches of a model's Lipschitz layers."""
    for layer in _layers(model):
        if isinstance(layer, EffectiveLayer):
            layer.note_cache(undo)


def _layers(model):
    # Other things are for the block to refuse.
    return model._flatten_layers() if isinstance(model, keras.Model) else ()
