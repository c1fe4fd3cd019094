"""The papers' networks and small ones for examples, as plain functional Keras models.

Every model ends in logits: no softmax, so that a certificate reads its margins directly.
Activations are layers of their own, which keeps their slopes visible in the saved file.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras

from tf_lyapunov.layers import LocalResponseNormalization

ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "linear")


def _activation(name: str, negative_slope: float, layer_name: str) -> keras.layers.Layer | None:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be one of {', '.join(ACTIVATIONS)}. Received: activation={name!r}."
        )
    if name == "linear":
        return None
    if name == "leaky_relu":
        return keras.layers.LeakyReLU(negative_slope=negative_slope, name=layer_name)
    if name == "relu":
        return keras.layers.ReLU(name=layer_name)
    return keras.layers.Activation(name, name=layer_name)


def _counts(name: str, values: Sequence[int], allow_empty: bool = True) -> list[int]:
    values = list(values)
    if any(not isinstance(v, int) or v < 1 for v in values) or not (values or allow_empty):
        raise ValueError(f"`{name}` must be positive integers. Received: {name}={values!r}.")
    return values


def _rate(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout!r}.")
    return dropout


class _Names:
    """Counts layers, so that names do not depend on what else the process has built."""

    def __init__(self):
        self._seen: dict[str, int] = {}

    def __call__(self, stem: str) -> str:
        self._seen[stem] = self._seen.get(stem, 0) + 1
        return f"{stem}_{self._seen[stem]}"


def _flat(x, names):
    return x if len(x.shape) == 2 else keras.layers.Flatten(name=names("flatten"))(x)


def _tail(x, names, widths, num_classes, activation, negative_slope, dropout, seed, batch_norm):
    """Dense layers with activations, then the logits."""
    for width in widths:
        x = keras.layers.Dense(width, name=names("dense"))(x)
        if batch_norm:
            x = keras.layers.BatchNormalization(name=names("batch_norm"))(x)
        layer = _activation(activation, negative_slope, names("activation"))
        x = x if layer is None else layer(x)
        if dropout:
            x = keras.layers.Dropout(dropout, seed=seed, name=names("dropout"))(x)
    return keras.layers.Dense(num_classes, name="logits")(x)


def mlp(
    input_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = (50, 20),
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
    *,
    dropout: float = 0.0,
    batch_norm: bool = False,
    seed: int = 0,
) -> keras.Model:
    """Fully connected network; the default widths are the papers' MNIST network 784-50-20-10.

    Args:
        input_shape: shape of one input; flattened when it has more than one axis.
        num_classes: number of logits.
        widths: units of the hidden layers.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        dropout: rate after each hidden layer.
        batch_norm: whether a BatchNormalization follows each hidden dense layer.
        seed: seed of the dropout layers.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> mlp((28, 28, 1), 10).count_params()
    40480
    """
    widths, dropout, names = _counts("widths", widths), _rate(dropout), _Names()
    inputs = keras.Input(tuple(input_shape), name="input")
    x = _flat(inputs, names)
    outputs = _tail(
        x, names, widths, num_classes, activation, negative_slope, dropout, seed, batch_norm
    )
    return keras.Model(inputs, outputs, name="mlp")


def residual_mlp(
    input_shape: Sequence[int],
    num_classes: int,
    width: int = 64,
    blocks: int = 2,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
) -> keras.Model:
    """Dense stem, residual blocks x + φ(Wx + b) of one width, and a dense head.

    Args:
        input_shape: shape of one input.
        num_classes: number of logits.
        width: units of every block.
        blocks: number of blocks.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> residual_mlp((6,), 3, width=4, blocks=1).output_shape
    (None, 3)
    """
    _counts("width, blocks", (width, blocks))
    names = _Names()
    inputs = keras.Input(tuple(input_shape), name="input")
    x = keras.layers.Dense(width, name="stem")(_flat(inputs, names))
    for _ in range(blocks):
        branch = keras.layers.Dense(width, name=names("dense"))(x)
        layer = _activation(activation, negative_slope, names("activation"))
        branch = branch if layer is None else layer(branch)
        x = keras.layers.Add(name=names("add"))([x, branch])
    return keras.Model(
        inputs, keras.layers.Dense(num_classes, name="logits")(x), name="residual_mlp"
    )


def cnn(
    input_shape: Sequence[int],
    num_classes: int,
    filters: Sequence[int] = (16, 32),
    kernel_size: int = 4,
    strides: int = 2,
    widths: Sequence[int] = (100,),
    activation: str = "relu",
    negative_slope: float = 0.1,
    *,
    padding: str = "same",
    dropout: float = 0.0,
    batch_norm: bool = False,
    seed: int = 0,
) -> keras.Model:
    """Small convolutional network; the defaults are "2C2F": c(16,4,2).c(32,4,2).f100.f10.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        filters: channels of the convolutions.
        kernel_size: side of their kernels.
        strides: their stride.
        widths: units of the hidden dense layers.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        padding: "same" or "valid".
        dropout: rate after each hidden dense layer.
        batch_norm: whether a BatchNormalization follows each hidden linear layer.
        seed: seed of the dropout layers.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> cnn((28, 28, 1), 10).count_params()
    166406
    """
    filters, widths = _counts("filters", filters, allow_empty=False), _counts("widths", widths)
    dropout, names = _rate(dropout), _Names()
    inputs = x = keras.Input(_image(input_shape), name="input")
    for channels in filters:
        x = keras.layers.Conv2D(
            channels, kernel_size, strides=strides, padding=padding, name=names("conv")
        )(x)
        if batch_norm:
            x = keras.layers.BatchNormalization(name=names("batch_norm"))(x)
        layer = _activation(activation, negative_slope, names("activation"))
        x = x if layer is None else layer(x)
    outputs = _tail(
        _flat(x, names),
        names,
        widths,
        num_classes,
        activation,
        negative_slope,
        dropout,
        seed,
        batch_norm,
    )
    return keras.Model(inputs, outputs, name="cnn")


def alexnet_cifar(
    input_shape: Sequence[int] = (28, 28, 3),
    num_classes: int = 10,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
    *,
    response_normalization: bool = True,
) -> keras.Model:
    """The papers' AlexNet, for the central 28×28 pixels of CIFAR and SVHN images.

    conv 5×5-96 'same', φ, max pool 3/2 'valid', LRN; conv 5×5-256 'same', φ, max pool 3/2
    'valid', LRN; dense 384, 192 and the logits. LRN is local response normalization over 9
    channels with bias 1, alpha 0.001/9, beta 0.75. Glorot initialisation, as published.

    Budgets: 5. Every overlapping pool has an l2 gain of 2, and every LRN one of up to 1.23 (the
    papers leave both out of their bounds); the budget of the convolution before them pays.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of logits.
        activation: one of `models.ACTIVATIONS`.
        negative_slope: slope of a leaky ReLU below zero.
        response_normalization: False leaves the two LRN layers out.

    Returns:
        A built functional model from inputs to logits.

    Example:

    >>> alexnet_cifar().get_layer("flatten_1").output.shape
    (None, 9216)

    Reference: Aquino et al. (2022), section 5; Rahnama et al. (2020), section 5; released code.
    """
    names = _Names()
    inputs = x = keras.Input(_image(input_shape), name="input")
    for channels in (96, 256):
        x = keras.layers.Conv2D(channels, 5, padding="same", name=names("conv"))(x)
        layer = _activation(activation, negative_slope, names("activation"))
        x = x if layer is None else layer(x)
        x = keras.layers.MaxPooling2D(3, 2, padding="valid", name=names("max_pool"))(x)
        if response_normalization:
            x = LocalResponseNormalization(4, 1.0, 0.001 / 9, 0.75, name=names("lrn"))(x)
    outputs = _tail(
        _flat(x, names),
        names,
        (384, 192),
        num_classes,
        activation,
        negative_slope,
        0.0,
        0,
        False,
    )
    return keras.Model(inputs, outputs, name="alexnet_cifar")


def _image(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(
            "A convolutional network needs inputs of shape (height, width, channels). Received: "
            f"input_shape={shape}. Use `mlp` for flat inputs."
        )
    return shape
