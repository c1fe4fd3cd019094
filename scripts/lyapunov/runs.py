"""What `lyapunov/cifar.py` and `lyapunov/imagenet.py` share: one run per configuration, one table.

Every run lies in OUT/runs/NAME as `tf-lyapunov run` leaves it; finished ones are not repeated, and
an interrupted one continues after its last checkpoint.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from lyapunov.tables import contradictions, draw, markdown, write_csv
from tf_lyapunov.cli.entry import BAD_INPUT, INTERRUPTED, is_callers
from tf_lyapunov.errors import ConfigError, RunDirectoryError
from tf_lyapunov.evaluation.wording import number, percent, percent_down, round_up
from tf_lyapunov.experiments import files, runner
from tf_lyapunov.experiments.execution import PRECISIONS, SCALINGS, STRATEGIES, Execution
from tf_lyapunov.experiments.reading import load_config
from tf_lyapunov.experiments.targets import Opened, load_data
from tf_lyapunov.experiments.training import run_identity
from tf_lyapunov.writing import write_text

# What a run's numbers depend on, and how it was made, beside its own files.
MADE = "rebuild.json"
ROOT = Path(__file__).resolve().parents[2]
COLOURS = ("#0072b2", "#aa4499", "#d55e00", "#00795b", "#444b5a", "#b8860b", "#56b4e9", "#882255")
LINES = ("-", "--", "-.", ":")


def parser(description: str, parts) -> argparse.ArgumentParser:
    """The options of both scripts."""
    found = argparse.ArgumentParser(description=description)
    add = found.add_argument
    add("--only", nargs="+", default=[], help=f"of {', '.join(parts)}, or configuration names")
    add("--data-dir", help="prepared TensorFlow Datasets directory")
    add("--out", type=Path, help="directory of the results")
    add("--quick", action="store_true", help="a smoke test; its numbers mean nothing")
    add("--epochs", type=int, help="at most this many epochs (the papers': 200 and 90)")
    add("--subset", type=int, help="at most this many images of each split")
    add("--samples", type=int, help="test images to certify and attack (default 1000)")
    add("--pgd-steps", type=int, help="steps of PGD (default 100, as in the papers)")
    add("--set", action="append", default=[], help="key=value for every configuration")
    add("--strategy", choices=STRATEGIES, default="none")
    add("--devices", type=int, help="replicas in this process")
    add("--scaling", choices=SCALINGS, default="none", help="of batch and rate by replicas")
    add("--worker-timeout", type=float, default=60.0)
    add("--tpu", default="")
    add("--precision", choices=PRECISIONS, default="float32")
    add("--jit", action="store_true")
    add("--deterministic", action="store_true")
    return found


def execution(options) -> Execution:
    """Devices, precision and compilation, as asked for."""
    names = "strategy devices scaling worker_timeout tpu precision jit deterministic"
    return Execution(**{name: getattr(options, name) for name in names.split()})


def chosen(options, parts: dict) -> dict:
    """Configurations by part, with only those asked for."""
    known = {name.split("/")[-1] for names in parts.values() for name in names}
    unknown = [name for name in options.only if name not in parts and name not in known]
    if unknown:
        raise ConfigError(f"Unknown: {unknown}. Choose of {list(parts)} or {sorted(known)}.")
    if not options.only:
        return parts
    kept = {
        part: [n for n in names if part in options.only or n.split("/")[-1] in options.only]
        for part, names in parts.items()
    }
    return {part: names for part, names in kept.items() if names}


def configured(name: str, options, overrides=()):
    """One configuration, with what the options say."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    changes = [f"name={name.replace('/', '-')}"]
    if options.epochs is not None:
        changes.append(f"training.epochs={min(options.epochs, config.training.epochs)}")
    if options.subset is not None:
        changes.append(f"dataset.limit={options.subset}")
    if options.samples is not None:
        changes.append(f"samples={options.samples}")
    if options.pgd_steps is not None:
        if options.pgd_steps < 1:
            raise ConfigError(f"PGD takes steps. Received: --pgd-steps {options.pgd_steps}.")
        places = [i for i, attack in enumerate(config.attacks) if attack.name == "pgd"]
        for i in places:
            changes += [
                f"attacks.{i}.steps={options.pgd_steps}",
                f"attacks.{i}.relative_step={2 / options.pgd_steps}",
            ]
    changes = [*overrides, *changes, *options.set]
    return load_config(ROOT / "configs" / f"{name}.yaml", changes)


def one_run(config, out: Path, how: Execution, options, data=None, made=None) -> Path | None:
    """Trains, certifies, attacks and reports, or what of it is left to do.

    `made` says how, in words; it is kept beside the run with what its numbers depend on.

    Returns:
        The run's directory, or None for a worker that is not the chief.
    """
    run = files.RunDirectory(out / "runs" / config.name)
    scaled = how.scaled(config)
    data = load_data(config, options.data_dir) if data is None else data
    identity = {"config": scaled.to_yaml(), **run_identity(scaled, data, how)}
    identity = json.loads(json.dumps(identity, default=str))
    kept = files.read_json(run.path / MADE) if (run.path / MADE).exists() else {}
    done = run.has(files.RESULTS) and kept.get("identity") == identity
    chief = how.distribution.is_chief
    if done or not chief:
        if not done:
            runner.train_experiment(config, run, resume=True, data=data, execution=how)
        return run.path if chief else None
    with run.open(resume=True):
        started = time.perf_counter()

        def progress(epoch, epochs, logs):
            minutes = (time.perf_counter() - started) / 60
            accuracy = percent(logs.get("accuracy", float("nan")))
            print(f"  epoch {epoch}/{epochs}: {accuracy}, {minutes:.1f} min", flush=True)

        say = lambda text: print(f"  {text}", flush=True)  # noqa: E731
        trained = runner.train_experiment(
            config, run, resume=True, data=data, execution=how, on_epoch=progress, say=say
        )
        opened = Opened(trained.model, data, config, trained.design, run, say=say)
        runner.certify_target(opened, "test", config.samples)
        runner.attack_target(opened, config.attacks, config.radii, "test", config.samples)
        runner.report_run(run)
        files.write_record(run.path / MADE, {"identity": identity, "made": made or {}})
    return run.path


def record(path: Path, part: str) -> dict:
    """The numbers of a finished run."""
    results = files.read_json(path / files.RESULTS)
    made = files.read_json(path / MADE)["made"] if (path / MADE).exists() else {}
    config = results["config"]
    return {
        "name": config["name"],
        "label": results["title"].split(", ", 1)[-1],
        "part": part,
        "epochs": len(results["history"]),
        "asked_epochs": config["training"]["epochs"],
        "batch": config["training"]["batch_size"],
        "train_images": results["dataset"]["train"],
        "test_images": results["rows"][0]["count"],
        "clean": results["rows"][0]["clean"],
        "gain_upper_bound": results["gain"]["upper_bound"],
        "proved": (results.get("design") or {}).get("verdict"),
        "seconds": results["seconds"],
        "rows": results["rows"],
        "made": {k: v for k, v in made.items() if k in ("data", "date", "machine", "command")},
    }


def finished(out: Path, parts: dict) -> list[dict]:
    """Records of all runs of a script that are finished, in the order of its parts."""
    names = [(part, name.replace("/", "-")) for part, names in parts.items() for name in names]
    paths = [(part, out / "runs" / name) for part, name in names]
    return [record(path, part) for part, path in paths if (path / files.RESULTS).exists()]


def lines_of(records: list[dict]) -> list[dict]:
    """One flat row a run and radius."""
    found = []
    for item in records:
        for row in item["rows"]:
            attacked = {kind: _attacked(row, kind) for kind in ("FGM", "PGD")}
            found.append(
                {
                    "part": item["part"],
                    "name": item["name"],
                    "training": item["label"],
                    "epochs": item["epochs"],
                    "clean": item["clean"],
                    "radius": row["radius"],
                    "fgm": attacked["FGM"],
                    "pgd": attacked["PGD"],
                    "certified": row["certified"],
                    "gain_upper_bound": item["gain_upper_bound"],
                }
            )
    return found


def _attacked(row, kind):
    values = [v for name, v in row["attacked"].items() if name.startswith(kind)]
    return min(values) if values else None


def draw_curves(path: Path, records: list[dict]) -> None:
    """Accuracy under FGM, under PGD and certified, by radius, one curve a run."""
    panels = []
    for key, title in (("fgm", "under FGM"), ("pgd", "under PGD"), ("certified", "certified")):
        curves = []
        for i, item in enumerate(records):
            mine = lines_of([item])
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS)]}
            x, y = [0.0, *(k["radius"] for k in mine)], [item["clean"], *(k[key] for k in mine)]
            if key == "certified":
                x, y = x[1:], y[1:]
            curves.append((item["label"], x, y, style))
        panels.append((title, curves))
    draw(path, panels, "ε (l2)", "test accuracy")


def table(records: list[dict], papers: dict | None = None) -> str:
    """Markdown of one part; `papers` maps (name, radius) to the printed accuracy."""
    columns = {
        "training": lambda line: line["training"],
        "epochs": lambda line: str(line["epochs"]),
        "clean": lambda line: percent(line["clean"]),
        "proved gain": lambda line: round_up(line["gain_upper_bound"]),
        "ε": lambda line: number(line["radius"]),
        "FGM": lambda line: percent(line["fgm"]),
        "PGD": lambda line: percent(line["pgd"]),
        "certified": lambda line: percent_down(line["certified"]),
    }
    if papers:
        columns["paper, FGM"] = lambda line: _printed(papers.get((line["name"], line["radius"])))
    return markdown(columns, lines_of(records))


def _printed(value):
    return "" if value is None else percent(value)


def write_results(out: Path, title: str, parts: dict, records, how: dict, papers=None) -> str:
    """RESULTS.md, CSV, JSON and figures of the runs that are finished; returns the text."""
    from tf_lyapunov.evaluation.results import plain

    text = [f"# {title}", ""]
    if how["quick"]:
        text += ["**A smoke test on a few images and steps: its numbers mean nothing.**", ""]
    text += [
        "Clean and attacked accuracies are measured on the same test images; an image that an "
        "attack broke at a smaller radius counts as broken at larger ones. “Certified” and "
        "“proved gain” hold for every attack. Papers' bounds are on the kernels alone.",
        "",
    ]
    for part, heading in parts.items():
        mine = [item for item in records if item["part"] == part]
        if not mine:
            continue
        draw_curves(out / part, mine)
        text += [f"## {heading}", "", table(mine, papers), "", f"![Accuracy]({part}.svg)", ""]
    if records:
        write_csv(out / "rows.csv", lines_of(records))
    broken = contradictions(records)
    text += ["## Proofs against measurements", ""]
    text += [f"- CONTRADICTION: {line}" for line in broken] or [
        "No attack broke a certificate, and no measured gain exceeds its proved bound."
    ]
    text += ["", "## How it was made", ""]
    text += [f"- {key}: {value}" for key, value in how.items() if key != "quick"]
    for item in records:
        cut = "" if item["epochs"] == item["asked_epochs"] else " (stopped: fitted)"
        text.append(
            f"- {item['name']}: {item['epochs']} epochs{cut} of {item['train_images']} images, "
            f"batch {item['batch']}, {item['seconds'].get('training', 0) / 60:.1f} min; "
            f"{item['test_images']} test images"
            + "".join(f"; {key}: {value}" for key, value in item.get("made", {}).items())
        )
    text = "\n".join([*text, ""])
    content = plain({"how": how, "records": records})
    write_text(out / "results.json", json.dumps(content, indent=1))
    write_text(out / "RESULTS.md", text)
    return text


def provenance(script: str, options, argv, data: str) -> dict:
    """Command, date, machine and data."""
    from benchmarks.machine import machine

    found = machine()
    shown = list(argv)
    for option in ("--data-dir", "--cifar", "--out"):  # the user's own paths tell nobody anything
        if option in shown:
            shown[shown.index(option) + 1] = "DIR"
    return {
        "quick": options.quick,
        "command": f"`{shlex.join(['python', f'scripts/{script}', *shown])}`",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{found['cores']} cores of {found['cpu']}, {options.strategy} strategy",
        "versions": f"Python {found['python']}, Keras {found['keras']} on {found['backend']}",
        "data": data,
    }


def rebuild(script, title, parts, headings, options, argv, *, overrides, data_for, note, papers):
    """Runs what was asked for and writes the results; returns the exit code.

    Args:
        script, title: names for the results.
        parts: part -> configuration names.
        headings: part -> heading.
        options, argv: as parsed, and as typed.
        overrides: function of a configuration's name: key=value texts.
        data_for: function of a configuration: a data set, or None to load what it names.
        note: what the data are, in words.
        papers: (name, radius) -> printed accuracy, or None.
    """
    try:
        how, records, out = execution(options), [], options.out
        if how.distribution.is_chief:
            out.mkdir(parents=True, exist_ok=True)
            (out / "runs").mkdir(exist_ok=True)
            write_text(out / "runs" / ".gitignore", "*\n")
        for names in chosen(options, parts).values():
            for name in names:
                config = configured(name, options, overrides(name))
                print(f"{config.name}: {config.title}", flush=True)
                made = provenance(script, options, argv, note)
                path = one_run(config, out, how, options, data_for(config), made)
                if path is not None:
                    # Those of earlier calls as well, with how they were made.
                    records = finished(out, parts)
                    # After every run, so that a cut leaves what is finished.
                    text = write_results(
                        out, title, headings, records, made, papers,
                    )  # fmt: skip
        if not how.distribution.is_chief:
            return 0
    except KeyboardInterrupt:
        print("Interrupted. The same command continues.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_callers(error):
            raise
        hint = " Or give another --out." if isinstance(error, RunDirectoryError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return BAD_INPUT
    print(f"\n{text}\nWritten to {out}")
    return 1 if contradictions(records) else 0
