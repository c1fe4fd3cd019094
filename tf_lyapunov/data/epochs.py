"""Batches are told the epoch by a callback, for Keras gives its hook no number."""

from __future__ import annotations

import keras


class EpochNumber(keras.callbacks.Callback):
    """Tells batches which epoch begins, by their `set_epoch`."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch)
