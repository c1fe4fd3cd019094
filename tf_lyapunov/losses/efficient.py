"""Cross-entropies whose margins are those that the gains of single pairs of classes ask for."""

from __future__ import annotations

import keras
from keras import ops

from tf_lyapunov.losses.labels import (
    labelled,
    memberships,
    positive,
    unchecked_one_hot,
)

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")
# Least share of the radius that EMMA asks for where a decision is wrong.
_LEAST = 0.01
# Squares of distances that rounding alone may make, relative to those of the columns.
_ROUNDED = 1e-6


class _PairMargin(keras.losses.Loss):
    """Cross-entropy with a margin per pair of classes, K_j times a distance."""

    def __init__(self, radius, model, gain, temperature, reduction, name, **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.temperature = positive("temperature", temperature, "1 is plain cross-entropy.")
        radius = positive("radius", radius, "It is a distance in the input.")
        # A variable: a ramp changes it between epochs, compiled functions read it.
        self._radius = keras.Variable(radius, trainable=False, dtype="float32", name="radius")
        self._layer, self._lost = None, None
        self._gain = _checked_gain(gain)
        if model is not None:
            self.bind(model)

    @property
    def radius(self):
        """The radius that is asked for now, float; assign to change it."""
        return float(ops.convert_to_numpy(self._radius.value))

    @radius.setter
    def radius(self, value):
        self._radius.assign(positive("radius", value, "It is a distance in the input."))

    def bind(self, model, gain=None):
        """Takes the gains of pairs from the last layer of `model`. Returns the loss.

        Args:
            model: built model that ends with a linear dense layer, its logits, or that layer.
            gain: of what precedes it, as of the class; None leaves it.

        Raises:
            ValueError: if it does not end so.
        """
        self._layer = _output_layer(model)
        if gain is not None:
            self._gain = _checked_gain(gain)
        if self._gain is None:
            raise ValueError(
                "The gain of what precedes the last layer was a function, which no file holds. "
                "Received: gain=None. Pass it to `bind` again."
            )
        self._lost = None
        return self

    def pair_gains(self, target, width):
        """K of f_j - f_y, (n, width), differentiable; 0 at j = y. Of one logit that of f itself.

        Args:
            target: one-hot labels (n, width).
            width: number of logits.
        """
        if self._lost is not None:
            raise ValueError(
                "A loss with gains of pairs must know its model. Received: one from a file, whose "
                f"gains are those of layer {self._lost!r}. Call `loss.bind(model)`, and compile."
            )
        dtype = target.dtype
        gain = ops.cast(self._gain() if callable(self._gain) else self._gain, dtype)
        if self._layer is None:
            # Any two logits of a network of this gain.
            return gain * (2.0**0.5 * (1.0 - target) if width > 1 else ops.ones_like(target))
        kernel = ops.cast(_kernel(self._layer), dtype)
        if kernel.shape[-1] != width:
            raise ValueError(
                "The logits must be those of the layer that the loss is bound to. Received: "
                f"{width} logits, and layer {self._layer.name!r} of {kernel.shape[-1]}."
            )
        sizes = ops.sum(ops.square(kernel), axis=0)
        if width == 1:
            return gain * _root(sizes, 0.0)[None] * ops.ones_like(target)
        both = sizes[:, None] + sizes[None]
        squares = both - 2.0 * ops.matmul(ops.transpose(kernel), kernel)
        return gain * ops.matmul(target, _root(squares, _ROUNDED * both))

    def _terms(self, y_true, y_pred, distance):
        """T·log Σ exp((f_j - f_y + K_j·distance)/T), distance from (lead of the label, K)."""
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        width = y_pred.shape[-1]
        if width == 1:
            sign = 2 * memberships(y_true, y_pred) - 1
            gains, lead = self.pair_gains(ops.ones_like(y_pred), 1), sign * y_pred
            shifted = (gains * distance(lead, gains) - lead)[..., 0] / self.temperature
            return labelled(self.temperature * ops.softplus(shifted), y_true, y_pred)
        target = unchecked_one_hot(y_true, y_pred)
        lead = ops.sum(target * y_pred, axis=-1, keepdims=True) - y_pred
        # Probabilities as labels: the margins are those of the likeliest class.
        own = ops.one_hot(ops.argmax(target, axis=-1), width, dtype=target.dtype)
        gains = self.pair_gains(own, width)
        shifted = (gains * distance(lead, gains) - lead) / self.temperature
        losses = self.temperature * ops.logsumexp(shifted, axis=-1)
        return labelled(losses, y_true, y_pred)

    def get_config(self):
        layer = self._lost if self._layer is None else self._layer.name
        own = {"radius": self.radius, "temperature": self.temperature, "layer": layer}
        # A function is not written; `bind` asks for it.
        own["gain"] = None if callable(self._gain) else self._gain
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        layer, gain = config.pop("layer", None), config.pop("gain", 1.0)
        found = cls(gain=1.0 if gain is None else gain, **config)
        found._lost = layer if layer is not None or gain is not None else "unknown"
        found._gain = gain
        return found


@_register
class EfficientMargin(_PairMargin):
    """Efficient margin maximisation (EMMA): margins as large as each sample can reach now.

    With logits f, label y, K_j the gain of f_j - f_y and temperature T,

        loss = T·log Σ_j exp((f_j - f_y + K_j·ε_j)/T),   ε_j = clip((f_y - f_j)/K_j, 0.01·ε, ε),

    K_y = 0. ε_j, which is what is certified of the pair, is a constant to the gradient, K_j is not:
    growing the radius and shrinking gains are the same to it. Samples with a wrong decision ask for
    a hundredth of ε, those beyond ε for no more. Of a single logit f, K is its gain and the lead
    ±f.

    K_j = gain·‖w_j - w_y‖ for the columns w of the last layer's kernel. Without a model every pair
    has √2·gain. It is a loss: what is certified, `certify` proves. A larger ε than the radius aimed
    at helps; `callbacks.MarginRamp` raises it in training.

    Args:
        radius: positive float ε, in units of the input, l2. The attribute may be assigned.
        model: built model that ends with a linear dense layer, that layer, or None. A file keeps
            the layer's name alone: call `bind` on a loss that was loaded, before training goes on.
        gain: positive float: of what precedes the last layer, without `model` of the whole
            network. Or a function without arguments that gives a scalar tensor, which is
            differentiated.
        temperature: positive float T, in units of the logits.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range, or the model does not end so.

    Example:

    >>> import numpy as np
    >>> loss = EfficientMargin(0.5, gain=1.0)
    >>> round(float(loss(np.array([0]), np.array([[1.0, 1.0]]))), 6)  # log(1 + exp(√2·0.005))
    0.696689

    Reference: Hu, Zou, Wang, Leino, Fredrikson, "Unlocking deterministic robustness certification
    on ImageNet" (NeurIPS 2023), as published but for `temperature`.
    """

    def __init__(
        self,
        radius: float = 0.5,
        model=None,
        gain=1.0,
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "efficient_margin",
        **kwargs,
    ):
        super().__init__(radius, model, gain, temperature, reduction, name, **kwargs)

    def call(self, y_true, y_pred):
        def distance(lead, gains):
            radius = ops.cast(self._radius, lead.dtype)
            apart = gains > 0
            found = lead / ops.where(apart, gains, ops.ones_like(gains))
            found = ops.minimum(ops.maximum(found, _LEAST * radius), radius)
            return ops.stop_gradient(ops.where(apart, found, ops.zeros_like(found)))

        return self._terms(y_true, y_pred, distance)


@_register
class OffsetCrossEntropy(_PairMargin):
    """Cross-entropy with the offset at which twice a radius is certified (OffsetCE).

    With logits f, label y, K_j the gain of f_j - f_y and temperature T,

        loss = T·log Σ_j exp((f_j - f_y + 2·ε·K_j)/T).

    Without a model K_j = √2·gain, the margin 2√2·ε of a network of gain 1 as published; with one,
    K_j = gain·‖w_j - w_y‖ for the columns w of the last layer's kernel, and is differentiated.

    Args:
        radius: positive float ε, in units of the input, l2. The attribute may be assigned.
        model, gain, reduction, name: see `EfficientMargin`.
        temperature: positive float T, in units of the logits.

    Raises:
        ValueError: if an argument is out of range, or the model does not end so.

    Example:

    >>> import numpy as np
    >>> loss = OffsetCrossEntropy(0.5)
    >>> round(float(loss(np.array([0]), np.array([[2.0, 2.0 - 2.0**0.5]]))), 6)  # ¼·log 2
    0.173287

    Reference: Prach, Brau, Buttazzo, Lampert, "1-Lipschitz layers compared: memory, speed, and
    certifiable robustness" (CVPR 2024); temperature 1/4 and margin 2√2·ε as published,
    the gains of pairs in place of √2.
    """

    def __init__(
        self,
        radius: float = 36 / 255,
        model=None,
        gain=1.0,
        temperature: float = 0.25,
        reduction: str = "sum_over_batch_size",
        name: str = "offset_cross_entropy",
        **kwargs,
    ):
        super().__init__(radius, model, gain, temperature, reduction, name, **kwargs)

    def call(self, y_true, y_pred):
        def distance(lead, gains):
            return 2.0 * ops.cast(self._radius, lead.dtype)

        return self._terms(y_true, y_pred, distance)


def _root(squares, least):
    """√squares, and 0 with a derivative of 0 where they are no larger than `least`."""
    counts = squares > least
    root = ops.sqrt(ops.where(counts, squares, ops.ones_like(squares)))
    return ops.where(counts, root, ops.zeros_like(root))


def _checked_gain(gain):
    if callable(gain):
        return gain
    return positive("gain", gain, "A network of 1-Lipschitz layers has gain 1.")


def _kernel(layer):
    """(features, units); of a layer with effective weights these, computed from its variables."""
    if hasattr(layer, "effective"):
        return layer.effective(training=True)[0]
    return ops.convert_to_tensor(layer.kernel)


def _output_layer(model):
    layer = getattr(model, "plain", model)
    if isinstance(layer, keras.Model):
        last = layer.layers[-1] if layer.layers else None
        outputs = getattr(layer, "outputs", None) or ()
        is_last = last is not None and any(last.output is t for t in outputs)
        layer = last if is_last else layer
    linear = getattr(layer, "activation", None) in (None, keras.activations.linear)
    is_dense = type(layer) is keras.layers.Dense or (
        hasattr(layer, "effective") and hasattr(layer, "units")
    )
    if isinstance(layer, keras.Model) or not (linear and is_dense and layer.built):
        raise ValueError(
            "Gains of pairs are those of a built linear dense layer that ends the model, its "
            f"logits. Received: {layer.name!r} of type {type(layer).__name__}. Without a model the "
            "loss takes √2·gain for every pair."
        )
    return layer
