"""L2-nonexpansive networks: the three-part loss, distances kept, and a small model."""

from __future__ import annotations

import keras
from keras import ops

from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.layers import ConvexCombination, L2NormPooling2D, TwoSidedReLU
from tf_lyapunov.losses.labels import one_hot
from tf_lyapunov.projection import project
from tf_lyapunov.regularizers import RowSumPenalty
from tf_lyapunov.spectral.arguments import GAIN_RANGE, count, finite, positive
from tf_lyapunov.training.base import TrainingModel


def distance_contraction(x, features):
    """Mean relative loss of distance between neighbours in a batch.

        c = mean_i max(0, 1 - ‖h_i - h_{i+1}‖ / ‖x_i - x_{i+1}‖),   indices modulo n         (1)

    0 where no such pair comes closer; equal inputs count as 0. Finite gradients.

    Args:
        x: inputs (n, ...).
        features: h (n, ...).

    Returns:
        Scalar float32 tensor.

    Example:

    >>> import numpy as np
    >>> x = np.array([[0.0], [2.0]], "float32")
    >>> float(distance_contraction(x, 0.25 * x))
    0.75
    """
    before, apart = _neighbour_distances(x)
    after, _ = _neighbour_distances(features)
    ratio = after / ops.where(apart, before, ops.ones_like(before))
    return ops.mean(ops.where(apart, ops.relu(1 - ratio), ops.zeros_like(ratio)))


def _neighbour_distances(x):
    """‖x_i - x_{i+1}‖ and where it is positive; the gradient is 0 where it is not."""
    x = ops.reshape(ops.cast(x, "float32"), (ops.shape(x)[0], -1))
    change = x - ops.roll(x, -1, axis=0)
    top = ops.stop_gradient(ops.max(ops.abs(change), axis=1, keepdims=True))
    apart = top > 0
    change = change / ops.where(apart, top, ops.ones_like(top))
    square = ops.sum(ops.square(change), axis=1, keepdims=True)
    distance = top * ops.sqrt(ops.where(apart, square, ops.ones_like(square)))
    return ops.squeeze(distance, axis=1), ops.squeeze(apart, axis=1)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class NonexpansiveModel(TrainingModel):
    """Trains a classifier of small gain with the three-part loss of L2-nonexpansive networks.

        loss = CE(u ⊙ f, y) + common·CE(v·f, y) + gap·mean log(1 - softmax(z·f)_y) / z
               + distance · mean_l c(x, h_l) + (layers' own losses)                        (1)

    The first term, with u trained, one per class, stands for cross-entropy of an ordinary network;
    the second for accuracy at the common scale v of all logits; the third for minus the mean
    confidence gap. c is `distance_contraction` at the named layers and the logits. u lives in this
    wrapper, so that the gain of `.plain` is as certified. Replaces the compiled loss: compile with
    an optimizer and metrics alone.

    Args:
        model: classifier that returns logits, at least two.
        layers: names of layers that should keep distances, besides the logits.
        scale: v > 0.
        gap_scale: z > 0.
        common: weight of the second term.
        gap: weight of the third term.
        distance: weight of the distances.

    Raises:
        ValueError: if an argument is out of range or a name unknown.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> trained = NonexpansiveModel(model)
    >>> trained.compile("adam", metrics=["sparse_categorical_accuracy"])

    Reference: Qian and Wegman (ICLR 2019), section 2.3, as published; the distance term in a form
    of its own, over neighbours in the batch.
    """

    def __init__(
        self, model, layers=(), scale=5.0, gap_scale=5.0, common=1.0, gap=1.0, distance=0.0,
        **kwargs,
    ):  # fmt: skip
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a sequence of names. Received: layers={layers!r}.")
        super().__init__(model, layers, **kwargs)
        if isinstance(model, TrainingModel):
            raise ValueError(
                f"A {type(self).__name__} must be the innermost training method: it replaces the "
                f"loss. Received: one around a {type(model).__name__}. Swap them."
            )
        self.scale = positive("scale", scale, GAIN_RANGE)
        self.gap_scale = positive("gap_scale", gap_scale, GAIN_RANGE)
        self.common = _not_negative("common", common)
        self.gap = _not_negative("gap", gap)
        self.distance = _not_negative("distance", distance)
        classes = self.plain.compute_output_shape(self._input_shape())[-1]
        if classes is None or classes < 2:
            raise ValueError(
                "The three-part loss needs at least two logits. Received: outputs of width "
                f"{classes}."
            )
        self.class_scales = self.add_weight(
            name="class_scales",
            shape=(classes,),
            initializer=keras.initializers.Constant(self.scale),
            dtype="float32",
            autocast=False,
        )

    def _input_shape(self):
        shape = getattr(self.plain, "input_shape", None)
        if not isinstance(shape, tuple):
            raise ValueError(
                "The three-part loss needs a model with an `Input`. Received: "
                f"{type(self.plain).__name__} {self.plain.name!r}."
            )
        return shape

    def evaluated(self, owner, x, y, outputs, sample_weight):
        return self._three_parts(owner, y, outputs, sample_weight)

    def objective(self, owner, x, y, found, sample_weight):
        loss = self._three_parts(owner, y, found["outputs"], sample_weight)
        if self.distance:
            kept = [found["outputs"], *(found["layers"][name] for name in self.layer_names)]
            loss = loss + self.distance * sum(distance_contraction(x, h) for h in kept) / len(kept)
        return loss

    def _three_parts(self, owner, y, outputs, sample_weight):
        logits = ops.cast(outputs, "float32")
        target = one_hot(y, logits)
        own = ops.log_softmax(self.class_scales * logits)
        common = ops.log_softmax(self.scale * logits)
        # log(1 - p_y) = log Σ_j≠y p_j, without cancellation.
        others = ops.where(target > 0.5, ops.full_like(logits, -1e30), self.gap_scale * logits)
        gap = ops.logsumexp(others, axis=-1) - ops.logsumexp(self.gap_scale * logits, axis=-1)
        terms = -ops.sum(target * (own + self.common * common), axis=-1)
        terms = terms + self.gap / self.gap_scale * gap
        if sample_weight is not None:
            terms = terms * ops.cast(ops.reshape(sample_weight, (-1,)), "float32")
        return ops.mean(terms) + sum(ops.cast(ops.sum(extra), "float32") for extra in owner.losses)

    def get_config(self):
        names = ("scale", "gap_scale", "common", "gap", "distance")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), "layers": self.layer_names, **own}


def l2nn(input_shape, classes, filters=(32, 64), widths=(128,), residual=True, *, penalty=0.0):
    """A small convolutional classifier of gain at most 1.

    Per entry of `filters`: a 3×3 convolution, with `residual` a block t·F(x) + (1 - t)·x, F a
    two-sided ReLU and a 3×3 convolution, then a two-sided ReLU and 2×2 norm-pooling. Then dense
    layers with two-sided ReLUs, and a dense layer. Every kernel carries `SpectralBound(1)`, so
    that the gain is at most 1 in training and after; initial kernels are projected.

    Args:
        input_shape: (height, width, channels), each spatial size at least 2^len(filters).
        classes: number of logits, at least 2.
        filters: channels of the convolutions.
        widths: units of the hidden dense layers.
        residual: whether to add the residual blocks.
        penalty: factor of an additional `RowSumPenalty`, 0 for none.

    Returns:
        A built functional model of logits. `certify` proves its gain.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> l2nn((2, 2, 1), 3, filters=(2,), widths=(), residual=False).output_shape
    (None, 3)

    Reference: Qian and Wegman (ICLR 2019), sections 2 and 3, in small; residual in sound form:
    the weights t and √(1 - t²) of a common variant sum to up to √2.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 2 ** len(filters):
        raise ValueError(
            f"`input_shape` must be (height, width, channels), of at least {2 ** len(filters)} "
            f"pixels a side for {len(filters)} poolings. Received: input_shape={input_shape}."
        )
    if count("classes", classes) < 2:
        raise ValueError(f"`classes` must be at least 2. Received: classes={classes}.")
    penalty = _not_negative("penalty", penalty)
    regularizer = {"kernel_regularizer": RowSumPenalty(penalty)} if penalty else {}

    def convolution(h, channels):
        bound = SpectralBound(1.0, input_shape=tuple(h.shape[1:3]), strides=1, padding="same")
        return keras.layers.Conv2D(
            channels, 3, padding="same", kernel_constraint=bound, **regularizer
        )(h)

    def dense(h, units):
        return keras.layers.Dense(units, kernel_constraint=SpectralBound(1.0), **regularizer)(h)

    inputs = h = keras.Input(input_shape)
    for channels in filters:
        h = convolution(h, count("filters", channels))
        if residual:
            h = ConvexCombination()([h, convolution(TwoSidedReLU()(h), channels)])
        h = L2NormPooling2D(2)(TwoSidedReLU()(h))
    h = keras.layers.Flatten()(h)
    for units in widths:
        h = TwoSidedReLU()(dense(h, count("widths", units)))
    return project(keras.Model(inputs, dense(h, classes), name="l2nn"))


def _not_negative(name, value):
    value = finite(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must not be negative. Received: {name}={value}.")
    return value
