"""Arguments in the order of Keras' layers: those that changed place, and those that a layer lacks.

Positional arguments of a layer with a counterpart in Keras stand where Keras has them, and its own
follow by keyword alone: code that swaps `keras.layers.Dense` for a layer of this library means the
same.
"""

import functools
import inspect
import warnings

import numpy as np

# Types of values that no activation, and no strides, have.
NUMBERS = (bool, int, float, np.bool_, np.number)
FLAGS = (bool, np.bool_)
# What layers on images can do of what `keras.layers.Conv2D` can.
IMAGES = {
    "data_format": (None, "channels_last"),
    "groups": (1,),
    "dilation_rate": (1, (1,), (1, 1)),
}
# What a Lipschitz layer says of arguments of Keras that it cannot honour.
_WHY = {
    "kernel_constraint": "The kernel that is applied is bounded by construction: use `max_gain`.",
    "lora_rank": "An adapter added to the kernel would leave its bound.",
    "lora_alpha": "An adapter added to the kernel would leave its bound.",
    "quantization_config": "A rounded kernel would leave its bound.",
    "data_format": "Put `keras.layers.Permute((2, 3, 1))` before it and `Permute((3, 1, 2))` after "
    "it.",
    "groups": "For grouped channels use `SpectralConv2D`.",
    "dilation_rate": "For dilated kernels use `SpectralConv2D`.",
    "strides": "Its output has the shape of its input: put a pooling or `InvertibleDownSampling` "
    "behind it.",
    "padding": "For other paddings use `SpectralConv2D`.",
}


def formerly(*names, kept, mistaken=object):
    """Decorator of `__init__` that still takes positional arguments in their former order.

    A warning says so: the next version takes them as Keras does.

    Args:
        names: the former order, without `self`.
        kept: number of leading arguments whose place has not changed.
        mistaken: types of a value that shows, in the first place that has changed, that the former
            order is meant.
    """

    def decorate(init):
        @functools.wraps(init)
        def wrapped(self, *args, **kwargs):
            if len(args) > kept and isinstance(args[kept], mistaken):
                moved = dict(zip(names[kept:], args[kept:], strict=False))
                if len(args) > len(names) or moved.keys() & kwargs.keys():
                    raise TypeError(
                        f"{type(self).__name__} takes {len(names)} positional arguments in the "
                        f"former order, {', '.join(names)}. Received: {len(args)}, and "
                        f"{sorted(kwargs)} by keyword."
                    )
                written = ", ".join(f"{name}={value!r}" for name, value in moved.items())
                warnings.warn(
                    f"Positional arguments of {type(self).__name__} follow those of Keras' layer. "
                    f"Received: {written} by position, as before. Write `{written}`: the next "
                    "version takes these places as Keras does.",
                    FutureWarning,
                    stacklevel=2,
                )
                args, kwargs = args[:kept], {**moved, **kwargs}
            init(self, *args, **kwargs)

        # Keras reads it without looking through wrappers.
        wrapped.__signature__ = inspect.signature(init)
        return wrapped

    return decorate


def extending(parent, *, positional=True, lacking=()):
    """Decorator of an `__init__` with `*args`: its signature names those of the class it extends.

    `def __init__(self, units, *args, own, **kwargs)` shows what `parent` takes by position, then
    `own`, then the parent's other keywords. Without `positional` all of the parent's are keywords:
    for layers that lack an argument that Keras has before them. `lacking` names those of the parent
    that are not passed on.
    """

    def decorate(init):
        mine = list(inspect.signature(init).parameters.values())
        above = list(inspect.signature(parent.__init__).parameters.values())
        named = {*(p.name for p in mine), *lacking}
        places = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p for p in mine if p.kind is p.KEYWORD_ONLY]
        for parameter in (p for p in above if p.name not in named):
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and positional:
                places.append(parameter)
            elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                keywords.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        rest = [p for p in mine if p.kind is p.VAR_KEYWORD]
        init.__signature__ = inspect.Signature([*places, *keywords, *rest])
        return init

    return decorate


def without(layer, kwargs, **allowed):
    """`kwargs` less the arguments of Keras' layer that `layer` has at one value only.

    Args:
        layer: the layer, for messages.
        kwargs: keyword arguments as given.
        **allowed: for every such argument the values that say what the layer does anyhow.

    Raises:
        ValueError: for another value, with the reason and what to use.
    """
    kept = {}
    for name, value in kwargs.items():
        if name not in allowed:
            kept[name] = value
            continue
        values = allowed[name]
        same = tuple(value) if isinstance(value, list) else value
        if not any(same is v or (type(same) is type(v) and same == v) for v in values):
            shown = " or ".join(repr(v) for v in values)
            raise ValueError(
                f"`{name}` of a {type(layer).__name__} must be {shown}. "
                f"Received: {name}={value!r}. {_WHY[name]}"
            )
    return kept
