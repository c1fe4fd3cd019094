"""Models to export, by the family of operations that each is made of, and what runs their files."""

import functools
import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov import layers as ours

L = keras.layers
IMAGE, ODD, SERIES, VECTOR, CUBE = (6, 6, 4), (5, 7, 3), (7, 4), (6,), (4, 5, 3, 2)


def outputs(path, *arrays):
    """What onnxruntime gives for the arrays, in float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)}
    (found,) = session.run(None, fed)
    return found.astype(np.float64)


def drawn(model, seed=0):
    """The model with random weights, variances positive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if not weight.dtype.startswith("float"):
            continue
        value = rng.normal(size=weight.shape) * 0.4
        if "variance" in weight.path:
            value = rng.uniform(0.5, 2.0, size=weight.shape)
        weight.assign(value)
    return model


def chain(shape, *layers):
    """A Sequential model of layers or functions, with random weights."""
    inputs = x = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    return drawn(keras.Model(inputs, x))


def branches(join, shape=IMAGE, count=2):
    """A model whose branches are joined by a function of a list."""
    inputs = keras.Input(shape)
    parts = [L.Conv2D(4, 1, name=f"branch{i}")(inputs) for i in range(count)]
    return drawn(keras.Model(inputs, join(parts)))


def two_inputs():
    """A model of an image and a vector."""
    image, vector = keras.Input(IMAGE, name="image"), keras.Input(VECTOR, name="vector")
    x = L.Flatten()(L.Conv2D(3, 3, activation="relu")(image))
    x = L.Concatenate()([L.Dense(4)(x), L.Dense(4, activation="tanh")(vector)])
    return drawn(keras.Model([image, vector], L.Dense(3)(x)))


class Sum(keras.layers.Layer):
    """A layer of a user's own whose `call` is made of known operations."""

    def call(self, x):
        return ops.sum(ops.relu(x), axis=1)


_ACTIVATIONS = (
    "relu6", "elu", "celu", "selu", "tanh", "hard_tanh", "tanh_shrink", "soft_shrink", "sigmoid",
    "hard_sigmoid", "sparse_sigmoid", "log_sigmoid", "softplus", "sparse_plus", "squareplus",
    "softsign", "silu", "hard_silu", "gelu", "mish", "leaky_relu",
)  # fmt: skip
_partial = functools.partial
# Family -> name -> function that makes a model.
CASES = {
    "linear": {
        "dense": lambda: chain(VECTOR, L.Dense(4), L.Dense(3, use_bias=False)),
        "dense on series": lambda: chain(SERIES, L.Dense(5), L.Dense(2, use_bias=False)),
        "conv1d causal": lambda: chain(SERIES, L.Conv1D(3, 3, padding="causal", dilation_rate=2)),
        "conv1d strides": lambda: chain(SERIES, L.Conv1D(3, 2, strides=3, padding="same")),
        "conv2d same": lambda: chain(ODD, L.Conv2D(4, (3, 2), strides=(2, 3), padding="same")),
        "conv2d groups": lambda: chain(IMAGE, L.Conv2D(6, 3, groups=2, dilation_rate=(2, 1))),
        "conv3d": lambda: chain(CUBE, L.Conv3D(3, 2, strides=(1, 2, 1), padding="same")),
        "conv1d transposed": lambda: chain(SERIES, L.Conv1DTranspose(3, 2, strides=3)),
        "conv2d transposed": lambda: chain(
            ODD, L.Conv2DTranspose(2, 3, strides=2, padding="same"), L.Conv2DTranspose(3, (2, 4))
        ),
        "conv2d transposed, output padding": lambda: chain(
            ODD, L.Conv2DTranspose(2, 3, strides=2, padding="same", output_padding=1)
        ),
        "conv3d transposed": lambda: chain(CUBE, L.Conv3DTranspose(2, 2, strides=2)),
        "depthwise": lambda: chain(ODD, L.DepthwiseConv2D(3, depth_multiplier=2, padding="same")),
        "depthwise 1d": lambda: chain(SERIES, L.DepthwiseConv1D(2, strides=2)),
        "separable": lambda: chain(ODD, L.SeparableConv2D(5, 3, padding="same")),
        "separable 1d": lambda: chain(SERIES, L.SeparableConv1D(5, 3, padding="valid")),
        "cayley": lambda: chain(VECTOR, ours.CayleyDense(8, activation="relu")),
        "almost orthogonal": lambda: chain(ODD, ours.AlmostOrthogonalConv2D(4, 2)),
        "spectral": lambda: chain(SERIES, ours.SpectralConv1D(4, 3, 2, padding="causal")),
    },
    "elementwise": {
        **{
            name: _partial(chain, IMAGE, L.Conv2D(3, 1), L.Activation(name))
            for name in _ACTIVATIONS
        },
        "relu": lambda: chain(IMAGE, L.ReLU(max_value=0.7)),
        "relu with a slope": lambda: chain(IMAGE, L.ReLU(max_value=0.7, negative_slope=0.3)),
        "leaky": lambda: chain(VECTOR, L.LeakyReLU(negative_slope=0.37)),
        "elu of alpha": lambda: chain(VECTOR, L.ELU(alpha=0.3)),
        "gelu by tanh": lambda: chain(VECTOR, lambda x: ops.gelu(x, approximate=True)),
        "celu of alpha": lambda: chain(VECTOR, lambda x: ops.celu(x, alpha=0.3)),
        "squareplus of b": lambda: chain(VECTOR, lambda x: ops.squareplus(x, b=2)),
        "soft shrink": lambda: chain(VECTOR, lambda x: ops.soft_shrink(x, threshold=0.3)),
        "abs": lambda: chain(VECTOR, ops.abs),
        "prelu": lambda: chain(IMAGE, L.Conv2D(3, 1), L.PReLU(shared_axes=(1, 2)), L.PReLU()),
        "lipschitz prelu": lambda: chain(IMAGE, ours.LipschitzPReLU(shared_axes=(1, 2))),
        "clip": lambda: chain(IMAGE, lambda x: ops.clip(x, -0.3, 0.4)),
        "clip by arrays": lambda: chain(
            SERIES, lambda x: ops.clip(x, np.linspace(-1, 0, 4), np.linspace(0.1, 0.9, 4))
        ),
    },
    "fused": {
        "relu": lambda: chain(VECTOR, L.Dense(4, activation="relu")),
        "softmax": lambda: chain(VECTOR, L.Dense(4, activation="softmax")),
        "own": lambda: chain(VECTOR, ours.CayleyDense(4, activation=ours.GroupSort(2))),
        "layer": lambda: chain(ODD, L.Conv2D(4, 2, activation=L.LeakyReLU(negative_slope=0.1))),
    },
    "softmax": {
        "last axis": lambda: chain(SERIES, L.Softmax()),
        "channels of an image": lambda: chain(IMAGE, L.Conv2D(3, 1), L.Softmax(axis=-1)),
        "two axes": lambda: chain(IMAGE, L.Conv2D(3, 1), L.Softmax(axis=(1, 2))),
        "logarithm": lambda: chain(SERIES, L.Activation("log_softmax")),
        "logarithm, first axis": lambda: chain(SERIES, lambda x: ops.log_softmax(x, axis=1)),
    },
    "pooling": {
        "max": lambda: chain(IMAGE, L.MaxPooling2D((3, 2), (2, 1))),
        "max same": lambda: chain(ODD, L.MaxPooling2D(3, 2, "same")),
        "max 1d": lambda: chain(SERIES, L.MaxPooling1D(3, 2, "same")),
        "max 3d": lambda: chain(CUBE, L.MaxPooling3D(2, padding="same")),
        "mean": lambda: chain(IMAGE, L.AveragePooling2D((3, 2), (2, 1))),
        "mean same": lambda: chain(ODD, L.AveragePooling2D((4, 3), (3, 2), "same")),
        "mean 1d": lambda: chain(SERIES, L.AveragePooling1D(3, 2, "same")),
        "mean 3d": lambda: chain(CUBE, L.AveragePooling3D(2, padding="same")),
        "global": lambda: chain(IMAGE, L.Conv2D(3, 1), L.GlobalAveragePooling2D()),
        "global max": lambda: chain(ODD, L.GlobalMaxPooling2D(keepdims=True)),
        "global 1d": lambda: chain(SERIES, L.GlobalAveragePooling1D(keepdims=True)),
    },
    "merging": {
        "add": lambda: branches(L.Add(), count=3),
        "subtract": lambda: branches(L.Subtract()),
        "average": lambda: branches(L.Average(), count=3),
        "maximum": lambda: branches(L.Maximum(), count=3),
        "minimum": lambda: branches(L.Minimum()),
        "concatenate": lambda: branches(L.Concatenate(axis=-1)),
        "concatenate rows": lambda: branches(lambda p: L.Concatenate(axis=1)([p[0], p[1]])),
        "of a view and none": lambda: branches(lambda p: L.Add()([p[0], L.Reshape(IMAGE)(p[1])])),
        "maximum with a constant": lambda: chain(IMAGE, lambda x: ops.maximum(x, 0.3)),
        "minimum with an array": lambda: chain(
            IMAGE, L.Conv2D(4, 1), lambda x: ops.minimum(x, np.linspace(-1, 1, 4, dtype="float32"))
        ),
        "broadcast": lambda: branches(
            lambda p: L.Subtract()([p[0], ops.mean(p[1], axis=(1, 2), keepdims=True)])
        ),
    },
    "scaling": {
        "batch": lambda: chain(IMAGE, L.BatchNormalization()),
        "batch of channels": lambda: chain(
            IMAGE, L.Conv2D(3, 2), L.BatchNormalization(scale=False)
        ),
        "batch, rows": lambda: chain(IMAGE, L.Conv2D(3, 1), L.BatchNormalization(axis=1)),
        "rescaling": lambda: chain(IMAGE, L.Rescaling(1 / 127.5, offset=-1)),
        "normalization": lambda: chain(
            SERIES, L.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 0.3, 0.4])
        ),
        "centering": lambda: chain(IMAGE, L.Conv2D(3, 1), ours.BatchCentering()),
        "positions": lambda: chain(IMAGE, ours.PositionBias("normal"), L.Conv2D(3, 1)),
        "constants": lambda: chain(VECTOR, lambda x: -(x * 3.0 - 0.5) / 7.0 + np.arange(6.0)),
        "constant with more rows": lambda: chain(
            (1, 4), lambda x: ops.multiply(x, np.ones((3, 1), "float32"))
        ),
    },
    "moving": {
        "flatten": lambda: chain(IMAGE, L.Conv2D(2, 1), L.Flatten()),
        "reshape": lambda: chain(IMAGE, L.Reshape((4, 36)), L.Dense(2)),
        "permute": lambda: chain(IMAGE, L.Permute((3, 1, 2)), L.Dense(2)),
        "pad": lambda: chain(ODD, L.ZeroPadding2D(((1, 2), (0, 3))), L.Conv2D(2, 2)),
        "pad 1d and 3d": lambda: chain(
            CUBE, L.ZeroPadding3D(1), L.Reshape((42, 10)), L.ZeroPadding1D((0, 2))
        ),
        "crop": lambda: chain(ODD, L.Conv2D(2, 1), L.Cropping2D(((1, 0), (2, 1)))),
        "upsampling 1d": lambda: chain(SERIES, L.UpSampling1D(3)),
        "upsampling 2d": lambda: chain(ODD, L.Conv2D(2, 1), L.UpSampling2D((2, 3))),
        "upsampling 3d": lambda: chain(CUBE, L.UpSampling3D(2)),
        "repeat vector": lambda: chain(VECTOR, L.RepeatVector(3)),
        "item": lambda: chain(IMAGE, lambda x: x[:, 1:5:2, 2:, 2]),
        "new axes": lambda: chain(SERIES, lambda x: ops.expand_dims(x, 2)[:, :, :, 1:3]),
        "down": lambda: chain(IMAGE, ours.InvertibleDownSampling((3, 2)), L.Conv2D(2, 1)),
        "up": lambda: chain(IMAGE, L.Conv2D(8, 1), ours.InvertibleUpSampling(2)),
        "channels": lambda: chain(IMAGE, L.Conv2D(3, 1), ours.ChannelPadding(7)),
        "reflected": lambda: chain(IMAGE, ours.Padding2D(1, "reflect"), L.Conv2D(2, 3)),
        "truncate": lambda: chain(IMAGE, ours.Truncate(3, axis=1)),
    },
    "unchanged": {
        "dropout": lambda: chain(VECTOR, L.Dropout(0.5), L.GaussianNoise(0.3), L.Dense(2)),
        "identity": lambda: chain(VECTOR, L.Identity()),
    },
    "sorting": {
        "maxmin": lambda: chain(IMAGE, L.Conv2D(6, 1), ours.MaxMin()),
        "maxmin, rows": lambda: chain(IMAGE, ours.MaxMin(axis=1)),
        "pairs": lambda: chain(IMAGE, L.Conv2D(6, 1), ours.GroupSort(2)),
        "groups": lambda: chain(IMAGE, L.Conv2D(6, 1), ours.GroupSort(3)),
        "groups of rows": lambda: chain(IMAGE, ours.GroupSort(3, axis=1)),
        "pairs of a vector": lambda: chain(VECTOR, ours.GroupSort(2)),
        "all": lambda: chain(SERIES, ours.FullSort()),
        "householder": lambda: chain(IMAGE, L.Conv2D(6, 1), ours.Householder()),
        "householder, rows": lambda: chain(IMAGE, ours.Householder(axis=1)),
    },
    "two_sided": {
        "image": lambda: chain(IMAGE, L.Conv2D(3, 1), ours.TwoSidedReLU()),
        "rows": lambda: chain(IMAGE, ours.TwoSidedReLU(axis=1)),
    },
    "norms": {
        "1-norm": lambda: chain(IMAGE, ours.LpPooling2D(2, 1, p=1.0)),
        "2-norm": lambda: chain(ODD, ours.LpPooling2D((3, 2), (2, 1), "same", p=2.0)),
        "3.5-norm": lambda: chain(IMAGE, ours.LpPooling2D(2, p=3.5)),
        "largest": lambda: chain(ODD, ours.LpPooling2D(3, 2, "same", p=math.inf)),
        "norm pooling": lambda: chain(ODD, ours.L2NormPooling2D(3, 2, "same")),
        "scaled mean": lambda: chain(ODD, ours.ScaledAveragePooling2D(3, 2, "same")),
        "wide strides": lambda: chain(ODD, ours.ScaledAveragePooling2D(2, 3)),
        "global norm": lambda: chain(ODD, L.Conv2D(3, 1), ours.GlobalL2NormPooling2D()),
        "global mean": lambda: chain(ODD, ours.ScaledGlobalAveragePooling2D(keepdims=True)),
    },
    "response": {
        "image": lambda: chain(IMAGE, ours.LocalResponseNormalization(1, 1.0, 0.5, 0.75)),
        "power": lambda: chain(IMAGE, ours.LocalResponseNormalization(2, 2.0, 2.0, 1.3)),
        "rows": lambda: chain(IMAGE, L.Conv2D(3, 1), ours.LocalResponseNormalization(9, axis=1)),
        "series": lambda: chain(SERIES, ours.LocalResponseNormalization(1)),
        "vector": lambda: chain(VECTOR, ours.LocalResponseNormalization(2)),
    },
    "l2_attention": {
        "tokens": lambda: chain(SERIES, ours.L2Attention()),
        "heads": lambda: chain(SERIES, L.Dense(6), ours.L2Attention(3, 2.0, temperature=0.5)),
    },
    "residuals": {
        "images": lambda: branches(ours.ConvexCombination()),
        "vectors": lambda: chain(
            VECTOR, lambda x: ours.ConvexCombination()([x, L.Activation("tanh")(x)])
        ),
    },
    "potential": {
        "dense": lambda: chain(VECTOR, ours.ConvexPotentialDense(8, activation="elu")),
        "1d": lambda: chain(SERIES, ours.ConvexPotentialConv1D(5, kernel_size=4)),
        "2d": lambda: chain(ODD, ours.ConvexPotentialConv2D(5, kernel_size=(3, 2), max_gain=0.7)),
        "softmax": lambda: chain(SERIES, ours.SoftmaxPotential(5, 3.0, max_gain=0.7)),
        "sdp": lambda: chain(SERIES, ours.SDPLipschitzDense(8, activation="tanh")),
        "sdp 2d": lambda: chain(ODD, ours.SDPLipschitzConv2D(3, kernel_size=(2, 4))),
    },
    "sandwich": {
        "dense": lambda: chain(SERIES, ours.SandwichDense(5, activation="softplus")),
        "2d": lambda: chain(ODD, ours.SandwichConv2D(4, strides=(2, 3))),
    },
    "fourier": {
        "cayley": lambda: chain(ODD, ours.CayleyConv2D(4, 3, (2, 1))),
        "cayley, sorted": lambda: chain(
            IMAGE, ours.CayleyConv2D(8, 2, activation=ours.GroupSort(2)), L.Conv2D(2, 1)
        ),
    },
    "skew": {
        "image": lambda: chain(ODD, ours.SkewOrthogonalConv2D(6, 3, activation="relu")),
        "strides": lambda: chain(ODD, ours.SkewOrthogonalConv2D(4, (1, 3), 2)),
    },
    "orthogonal": {
        "circular": lambda: chain(
            ODD, ours.OrthogonalConv2D(6, 3, 2, "circular", groups=1, activation=ours.MaxMin())
        ),
        "zeros": lambda: chain(ODD, ours.OrthogonalConv2D(6, 2, groups=3, activation="relu")),
        "transposed": lambda: chain(ODD, ours.OrthogonalConv2DTranspose(2, 3, 2)),
    },
    "normalizing": {
        "layer": lambda: chain(SERIES, L.LayerNormalization()),
        "layer, all axes": lambda: chain(
            IMAGE, L.Conv2D(3, 1), L.LayerNormalization(axis=(1, 2, 3))
        ),
        "layer, rows": lambda: chain(IMAGE, L.LayerNormalization(axis=1)),
        "groups": lambda: chain(IMAGE, L.Conv2D(6, 1), L.GroupNormalization(3)),
        "root mean square": lambda: chain(SERIES, L.RMSNormalization()),
    },
    "indexing": {
        "flip": lambda: chain(IMAGE, lambda x: ops.flip(x, axis=2)),
        "roll": lambda: chain(SERIES, lambda x: ops.roll(x, 2, axis=1)),
        "pad by a constant": lambda: chain(
            IMAGE, lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5)
        ),
        "pad by edges": lambda: chain(
            IMAGE, L.Conv2D(2, 1), lambda x: ops.take(x, [0, 0, 1, 2, 3, 4, 5, 5, 5], axis=2)
        ),
        "pad by reflection": lambda: chain(
            IMAGE, lambda x: ops.pad(x, ((0, 0), (1, 2), (3, 1), (0, 0)), "reflect")
        ),
        "pad symmetric": lambda: chain(
            SERIES, lambda x: ops.pad(x, ((0, 0), (2, 1), (0, 0)), "symmetric")
        ),
        "repeat": lambda: chain(SERIES, lambda x: ops.repeat(x, 3, axis=2)),
        "tile": lambda: chain(SERIES, lambda x: ops.tile(x, (1, 2, 3))),
        "take": lambda: chain(SERIES, lambda x: ops.take(x, [3, 0, 3], axis=1)),
        "swap": lambda: chain(IMAGE, lambda x: ops.swapaxes(x, 1, 3)),
        "triangle": lambda: chain((5, 5), lambda x: ops.tril(x, k=1)),
        "diagonal": lambda: chain((5, 5), lambda x: ops.diagonal(x, axis1=1, axis2=2)),
        "split": lambda: chain(SERIES, lambda x: ops.split(x, 2, axis=2)[1]),
        "steps": lambda: chain(
            SERIES, L.TimeDistributed(L.Dense(3, activation="relu")), L.Flatten()
        ),
        "steps of images": lambda: chain(
            (3, 4, 4, 2), L.TimeDistributed(L.Conv2D(2, 2)), L.TimeDistributed(L.Flatten())
        ),
    },
    "separable": {
        "bilinear": lambda: chain(ODD, L.UpSampling2D((2, 3), interpolation="bilinear")),
        "resizing": lambda: chain(ODD, L.Conv2D(2, 1), L.Resizing(8, 4), L.Conv2D(2, 2)),
        "nearest": lambda: chain(ODD, L.Resizing(8, 4, interpolation="nearest")),
        "centre crop": lambda: chain(ODD, L.CenterCrop(3, 4)),
        "adaptive mean": lambda: chain(ODD, L.AdaptiveAveragePooling2D((2, 3))),
        "adaptive mean 3d": lambda: chain(CUBE, L.AdaptiveAveragePooling3D((2, 3, 2))),
        "adaptive largest": lambda: chain(ODD, L.Conv2D(2, 1), L.AdaptiveMaxPooling2D((2, 3))),
    },
    "reducing": {
        "sum": lambda: chain(IMAGE, L.Conv2D(3, 1), lambda x: ops.sum(x, axis=(1, 3))),
        "mean": lambda: chain(IMAGE, lambda x: ops.mean(x, axis=2, keepdims=True)),
        "largest": lambda: chain(IMAGE, L.Conv2D(3, 1), lambda x: ops.max(x, axis=1)),
        "smallest": lambda: chain(IMAGE, lambda x: ops.min(x, axis=(1, 2, 3), keepdims=True)),
        "stack": lambda: branches(lambda parts: ops.stack(parts, axis=2)),
        "stack, last": lambda: chain(VECTOR, lambda x: ops.stack([x, ops.relu(x)], axis=-1)),
        "pools": lambda: chain(IMAGE, lambda x: ops.average_pool(x, 2, 1, padding="same")),
        "own layer": lambda: chain(SERIES, Sum()),
    },
    "einsum": {
        "dense": lambda: chain(SERIES, L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d")),
        "dense, two axes": lambda: chain(
            IMAGE, L.EinsumDense("abcd,bde->ace", (6, 5), activation="relu")
        ),
        "matmul": lambda: chain(SERIES, lambda x: ops.matmul(x, np.ones((4, 3), "float32"))),
        "matmul from the left": lambda: chain(
            SERIES, lambda x: ops.matmul(np.arange(14, dtype="float32").reshape(2, 7) / 14, x)
        ),
        "sum": lambda: chain(SERIES, lambda x: ops.einsum("abc->acb", x)),
    },
    "preprocessing": {
        "augmenting": lambda: chain(
            IMAGE, L.RandomFlip(), L.RandomContrast(0.2), L.Conv2D(2, 2), L.Flatten()
        ),
        "brightness": lambda: chain(IMAGE, L.RandomBrightness(0.1), L.Flatten()),
    },
    "several inputs": {"image and vector": two_inputs},
}
# All cases, by family and name.
FLAT = {
    f"{family}: {name}": make for family, cases in CASES.items() for name, make in cases.items()
}


@functools.cache
def made(name):
    """The model of a case, made once; no test changes its weights."""
    keras.utils.set_random_seed(0)
    return FLAT[name]()
