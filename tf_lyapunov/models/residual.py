"""Residual networks of the papers: pre-activation ResNets for small images, ResNet50 for ImageNet.

`constrain` takes one budget for each layer with a kernel, in the order of the graph. A batch
normalization behind a convolution belongs to that convolution's stage; one at the head of a
pre-activation block follows a sum and belongs to none: `normalization_gain` bounds those.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras

from tf_lyapunov.constraints import NormalizationBound
from tf_lyapunov.models.plain import _activation, _counts, _image, _Names

# As in the released code and in PyTorch; Keras' 1e-3 would dampen small variances.
_NORMALIZATION = {"momentum": 0.9, "epsilon": 1e-5}


def preact_resnet(
    input_shape: Sequence[int] = (28, 28, 3),
    num_classes: int = 10,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    activation: str = "relu",
    negative_slope: float = 0.1,
    *,
    batch_norm: bool = False,
    normalization_gain: float | None = None,
    released_widths: bool = False,
) -> keras.Model:
    """The pre-activation ResNet [2, 2, 2, 2] of the papers' released code.

    conv 7×7 stride 2; groups of blocks x + conv(φ(conv(φ(x)))) of 3×3 convolutions, the first of
    each group with a 1×1 projection of φ(x) and (but for the first group) stride 2; φ, average
    over positions, logits. Group i has width·2^i channels.

    The released code multiplies the width of the group before by 2^i instead (its comment and the
    model that it adapts say otherwise): 64, 128, 512, 4096 instead of 64, 128, 256, 512, and 482
    instead of 11 million weights. `released_widths=True` rebuilds that.

    Budgets: 2 + Σ(2·blocks + 1), 22 by default; the released code has 6, one for the first
    convolution, each group and the logits.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        width: channels of the first convolution and group.
        blocks: blocks in each group.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        batch_norm: whether each φ follows a BatchNormalization (the released default is no).
        normalization_gain: bound on the gain of the BatchNormalizations at the head of blocks, or
            None; `project` and `LyapunovMonitor` enforce it.
        released_widths: whether to rebuild the released widths.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> model = preact_resnet(width=2, released_widths=True)
    >>> [model.get_layer(f"projection_{i}").filters for i in (1, 2, 3, 4)]
    [2, 4, 16, 128]

    Reference: released code of Aquino et al. (2022) and Rahnama et al. (2020), `resnet.py`.
    """
    blocks = _counts("blocks", blocks, allow_empty=False)
    _counts("width", [width])
    net = _Net(activation, negative_slope, batch_norm, normalization_gain)
    inputs = keras.Input(_image(input_shape), name="input")
    x = net.conv(inputs, width, 7, 2)
    for group, count in enumerate(blocks):
        # The bug: `num_filters = num_filters * (2**i)` inside the loop over i.
        width = width * 2 ** (group if released_widths else min(group, 1))
        for block in range(count):
            strides = 2 if group and not block else 1
            x = net.preactivation_block(x, width, strides, project=not block)
    x = net.activate(x)
    return net.model(inputs, x, num_classes, "preact_resnet")


def preact_resnet18(
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    width: int = 64,
    activation: str = "relu",
    negative_slope: float = 0.1,
    *,
    batch_norm: bool = True,
    normalization_gain: float | None = None,
) -> keras.Model:
    """PreActResNet18 for small images: conv 3×3, eight pre-activation blocks, average, logits.

    As the usual CIFAR version: stride 1 before the blocks, groups of 64, 128, 256, 512 channels,
    projections only where the shape changes, nothing between the last sum and the average.

    Budgets: 21 (the first convolution, 16 in the blocks, 3 projections, the logits).

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        width: channels of the first convolution and group.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        batch_norm: whether each φ follows a BatchNormalization.
        normalization_gain: bound on the gain of the BatchNormalizations at the head of blocks, or
            None; `project` and `LyapunovMonitor` enforce it.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> preact_resnet18(width=4).output_shape
    (None, 10)

    Reference: He et al., "Identity mappings in deep residual networks" (2016).
    """
    _counts("width", [width])
    net = _Net(activation, negative_slope, batch_norm, normalization_gain)
    inputs = keras.Input(_image(input_shape), name="input")
    x = net.conv(inputs, width, 3, 1)
    for group in range(4):
        for block in range(2):
            strides = 2 if group and not block else 1
            x = net.preactivation_block(x, width * 2**group, strides, project=strides > 1)
    return net.model(inputs, x, num_classes, "preact_resnet18")


def resnet50(
    input_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    width: int = 64,
    blocks: Sequence[int] = (3, 4, 6, 3),
    activation: str = "relu",
    negative_slope: float = 0.1,
    *,
    batch_norm: bool = True,
) -> keras.Model:
    """ResNet50 for ImageNet: conv 7×7/2, max pool 3/2, bottleneck blocks, average, logits.

    A block is φ(x + conv 1×1(φ(conv 3×3(φ(conv 1×1(x)))))), each convolution with a
    BatchNormalization and none with a bias; the stride is in the 3×3 convolution.

    Budgets: 2 + 3·Σblocks + 4 projections, 54 by default, each for a convolution with its
    BatchNormalization. The first one pays for the overlapping pool, whose gain is 2.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        width: channels of the first convolution; blocks have 1, 2, 4, 8 times that inside and 4
            times as many outside.
        blocks: blocks in each group.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        batch_norm: whether a BatchNormalization follows each convolution.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> resnet50((32, 32, 3), 7, width=2, blocks=(1, 1)).output_shape
    (None, 7)

    Reference: He et al., "Deep residual learning for image recognition" (2016), with the stride
    where Goyal et al. (2017) and TensorFlow's reference model, which the papers adapt, have it.
    """
    blocks = _counts("blocks", blocks, allow_empty=False)
    _counts("width", [width])
    net = _Net(activation, negative_slope, batch_norm, None)
    inputs = keras.Input(_image(input_shape), name="input")
    x = net.activate(net.conv(inputs, width, 7, 2))
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="max_pool_1")(x)
    for group, count in enumerate(blocks):
        for block in range(count):
            x = net.bottleneck(x, width * 2**group, 2 if group and not block else 1, not block)
    return net.model(inputs, x, num_classes, "resnet50")


class _Net:
    """The parts of one network, with names that count from 1."""

    def __init__(self, activation, negative_slope, batch_norm, normalization_gain):
        self.names, self.kind = _Names(), (activation, negative_slope)
        self.batch_norm = batch_norm
        self.head = {}
        if normalization_gain is not None:
            self.head["gamma_constraint"] = NormalizationBound(normalization_gain)

    def conv(self, x, filters, size, strides, stem="conv"):
        """Convolution without bias, padded by its kernel alone and not by the image's size."""
        padding = "same"
        if strides > 1 and size > 1:
            before, padding = (size - 1) // 2, "valid"
            edges = ((before, size - 1 - before),) * 2
            x = keras.layers.ZeroPadding2D(edges, name=self.names("padding"))(x)
        return keras.layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding=padding,
            use_bias=False,
            kernel_initializer="he_normal",
            name=self.names(stem),
        )(x)

    def normalize(self, x, **options):
        if not self.batch_norm:
            return x
        name = self.names("batch_norm")
        return keras.layers.BatchNormalization(name=name, **_NORMALIZATION, **options)(x)

    def activate(self, x, **options):
        x = self.normalize(x, **options)
        return self.bend(x)

    def bend(self, x):
        layer = _activation(*self.kind, self.names("activation"))
        return x if layer is None else layer(x)

    def add(self, x, y):
        return keras.layers.Add(name=self.names("add"))([x, y])

    def preactivation_block(self, x, filters, strides, project):
        inside = self.activate(x, **self.head)
        if project:
            x = self.conv(inside, filters, 1, strides, "projection")
        inside = self.conv(inside, filters, 3, strides)
        return self.add(x, self.conv(self.activate(inside), filters, 3, 1))

    def bottleneck(self, x, filters, strides, project):
        inside = self.activate(self.conv(x, filters, 1, 1))
        inside = self.activate(self.conv(inside, filters, 3, strides))
        inside = self.normalize(self.conv(inside, 4 * filters, 1, 1))
        if project:
            x = self.normalize(self.conv(x, 4 * filters, 1, strides, "projection"))
        return self.bend(self.add(x, inside))

    def model(self, inputs, x, num_classes, name):
        x = keras.layers.GlobalAveragePooling2D(name="average")(x)
        return keras.Model(inputs, keras.layers.Dense(num_classes, name="logits")(x), name=name)
