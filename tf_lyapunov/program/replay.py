"""The calls of a model, repeated one by one with the model's own layers."""

import keras

from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.tensors import as_tensor


class Replay:
    """The calls of a network's model, repeated one by one in the model's own precision.

    Args:
        network: `network.Network`.
    """

    def __init__(self, network):
        self.network = network

    def __call__(self, inputs, until=None):
        """Tensors of every call by name, each a tuple of outputs.

        Args:
            inputs: list of arrays, one per input of the network.
            until: name of the call to stop before, or None.
        """
        tensors = self.network.graph.inputs
        return self.of_tensors(
            [as_tensor(x, t.dtype) for t, x in zip(tensors, inputs, strict=True)], until
        )

    def of_tensors(self, inputs, until=None):
        """As a call, of tensors of the inputs' own types; they may be those of a traced function.

        Returns:
            dict of names and tuples of tensors, which are the inputs' and those of the calls.
        """
        graph = self.network.graph
        known = {t.producer: (x,) for t, x in zip(graph.inputs, inputs, strict=True)}
        for call in graph.calls:
            if call.name == until:
                break
            args, kwargs = arguments(call, known)
            known[call.name] = tuple(keras.tree.flatten(call.operation(*args, **kwargs)))
        return known


def arguments(call, known):
    """Arguments of a call with tensors in place of `graph.Tensor`.

    Args:
        call: `graph.Call`.
        known: dict of producers' names and tuples of tensors.
    """

    def fill(a):
        return known[a.producer][a.index] if isinstance(a, Tensor) else a

    return keras.tree.map_structure(fill, (call.args, call.kwargs))


def without_activation(layer):
    """The same layer, with the same variables, that stops before its activation."""
    # `copy.copy` would serialise the layer and so copy the weights.
    shadow = object.__new__(type(layer))
    shadow.__dict__.update(layer.__dict__)
    object.__setattr__(shadow, "activation", keras.activations.linear)
    return shadow
