"""Training and measuring of one network of `potential/rebuild.py`, on any backend."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import keras
import numpy as np

from tf_lyapunov import datasets, losses, models
from tf_lyapunov.attacks import PGD
from tf_lyapunov.certification import certify
from tf_lyapunov.errors import DatasetNotFound
from tf_lyapunov.evaluation.results import plain
from tf_lyapunov.experiments.augmentation import AugmentedBatches
from tf_lyapunov.experiments.checkpoints import (
    newest_checkpoint,
    restore,
    snapshot,
    write_checkpoint,
)
from tf_lyapunov.experiments.objectives import PiecewiseLinear
from tf_lyapunov.optimizers import Stiefel, is_marked
from tf_lyapunov.theory.balls import L2
from tf_lyapunov.writing import write_text

RADII = tuple(r / 255 for r in (36, 72, 108))
# Figures 1, 4 and 5 of the paper end at 1; figure 2 uses ten steps.
CURVE = tuple(round(0.05 * k, 2) for k in range(31))
ATTACKED = (36 / 255, 0.5, 1.0, 1.5)
PGD_STEPS = 10
ARRAYS = ("x", "y", "x_test", "y_test")
LOSSES = {
    "cross_entropy": losses.TemperatureCrossEntropy,
    "multi_margin": losses.MultiMargin,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One network: what is trained, how, and what the paper prints beside it."""

    name: str
    label: str
    part: str
    dataset: str
    model: dict
    loss: dict
    epochs: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    augment: bool = False
    train: int | None = None  # the first images of the training set
    test: int | None = None
    attacked: int = 1000
    seed: int = 0
    published: tuple | None = None  # clean and certified at RADII, percent
    published_seconds: float | None = None  # an epoch, on the authors' GPU

    def identity(self) -> dict:
        """What decides the numbers."""
        known = ("label", "published", "published_seconds")
        return plain({k: v for k, v in dataclasses.asdict(self).items() if k not in known})


def load(name: str, directory: str | None):
    """Images and labels, `(x, y, x_test, y_test)`: the whole sets, in the order of the files.

    32×32 pixels of x/255 - 0.5, a translation of the paper's mean-subtracted [0, 1]: radii are the
    same. From the arrays of `prepare` if they are there, else from TensorFlow Datasets.
    """
    arrays = None if directory is None else Path(directory) / f"{name}.npz"
    if arrays is not None and arrays.exists():
        with np.load(arrays) as file:
            return tuple(file[k] for k in ARRAYS)
    data = datasets.load(name, directory, crop=0, validation=1)
    x, y = (np.concatenate(v) for v in ((data.x_val, data.x_train), (data.y_val, data.y_train)))
    return x, y, data.x_test, data.y_test


def prepare(name: str, directory: str, into: str) -> Path:
    """Writes a data set as arrays, for machines without TensorFlow Datasets."""
    path = Path(into) / f"{name}.npz"
    np.savez_compressed(path, **dict(zip(ARRAYS, load(name, directory), strict=True)))
    return path


class Clock(keras.callbacks.Callback):
    """A line a epoch in a file: what was measured, CPU and wall seconds."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.lines = [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.process_time(), time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        cpu, wall = time.process_time(), time.perf_counter()
        line = {
            "epoch": epoch + 1,
            **{k: float(v) for k, v in logs.items()},
            "cpu": cpu - self.started[0],
            "wall": wall - self.started[1],
        }
        # An epoch that is repeated after an interruption replaces its line.
        self.lines = [*self.lines[:epoch], line]
        write_text(self.path, "".join(json.dumps(v) + "\n" for v in self.lines))


def fit_to_end(model, batches, epochs: int, told, folder: Path, final: Path, plain=None):
    """Trains for so many epochs, from the newest intact checkpoint on, and keeps the weights.

    A kill at any moment loses no more than the epoch that it strikes: checkpoints are whole files
    that carry their digest, and go when the weights at the end are written.

    Args:
        model: compiled.
        batches: `datasets.Batches`.
        epochs: in all.
        told: callbacks.
        folder: of the checkpoints.
        final: file of the weights at the end.
        plain: whose weights these are; by default of `model`.
    """
    found, messages = newest_checkpoint(folder)
    for message in messages:
        print(message, flush=True)
    if found is not None:
        restore(model, found)
    model.fit(
        batches,
        initial_epoch=0 if found is None else found.epoch,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[batches.epoch_callback(), *told, Checkpoints(folder)],
    )
    # Keras insists on the end of the name.
    unfinished = final.with_name("unfinished.weights.h5")
    (model if plain is None else plain).save_weights(unfinished)
    unfinished.replace(final)
    shutil.rmtree(folder, ignore_errors=True)


def start_over(folder: Path, mark: Path):
    """An empty folder for a run; one of other settings, which may have taken hours, is moved aside.

    Args:
        folder: of the run.
        mark: the file that says which run it holds.
    """
    if mark.exists():
        names = (folder.with_name(f"{folder.name}_old_{k}") for k in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class Checkpoints(keras.callbacks.Callback):
    """A checkpoint of every epoch."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        write_checkpoint(self.folder, snapshot(self.model, epoch + 1, [], {}, {}))


def train(job: Job, data, cache: Path):
    """A trained model and its epochs; continues where an interrupted run stopped."""
    x, y = data[0][: job.train], data[1][: job.train]
    model = models.build(job.model, x.shape[1:], int(data[1].max()) + 1, seed=job.seed)
    folder = cache / job.name
    mark = folder / "job.json"
    if not mark.exists() or json.loads(mark.read_text()) != job.identity():
        start_over(folder, mark)
        write_text(cache / ".gitignore", "*\n")
        write_text(mark, json.dumps(job.identity()))
    clock = Clock(folder / "epochs.jsonl")
    final = folder / "final.weights.h5"
    if final.exists():
        model.load_weights(final)
        return model, clock.lines
    arguments = {"batch_size": job.batch_size, "seed": job.seed}
    if job.augment:
        batches = AugmentedBatches(x, y, crop=4, flip=True, **arguments)
    else:
        batches = datasets.Batches(x, y, **arguments)
    total, peak = len(batches) * job.epochs, job.learning_rate
    rate = PiecewiseLinear([0, 0.4 * total, 0.8 * total, total], [0, peak, peak / 20, 0])
    loss = dict(job.loss)
    optimizer = keras.optimizers.Adam(rate)
    if any(is_marked(v) for v in model.trainable_variables):
        optimizer = Stiefel(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=LOSSES[loss.pop("name")](**loss),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=min(16, len(batches)),
    )
    fit_to_end(model, batches, job.epochs, [clock], folder / "checkpoints", final)
    return model, clock.lines


def run(job: Job, directories: dict, out: Path, loaded: dict) -> dict | None:
    """The record of a job, measured now or before; None where its data set is not there."""
    path = out / "models" / f"{job.name}.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["identity"] == job.identity():
            return record
    if (record := _twin(job, path.parent)) is not None:
        record["identity"] = job.identity()
        write_text(path, json.dumps(record, indent=1) + "\n")
        return record
    try:
        if job.dataset not in loaded:
            loaded[job.dataset] = load(job.dataset, directories[job.dataset])
    except DatasetNotFound as error:
        print(f"{job.name}: left out. {error}", flush=True)
        return None
    data = loaded[job.dataset]
    model, epochs = train(job, data, out / "cache")
    record = {"identity": job.identity(), "epochs": epochs, **measure(job, model, data)}
    # The first epoch compiles.
    steady = epochs[1:] or epochs
    record["parameters"] = int(sum(math.prod(v.shape) for v in model.trainable_variables))
    record["seconds"] = {
        "cpu": sum(e["cpu"] for e in epochs),
        "wall": sum(e["wall"] for e in epochs),
        "cpu_per_epoch": float(np.median([e["cpu"] for e in steady])),
        "wall_per_epoch": float(np.median([e["wall"] for e in steady])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain(record), indent=1) + "\n")
    keras.backend.clear_session()
    return record


def _twin(job: Job, models: Path) -> dict | None:
    """The record of the same training under another name."""
    names = ("name", "part")
    wanted = {k: v for k, v in job.identity().items() if k not in names}
    for path in sorted(models.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if {k: v for k, v in record["identity"].items() if k not in names} == wanted:
            return record
    return None


def measure(job: Job, model, data) -> dict:
    """Accuracy, proved accuracy at `RADII` and `CURVE`, and under PGD of ten steps."""
    x, y = data[2][: job.test], data[3][: job.test]
    started = time.process_time()
    proof = certify(model, x, y)
    found = {
        "clean": proof.accuracy,
        "certified": [float(proof.certified_accuracy(r)) for r in RADII],
        "curve": [float(proof.certified_accuracy(r)) for r in CURVE],
        "gain_upper_bound": proof.gain_upper_bound,
        "verdict": proof.verdict,
        "certify_cpu": time.process_time() - started,
        "pgd": [],
        "broken": 0,
    }
    count = job.attacked
    for radius in ATTACKED if count else ():
        attack = PGD(L2(radius), steps=PGD_STEPS, step=2.5 * radius / PGD_STEPS, batch_size=500)
        result = attack(model, x[:count], y[:count])
        right = ~np.asarray(result.success)
        found["pgd"].append(float(np.mean(right)))
        broken = ~right & (proof.radius[:count] >= radius * (1 + 1e-4))
        found["broken"] += int(np.sum(broken))
    return found
