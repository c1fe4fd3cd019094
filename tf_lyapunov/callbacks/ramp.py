"""Raises the radius that a loss asks for, epoch by epoch."""

from __future__ import annotations

import math

import keras

from tf_lyapunov.losses.efficient import EfficientMargin, OffsetCrossEntropy
from tf_lyapunov.losses.labels import positive


class MarginRamp(keras.callbacks.Callback):
    """Raises a loss's radius ε linearly over the first epochs of `fit`.

        ε(epoch) = radius·(start + (stop - start)·min(1, epoch/(share·epochs)))

    It depends on the number of the epoch alone, so that a run that is resumed by `initial_epoch`
    goes on as it would have. On JAX, whose compiled functions hold the radius as a constant, a
    change compiles them anew: with `levels` that happens so many times, not in every epoch.

    Args:
        loss: `losses.EfficientMargin` or `losses.OffsetCrossEntropy`, the one compiled.
        radius: that the training aims at; None for the loss's own at the beginning.
        start, stop: factors of it at the beginning and the end.
        share: of the epochs, in (0, 1], after which the end is reached.
        levels: number of equal jumps in which it rises; None: one in every epoch.

    Raises:
        TypeError: if `loss` has no radius that could be raised.
        ValueError: if a number is out of range.

    Example:

    >>> ramp = MarginRamp(EfficientMargin(0.5))
    >>> [round(ramp.radius_at(epoch, epochs=8), 4) for epoch in (0, 2, 4, 7)]
    [0.05, 0.775, 1.5, 1.5]

    Reference: Hu et al. (NeurIPS 2023), who raise ε so for `EfficientMargin`; from 0.1 to 3 times
    the radius over half of the epochs, by default.
    """

    def __init__(self, loss, radius=None, start=0.1, stop=3.0, share=0.5, levels=None):
        super().__init__()
        if not isinstance(loss, (EfficientMargin, OffsetCrossEntropy)):
            raise TypeError(
                "`loss` must be an EfficientMargin or OffsetCrossEntropy, the object that is "
                f"compiled. Received: loss={loss!r}."
            )
        self.loss = loss
        hint = "The radius is the product."
        self.radius = positive("radius", loss.radius if radius is None else radius, hint)
        self.start, self.stop = positive("start", start, hint), positive("stop", stop, hint)
        self.share = positive("share", share, "Half of the epochs is usual.")
        if self.share > 1:
            raise ValueError(f"`share` must be in (0, 1]. Received: share={share!r}.")
        if levels is not None and (isinstance(levels, bool) or levels != int(levels) or levels < 1):
            raise ValueError(
                f"`levels` must be None or a positive number of jumps. Received: levels={levels!r}."
            )
        self.levels = None if levels is None else int(levels)

    def radius_at(self, epoch, epochs):
        """ε in an epoch, numbered from 0, of so many."""
        done = min(1.0, epoch / max(self.share * epochs, 1e-9))
        if self.levels is not None:
            # What rounding takes off a product is given back.
            done = math.floor(done * self.levels + 1e-9) / self.levels
        return self.radius * (self.start + (self.stop - self.start) * done)

    def on_train_begin(self, logs=None):
        compiled = getattr(getattr(self.model, "_compile_loss", None), "_user_loss", self.loss)
        if isinstance(compiled, keras.losses.Loss) and compiled is not self.loss:
            raise ValueError(
                "The ramp must hold the very loss that the model was compiled with. Received: "
                f"{self.loss.name!r}, and a model compiled with {compiled.name!r}."
            )

    def on_epoch_begin(self, epoch, logs=None):
        before, radius = self.loss.radius, self.radius_at(epoch, self.params["epochs"])
        self.loss.radius = radius
        if keras.backend.backend() == "jax" and self.loss.radius != before:
            self.model.make_train_function(force=True)
            self.model.make_test_function(force=True)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["margin_radius"] = self.loss.radius
