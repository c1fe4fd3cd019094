"""All operations that a program can hold, assembled from the families.

A family is a module of `families` with the names below; `docs/adding-an-operation.md` says how to
write one. A new family is one more name in `FAMILIES`.
"""

import keras

from tf_lyapunov.program import registry, rounding
from tf_lyapunov.program.families import (
    declared,
    einsum,
    elementwise,
    fourier,
    fused,
    indexing,
    l2_attention,
    linear,
    merging,
    moving,
    normalizing,
    norms,
    orthogonal,
    pooling,
    potential,
    preprocessing,
    products,
    reducing,
    residuals,
    response,
    sandwich,
    scaling,
    separable,
    skew,
    softmax,
    sorting,
    two_sided,
    unchanged,
)
from tf_lyapunov.program.graph import check_own_call
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.wrapping import ADDED, Part

FAMILIES = (
    orthogonal,
    linear,
    elementwise,
    fused,
    softmax,
    pooling,
    merging,
    scaling,
    moving,
    unchanged,
    sorting,
    two_sided,
    norms,
    response,
    residuals,
    potential,
    l2_attention,
    sandwich,
    fourier,
    skew,
    normalizing,
    indexing,
    separable,
    reducing,
    einsum,
    preprocessing,
)
# Layer class -> function of a `graph.Call` that gives its list of operations.
READERS = {}
# Layer class -> function of a `graph.Call` that gives its `Gain`.
RULES = {}
# The same for operations of `keras.ops`, by the name of their class.
BARE_READERS = {}
BARE_RULES = {}
# Layers that may be called on several tensors.
SEVERAL_INPUTS = []


def include(family):
    """Adds a family's operations; what is there already stays."""
    for table, name in (
        (READERS, "READERS"),
        (RULES, "RULES"),
        (BARE_READERS, "BARE_READERS"),
        (BARE_RULES, "BARE_RULES"),
    ):
        for key, function in getattr(family, name, {}).items():
            table.setdefault(key, function)
    SEVERAL_INPUTS.extend(getattr(family, "SEVERAL_INPUTS", ()))
    registry.keep((*getattr(family, "READERS", ()), *getattr(family, "RULES", ())))


for _family in FAMILIES:
    include(_family)


def gain_of(call):
    """`Gain` of one `graph.Call` that is not a dense or convolution layer.

    Raises:
        UnsupportedLayerError: for what has no rule, and for operations that mix samples.
    """
    operation = call.operation
    if not isinstance(operation, keras.Layer):
        return _bare_gain(call)
    registered = registry.registered_gain(operation)
    if registered is not None:
        return declared.gain(registered, call)
    rule = RULES.get(type(operation))
    if rule is None:
        refuse(operation)
    if len(call.inputs) != 1 and type(operation) not in SEVERAL_INPUTS:
        refuse(operation, "it is called on several tensors (a mask or a state)")
    return _of_floats(rule, call)


def _bare_gain(call):
    operation = call.operation
    check_own_call(operation)
    recorded = operation.operation if type(operation) is Part else operation
    known = type(recorded).__module__.startswith("keras.") or type(recorded) in ADDED
    if not known:
        refuse(operation, "it is not one of Keras's own operations")
    if len(call.outputs) != 1 or not call.inputs:
        refuse(operation)
    if not call.outputs[0].shape:
        refuse(operation, "it combines samples along the batch axis")
    rule = BARE_RULES.get(type(operation).__name__)
    if rule is None and len(call.inputs) != 1:
        refuse(operation)
    return _of_floats(rule or elementwise.bare_gain, call)


def _of_floats(rule, call):
    """The gain by a rule, or a refusal of arithmetic on integers."""
    try:
        return rule(call)
    except rounding.NoRoundoff:
        dtype = call.outputs[0].dtype
        reason = f"it computes in {dtype}, where results wrap around; put a Rescaling before it"
        refuse(call.operation, reason)


def operations_of(call):
    """Operations of one call, the first of which takes all its inputs.

    Raises:
        UnsupportedLayerError: if it is not evaluated apart from the model.
    """
    operation = call.operation
    if products.is_product(call):
        return tuple(products.read(call))
    if not isinstance(operation, keras.Layer):
        reader = BARE_READERS.get(type(operation).__name__, elementwise.read_bare)
        return tuple(reader(call))
    if registry.registered_gain(operation) is not None:
        return declared.read(call)
    reader = READERS.get(type(operation))
    if reader is None or len(call.outputs) != 1:
        raise elementwise.unread(operation, "a function of its own")
    return tuple(reader(call))
