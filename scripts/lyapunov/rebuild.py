#!/usr/bin/env python
"""Rebuilds the MNIST experiments: paper 1's Table 2 and paper 2's Figure 1.

    python scripts/lyapunov/rebuild.py --data-dir DIR            # all, about 45 minutes on 2 cores
    python scripts/lyapunov/rebuild.py --data-dir DIR --quick    # a smoke test, under 2 minutes

Finished models are kept: the same command continues after an interruption. Results go to
`scripts/results/mnist` (`mnist_quick` with --quick): RESULTS.md, CSV, JSON and figures. Exit code
1 if a measurement contradicts a proof.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folders of all papers

import keras
import numpy as np

from lyapunov.tables import TABLE_2, TABLE_2_RADII, contradictions, write_results
from tf_lyapunov import datasets, models
from tf_lyapunov.attacks import FGM, PGD
from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.certification import certify
from tf_lyapunov.design import spectral_design
from tf_lyapunov.evaluation import accuracy_under_attack, measured_gain, summaries
from tf_lyapunov.evaluation.results import plain
from tf_lyapunov.evaluation.wording import percent, round_up
from tf_lyapunov.losses import TemperatureCrossEntropy
from tf_lyapunov.projection import constrain
from tf_lyapunov.theory.balls import L2
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
# Aquino et al.: the released spectral bounds for MNIST and the network's claim.
RELEASED_BOUNDS = (2.3783, 2.5231, 0.9815)
FIGURE_1_CLAIM = (0.4, -2.0)
FIGURE_1_RADII = tuple(round(0.05 * k, 2) for k in range(16))
PGD_STEPS = 100
STOP_AT, STOP_WINDOW = 0.999, 5
# The sound networks are trained for margins that certify this radius.
MARGIN_RADIUS = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers; results of other settings are not reused."""

    quick: bool
    seed: int
    train: int | None
    test: int | None
    table_2_epochs: int
    figure_1_epochs: int
    table_2_claims: tuple
    figure_1_radii: tuple
    pgd_steps: int

    @classmethod
    def of(cls, quick: bool, seed: int) -> Settings:
        if quick:
            claims, radii = tuple(TABLE_2)[:1], (0.0, 0.25, 0.5, 0.75)
            return cls(True, seed, 6000, 400, 2, 2, claims, radii, 20)
        return cls(False, seed, None, None, 30, 200, tuple(TABLE_2), FIGURE_1_RADII, PGD_STEPS)


@dataclasses.dataclass(frozen=True)
class Job:
    """One model: how it is bounded and trained, and which experiment it belongs to."""

    name: str
    label: str
    part: str
    slope: float
    bounds: object = None  # a Design, budgets, or None
    claim: tuple | None = None
    weight_decay: float = 0.0
    margin: float = 0.0  # in units of the logits; 0 trains with plain cross-entropy
    stop: bool = False


def jobs(settings: Settings) -> list[Job]:
    """All models of both experiments."""
    found = []
    leaky = Sector.of("leaky_relu", negative_slope=0.3)
    sectors = [leaky, leaky, Sector.linear()]
    for delta, nu in settings.table_2_claims:
        claim = Indices(delta, nu)
        stem = f"table_2_{round(100 * delta):03d}_{round(100 * nu):03d}"
        printed = spectral_design(claim, sectors, rule="lyapunov")
        derived = spectral_design(claim, sectors, rule="lyapunov", square_root=True)
        sound = spectral_design(gain=claim.gain_as_published, sectors=sectors)
        for kind, label, design, margin in (
            ("printed", "rule as printed (σ ≤ λ)", printed, 0.0),
            ("derived", "rule as derived (σ ≤ √λ)", derived, 0.0),
            ("sound", "our sound design, gain √c", sound, margin_for(sound)),
        ):
            found.append(
                Job(
                    f"{stem}_{kind}",
                    label,
                    "table_2",
                    0.3,
                    design,
                    (delta, nu),
                    margin=margin,
                )
            )
    found.append(Job("table_2_baseline", "baseline, no bounds", "table_2", 0.3))
    leaky = Sector.of("leaky_relu", negative_slope=0.1)
    sound = spectral_design(Indices(*FIGURE_1_CLAIM), [leaky, leaky, Sector.linear()], rule="sound")
    figure = {"part": "figure_1", "slope": 0.1, "stop": True}
    found += [
        Job("figure_1_vanilla", "vanilla", **figure),
        Job("figure_1_weight_decay", "l2 weight decay 0.01", weight_decay=0.01, **figure),
        Job("figure_1_released", "spectral, released bounds", bounds=RELEASED_BOUNDS, **figure),
        Job(
            "figure_1_sound",
            "spectral, our sound design",
            bounds=sound,
            claim=FIGURE_1_CLAIM,
            margin=margin_for(sound),
            **figure,
        ),
    ]
    return found


def margin_for(design) -> float:
    """Margin m of the logits that certifies `MARGIN_RADIUS`: m = √2·gain·radius."""
    return 2**0.5 * design.gain_upper_bound * MARGIN_RADIUS


class StopWhenFitted(keras.callbacks.Callback):
    """Ends training when the mean training accuracy of five epochs reaches 0.999."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(float(logs["accuracy"]))
        if len(self.seen) >= STOP_WINDOW and np.mean(self.seen[-STOP_WINDOW:]) >= STOP_AT:
            self.model.stop_training = True


def build(job: Job, data, settings: Settings):
    """The 784-50-20-10 network, with the job's bounds attached."""
    spec = {
        "name": "mlp",
        "widths": [50, 20],
        "activation": "leaky_relu",
        "negative_slope": job.slope,
    }
    model = models.build(spec, data.input_shape, data.num_classes, seed=settings.seed)
    if job.weight_decay:
        for layer in model.layers:
            if hasattr(layer, "kernel"):
                # On the built variable: that is what the training step reads.
                layer.kernel.regularizer = keras.regularizers.L2(job.weight_decay)
    if job.bounds is not None:
        constrain(model, job.bounds)
    return model


def train(job: Job, data, settings: Settings, cache: Path):
    """A trained model and its training record, from the cache if it is there."""
    model = build(job, data, settings)
    weights, record = cache / f"{job.name}.weights.h5", cache / f"{job.name}.json"
    identity = {**plain(dataclasses.asdict(settings)), "job": describe(job)}
    old = read_json(record)
    if old and old["identity"] == identity and weights.exists():
        model.load_weights(weights)
        return model, old
    # A small gain cannot make logits large: the cold loss with a margin lets it learn.
    cold = {"temperature": 0.05, "margin": job.margin} if job.margin else {}
    epochs = settings.figure_1_epochs if job.part == "figure_1" else settings.table_2_epochs
    batches = datasets.Batches(data.x_train, data.y_train, 128, seed=settings.seed)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=TemperatureCrossEntropy(**cold),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=min(16, len(batches)),
    )
    callbacks = [batches.epoch_callback(), EpochPrinter(job.name, epochs)]
    if job.bounds is not None:
        design = None if isinstance(job.bounds, tuple) else job.bounds
        callbacks.append(LyapunovMonitor(design, on_violation="ignore", verbose=0))
    if job.stop:
        callbacks.append(StopWhenFitted())
    started = time.perf_counter()
    fit = model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    found = {
        "identity": identity,
        "epochs": len(fit.epoch),
        "train_accuracy": fit.history["accuracy"][-1],
        "seconds": time.perf_counter() - started,
    }
    cache.mkdir(parents=True, exist_ok=True)
    write_text(cache / ".gitignore", "*\n")
    temporary = cache / f".{job.name}.{os.getpid()}.weights.h5"
    model.save_weights(temporary)
    os.replace(temporary, weights)
    write_text(record, json.dumps(plain(found)))
    return model, found


class EpochPrinter(keras.callbacks.Callback):
    """One line on a terminal, overwritten each epoch."""

    def __init__(self, name: str, epochs: int):
        super().__init__()
        self.name, self.epochs = name, epochs

    def on_epoch_end(self, epoch, logs=None):
        if sys.stdout.isatty():
            text = f"{self.name}: epoch {epoch + 1}/{self.epochs}, {percent(logs['accuracy'])}"
            print(f"\r\033[K  {text}", end="", flush=True)

    def on_train_end(self, logs=None):
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)


def describe(job: Job) -> dict:
    """The job in JSON types; a design by its budgets, which decide the training."""
    budgets = getattr(job.bounds, "budgets", job.bounds)
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return plain({**fields, "bounds": budgets})


def measure(job: Job, model, data, settings: Settings) -> dict:
    """Certificate and attacks of a trained model, on the test images."""
    x, y = data.x_test, data.y_test
    proof = certify(model, x, y)
    found = {
        "clean": proof.accuracy,
        "gain_upper_bound": proof.gain_upper_bound,
        "certificate": {
            key: value
            for key, value in summaries.certificate_summary(proof).items()
            if key in ("verdict", "method", "median_radius", "contributions", "assumptions")
        },
    }
    if job.bounds is not None and not isinstance(job.bounds, tuple):
        found["design"] = summaries.design_summary(job.bounds)
    if job.part == "table_2":
        found["rows"] = [table_2_row(job, model, x, radius, settings) for radius in TABLE_2_RADII]
        for row in found["rows"]:
            row["certified"] = proof.certified_accuracy(row["radius"])
            row["proved"] = proof.gain_upper_bound * row["radius"]
        return found
    found["rows"] = accuracy_under_attack(
        model,
        x,
        y,
        {
            "FGM": lambda radius: FGM(L2(radius), batch_size=1000),
            "PGD": lambda radius: PGD(
                L2(radius),
                steps=settings.pgd_steps,
                step=2 * radius / settings.pgd_steps,
                batch_size=1000,
            ),
        },
        settings.figure_1_radii,
        certificate=proof,
        cumulative=False,
    )
    return found


def table_2_row(job: Job, model, x, radius: float, settings: Settings) -> dict:
    """Output changes under PGD towards other classes than the model's own, without clipping."""
    attack = PGD(
        L2(radius),
        steps=settings.pgd_steps,
        step=2 * radius / settings.pgd_steps,
        keep="last",
        batch_size=1000,
    )
    result = attack(model, x)
    change = measured_gain(model, x, result.x_adv)
    return {
        "radius": radius,
        "mean": change.change_mean,
        "max": change.change_maximum,
        "gain_max": change.maximum,
        "moved": change.count,
        "flipped": result.success_rate,
    }


def read_json(path: Path):
    """The JSON in a file, or None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def provenance(settings: Settings, data, data_dir) -> dict:
    """Command, date, machine and data set of this run."""
    directory = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    prepared = sorted(p.name for p in (directory.expanduser() / "mnist").glob("*.*.*"))
    digest = hashlib.sha256(data.x_test.tobytes() + data.y_test.tobytes()).hexdigest()[:16]
    versions = summaries.installed_versions()
    options = ["--quick"] if settings.quick else []
    return {
        "command": shlex.join(
            ["python", "scripts/lyapunov/rebuild.py", "--data-dir", "DIR", *options]
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": versions.pop("platform"),
        "cores": os.cpu_count(),
        "data": f"TFDS mnist {prepared[-1] if prepared else ''}, {len(data.x_train)} training and "
        f"{len(data.x_test)} test images, {data.preprocessing}, SHA-256 of the test split {digest}",
        "versions": versions,
        "settings": plain(dataclasses.asdict(settings)),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test, under 2 minutes")
    parser.add_argument("--only", choices=("table_2", "figure_1"), help="one experiment")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    settings = Settings.of(options.quick, options.seed)
    out = options.out or ROOT / "results" / ("mnist_quick" if options.quick else "mnist")
    try:
        data = datasets.load("mnist", options.data_dir)
    except ValueError as error:  # DatasetNotFound
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = dataclasses.replace(
        data,
        x_train=data.x_train[: settings.train],
        y_train=data.y_train[: settings.train],
        x_test=data.x_test[: settings.test],
        y_test=data.y_test[: settings.test],
    )
    records = []
    for job in jobs(settings):
        path = out / "models" / f"{job.name}.json"
        record = read_json(path)
        identity = {**plain(dataclasses.asdict(settings)), "job": describe(job)}
        if record is None or record.get("identity") != identity:
            if options.only not in (None, job.part):
                continue
            started = time.perf_counter()
            model, trained = train(job, data, settings, out / "cache")
            record = {"name": job.name, "label": job.label, "part": job.part, **trained}
            record["job"] = describe(job)
            record.update(plain(measure(job, model, data, settings)))
            record["seconds_in_all"] = time.perf_counter() - started
            write_text(path, json.dumps(plain(record), indent=1))
            keras.backend.clear_session()
        records.append(record)
        done = f"{record['epochs']} epochs, clean {percent(record['clean'])}"
        print(f"{job.name}: {done}, proved gain {round_up(record['gain_upper_bound'])}", flush=True)
    text = write_results(records, provenance(settings, data, options.data_dir), out)
    print(f"\n{text}\nWritten to {out}")
    return 1 if contradictions(records) else 0


if __name__ == "__main__":
    sys.exit(main())
