"""Gains of users' own layers, each with the assumption under which it holds."""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable

import keras


@dataclasses.dataclass(frozen=True)
class RegisteredGain:
    """A user's rule for one layer class, and the assumption that certificates will list."""

    rule: Callable
    assumption: str
    takes_shape: bool


_REGISTRY: dict[type, RegisteredGain] = {}
# In the order in which messages list them.
_PROVEN: dict[type, None] = {}


def keep(classes):
    """Notes classes whose rules are proved, which no registration may replace."""
    _PROVEN.update(dict.fromkeys(classes))


def is_proven(layer_class):
    """Whether this library has a rule for exactly this class."""
    return layer_class in _PROVEN


def kept():
    """The classes whose rules are proved."""
    return tuple(_PROVEN)


def register_gain(layer_class, rule, *, assumption=None):
    """Declares an upper bound on the l2 gain of your own layer, so that certificates can use it.

    The rule must return, for every instance, a number g with

        ‖f(u) - f(v)‖ ≤ g·‖u - v‖   for all inputs u, v of the layer at inference,

    in the l2 norm of the flattened tensors (of all inputs together, if the layer has several).
    Nothing checks this: every certificate that passes through the layer lists `assumption`. The
    rule holds for this class alone, not for its subclasses, whose `call` may differ. A later
    registration of the same class replaces the earlier one; `rule=None` removes it.

    Args:
        layer_class: a subclass of `keras.Layer`.
        rule: a function `rule(layer) -> float` or `rule(layer, input_shape) -> float`, with the
            batch axis in `input_shape`, or a constant number; `None` forgets the class.
        assumption: one sentence on why the gain holds; required unless `rule` is `None`.

    Raises:
        TypeError: if `layer_class` is no Keras layer class, or `rule` cannot be called.
        ValueError: if the assumption is empty or a constant gain is negative, NaN or infinite.

    Example:

    >>> import keras
    >>> class Doubling(keras.layers.Layer):
    ...     def call(self, x):
    ...         return 2 * x
    >>> register_gain(Doubling, lambda layer: 2.0, assumption="Doubling multiplies by 2.")
    >>> register_gain(Doubling, None)
    """
    if not (inspect.isclass(layer_class) and issubclass(layer_class, keras.Layer)):
        raise TypeError(
            "`layer_class` must be a subclass of `keras.Layer`. "
            f"Received: layer_class={layer_class!r}. Pass the class, not an instance."
        )
    if layer_class is keras.Layer or issubclass(layer_class, keras.Model):
        raise TypeError(
            "`layer_class` must be a layer class of your own. "
            f"Received: layer_class={layer_class.__name__}. Models are opened, not registered."
        )
    if layer_class in _PROVEN:
        raise ValueError(
            "A layer with a proven rule keeps it. "
            f"Received: layer_class={layer_class.__name__}. Register a subclass of your own."
        )
    if rule is None:
        _REGISTRY.pop(layer_class, None)
        return
    if not isinstance(assumption, str) or not assumption.strip():
        raise ValueError(
            "`assumption` must say in a sentence why the gain holds; certificates print it. "
            f"Received: assumption={assumption!r}."
        )
    if isinstance(rule, numbers.Real) and not isinstance(rule, bool):
        constant = check_gain(rule, layer_class.__name__)
        rule, takes_shape = (lambda layer: constant), False
    elif callable(rule):
        takes_shape = _takes_shape(rule)
    else:
        raise TypeError(
            "`rule` must be a function of the layer, or a number. "
            f"Received: rule={rule!r} of type {type(rule).__name__}."
        )
    _REGISTRY[layer_class] = RegisteredGain(rule, assumption.strip(), takes_shape)


def registered_gain(layer):
    """The `RegisteredGain` of exactly this layer's class, or None."""
    return _REGISTRY.get(type(layer))


def evaluate(registered, layer, input_shape):
    """The registered gain of one layer, checked."""
    arguments = (layer, input_shape) if registered.takes_shape else (layer,)
    return check_gain(registered.rule(*arguments), f"{type(layer).__name__} {layer.name!r}")


def check_gain(value, owner):
    """`value` as a float, refused unless it is a finite non-negative number."""
    try:
        gain = float(value)
    except (TypeError, ValueError):
        gain = math.nan
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(
            f"A registered gain must be a finite number ≥ 0. Received: {value!r} for {owner}."
        )
    return gain


def _takes_shape(rule):
    """Whether the rule wants `(layer, input_shape)` instead of `(layer)`."""
    try:
        parameters = inspect.signature(rule).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(positional) > 2:
        raise TypeError(
            "`rule` must take `(layer)` or `(layer, input_shape)`. "
            f"Received: a function of {len(positional)} arguments."
        )
    return len(positional) == 2
