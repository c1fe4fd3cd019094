#!/usr/bin/env python
"""Rebuilds the localized-robustness experiments: Figures 1 to 5 and Tables 1 and 2 of paper 3.

    python scripts/localized/rebuild.py --data-dir DIR            # MNIST, an hour on 2 cores
    python scripts/localized/rebuild.py --cifar DIR               # a CIFAR-10 subset
    python scripts/localized/rebuild.py --data-dir DIR --quick    # a smoke test
    python scripts/localized/rebuild.py --cifar DIR --config configs/localized/FILE.yaml

With --config, network, optimizer, batch size and epochs are the file's, for all methods but L2NN
and the spectral ones, which have networks of their own. Finished models and tables are kept: the
same command continues after an interruption. Results go to `scripts/results/localized`. Exit code
1 if a measurement contradicts a proof.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
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

from localized import measures
from localized import models as networks
from localized.models import CHAINS, METHODS, Settings
from tf_lyapunov import datasets
from tf_lyapunov.evaluation import summaries
from tf_lyapunov.evaluation.results import plain
from tf_lyapunov.writing import write_text

ROOT = Path(__file__).resolve().parents[1]


def load(name, directory, settings):
    """Images in [0, 1]; the whole training split, in the files' order, shortened to `train`."""
    limit = None if name == "mnist" else max(settings.train or 0, *settings.pairs) or None
    data = datasets.load(name, directory, validation=1, crop=0, limit=limit)
    x = np.concatenate([data.x_val[:1], data.x_train])
    y = np.concatenate([data.y_val[:1], data.y_train])
    return dataclasses.replace(
        data,
        x_train=np.clip(x + np.float32(0.5), 0, 1),
        y_train=y,
        x_test=np.clip(data.x_test[: settings.test] + np.float32(0.5), 0, 1),
        y_test=data.y_test[: settings.test],
        preprocessing="x/255",
        pixel_range=(0.0, 1.0),
    )


class Records:
    """Results by name, one JSON file each; those of other settings are made again."""

    def __init__(self, out, settings):
        self.out, self.identity = out, plain(dataclasses.asdict(settings))
        self.found = {}

    def get(self, name, make):
        path = self.out / "records" / f"{name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            record = None
        if record is None or record["identity"] != self.identity:
            started = time.perf_counter()
            record = {"name": name, "identity": self.identity, **make()}
            record["seconds"] = time.perf_counter() - started
            record = plain(record)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record) + "\n")
            print(f"{name}: {record['seconds']:.0f} s", flush=True)
        self.found[name] = record
        return record


def method_record(name, data, corruptions, settings, out):
    """A trained network and everything measured on it."""
    cache = out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    write_text(cache / ".gitignore", "*\n")
    identity = cache / f"{name}.json"
    wanted = plain(dataclasses.asdict(settings))
    old = json.loads(identity.read_text()) if identity.exists() else None
    weights = cache / f"{name}.npz"
    if old is None or old["identity"] != wanted:
        weights.unlink(missing_ok=True)
    images = dataclasses.replace(
        data, x_train=data.x_train[: settings.train], y_train=data.y_train[: settings.train]
    )
    model, record = networks.trained(name, images, settings, weights)
    if record is None:
        record = old["record"]
    write_text(identity, json.dumps(plain({"identity": wanted, "record": record})))
    chain = name in CHAINS
    found = measures.measure(
        model,
        images,
        corruptions,
        settings,
        cache / f"suite_{name}",
        chain=chain,
        every_norm=name in settings.every_norm,
    )
    keras.backend.clear_session()
    label = (CHAINS if chain else METHODS)[name]
    return {"label": label, "parameters": model.count_params(), **record, **found}


def provenance(settings, data, options):
    """Command, date, machine and data of this run."""
    versions = summaries.installed_versions()
    command = ["python", "scripts/localized/rebuild.py"]
    command += ["--data-dir" if settings.dataset == "mnist" else "--cifar", "DIR"]
    command += ["--quick"] if settings.quick else []
    command += ["--config", settings.config] if settings.config else []
    return {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{versions.pop('platform')}, {os.cpu_count()} cores, shared with other work",
        "data": f"{settings.dataset}: {settings.train or len(data.x_train)} training images, the "
        f"first {len(data.x_test)} test images, pixels in [0, 1]"
        + (
            "; a third party's lossy JPEG copy of CIFAR-10, so that errors are close to, but not "
            "comparable with, published ones"
            if options.cifar
            else ""
        ),
        "versions": versions,
        "settings": plain(dataclasses.asdict(settings)),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="prepared TensorFlow Datasets directory with MNIST")
    parser.add_argument("--cifar", metavar="DIR", help="one with CIFAR-10: that instead of MNIST")
    parser.add_argument("--config", help="experiment file with the network and its training")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test, a few minutes")
    parser.add_argument("--only", help="comma-separated records to make; the rest as far as done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    dataset = "cifar10" if options.cifar else "mnist"
    settings = Settings.of(dataset, options.quick, options.seed)
    if options.config:
        settings = dataclasses.replace(settings, config=options.config, train=None, chains=())
    stem = dataset + ("_quick" if options.quick else "")
    if options.config:
        stem = Path(options.config).stem
    out = options.out or ROOT / "results" / "localized" / stem
    try:
        data = load(dataset, options.cifar or options.data_dir, settings)
    except ValueError as error:  # DatasetNotFound
        print(f"error: {error}", file=sys.stderr)
        return 2
    records = Records(out, settings)
    corruptions = measures.Corruptions(data.x_test, data.y_test, settings.seed)
    jobs = {"sigmoid": measures.sigmoid, "linear": measures.linear}
    for name in (*settings.methods, *settings.chains):
        jobs[name] = lambda name=name: method_record(name, data, corruptions, settings, out)
    for name, norm, count in zip(
        ("pairs_l2", "pairs_linf"), (2, np.inf), settings.pairs, strict=True
    ):
        jobs[name] = lambda norm=norm, count=count: measures.geometry(
            data.x_train[:count], data.y_train[:count], norm, settings
        )
    chosen = options.only.split(",") if options.only else list(jobs)
    for name, make in jobs.items():
        if name in chosen or (out / "records" / f"{name}.json").exists():
            records.get(name, make)
    from localized.tables import write_results

    text = write_results(records.found, provenance(settings, data, options), out)
    print(f"\n{text}\nWritten to {out}")
    broken = [text for record in records.found.values() for text in measures.problems(record)]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
