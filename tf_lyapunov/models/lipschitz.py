"""Networks of layers whose Lipschitz constant is bounded by construction.

Every model has a gain of at most 1 to the features that its last layer reads. With `head=
"normalized"` the class vectors of that layer have norm 1 (last-layer normalisation), so that a
difference of two logits has a gain of at most 2; with `head="bounded"` the logits have gain 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras

from tf_lyapunov import layers
from tf_lyapunov.models.plain import _counts, _image, _Names

FAMILIES = {
    "cayley": (layers.CayleyConv2D, layers.CayleyDense),
    "skew": (layers.SkewOrthogonalConv2D, layers.CayleyDense),
    "almost_orthogonal": (layers.AlmostOrthogonalConv2D, layers.AlmostOrthogonalDense),
    "spectral": (layers.SpectralConv2D, layers.SpectralDense),
    "bjorck": (layers.SpectralConv2D, layers.BjorckDense),
    "sandwich": (layers.SandwichConv2D, layers.SandwichDense),
    "convex_potential": (layers.ConvexPotentialConv2D, layers.ConvexPotentialDense),
    "sdp": (layers.SDPLipschitzConv2D, layers.SDPLipschitzDense),
    "block_reflector": (layers.BlockReflectorConv2D, layers.BlockReflectorDense),
}
# Of gain 1 as long as `optimizers.Stiefel` trains them; certificates measure how far they are.
KEPT_FAMILIES = {"orthogonal": (layers.OrthogonalConv2D, layers.OrthogonalDense)}
# Their activation stands between two maps inside the layer.
RESIDUAL = ("convex_potential", "sdp")
NOT_LINEAR = ("sandwich", *RESIDUAL)
HEADS = ("normalized", "bounded")
SORTING = {
    "max_min": layers.MaxMin,
    "group_sort": layers.GroupSort,
    "householder": layers.Householder,
    "relu": keras.layers.ReLU,
}
# Depth and channels of the convolutional part, depth and hidden units of the dense part.
CONVEX_POTENTIAL_SIZES = {
    "S": (20, 45, 7, 2048),
    "M": (30, 60, 10, 2048),
    "L": (90, 60, 15, 4096),
    "XL": (120, 70, 15, 4096),
}


def one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(str, allowed))}. Received: {name}={value!r}."
        )
    return value


def last_layer(x, num_classes, head, dense=layers.SpectralDense):
    one_of("head", head, HEADS)
    if head == "normalized":
        return layers.NormalizedDense(num_classes, name="logits")(x)
    return dense(num_classes, name="logits")(x)


class _Blocks:
    """Convolutions and dense layers of one family, each followed by its activation."""

    def __init__(self, family, activation):
        known = FAMILIES | KEPT_FAMILIES
        self.family = one_of("family", family, known)
        self.activation = one_of("activation", activation, SORTING)
        self.convolution, self.dense = known[family]
        # Residual layers keep their width.
        self.last = layers.SpectralDense if family in RESIDUAL else self.dense
        self.names = _Names()

    def conv(self, x, filters, kernel_size, strides=1):
        if self.family in RESIDUAL:
            x, strides = self._rearranged(x, filters, strides), None
        return self._activated(self.linear(x, filters, kernel_size, strides))

    def units(self, x, units):
        return self._activated(self.dense(units, **self._inside(), name=self.names("dense"))(x))

    def linear(self, x, filters, kernel_size, strides=None):
        """The convolution alone; its strides where the family has any."""
        if self.family == "skew":  # odd sides
            kernel_size += 1 - kernel_size % 2
        options = self._inside() if strides is None else {"strides": strides, **self._inside()}
        return self.convolution(filters, kernel_size, **options, name=self.names("conv"))(x)

    def sort(self, x):
        return SORTING[self.activation](name=self.names("activation"))(x)

    def _activated(self, x):
        return x if self.family in NOT_LINEAR else self.sort(x)

    def _inside(self):
        return {"activation": "relu"} if self.family in NOT_LINEAR else {}

    def _rearranged(self, x, filters, strides):
        """Space to depth (zeros added to sides that it does not divide), then zero channels."""
        if strides > 1:
            high, wide = (-n % strides for n in x.shape[1:3])
            if high or wide:
                sides = ((0, high), (0, wide))
                x = keras.layers.ZeroPadding2D(sides, name=self.names("padding"))(x)
            x = layers.InvertibleDownSampling(strides, name=self.names("downsampling"))(x)
        if x.shape[-1] >= filters:
            return x
        return layers.ChannelPadding(filters, name=self.names("channel_padding"))(x)


def _network(name, input_shape, num_classes, blocks, convolutions, widths, head):
    one_of("head", head, HEADS)
    inputs = x = keras.Input(_image(input_shape), name="input")
    for filters, kernel_size, strides in convolutions:
        x = blocks.conv(x, filters, kernel_size, strides)
    x = keras.layers.Flatten(name="flatten")(x)
    for width in widths:
        x = blocks.units(x, width)
    return keras.Model(inputs, last_layer(x, num_classes, head, blocks.last), name=name)


def two_conv_two_dense(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    family: str = "cayley",
    activation: str = "group_sort",
    filters: Sequence[int] = (16, 32),
    widths: Sequence[int] = (100,),
    head: str = "normalized",
) -> keras.Model:
    """ "2C2F" for MNIST, c(16,4,2).c(32,4,2).f100.f10, of layers of gain 1.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        family: one of `FAMILIES`; skew filters have side 5 in place of 4. "bjorck" stands for the
            dense layers, behind spectral convolutions; "orthogonal" for explicit orthogonal
            kernels, to be trained with `optimizers.Stiefel`. The residual layers
            "convex_potential" and "sdp" keep their width: strides move pixels into channels, zeros
            are added if `filters` is larger than that, and `filters` and `widths` count hidden
            units.
        activation: one of `SORTING`; "sandwich", "convex_potential" and "sdp" have a ReLU inside.
        filters: channels of the convolutions.
        widths: units of the hidden dense layers.
        head: "normalized" or "bounded".

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> two_conv_two_dense((8, 8, 1), 3, filters=(4, 6), widths=(8,)).output_shape
    (None, 3)

    Reference: Wang and Manchester (2023), section 5.
    """
    blocks = _Blocks(family, activation)
    filters = _counts("filters", filters, allow_empty=False)
    return _network(
        "two_conv_two_dense",
        input_shape,
        num_classes,
        blocks,
        [(n, 4, 2) for n in filters],
        _counts("widths", widths),
        head,
    )


def kw_large(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    family: str = "cayley",
    activation: str = "group_sort",
    channels: int = 32,
    units: int = 512,
    head: str = "normalized",
) -> keras.Model:
    """ "KWLarge": 3×3-32, 4×4-32 stride 2, 3×3-64, 4×4-64 stride 2, two dense layers of 512.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        family, activation, head: as in `two_conv_two_dense`.
        channels: of the first convolutions; the later ones have twice as many.
        units: of the hidden dense layers.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> kw_large((8, 8, 3), 3, channels=4, units=8).output_shape
    (None, 3)

    Reference: Wong et al. (2018); Trockman and Kolter (2021), section 5.
    """
    blocks = _Blocks(family, activation)
    _counts("channels, units", (channels, units))
    convolutions = [
        (channels, 3, 1),
        (channels, 4, 2),
        (2 * channels, 3, 1),
        (2 * channels, 4, 2),
    ]
    return _network(
        "kw_large", input_shape, num_classes, blocks, convolutions, (units, units), head
    )


def lip_conv_net(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    depth: int = 5,
    family: str = "skew",
    activation: str = "max_min",
    channels: int = 32,
    head: str = "normalized",
) -> keras.Model:
    """ "LipConvNet-n": five blocks of n/5 convolutions, the last of each with stride 2.

    Channels grow from `channels` in the first block by 2 per block; images shrink to 1/32.

    Args:
        input_shape: (height, width, channels), sides of at least 32 for the full five blocks.
        num_classes: number of logits.
        depth: n, a multiple of 5.
        family, activation, head: as in `two_conv_two_dense`.
        channels: of the first block.

    Returns:
        A built functional model from inputs to logits.

    Raises:
        ValueError: if `depth` is no multiple of 5.

    Example:

    >>> lip_conv_net((32, 32, 3), 3, channels=2).get_layer("flatten").output.shape
    (None, 32)

    Reference: Singla and Feizi (2021), section 6; last layer: Singla et al. (2022).
    """
    blocks = _Blocks(family, activation)
    _counts("depth, channels", (depth, channels))
    if depth % 5:
        raise ValueError(f"`depth` must be a multiple of 5. Received: depth={depth}.")
    per_block = depth // 5
    convolutions = [
        (channels * 2**block, 3, 2 if i == per_block - 1 else 1)
        for block in range(5)
        for i in range(per_block)
    ]
    return _network("lip_conv_net", input_shape, num_classes, blocks, convolutions, (), head)


def convex_potential(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    size: str | None = "S",
    *,
    depth: int | None = None,
    channels: int | None = None,
    dense_depth: int | None = None,
    units: int | None = None,
    pool: int = 4,
    width: int | None = None,
    step: float = 1.0,
    norm: str | None = "bound",
    head: str = "normalized",
) -> keras.Model:
    """ "CPL-S/M/L/XL": zero channels, potential convolutions, pooling, potential dense layers.

    The gain to the features is 1 at any depth. `head="truncated"` keeps the first features as
    logits, as published without last-layer normalisation.

    Args:
        input_shape: (height, width, channels); `pool` divides height and width.
        num_classes: number of logits.
        size: "S", "M", "L" or "XL": depth, channels, dense depth and units.
        depth, channels, dense_depth, units: override those of `size`, which may be None if all
            are given.
        pool: side of the pooling windows, whose sum is divided by `pool`.
        width: hidden channels of the convolutions (None: `channels`).
        step, norm: of every potential layer; `norm="power"` (as published) and `norm=None` with a
            fixed step (Appendix D.2) carry no guarantee.
        head: "normalized", "bounded" or "truncated".

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> model = convex_potential((8, 8, 3), 3, depth=2, channels=4, dense_depth=1, units=6)
    >>> model.output_shape
    (None, 3)

    Reference: Meunier et al. (2022), section 5 and appendix.
    """
    published = (None,) * 4 if size is None else CONVEX_POTENTIAL_SIZES[
        one_of("size", size, CONVEX_POTENTIAL_SIZES)
    ]  # fmt: skip
    given = (depth, channels, dense_depth, units)
    depth, channels, dense_depth, units = (
        p if g is None else g for g, p in zip(given, published, strict=True)
    )
    _counts("depth, channels, dense_depth, units", (depth, channels, dense_depth, units))
    one_of("head", head, (*HEADS, "truncated"))
    steps = {"step": step, "norm": norm}
    inputs = keras.Input(_image(input_shape), name="input")
    x = layers.ChannelPadding(channels, name="padding")(inputs)
    for i in range(depth):
        x = layers.ConvexPotentialConv2D(width, 3, **steps, name=f"conv_{i + 1}")(x)
    x = layers.ScaledAveragePooling2D(pool, name="pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i in range(dense_depth):
        x = layers.ConvexPotentialDense(units, **steps, name=f"dense_{i + 1}")(x)
    if head == "truncated":
        outputs = layers.Truncate(num_classes, name="logits")(x)
    else:
        outputs = last_layer(x, num_classes, head)
    return keras.Model(inputs, outputs, name="convex_potential")


def liresnet(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    blocks: int = 4,
    channels: int = 64,
    units: int = 256,
    *,
    family: str = "spectral",
    activation: str = "max_min",
    head: str = "normalized",
) -> keras.Model:
    """LiResNet-like backbone: linear residual blocks, each followed by a sorting activation.

        x ← sort(t·(K ∗ x + b) + (1 - t)·x),   ‖K‖ ≤ 1,   t learned in [0, 1]                 (1)

    between a stem (5×5, stride 2) and a neck (stride 2, then a dense layer). The published blocks
    x + K ∗ x are divided by power-iteration estimates of their norm; (1) has gain 1 always.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        blocks: number of residual blocks.
        channels: of the backbone; even.
        units: of the dense layer of the neck.
        family, activation, head: as in `two_conv_two_dense`; not "sandwich", "convex_potential" or
            "sdp".

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> liresnet((8, 8, 3), 3, blocks=2, channels=4, units=8).output_shape
    (None, 3)

    Reference: after Hu et al., Unlocking Deterministic Robustness Certification on ImageNet (2023).
    """
    made = _Blocks(family, activation)
    if family in NOT_LINEAR:
        raise ValueError(f"`family` must be linear. Received: family={family!r}.")
    _counts("blocks, channels, units", (blocks, channels, units))
    inputs = keras.Input(_image(input_shape), name="input")
    x = made.conv(inputs, channels, 5, 2)
    for _ in range(blocks):
        branch = made.linear(x, channels, 3)
        x = layers.ConvexCombination(0.5, name=made.names("combination"))([x, branch])
        x = made.sort(x)
    x = keras.layers.Flatten(name="flatten")(made.conv(x, channels, 3, 2))
    x = made.units(x, units)
    return keras.Model(inputs, last_layer(x, num_classes, head, made.last), name="liresnet")
