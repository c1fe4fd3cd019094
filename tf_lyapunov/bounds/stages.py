"""A model as a cascade of stages: each linear layer with what follows it up to the next one.

The budget of a stage bounds its linear map; pooling and batch normalization belong to the layer
before them, so that every stage's gain is (linear gain)·(largest slope)·(post gain).
"""

import dataclasses

import keras

from tf_lyapunov.bounds.tails import keeps_order
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.base import LipschitzLayer
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.position import PositionBias
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.scaling import BatchNormScale
from tf_lyapunov.program.network import Network, read_network
from tf_lyapunov.program.weights import kernel_maps
from tf_lyapunov.theory.sectors import Sector


@dataclasses.dataclass(frozen=True)
class Stage:
    """One linear layer of a model and what follows it up to the next linear layer or branch.

    Attributes:
        name: name of the layer call (with the path of nested models), unique.
        layer: the Keras layer that holds the kernel.
        maps: tuple of `(kernel variable, LinearMap)`; two for separable layers.
        sector: slope sector of the first activation after it; linear if there is none.
        post_gain: float, gain of the weight-free layers after it (pooling, further activations,
            …), rounded up.
        batch_norms: Keras layers folded into the linear map.
        post_batch_norms: Keras batch normalizations later in the stage (after the activation);
            their gain max|γ|/√(var + e) changes in training.
        pre_gain: gain of weight-free layers before the first linear layer (Rescaling, …); 1 for
            all stages but the first.
        pre_batch_norms: Keras batch normalizations before the first linear layer, not in
            `pre_gain`, since theirs changes in training.
        is_bare: whether the stage is its linear map and one activation alone, entry by entry: what
            a claim with ν ≥ 0 is about. A permutation or a change of sign has gain 1 too.
    """

    name: str
    layer: object
    maps: tuple
    sector: Sector
    post_gain: float = 1.0
    batch_norms: tuple = ()
    post_batch_norms: tuple = ()
    pre_gain: float = 1.0
    pre_batch_norms: tuple = ()
    is_bare: bool = True

    @property
    def surrounding_gain(self):
        """pre_gain·(largest slope)·post_gain·(unfolded normalizations), at present weights."""
        unfolded = (*self.pre_batch_norms, *self.post_batch_norms)
        norms = [BatchNormScale.of(layer).gain for layer in unfolded]
        return rounding.product_up(self.pre_gain, self.sector.magnitude, self.post_gain, *norms)


def stages(model, input_shapes=None):
    """Stages of a model, in the order of its graph.

    Args:
        model: a built Keras model, or a `Network`.
        input_shapes: as for `read_network`.

    Returns:
        Tuple of `Stage`. For a chain (`Network.is_chain`) the product of the stages' gains is the
        network's gain up to a final softmax; in branched graphs a stage ends at the first branch
        or merge, and only names identify it.

    Raises:
        UnsupportedLayerError, ValueError: as `read_network`.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3),
    ...     keras.layers.ReLU(), keras.layers.MaxPooling2D(3, 2), keras.layers.Flatten(),
    ...     keras.layers.Dense(2)])
    >>> [(stage.layer.name[:4], stage.sector.alpha, stage.post_gain) for stage in stages(model)]
    [('conv', 0.0, 2.0), ('dens', 1.0, 1.0)]
    """
    network = (
        model if isinstance(model, Network) else read_network(model, input_shapes, bounded=False)
    )
    nodes = {node.name: node for node in network.nodes}
    consumers = network.consumers()
    kept = _ancestors(nodes, network.logits)
    found, seen = [], set()
    for node in network.nodes:
        if node.kind != "linear" or node.call in seen or node.name not in kept:
            continue
        seen.add(node.call)
        first = node
        while nodes[consumers[node.name][0]].call == first.call if consumers[node.name] else False:
            following = nodes[consumers[node.name][0]]
            if following.kind != "linear":
                break
            node = following
        after = _following(node, nodes, consumers, kept)
        before = []
        if not found and network.is_chain:
            before = network.nodes[1 : network.nodes.index(first)]
        _check_fixed(network, (*before, *after))
        found.append(_stage(first, node, after, before, nodes))
    return tuple(found)


# Kinds whose gain is read anew, is promised, or does not depend on weights.
_KEPT = ("linear", "batch normalization", "lipschitz", "activation", "declared")
# Whose weights are added: they move no difference, whatever they become.
_SHIFTING = (BatchCentering, PositionBias)


def _check_fixed(network, nodes):
    """Refuses steps of a stage whose gain depends on weights that are trained."""
    calls = {call.name: call for call in network.graph.calls}
    for node in nodes:
        call = calls.get(node.call)
        if call is None or node.kind in _KEPT or isinstance(node.layer, _SHIFTING):
            continue
        held = [v for v in keras.tree.flatten((call.args, call.kwargs))
                if isinstance(v, keras.Variable)]  # fmt: skip
        if isinstance(call.operation, keras.Layer):
            held += call.operation.trainable_variables
        if any(v.trainable for v in held):
            raise UnsupportedLayerError(
                "A stage needs layers whose gain stays as it is in training. Received: step "
                f"{node.name!r} of kind {node.kind!r}, whose gain depends on trained weights. Set "
                "`trainable = False` on its layer, or certify the model as it is."
            )


def _ancestors(nodes, name):
    kept, stack = set(), [name]
    while stack:
        current = stack.pop()
        if current not in kept:
            kept.add(current)
            stack.extend(nodes[current].inputs)
    return kept


def _following(node, nodes, consumers, kept):
    """Nodes after `node` until the next linear node, branch or merge."""
    after = []
    while True:
        readers = [r for r in consumers[node.name] if r in kept]
        if len(readers) != 1:
            return after
        node = nodes[readers[0]]
        if node.kind == "linear" or len(node.inputs) != 1:
            return after
        after.append(node)


def _stage(first, last, after, before, nodes):
    activations = [n for n in after if n.sector is not None]
    norms = [n for n in after if n.kind == "batch normalization"]
    early = [n for n in before if n.kind == "batch normalization"]
    rest = [n for n in after if n not in norms and n not in activations[:1]]
    shape = nodes[first.inputs[0]].output_shape
    layer = first.layer
    held = kernel_maps(layer, shape)
    return Stage(
        name=first.call,
        layer=layer,
        maps=tuple(held),
        sector=activations[0].sector if activations else Sector.linear(),
        post_gain=rounding.product_up(*map(_lasting_gain, rest)) if rest else 1.0,
        batch_norms=last.batch_norms,
        post_batch_norms=tuple(n.layer for n in norms),
        pre_gain=rounding.product_up(*(_lasting_gain(n) for n in before if n not in early)),
        pre_batch_norms=tuple(n.layer for n in early),
        is_bare=first is last
        and not last.batch_norms
        and all(n.kind == "identity" or keeps_order(n) for n in (*before, *rest, *norms)),
    )


def _lasting_gain(node):
    """Gain of a node that stays true when the weights of a layer of this library change."""
    if node.kind != "lipschitz":
        return node.gain_upper_bound
    if not getattr(node.layer, "guaranteed", True):
        raise UnsupportedLayerError(
            "A stage needs layers whose gain is bounded while they are trained. Received: layer "
            f"{node.name!r} of type {type(node.layer).__name__} with norm={node.layer.norm!r}. "
            "Use norm='bound' and a step of at most 1, or certify the model as it is."
        )
    if not isinstance(node.layer, LipschitzLayer):
        return node.gain_upper_bound  # it has no weights, or an optimizer keeps it as it is
    promised = rounding.product_up(node.layer.max_gain, node.layer.rounding_inflation)
    return max(node.gain_upper_bound, promised)
