"""Mixers of patches with gain 1: shifts between positions, maps of the channels within each.

Their heads are those of `models.lipschitz`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras

from tf_lyapunov import layers
from tf_lyapunov.models.lipschitz import SORTING, last_layer, one_of
from tf_lyapunov.models.plain import _counts, _image, _Names

# Blocks and channels; with memories for `potential_mixer`. Sizes of this library.
LIPNEXT_SIZES = {"S": (4, 64), "M": (8, 128), "L": (16, 256)}
MIXER_SIZES = {"S": (4, 64, 128), "M": (8, 128, 256), "L": (16, 256, 512)}


def lipnext_block(
    x,
    *,
    share: float = 0.125,
    activation: str = "max_min",
    names: Callable[[str], str] | None = None,
):
    """A block of `lipnext`, of gain 1: orthogonal maps of channels around shifts of groups of them.

        z = sort(S(R(x + p))·M + b),   RᵀR = I,   MᵀM = I                                     (1)

    The published block is M Rᵀ S R; as M and R are free and orthogonal, M here stands for M Rᵀ.
    `optimizers.Stiefel(inner)` keeps both orthogonal, and certificates measure how far they are.

    Args:
        x: symbolic images or sequences, channels last, of known size.
        share: of channels that `ShiftMixing` moves in each direction.
        activation: as in `two_conv_two_dense`.
        names: function of a part ("position", "before", "shift", "after", "activation") to the name
            of its layer; None: names by Keras.

    Returns:
        Symbolic tensor of the shape of `x`.

    Raises:
        ValueError: for an unknown activation, or as `ShiftMixing` and `PositionBias` do.

    Example:

    >>> x = keras.Input((4, 4, 8))
    >>> lipnext_block(x).shape
    (None, 4, 4, 8)

    Reference: "LipNeXt: scaling up Lipschitz-based certified robustness to billion-parameter
    models" (arXiv 2601.18513).
    """
    sort, names = SORTING[one_of("activation", activation, SORTING)], names or (lambda part: None)
    channels = x.shape[-1]
    x = layers.PositionBias(name=names("position"))(x)
    x = layers.OrthogonalDense(channels, use_bias=False, name=names("before"))(x)
    x = layers.ShiftMixing(share, "channels_last", name=names("shift"))(x)
    x = layers.OrthogonalDense(channels, name=names("after"))(x)
    return sort(name=names("activation"))(x)


def lipnext(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    size: str | Sequence[int] = "S",
    patch: int = 4,
    *,
    share: float = 0.125,
    activation: str = "max_min",
    head: str = "normalized",
) -> keras.Model:
    """LipNeXt-like network: orthogonal maps of channels, and shifts in place of convolutions.

        x ← sort(S(R(x + p))·M + b),   RᵀR = I,   MᵀM = I                                     (1)

    with p a bias of every position and S circular shifts of groups of channels, between a stem that
    moves pixels of a patch into channels and pooling by l2 norms. Published blocks multiply by
    M Rᵀ; as both are free and orthogonal, M here stands for that product. Train it with
    `optimizers.Stiefel(inner)`, which keeps R and M orthogonal.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        size: "S", "M" or "L", or (number of blocks, channels); channels even, and at least
            1/share of them.
        patch: side of a patch; zeros are added to sides that it does not divide.
        share: of channels that `ShiftMixing` moves in each direction.
        activation, head: as in `two_conv_two_dense`.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> lipnext((8, 8, 3), 3, size=(2, 16)).output_shape
    (None, 3)

    Reference: after "LipNeXt: scaling up Lipschitz-based certified robustness to billion-parameter
    models" (arXiv 2601.18513); sizes of this library.
    """
    one_of("activation", activation, SORTING)
    names = _Names()
    if isinstance(size, str):
        size = LIPNEXT_SIZES[one_of("size", size, LIPNEXT_SIZES)]
    blocks, channels = size
    _counts("blocks, channels, patch", (blocks, channels, patch))
    inputs, x = _patches(input_shape, patch)
    x = layers.OrthogonalDense(channels, name="stem")(x)
    for _ in range(blocks):
        x = lipnext_block(x, share=share, activation=activation, names=names)
    x = layers.GlobalL2NormPooling2D(name="pooling")(x)
    return keras.Model(
        inputs, last_layer(x, num_classes, head, layers.OrthogonalDense), name="lipnext"
    )


def potential_mixer(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    size: str | Sequence[int] = "S",
    patch: int = 4,
    *,
    beta: float = 4.0,
    share: float = 0.125,
    head: str = "normalized",
) -> keras.Model:
    """Mixer of patches: shifts between positions, softmax over memories within each.

        x ← A(S(x + p)),   A(x) = x - (4/(βs²))·W softmax(β(Wᵀx + b)),   s ≥ ‖W‖

    with p a bias of every position, S circular shifts of groups of channels (`ShiftMixing`) and A a
    `SoftmaxPotential`: gain 1 for all weights, with any optimizer.

    Args:
        input_shape, num_classes, patch, share, head: as in `lipnext`.
        size: "S", "M" or "L", or (number of blocks, channels, memories).
        beta: β, how sharply the softmax chooses.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> potential_mixer((8, 8, 3), 3, size=(2, 16, 8)).output_shape
    (None, 3)
    """
    names = _Names()
    if isinstance(size, str):
        size = MIXER_SIZES[one_of("size", size, MIXER_SIZES)]
    blocks, channels, memories = size
    _counts("blocks, channels, memories, patch", (blocks, channels, memories, patch))
    inputs, x = _patches(input_shape, patch)
    x = layers.CayleyDense(channels, name="stem")(x)
    for _ in range(blocks):
        x = layers.PositionBias(name=names("position"))(x)
        x = layers.ShiftMixing(share, name=names("shift"))(x)
        x = layers.SoftmaxPotential(memories, beta, name=names("memory"))(x)
    x = layers.GlobalL2NormPooling2D(name="pooling")(x)
    return keras.Model(inputs, last_layer(x, num_classes, head, layers.CayleyDense), name="mixer")


def _patches(input_shape, patch):
    """`(inputs, x)`, with the pixels of each patch among the channels of x."""
    inputs = x = keras.Input(_image(input_shape), name="input")
    high, wide = (-n % patch for n in x.shape[1:3])
    if high or wide:
        x = keras.layers.ZeroPadding2D(((0, high), (0, wide)), name="padding")(x)
    if patch > 1:
        x = layers.InvertibleDownSampling(patch, name="patches")(x)
    return inputs, x
