"""Training with plain `model.fit`, continued bit for bit after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from .. import models
from ..data.arrays import Dataset
from ..data.streams import ImageStream
from ..errors import ConfigError, RunDirectoryError
from ..modelfile import save_model
from . import files
from .augmentation import training_batches
from .checkpoints import newest_checkpoint, restore, snapshot, write_checkpoint
from .config import ExperimentConfig, LayersConfig
from .execution import Execution
from .objectives import (
    add_weight_decay,
    kept_orthogonal,
    make_loss,
    make_optimizer,
    make_ramps,
)

OnEpoch = Callable[[int, int, dict], None]
Say = Callable[[str], None]


@dataclass
class Trained:
    """A trained model and how it came about.

    Attributes:
        model: the Keras model, projected onto its bounds.
        design: its `Design`, or None for a baseline.
        history: one row of metrics for each epoch.
        resumed_from: epoch that training continued at; 0 for a fresh run.
        seconds: time spent in this call.
    """

    model: keras.Model
    design: Any
    history: list[dict] = field(default_factory=list)
    resumed_from: int = 0
    seconds: float = 0.0


def build_model(config: ExperimentConfig, data: Dataset) -> keras.Model:
    """The configured model with its initial weights, which depend on the seed alone."""
    try:
        return models.build(
            config.model.model_dump(), data.input_shape, data.num_classes, seed=config.seed
        )
    except ValueError as error:
        raise ConfigError(f"The model does not fit the data set: {error}") from error


def make_design(config: ExperimentConfig, model: keras.Model):
    """The `Design` of the configured claim for a model's stages; None for a baseline.

    Raises:
        DesignInfeasible: no budgets can satisfy the claim.
        ConfigError: the model is not a chain of layers.
    """
    if config.claim is None:
        return None
    from ..bounds.stages import stages
    from ..certification import read_network
    from ..design import spectral_design
    from ..theory.sectors import Indices

    network = read_network(model, bounded=False)
    if not network.is_chain:
        raise ConfigError(
            f"A claim is designed for a chain of layers, and this model branches. Received: "
            f"model.name={config.model.name!r} with a claim. Leave out `claim` and set "
            "`layers.budgets`, one for each layer with weights."
        )
    found = stages(network)
    sectors = [stage.sector for stage in found]
    weights = config.layers.weights
    if config.claim.gain is not None:
        return spectral_design(gain=config.claim.gain, sectors=sectors, weights=weights)
    options: dict[str, Any] = {"rule": config.rule, "weights": weights}
    if config.layers.indices is not None:
        options["layer_indices"] = [Indices(i.delta, i.nu) for i in config.layers.indices]
    if config.layers.smallest_singular_values is not None:
        options["smallest_singular_values"] = config.layers.smallest_singular_values
    if config.variant is not None:
        options["variant"] = config.variant
    if config.square_root:
        options["square_root"] = True
    kernels = [kernel.shape for stage in found for kernel, _ in stage.maps]
    if all(len(shape) == 2 for shape in kernels):
        options["widths"] = [kernels[0][0], *(shape[1] for shape in kernels)]
    return spectral_design(Indices(config.claim.delta, config.claim.nu), sectors, **options)


def bind(config: ExperimentConfig, model: keras.Model, design) -> list[keras.callbacks.Callback]:
    """Put the configured bounds on a built model; returns the monitor to train with, if any."""
    bounds = design if design is not None else _by_hand(config.layers, model)
    if bounds is None:
        return []
    from ..callbacks import LyapunovMonitor
    from ..projection import constrain

    constrain(model, bounds, guarantee=config.training.guarantee, every=config.training.every)
    return [LyapunovMonitor(design, on_violation="warn", verbose=0)]


def _by_hand(layers: LayersConfig, model: keras.Model) -> list[float] | None:
    """Budgets of the stages, as they stand in the configuration or for the kernels alone."""
    if not layers.by_hand:
        return None
    if layers.uniform is None and layers.scope == "stage":
        return layers.budgets
    from ..bounds.stages import stages

    found = stages(model)
    budgets = layers.budgets or [layers.uniform] * len(found)
    if layers.scope == "stage" or len(budgets) != len(found):  # `constrain` names the mismatch
        return budgets
    gains = [stage.pre_gain * stage.post_gain for stage in found]
    return [budget * gain for budget, gain in zip(budgets, gains, strict=True)]


def adversarial_model(config: ExperimentConfig, model: keras.Model) -> keras.Model:
    """What is trained: the model itself, or an `AdversarialModel` around it."""
    spec = config.training.adversarial
    if spec is None:
        return model
    from ..attacks import FGM, PGD
    from ..theory.balls import L2, Linf
    from ..training import AdversarialModel

    ball = L2(spec.radius) if spec.norm == "l2" else Linf(spec.radius)
    attack = FGM(ball)
    if spec.name == "pgd":
        step = None if spec.relative_step is None else spec.relative_step * spec.radius
        attack = PGD(ball, steps=spec.steps, step=step, random_start=spec.random_start)
    return AdversarialModel(model, attack, mix=spec.mix, seed=config.seed)


def train(
    config: ExperimentConfig,
    run: files.RunDirectory,
    data: Dataset,
    *,
    resume: bool = False,
    execution: Execution | None = None,
    on_epoch: OnEpoch | None = None,
    say: Say = lambda message: None,
) -> Trained:
    """Train the configured model in an open run directory.

    After every epoch a checkpoint is written whole; `resume=True` continues from the newest intact
    one, and the weights at the end equal those of an uninterrupted run bit for bit (same machine
    and versions).

    Args:
        config: the experiment.
        run: an open `RunDirectory`.
        data: the data set.
        resume: continue the run that is there.
        execution: devices, precision and compilation; by default one device and float32. Only the
            chief of several workers writes to `run`, which all of them must be able to read.
        on_epoch: called as `on_epoch(epochs done, epochs in all, metrics)`.
        say: called with messages for the user.

    Returns:
        A `Trained` with the model saved as `model.keras`.

    Raises:
        RunDirectoryError: the run that is there is a different one.
        ConfigError: the model does not fit the data.
        ValueError: the loss became NaN or infinite.
        DistributionError: another worker was lost, or holds other weights.
        KeyboardInterrupt: with a message that says how far training came.
    """
    started = time.perf_counter()
    execution = execution or Execution()
    distribution = execution.distribution
    if not distribution.is_chief:
        on_epoch, say = None, lambda message: None
    with execution.scope():
        trained = _fit(config, run, data, execution, resume, on_epoch, say)
    if execution.makes_a_copy:
        weights = trained.model.get_weights()
        trained.model, *_ = _prepared(config, data)
        trained.model.set_weights(weights)
    if distribution.is_chief:
        save_model(trained.model, run.file(files.MODEL))
    trained.seconds = time.perf_counter() - started
    return trained


def _prepared(config, data):
    """Model, design and monitors, ready to be compiled."""
    model = build_model(config, data)
    design = make_design(config, model)
    monitors = bind(config, model, design)
    if config.training.weight_decay:
        add_weight_decay(model, config.training.weight_decay)
    return model, design, monitors


def _fit(config, run, data, execution, resume, on_epoch, say) -> Trained:
    distribution = execution.distribution
    model, design, monitors = _prepared(config, data)
    if execution.precision != "float32":
        # The monitor reads the kernels that compute, which rounding may take past their budgets;
        # the bounds are claimed of the float32 model that is saved.
        for monitor in monitors:
            monitor.on_violation = "ignore"
    batches = training_batches(config, data)
    trainer, loss = adversarial_model(config, model), make_loss(config, model)
    trainer.compile(
        optimizer=kept_orthogonal(make_optimizer(config, len(batches)), model),
        loss=loss,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=distribution.steps_per_execution(config.training.steps_per_execution),
        jit_compile=distribution.jit_compile(execution.jit),
    )
    identity = run_identity(config, data, execution)
    recorder = Recorder(config, run, monitors, identity, on_epoch, distribution.is_chief)
    done = recorder.resume(trainer, say) if resume else 0
    distribution.agree(done, "epochs done")
    if distribution.is_chief:
        _write_inputs(config, run, design)

    epochs = done if recorder.is_finished() else config.training.epochs
    if done and done >= epochs:
        say(f"Training is complete: {done} epochs are done.")
    try:
        with Interrupts() as interrupts:
            # Also with nothing left to do: the monitor projects when training ends.
            distribution.fit(
                trainer,
                batches,
                initial_epoch=done,
                epochs=epochs,
                validation_data=(data.x_val, data.y_val),
                validation_batch_size=1024,
                callbacks=[
                    batches.epoch_callback(),
                    *monitors,
                    *make_ramps(config, loss),
                    recorder,
                    interrupts,
                ],
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted after {recorder.epochs_done} of {epochs} epochs. Nothing is lost up to "
            f"there: the same command with --resume continues in {run.path}."
        ) from None
    return Trained(model=model, design=design, history=recorder.history, resumed_from=done)


def run_identity(config: ExperimentConfig, data: Dataset, execution: Execution) -> dict:
    """What the numbers of a run depend on: configuration, data, execution and versions."""
    return {
        "training": {**config.training_identity(), **execution.identity},
        "data": _fingerprint(data),
        "versions": {"keras": keras.__version__, "backend": keras.backend.backend()},
    }


def _fingerprint(data: Dataset | ImageStream) -> str:
    if isinstance(data, ImageStream):
        return data.fingerprint()
    digest = hashlib.sha256()
    for array in (data.x_train, data.y_train, data.x_val, data.y_val):
        digest.update(str((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write_inputs(config: ExperimentConfig, run: files.RunDirectory, design) -> None:
    # The configuration first: it is what makes the directory a run.
    files.write_text(run.file(files.CONFIG), config.to_yaml())
    files.write_record(run.file(files.VERSIONS), files.version_info())
    if design is not None:
        record = design.to_json()
        record = json.loads(record) if isinstance(record, str) else record
        files.write_record(run.file(files.DESIGN), record)


class Interrupts(keras.callbacks.Callback):
    """Remembers Ctrl-C until the epoch's end.

    Python drops a KeyboardInterrupt that strikes inside a destructor or a callback from native
    code, and training would go on; here it is raised again when the epoch ends.
    """

    def __init__(self):
        super().__init__()
        self.seen = False

    def __enter__(self):
        self._old = None
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *unused):
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)

    def _note(self, number, frame):
        self.seen = True
        raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        if self.seen:
            raise KeyboardInterrupt


class Recorder(keras.callbacks.Callback):
    """Keeps the metrics of every epoch and writes them, with a checkpoint, when it ends.

    It must come after the callbacks whose state it saves: they project weights and add metrics
    at the end of an epoch.
    """

    def __init__(self, config, run, stateful=(), identity=None, on_epoch=None, writes=True):
        super().__init__()
        self.writes = writes
        self.config, self.run, self.identity = config, run, identity or {}
        self.stateful = [c for c in stateful if hasattr(c, "get_state")]
        self.on_epoch = on_epoch
        self.history: list[dict] = []
        self._restored: dict | None = None
        self._epoch_started = time.perf_counter()

    @property
    def epochs_done(self) -> int:
        """Number of epochs in the history."""
        return len(self.history)

    def resume(self, model: keras.Model, say: Say) -> int:
        """Load the newest intact checkpoint, if there is one; returns the epochs done."""
        checkpoint, messages = newest_checkpoint(self.run.file(files.CHECKPOINTS))
        for message in messages:
            say(message)
        if checkpoint is None:
            if messages:
                say("No checkpoint is intact: training starts from the beginning.")
            return 0
        _check_identity(self.identity, checkpoint.identity, self.run, say)
        if checkpoint.epoch > self.config.training.epochs:
            raise RunDirectoryError(
                f"The run is already further than asked for. Received: {checkpoint.epoch} epochs "
                f"in {self.run.path}, training.epochs={self.config.training.epochs}. Pass "
                "--overwrite to start again."
            )
        restore(model, checkpoint)
        self.history = checkpoint.history
        self._restored = checkpoint.state
        if self.writes:
            self._write_metrics()
        say(f"Continuing after epoch {checkpoint.epoch}.")
        return checkpoint.epoch

    def is_finished(self) -> bool:
        """Whether the accuracy of the last epochs is as high as asked for."""
        level, window = self.config.training.stop_at_accuracy, self.config.training.stop_window
        if level is None or len(self.history) < window:
            return False
        return math.fsum(row["accuracy"] for row in self.history[-window:]) / window >= level

    def on_train_begin(self, logs=None):
        if self._restored is None:
            return
        for callback, state in zip(self.stateful, self._restored["callbacks"], strict=False):
            callback.set_state(state)
        warm = _warm_vectors(self.model)
        for variable, value in zip(warm, self._restored["warm_vectors"], strict=False):
            variable.assign(value)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1}
        row.update({key: _plain_number(value) for key, value in (logs or {}).items()})
        row["seconds"] = round(time.perf_counter() - self._epoch_started, 3)
        if not math.isfinite(row.get("loss", 0.0)):
            rate = self.config.training.optimizer.learning_rate
            raise ValueError(
                f"The loss of epoch {epoch + 1} is not finite. Received: loss={row['loss']}, "
                f"learning_rate={rate}. Lower `training.optimizer.learning_rate`; the run is kept "
                "up to the epoch before."
            )
        self.history.append(row)
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        if self.writes:
            self._write(epoch + 1)
        if self.on_epoch is not None:
            self.on_epoch(epoch + 1, self.config.training.epochs, row)
        if self.is_finished():
            self.model.stop_training = True

    def _write(self, done):
        state = {
            "callbacks": [callback.get_state() for callback in self.stateful],
            "warm_vectors": [variable.numpy() for variable in _warm_vectors(self.model)],
        }
        try:
            write_checkpoint(
                self.run.file(files.CHECKPOINTS),
                snapshot(self.model, done, self.history, state, self.identity),
            )
            self._write_metrics()
        except OSError as error:
            raise RunDirectoryError(
                f"Epoch {done} could not be written: {error.strerror or error}. Received: "
                f"{self.run.path}. The checkpoint before it is kept: make room and run the same "
                "command with --resume."
            ) from error

    def _write_metrics(self):
        files.write_csv(self.run.file(files.METRICS_CSV), self.history)
        files.write_json(self.run.file(files.METRICS_JSON), self.history)


def _warm_vectors(model: keras.Model) -> list[keras.Variable]:
    """Variables from which the amortised constraints steer; the monitor makes them in training.

    They change no guarantee, and Keras saves them nowhere, but the bits of the next step depend
    on them.
    """
    starts = [getattr(v.constraint, "_start", None) for v in model.trainable_variables]
    return [start for start in starts if start is not None]


def _plain_number(value: Any) -> Any:
    if isinstance(value, str | bool) or value is None:
        return value
    return float(value)


def _check_identity(ours: dict, theirs: dict, run: files.RunDirectory, say: Say) -> None:
    difference = _first_difference(theirs.get("training"), ours.get("training"))
    if difference is not None:
        path, old, new = difference
        raise RunDirectoryError(
            f"The run in {run.path} was started with another configuration. Received: {path}={new} "
            f"where the run has {path}={old}. Resume with the old value, pass --overwrite to start "
            "again, or choose another --run-dir."
        )
    if theirs.get("data") != ours.get("data"):
        raise RunDirectoryError(
            f"The run in {run.path} was started with other data: the training examples differ. "
            "Use the same data directory, or pass --overwrite to start again."
        )
    if theirs.get("versions") != ours.get("versions"):
        say(
            f"The run was started with {theirs.get('versions')}, and continues with "
            f"{ours.get('versions')}: the last bits may differ."
        )


def _first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            found = _first_difference(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
            if found:
                return found
        return None
    return None if old == new else (path or "configuration", old, new)
