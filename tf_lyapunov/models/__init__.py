"""Networks by name, as plain functional Keras models that end in logits.

`plain` holds the papers' networks and small ones for examples, `residual` the papers' ResNets,
`lipschitz` and `mixers` those whose Lipschitz constant is bounded by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras

from tf_lyapunov.models.lipschitz import (
    convex_potential,
    kw_large,
    lip_conv_net,
    liresnet,
    two_conv_two_dense,
)
from tf_lyapunov.models.mixers import lipnext, lipnext_block, potential_mixer
from tf_lyapunov.models.plain import ACTIVATIONS, alexnet_cifar, cnn, mlp, residual_mlp
from tf_lyapunov.models.residual import preact_resnet, preact_resnet18, resnet50

__all__ = [
    "ACTIVATIONS",
    "BUILDERS",
    "alexnet_cifar",
    "build",
    "cnn",
    "convex_potential",
    "kw_large",
    "lip_conv_net",
    "lipnext",
    "lipnext_block",
    "liresnet",
    "mlp",
    "potential_mixer",
    "preact_resnet",
    "preact_resnet18",
    "residual_mlp",
    "resnet50",
    "two_conv_two_dense",
]

BUILDERS = {
    "mlp": mlp,
    "residual_mlp": residual_mlp,
    "cnn": cnn,
    "alexnet_cifar": alexnet_cifar,
    "preact_resnet": preact_resnet,
    "preact_resnet18": preact_resnet18,
    "resnet50": resnet50,
    "two_conv_two_dense": two_conv_two_dense,
    "kw_large": kw_large,
    "lip_conv_net": lip_conv_net,
    "convex_potential": convex_potential,
    "liresnet": liresnet,
    "lipnext": lipnext,
    "potential_mixer": potential_mixer,
}


def build(
    spec: Mapping | str, input_shape: Sequence[int], num_classes: int, *, seed: int | None = None
) -> keras.Model:
    """Build a model from a plain description, as it stands in a configuration file.

    Args:
        spec: a name of `models.BUILDERS`, or a mapping with that `name` and the arguments of the
            builder.
        input_shape: shape of one input.
        num_classes: number of logits.
        seed: when given, `keras.utils.set_random_seed(seed)` is called first, so that two builds
            start from the same weights.

    Returns:
        A built functional model from inputs to logits.

    Raises:
        ValueError: the name or an argument is unknown, or a value is out of range.

    Example:

    >>> build({"name": "mlp", "widths": [8]}, (6,), 3, seed=0).count_params()
    83
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if name not in BUILDERS:
        raise ValueError(
            f"`spec['name']` must be one of {', '.join(BUILDERS)}. Received: name={name!r}."
        )
    if not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(
            "`input_shape` must be positive integers, without the batch axis. Received: "
            f"input_shape={tuple(input_shape)}."
        )
    if seed is not None:
        keras.utils.set_random_seed(seed)
        if "seed" in (BUILDERS[name].__kwdefaults__ or {}):
            arguments.setdefault("seed", seed)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"`num_classes` must be positive. Received: num_classes={num_classes}.")
    try:
        return BUILDERS[name](tuple(input_shape), num_classes, **arguments)
    except TypeError as error:
        raise ValueError(
            f"`spec` does not fit the model {name!r}: {error}. Received: spec={dict(arguments)}."
        ) from error
