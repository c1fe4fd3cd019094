"""Training on several devices and machines: `fit` where Keras supports it, a loop where not.

none         one device, `fit`
mirrored     several devices of one machine: `tf.distribute.MirroredStrategy` and a loop of our own,
             since `fit` of Keras 3 takes up to twice as long under it; on JAX
             `keras.distribution.DataParallel` and `fit`
multiworker  several processes: `tf.distribute.MultiWorkerMirroredStrategy` and the same loop,
             since `fit` of Keras 3 fails under it; on JAX as above
tpu          `tf.distribute.TPUStrategy` and `fit`, written after TensorFlow's documentation and
             never run by us; JAX reaches TPUs by `mirrored`

PyTorch trains on one device only. Every replica holds all weights and applies the same summed
gradient, so that constraints act on the same bits everywhere; several workers compare digests of
their weights before the first and after every epoch. A bound is enforced by each replica on its own
copy: it does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from typing import Any

import keras
import numpy as np

from ..errors import ConfigError, DistributionError
from ..losses import HKR, KR, MulticlassHKR, MulticlassSoftHKR
from .config import ExperimentConfig
from .rendezvous import Cluster
from .shares import (
    InOrder,
    Padded,
    batch_sizes,
    read_ahead,
    warn_of_padding,
    without_padding,
)

SCALINGS = ("none", "linear", "sqrt", "auto")
OF_WHOLE_BATCHES = (KR, HKR, MulticlassHKR, MulticlassSoftHKR)
_ADAPTIVE = ("adam", "adamw", "rmsprop")


def scaled(config: ExperimentConfig, replicas: int, scaling: str = "auto") -> ExperimentConfig:
    """The experiment with its global batch and learning rate scaled to a number of replicas.

        none     batch, rate              the global batch is the configured one, split R ways
        linear   R·batch, R·rate          (SGD: R steps of one replica add up to one of all)
        sqrt     R·batch, √R·rate         (adaptive methods, whose updates have a fixed size)
        auto     sqrt for adam, adamw and rmsprop, linear for sgd

    With `none` the trained weights do not depend on R but for rounding. The others are heuristics
    for many replicas; train with a warm-up (`schedule: {name: triangular}`).

    Args:
        config: the experiment.
        replicas: R, a positive integer.
        scaling: one of `SCALINGS`.

    Returns:
        An `ExperimentConfig`.

    Raises:
        ValueError: `scaling` is unknown, or `replicas` is not positive.

    Example:

    >>> from tf_lyapunov.experiments.reading import parse_config
    >>> config = parse_config("{dataset: {name: digits}, model: {name: mlp}}")
    >>> large = scaled(config, 4).training
    >>> large.batch_size, large.optimizer.learning_rate
    (512, 0.002)

    Reference: Goyal et al. (2017), linear scaling rule; Malladi et al. (2022), square root rule.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {SCALINGS}. Received: scaling={scaling!r}.")
    if replicas < 1:
        raise ValueError(f"`replicas` must be positive. Received: replicas={replicas!r}.")
    training, optimizer = config.training, config.training.optimizer
    if scaling == "none" or replicas == 1:
        return config
    if scaling == "auto":
        scaling = "sqrt" if optimizer.name in _ADAPTIVE else "linear"
    factor = float(replicas) if scaling == "linear" else math.sqrt(replicas)
    rate = {"learning_rate": optimizer.learning_rate * factor}
    changes = {
        "batch_size": training.batch_size * replicas,
        "optimizer": optimizer.model_copy(update=rate),
    }
    return config.model_copy(update={"training": training.model_copy(update=changes)})


class Distribution:
    """One process on one device, and the interface of the others.

    Attributes:
        name: the strategy.
        replicas: copies of the model in all processes together.
        workers: number of processes.
        worker: number of this process; 0 is the chief, who alone writes files.
    """

    name = "none"
    replicas = workers = 1
    worker = 0

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's files."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager:
        """Within it models are built, compiled, restored and trained."""
        return contextlib.nullcontext()

    def steps_per_execution(self, asked: int) -> int:
        """Keras runs several steps at once on one device only; results are the same."""
        return asked

    def jit_compile(self, asked: bool) -> bool | str:
        """What `compile` is told: XLA if asked for, else as Keras decides.

        Raises:
            ConfigError: Keras cannot combine the two.
        """
        return True if asked else "auto"

    def fit(self, model: keras.Model, batches, *, validation_data=None, **options) -> None:
        """`model.fit` on batches in their own order."""
        with _built_once(model):
            model.fit(batches, validation_data=validation_data, shuffle=False, verbose=0, **options)

    def agree(self, number: int, what: str) -> int:
        """The chief's number, if every worker has the same.

        Raises:
            DistributionError: the workers differ.
        """
        return number


class Replicated(Distribution):
    """`fit` of padded batches under a strategy."""

    def __init__(self, name: str, strategy: Any, replicas: int, worker: int = 0, workers: int = 1):
        self.name, self.strategy, self.replicas = name, strategy, replicas
        self.worker, self.workers = worker, workers

    def scope(self):
        return self.strategy.scope()

    def steps_per_execution(self, asked):
        return 1

    def jit_compile(self, asked):
        if asked and self.name != "tpu":
            raise ConfigError(
                f"Keras cannot compile a step with XLA under tf.distribute. Received: --jit with "
                f"--strategy {self.name}. Leave out one, or use KERAS_BACKEND=jax."
            )
        return asked

    def _shares(self, batches):
        return Padded(batches, self.replicas, (self.worker, self.workers))

    def _training_shares(self, model, batches):
        _check_loss(model, batches, self.replicas)
        warn_of_padding(model, batches, self.replicas)
        return self._shares(batches)

    def _validation(self, data, batch_size):
        if data is None:
            return None
        # Only the last batch is padded.
        size = -(-batch_size // self.replicas) * self.replicas
        return self._shares(InOrder(*data, size))

    def fit(self, model, batches, *, validation_data=None, validation_batch_size=1024, **options):
        validation = self._validation(validation_data, validation_batch_size)
        shares = self._training_shares(model, batches)
        super().fit(model, shares, validation_data=validation, **options)


class DataParallel(Replicated):
    """`keras.distribution.DataParallel`; several processes see their own part of each batch."""

    def steps_per_execution(self, asked):
        return asked

    def jit_compile(self, asked):
        return True if asked else "auto"

    def agree(self, number, what):
        if self.workers == 1:
            return number
        from jax.experimental import multihost_utils

        return _same(np.asarray(multihost_utils.process_allgather(np.int32(number))), what)


class Looped(Replicated):
    """A loop over `tf.distribute.Strategy.run`, with what `fit` of Keras 3 lacks or is slow in.

    The step, callbacks and metrics are those of the compiled model.
    """

    def __init__(self, name: str, strategy: Any, worker: int = 0, workers: int = 1):
        super().__init__(name, strategy, strategy.num_replicas_in_sync, worker, workers)
        self._steps: tuple = (None,)
        self._epoch = 0

    def fit(
        self,
        model,
        batches,
        *,
        validation_data=None,
        validation_batch_size=1024,
        initial_epoch=0,
        epochs=1,
        callbacks=(),
    ):
        batches = self._training_shares(model, batches)
        validation = self._validation(validation_data, validation_batch_size)
        hooks = keras.callbacks.CallbackList(
            list(callbacks), model=model, epochs=epochs, steps=len(batches), verbose=0
        )
        model.stop_training = False
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        if self._steps[0] is not model:
            self._steps = (model, *map(self._compiled, (model.train_step, model.test_step)))
        _, train, test = self._steps
        logs: dict = {}
        with _synchronized(model):
            hooks.on_train_begin()
            self._check_equal(model, "before training")
            for self._epoch in range(initial_epoch, epochs):
                hooks.on_epoch_begin(self._epoch)
                logs = self._pass(model, batches, train, hooks, "train")
                if validation is not None:
                    found = self._pass(model, validation, test, hooks, "test")
                    logs |= {f"val_{name}": value for name, value in found.items()}
                # Before the chief writes a checkpoint of weights that the others may not have.
                self._check_equal(model, f"after epoch {self._epoch + 1}")
                hooks.on_epoch_end(self._epoch, logs)
                if model.stop_training:
                    break
            model.optimizer.finalize_variable_values(model.trainable_variables)
            hooks.on_train_end(logs)

    def _check_equal(self, model, when):
        """One process has one order of summation; there is nothing to compare."""

    def _compiled(self, step):
        import tensorflow as tf

        # A signature without the batch's size, so that a smaller last batch traces nothing new.
        return tf.function(
            lambda *batch: self.strategy.run(step, args=(batch,)), reduce_retracing=True
        )

    def _pass(self, model, batches, step, hooks, mode):
        """Training or validation on all batches once; returns the metrics."""
        model.reset_metrics()
        if mode == "test":
            hooks.on_test_begin()
        else:
            batches.on_epoch_begin()
        before: dict = {}
        with contextlib.closing(read_ahead(batches)) as coming:
            for index, batch in enumerate(coming):
                if mode == "test" and 0 < index == len(batches) - 1:
                    before = _numbers(model)
                getattr(hooks, f"on_{mode}_batch_begin")(index)
                step(*self._values(batch))
                getattr(hooks, f"on_{mode}_batch_end")(index, {})
                if mode == "train" and model.stop_training:
                    break
        logs = _numbers(model)
        if mode == "test":
            logs = without_padding(logs, before, batches)
            hooks.on_test_end(logs)
        return logs

    def _values(self, batch):
        """This worker's part, split among its replicas."""
        import tensorflow as tf

        local = self.replicas // self.workers

        def piece(array, context):
            size = len(array) // local
            place = context.replica_id_in_sync_group % local
            return tf.convert_to_tensor(array[place * size : (place + 1) * size])

        return [
            self.strategy.experimental_distribute_values_from_function(
                lambda context, array=array: piece(array, context)
            )
            for array in batch
        ]


def _numbers(model):
    return {name: float(value) for name, value in model.get_metrics_result().items()}


class MultiWorker(Looped):
    """`tf.distribute.MultiWorkerMirroredStrategy`: workers compare what must be equal."""

    def __init__(self, strategy, cluster: Cluster):
        super().__init__("multiworker", strategy, cluster.index, len(cluster.addresses))
        import tensorflow as tf

        self._gather = tf.function(lambda value: strategy.gather(value, axis=0))

    def fit(self, model, batches, **options):
        import tensorflow as tf

        lost = (
            tf.errors.UnavailableError,
            tf.errors.AbortedError,
            tf.errors.InternalError,
            tf.errors.CancelledError,
            tf.errors.DeadlineExceededError,
            tf.errors.FailedPreconditionError,
        )
        self._epoch = options.get("initial_epoch", 0)
        try:
            super().fit(model, batches, **options)
        except lost as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DistributionError(
                f"Another worker was lost in epoch {self._epoch + 1} ({reason}). Start all workers "
                "again with --resume: they continue after the last checkpoint."
            ) from error

    def _check_equal(self, model, when):
        digest = hashlib.sha256()
        for value in model.get_weights():
            digest.update(np.ascontiguousarray(value).tobytes())
        number = int.from_bytes(digest.digest()[:4], "little") >> 1
        self.agree(number, f"weights {when}")

    def agree(self, number, what):
        import tensorflow as tf

        mine = self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant([number], tf.int32)
        )
        return _same(self._gather(mine).numpy(), what)


@contextlib.contextmanager
def _built_once(model):
    """`LossScaleOptimizer` of Keras makes new variables whenever it is built, and `fit` builds it.

    Checkpoints would hold ever more, and JAX has laid out on its devices those before.
    """
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    optimizer.build = lambda variables: None
    try:
        yield
    finally:
        del optimizer.build


def _check_loss(model, batches, replicas):
    """Refuses losses that would count the copies by which a batch is filled up.

    The class means of a separation and the scale of a soft maximum are those of all examples,
    whatever their weights.
    """
    if replicas == 1 or not isinstance(model.loss, OF_WHOLE_BATCHES):
        return
    uneven = [size for size in batch_sizes(batches) if size % replicas]
    if uneven:
        raise ConfigError(
            "Means over the whole batch are part of this loss, and copies that fill a batch up "
            f"would enter them. Received: {type(model.loss).__name__} on a batch of {uneven[0]} "
            f"examples for {replicas} replicas. Choose a batch size and a number of examples that "
            f"{replicas} divides, or MulticlassHinge or a cross-entropy."
        )


@contextlib.contextmanager
def _synchronized(model):
    """Normalizes by the statistics of the whole batch instead of each replica's share.

    Else moving statistics would differ between replicas, and with them the scales that budgets of
    normalizations bound.
    """
    kind = keras.layers.BatchNormalization
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, kind)]
    before = [layer.synchronized for layer in layers]
    for layer in layers:
        layer.synchronized = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.synchronized = value


def _same(numbers: np.ndarray, what: str) -> int:
    numbers = np.ravel(numbers)
    others = np.flatnonzero(numbers != numbers[0])
    if others.size:
        raise DistributionError(
            f"The workers differ in their {what}. Received: {numbers.tolist()}, one number per "
            "replica. They must read one run directory (a shared file system) and the same data, "
            "and run the same versions on machines of one kind."
        )
    return int(numbers[0])
