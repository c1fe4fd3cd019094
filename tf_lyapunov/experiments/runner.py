"""A run from end to end: train, certify, attack, report; each step leaves its own files."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.arrays import Dataset
from ..errors import UnsupportedLayerError
from . import files, training
from .config import AttackConfig, ExperimentConfig
from .execution import Execution
from .reading import load_config
from .targets import Opened, Say, load_data, load_design, open_run, open_target

__all__ = [
    "Opened",
    "attack_target",
    "certify_target",
    "compose_results",
    "open_run",
    "open_target",
    "report_run",
    "run_experiment",
    "train_experiment",
]


def train_experiment(
    config: ExperimentConfig,
    run: files.RunDirectory,
    *,
    resume: bool = False,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    data: Dataset | None = None,
    execution: Execution | None = None,
    on_epoch: training.OnEpoch | None = None,
    say: Say = lambda message: None,
) -> training.Trained:
    """Load the data and train; see `training.train`.

    Global batch and learning rate are scaled as `execution` says. A run of several workers is noted
    by the chief alone.
    """
    execution = execution or Execution()
    config = execution.scaled(config)
    if data is None:
        data = load_data(config, data_dir, download)
    trained = training.train(
        config, run, data, resume=resume, execution=execution, on_epoch=on_epoch, say=say
    )
    if not execution.distribution.is_chief:
        return trained
    _note(
        run,
        execution={
            **dataclasses.asdict(execution),
            "replicas": execution.distribution.replicas,
            "workers": execution.distribution.workers,
            "global_batch_size": config.training.batch_size,
        },
        dataset={
            "name": data.name,
            "num_classes": data.num_classes,
            "input_shape": list(data.input_shape),
            "train": len(data.x_train),
            "validation": len(data.x_val),
            "test": len(data.x_test),
            "preprocessing": data.preprocessing,
        },
        model={"name": config.model.name, "parameters": int(trained.model.count_params())},
        seconds={"training": math.fsum(row.get("seconds", 0.0) for row in trained.history)},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return trained


def certify_target(
    opened: Opened,
    split: str = "test",
    samples: int | None = None,
    *,
    out: str | os.PathLike | None = None,
    **options,
):
    """Certify the model on a split; the certificate is written to the run and to `out`.

    `options` are those of `certify`.
    """
    from ..certification import certify

    x, y = opened.arrays(split, samples)
    started = time.perf_counter()
    certificate = certify(opened.model, x, y, **options)
    seconds = time.perf_counter() - started
    opened.certificate, opened.certified = certificate, (split, samples)
    reading = _reading(opened)
    opened.check = reading["check"]
    if opened.run is not None:
        certificate.save(opened.run.file(files.CERTIFICATE))
        _note(opened.run, seconds={"certification": seconds}, **reading)
    if out is not None:
        certificate.save(out)
    return certificate


def _reading(opened: Opened) -> dict:
    """Guaranteed bounds of the trained layers, and whether they still prove the claim."""
    if opened.run is None:
        return {"layers": [], "check": None}
    from ..callbacks import LyapunovMonitor
    from ..evaluation.summaries import layer_rows

    try:
        monitor = LyapunovMonitor(opened.design, on_violation="ignore", verbose=0)
        monitor.set_model(opened.model)
        reading = monitor.read()
    except UnsupportedLayerError:  # nothing to show by stage, for example in a branched graph
        return {"layers": [], "check": None}
    names = list(reading.sigma_upper_bound)
    rows = layer_rows(
        names,
        [reading.sigma_upper_bound[name] for name in names],
        _per_layer(opened, names, "budgets") or [reading.budget.get(name) for name in names],
        indices=_per_layer(opened, names, "indices"),
    )
    check = reading.check
    return {
        "layers": rows,
        "check": None
        if check is None
        else {key: getattr(check, key, None) for key in ("holds", "margin", "gain_upper_bound")},
    }


def _per_layer(opened: Opened, names: Sequence[str], what: str):
    """Budgets or indices as they were designed, or budgets set by hand; None if there are none."""
    source = opened.design
    if source is None and opened.config is not None and opened.config.layers.scope == "stage":
        source = opened.config.layers
    values = getattr(source, what, None)
    return values if values and len(values) == len(names) else None


def make_attack(spec: AttackConfig, radius: float):
    """The configured attack at one radius."""
    from ..attacks import FGM, PGD
    from ..theory.balls import L2, Linf

    ball = L2(radius) if spec.norm == "l2" else Linf(radius)
    if spec.name == "fgm":
        return FGM(ball, bounds=spec.bounds)
    step = None if spec.relative_step is None else spec.relative_step * radius
    return PGD(
        ball,
        steps=spec.steps,
        step=step,
        restarts=spec.restarts,
        random_start=spec.random_start,
        loss=spec.loss,
        bounds=spec.bounds,
    )


def attack_name(spec: AttackConfig) -> str:
    """Short name of an attack, for tables."""
    name = "FGM" if spec.name == "fgm" else f"PGD-{spec.steps}"
    if spec.name == "pgd" and spec.restarts > 1:
        name += f"×{spec.restarts}"
    if spec.name == "pgd" and spec.loss == "margin":
        name += " margin"
    if spec.norm == "linf":
        name += " l∞"
    return name if spec.bounds is None else f"{name} in [{spec.bounds[0]:g}, {spec.bounds[1]:g}]"


def attack_target(
    opened: Opened,
    attacks: Sequence[AttackConfig | Mapping],
    radii: Sequence[float],
    split: str = "test",
    samples: int | None = None,
    *,
    out: str | os.PathLike | None = None,
) -> dict:
    """Attack the model at every radius; the rows are written to the run and to `out`.

    Returns:
        A dict with "split", "samples", "attacks", "rows" and "gain" (largest measured). The run's
        file also gets "classes" and "examples", which the report shows.
    """
    from ..evaluation.accuracy import accuracy_under_attack, largest_measured_gain

    specs = [_attack_spec(spec) for spec in attacks]
    x, y = opened.arrays(split, samples)
    certificate = opened.certificate if opened.certified == (split, samples) else None
    started = time.perf_counter()
    rows: list[dict] = []
    by_class: list[dict] = []
    # An l2 certificate says nothing about l∞ balls: those attacks are measured on their own.
    for norm in ("l2", "linf"):
        chosen = {
            attack_name(spec): (lambda radius, spec=spec: make_attack(spec, radius))
            for spec in specs
            if spec.norm == norm
        }
        if not chosen and (norm == "linf" or any(spec.norm == "linf" for spec in specs)):
            continue
        new = accuracy_under_attack(
            opened.model,
            x,
            y,
            chosen,
            radii,
            certificate=certificate if norm == "l2" else None,
            by_class=True,
            progress=lambda text: opened.say(f"attacking: {text}"),
        )
        counts = [{"radius": row["radius"], **row.pop("by_class")} for row in new]
        by_class = by_class or (counts if norm == "l2" else [])
        rows = _merged(rows, new) if rows else new
    found = {
        "split": split,
        "samples": len(x),
        "attacks": [{"label": attack_name(spec), **spec.model_dump(mode="json")} for spec in specs],
        "rows": rows,
        "gain": largest_measured_gain(rows),
    }
    seconds = time.perf_counter() - started
    if opened.run is not None:
        more = _shown(opened, specs, x, y, certificate, by_class)
        files.write_record(opened.run.file(files.ATTACK_JSON), {**found, **more})
        files.write_csv(opened.run.file(files.ATTACK_CSV), [_flat(row) for row in rows])
        _note(opened.run, seconds={"attack": seconds})
    if out is not None:
        files.write_json(out, found)
    return found


def _shown(opened, specs, x, y, certificate, by_class) -> dict:
    """Counts by class, and the weakest inputs, for the report."""

    from ..certification.margins import decisions
    from ..evaluation.accuracy import logits
    from ..evaluation.classes import class_summary
    from ..evaluation.examples import weakest_examples
    from ..losses.classes import class_numbers

    opened.say("looking for the weakest inputs")
    outputs = logits(opened.model, x)
    boxes = {spec.bounds for spec in specs}
    return {
        "classes": class_summary(
            class_numbers(y, len(x), outputs.shape[1]),
            decisions(outputs),
            by_class,
            attacks=[attack_name(spec) for spec in specs if spec.norm == "l2"],
        ),
        "examples": weakest_examples(
            opened.model,
            x,
            y,
            certificate=certificate,
            bounds=boxes.pop() if len(boxes) == 1 else None,
            shape=opened.data.input_shape,
            outputs=outputs,
        ),
    }


def _attack_spec(spec: AttackConfig | Mapping) -> AttackConfig:
    if isinstance(spec, AttackConfig):
        return spec
    from pydantic import ValidationError

    try:
        return AttackConfig.model_validate(spec)
    except ValidationError as error:
        item = error.errors()[0]
        name = ".".join(str(part) for part in item["loc"]) or "attack"
        problem = item["msg"].removeprefix("Value error, ")
        raise ValueError(f"`{name}`: {problem}. Received: {spec.get(name)!r}.") from None


def _merged(rows: list[dict], more: list[dict]) -> list[dict]:
    for row, other in zip(rows, more, strict=True):
        for key in ("attacked", "output_change", "gain"):
            row[key] = {**row[key], **other[key]}
    return rows


def _flat(row: Mapping) -> dict:
    """One row of attack.csv: nested values get a column each."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        for name, item in value.items():
            if isinstance(item, Mapping):
                flat.update({f"{key}/{name}/{part}": number for part, number in item.items()})
            else:
                flat[f"{key}/{name}"] = item
    return flat


# ---------------------------------------------------------------------------------- report


def compose_results(run: files.RunDirectory):
    """The `Results` of a run, from the files that are there."""
    from ..evaluation.results import Results
    from ..evaluation.summaries import certificate_summary, design_summary

    config = load_config(run.file(files.CONFIG))
    record = _record(run)
    design = load_design(run)
    with files.understood(run.file(files.RECORD)):
        results = Results(
            title=config.title or config.name,
            date=record.get("date", ""),
            command=record.get("command", ""),
            config=config.to_dict(),
            dataset=record.get("dataset", {}),
            model=record.get("model", {}),
            layers=record.get("layers", []),
            seconds={key: float(value) for key, value in record.get("seconds", {}).items()},
            notes=_notes(config),
        )
    if run.has(files.VERSIONS):
        path = run.file(files.VERSIONS)
        versions = files.read_json(path)
        with files.understood(path):
            results.versions = {
                "python": versions["python"],
                "platform": versions["platform"],
                "backend": versions["backend"],
                **versions["packages"],
            }
    if run.has(files.METRICS_JSON):
        results.history = read_history(run.file(files.METRICS_JSON))
    if design is not None:
        check = record.get("check")
        results.design = design_summary(design, check and types.SimpleNamespace(**check))
        results.gain["claimed"] = design.gain
    if run.has(files.CERTIFICATE):
        from ..certification import Certificate

        with files.understood(run.file(files.CERTIFICATE)):
            certificate = Certificate.load(run.file(files.CERTIFICATE))
        results.certificate = certificate_summary(certificate)
        results.gain["upper_bound"] = certificate.gain_upper_bound
    if run.has(files.ATTACK_JSON):
        path = run.file(files.ATTACK_JSON)
        found = files.read_json(path)
        with files.understood(path):
            results.rows, results.gain = found["rows"], {**results.gain, **found["gain"]}
            results.classes = found.get("classes")
            results.examples = found.get("examples", [])
            results.attacks = [
                {"name": item.pop("label"), "method": item.pop("name"), **item}
                for item in found["attacks"]
            ]
            if found["split"] != "test":
                results.notes.append(f"The accuracies are those of the {found['split']} split.")
    return results


def read_history(path: os.PathLike) -> list[dict[str, float]]:
    """The epochs of a metrics.json.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    rows = files.read_json(path)
    with files.understood(path):
        if not isinstance(rows, list):
            raise TypeError(f"it holds a {type(rows).__name__} instead of a list of epochs")
        for row in rows:
            odd = {k: v for k, v in row.items() if not isinstance(v, int | float | type(None))}
            if odd:
                raise ValueError(f"not a number: {odd}")
    return rows


def _notes(config: ExperimentConfig) -> list[str]:
    notes = []
    if config.claim is None and not config.layers.by_hand:
        notes.append("This is a baseline: its layers were trained without any bound.")
    if config.layers.by_hand:
        notes.append("The layers' bounds were set by hand; no claim was designed.")
    if config.layers.scope == "kernel":
        notes.append(
            "They bound the kernels alone, as published: pools and response normalization add "
            "their gains, which the certificate counts."
        )
    if config.training.adversarial is not None:
        attack = config.training.adversarial
        notes.append(f"Trained on {attack.name.upper()} inputs of radius {attack.radius:g}.")
    if config.training.guarantee == "monitor":
        notes.append(
            "Training steps were steered by an estimate; the bounds were enforced every "
            f"{config.training.every} steps, at the end of every epoch and at the end of training."
        )
    return notes


def report_run(run: files.RunDirectory):
    """Write results.json, plots and report.html; returns the `Results` and the report's path."""
    from ..evaluation.report import write_report

    results = compose_results(run)
    files.write_text(run.file(files.RESULTS), results.to_json())
    _write_plots(run, results)
    return results, write_report(results, run.file(files.REPORT))


def _write_plots(run: files.RunDirectory, results) -> None:
    try:
        from ..evaluation import plots

        plots.require_matplotlib()
    except ImportError:
        return  # the report says that its figures are missing, and why
    write = getattr(plots, "write_figures", None)
    if write is not None:
        write(results, run.file(files.PLOTS))


def run_experiment(
    config: ExperimentConfig,
    run: files.RunDirectory,
    *,
    resume: bool = False,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    command: str = "",
    on_epoch: training.OnEpoch | None = None,
    say: Say = lambda message: None,
):
    """Train, certify, attack and report.

    Args:
        config: the experiment.
        run: an open run directory.
        resume: continue the run that is there.
        data_dir: TensorFlow Datasets directory.
        download: fetch the data set if it is missing.
        command: what to type to repeat the run, for the report.
        on_epoch: called after every epoch.
        say: called with messages for the user.

    Returns:
        The `Results` and the path of the report.
    """
    data = load_data(config, data_dir, download)
    trained = train_experiment(config, run, resume=resume, data=data, on_epoch=on_epoch, say=say)
    _note(run, command=command)
    opened = Opened(trained.model, data, config, trained.design, run, say=say)
    say("certifying the test split")
    certify_target(opened, "test", config.samples)
    attack_target(opened, config.attacks, config.radii, "test", config.samples)
    return report_run(run)


# ------------------------------------------------------------------------------ run.json


def _record(run: files.RunDirectory) -> dict:
    return files.read_json(run.file(files.RECORD)) if run.has(files.RECORD) else {}


def _note(run: files.RunDirectory, **entries: Any) -> None:
    """Add entries to run.json; dicts are merged with what is there."""
    record = _record(run)
    for key, value in entries.items():
        old = record.get(key)
        both = isinstance(old, dict) and isinstance(value, dict) and key == "seconds"
        record[key] = {**old, **value} if both else value
    files.write_record(run.file(files.RECORD), record)
