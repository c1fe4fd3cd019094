"""The evaluation suite: errors under noise, attacks, corruptions and dropped features, by cell.

Every cell (say, fog at severity 3) is written to disk when it is done, so that a suite that was
killed continues where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tf_lyapunov.attacks import FGSM, PGD
from tf_lyapunov.attacks.identity import described, inference_state
from tf_lyapunov.attacks.inputs import checked_seed
from tf_lyapunov.evaluation import noise
from tf_lyapunov.evaluation.accuracy import logits
from tf_lyapunov.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.sealing import seal, unseal
from tf_lyapunov.theory.balls import Linf
from tf_lyapunov.training.base import TrainingModel
from tf_lyapunov.writing import write_text

KINDS = ("clean", "noise", "fgsm", "pgd", "corruption", "dropout")
NOISE_SNRS = (50.0, 45.0, 40.0, 35.0, 30.0, 25.0, 20.0)
DROPOUT_RATES = (0.25, 0.4)
STATE = "suite.json"
_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One measurement: what is done to the inputs or the model, how strongly, and the details."""

    kind: str
    name: str
    level: float
    settings: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{self.level!r}/{self.settings}"


def evaluate_suite(
    model,
    x,
    y,
    *,
    include: Sequence[str] | None = None,
    snrs: Sequence[float] = NOISE_SNRS,
    fgsm_snrs: Sequence[float] = (33.0,),
    pgd: Sequence[PGD] | None = None,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    dropout_layers: Sequence[str] = (),
    dropout_rates: Sequence[float] = DROPOUT_RATES,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    released: Callable[[str, int], tuple] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    path: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Errors of a classifier on clean, noisy, attacked and corrupted inputs.

    All numbers are measurements on these inputs; none is a guarantee. Attacks start from the true
    labels; inputs that are misclassified already count as errors.

    Args:
        model: built Keras classifier, or a training method around one; softmax and sigmoid heads
            are looked through.
        x: inputs (n, ...), finite; images within `bounds` for corruptions.
        y: labels (n,) or one-hot.
        include: of `KINDS`; default all, and "dropout" if `dropout_layers` are named. "clean" is
            always measured.
        snrs: signal-to-noise ratios of Gaussian noise, in dB (`noise.gaussian_noise`).
        fgsm_snrs: ratios of FGSM steps (`noise.linf_radius`), which stay within `bounds`; what
            they clip raises the ratio.
        pgd: untargeted PGD attacks of one radius each; default l∞, 8/255 of the range, 10 steps of
            2/255, random start.
        corruptions: of `corruptions.CORRUPTIONS`.
        severities: of 1 … 5.
        dropout_layers: names of layers whose outputs are dropped (`noise.with_dropped_features`).
        dropout_rates: shares, in (0, 1).
        bounds: darkest and brightest value of x; None for data without a range, which then have
            no corruptions and no default `pgd`.
        released: function from (corruption, severity) to (images, labels) in the units of x, such
            as `datasets.released_corruptions(...)`, instead of our own corruptions.
        seed: of noise, random starts, corruptions and dropout.
        batch_size: inputs per evaluation.
        path: directory of the state; cells that are there, with equal attacks, are not computed
            again.
        overwrite: whether to drop a state of another model, other data or another seed.
        progress: called with a line of text before each cell.

    Returns:
        A `SuiteResult`. With `path`, also suite.csv there.

    Raises:
        ValueError: for unknown kinds, corruptions or severities, images that are none, empty
            lists, labels out of range, or a state of something else.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.eye(2)])
    >>> evaluate_suite(model, np.eye(2), [0, 1], include=["noise"], snrs=[20.0]).clean_error
    0.0

    Reference: Bontonou et al., section 5; Hendrycks and Dietterich (ICLR 2019).
    """
    model = model.plain if isinstance(model, TrainingModel) else model
    x = np.asarray(x, np.float32)
    if x.ndim < 2 or not len(x) or not np.all(np.isfinite(x)):
        raise ValueError(
            f"`x` must hold finite inputs (n, ...). Received: shape {x.shape}, or NaN or infinity."
        )
    seed = checked_seed(seed)
    box = None if bounds is None else (float(bounds[0]), float(bounds[1]))
    if box is not None and not -math.inf < box[0] < box[1] < math.inf:
        raise ValueError(
            f"`bounds` must be (darkest, brightest), finite. Received: bounds={bounds!r}. Pass "
            "`None` for data without a range."
        )
    pgd = (() if box is None else [_standard_pgd(box, seed)]) if pgd is None else pgd
    attacks = {_cell(attack): attack for attack in pgd}
    lists = {
        "noise": [Cell("noise", "gaussian", float(snr)) for snr in snrs],
        "fgsm": [Cell("fgsm", "FGSM", float(snr)) for snr in fgsm_snrs],
        "pgd": list(attacks),
        "corruption": [Cell("corruption", n, float(s)) for n in corruptions for s in severities],
        "dropout": [Cell("dropout", "+".join(dropout_layers), float(r)) for r in dropout_rates],
    }
    kinds = _checked_kinds(include, lists, dropout_layers)
    if "corruption" in kinds:
        _check_corruptions(x, corruptions, severities, box, released)
    cells = [Cell("clean", "clean", 0.0), *(cell for kind in kinds for cell in lists[kind])]
    classes = logits(model, x[:1]).shape[1]
    labels = class_numbers(y, len(x), classes)
    digest = _digest(model, x, labels, box, seed, released is not None)
    state = _State(path, digest, overwrite)

    def measure(cell):
        subject, images, own = model, x, labels
        if cell.kind in ("fgsm", "pgd"):
            attack = attacks.get(cell)
            if cell.kind == "fgsm":
                radius = Linf(noise.linf_radius(x, cell.level))
                attack = FGSM(radius, bounds=box, batch_size=batch_size)
            return attack(model, x, labels).success_rate, len(x)
        if cell.kind == "noise":
            images = noise.gaussian_noise(x, cell.level, seed=seed)
        elif cell.kind == "corruption" and released is None:
            images = corrupt(x, cell.name, int(cell.level), bounds=box, seed=seed)
        elif cell.kind == "corruption":
            images, own = released(cell.name, int(cell.level))
            own = class_numbers(own, len(images), classes)
        elif cell.kind == "dropout":
            subject = noise.with_dropped_features(model, dropout_layers, cell.level, seed=seed)
        return _error(subject, images, own, batch_size), len(images)

    rows = []
    for i, cell in enumerate(cells):
        if cell.key not in state.rows:
            if progress is not None:
                progress(f"{cell.kind} {cell.name} {cell.level:g} ({i + 1} of {len(cells)})")
            started = time.perf_counter()
            error, count = measure(cell)
            state.add(cell, float(error), count, time.perf_counter() - started)
        rows.append(state.rows[cell.key])
    result = SuiteResult(rows)
    if path is not None:
        write_text(Path(path) / "suite.csv", csv_text(rows))
    return result


def _cell(attack):
    if not isinstance(attack, PGD) or np.ndim(attack.ball.radius) or attack.targeted:
        raise ValueError(
            "`pgd` must list untargeted PGD attacks of one radius for all inputs. "
            f"Received: {attack!r}."
        )
    names = ("step", "random_start", "bounds", "keep", "stop_early", "seed")
    parts = [f"{name}={_shown(getattr(attack, name))}" for name in names]
    return Cell("pgd", repr(attack), float(attack.ball.radius), ", ".join(parts))


def _shown(value):
    """Short text that differs where values do."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_shown, value)) + ")"
    if isinstance(value, np.ndarray):
        return f"{value:.9g}" if value.ndim == 0 else hashlib.sha256(value.tobytes()).hexdigest()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _standard_pgd(box, seed):
    """l∞ 8/255 of the range, 10 steps of 2/255, random start (Madry et al., CIFAR-10)."""
    width = (box[1] - box[0]) / 255
    return PGD(Linf(8 * width), steps=10, step=2 * width, random_start=True, bounds=box, seed=seed)


def _checked_kinds(include, lists, dropout_layers):
    if isinstance(dropout_layers, str):
        raise TypeError(f"`dropout_layers` must be a list of names. Received: {dropout_layers!r}.")
    if include is None:
        include = [kind for kind in KINDS if kind != "dropout" or dropout_layers]
    unknown = [kind for kind in include if kind not in KINDS]
    if unknown or isinstance(include, str):
        raise ValueError(f"`include` must list some of {', '.join(KINDS)}. Received: {include!r}.")
    kinds = [kind for kind in KINDS[1:] if kind in include]
    if "dropout" in kinds and not dropout_layers:
        raise ValueError(
            "Dropout needs the names of the layers whose outputs are dropped. Received: "
            "dropout_layers=()."
        )
    empty = [kind for kind in kinds if not lists[kind]]
    if empty:
        raise ValueError(f"There is nothing to measure. Received: no levels for {empty}.")
    return kinds


def _check_corruptions(x, names, severities, bounds, released):
    """Refuse at once what `corrupt` or `released` would refuse cells later."""
    unknown = [name for name in names if name not in CORRUPTIONS]
    if unknown:
        raise ValueError(
            f"Unknown corruptions. Received: {unknown}. Known: {', '.join(CORRUPTIONS)}."
        )
    if any(severity not in SEVERITIES for severity in severities):
        raise ValueError(f"Severities must be 1 to 5. Received: {list(severities)}.")
    if released is not None:
        shape = np.shape(released(names[0], severities[0])[0])[1:]
        if shape != x.shape[1:]:
            raise ValueError(
                f"Released images must have the shape of the inputs, {x.shape[1:]}. Received: "
                f"images of shape {shape}."
            )
    else:
        try:
            if bounds is None:
                raise ValueError("Corruptions need `bounds` of the images. Received: bounds=None.")
            corrupt(x, "brightness", 1, bounds=bounds)
        except ValueError as error:
            raise ValueError(
                f"{error} Pass `include` without 'corruption' for other data."
            ) from None


def _error(model, x, labels, batch_size):
    outputs = logits(model, x, batch_size=batch_size)
    if not np.all(np.isfinite(outputs)):
        raise ValueError("The model's outputs must be finite. Received: NaN or infinity.")
    if outputs.shape[1] == 1:
        return float(np.mean((outputs[:, 0] > 0) != labels))
    return float(np.mean(outputs.argmax(axis=1) != labels))


def _digest(model, x, labels, bounds, seed, released):
    """What the numbers depend on, besides the cells' own names, levels and settings."""
    digest = hashlib.sha256()
    for array in (*inference_state(model), x, labels):
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    digest.update(repr((described(model), bounds, seed, released)).encode())
    return digest.hexdigest()


class _State:
    """Rows by cell, on disk after each."""

    def __init__(self, path, digest, overwrite):
        self.file = None if path is None else Path(path) / STATE
        self.digest, self.rows = digest, {}
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if overwrite or not self.file.exists():
            return
        found = read_state(self.file)
        if found["digest"] != digest:
            raise ValueError(
                "A suite of another model, other data, bounds or seed is there. Received: "
                f"path={str(path)!r}. Choose another directory, or pass `overwrite=True`."
            )
        self.rows = {
            Cell(r["kind"], r["name"], r["level"], r["settings"]).key: r for r in found["rows"]
        }

    def add(self, cell, error, count, seconds):
        self.rows[cell.key] = {
            "kind": cell.kind,
            "name": cell.name,
            "level": cell.level,
            "settings": cell.settings,
            "error": error,
            "accuracy": 1.0 - error,
            "count": count,
            "seconds": round(seconds, 3),
        }
        if self.file is not None:
            content = {
                "version": _VERSION, "digest": self.digest, "rows": list(self.rows.values())
            }  # fmt: skip
            write_text(self.file, json.dumps(seal(content), indent=1) + "\n")


def read_state(file: str | os.PathLike) -> dict[str, Any]:
    """Content of a suite.json.

    Raises:
        ValueError: if the file is damaged, or of another version.
    """
    file = Path(file)
    try:
        content = unseal(json.loads(file.read_text(encoding="utf-8")))
        keys = {"kind", "name", "level", "settings", "error"}
        sound = content["version"] == _VERSION and all(keys <= set(r) for r in content["rows"])
        content["digest"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"The file is damaged or no suite of this version. Received: {file}. Delete it, or "
            "pass `overwrite=True`."
        )
    return content


def load_suite(path: str | os.PathLike) -> SuiteResult:
    """The cells that are done, from a directory with a suite.json, or the file.

    Raises:
        ValueError: if there is none, or it is damaged.

    Example:

    >>> load_suite("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: There is no suite here. Received: nowhere.
    """
    file = Path(path)
    file = file / STATE if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"There is no suite here. Received: {file}.")
    return SuiteResult(read_state(file)["rows"])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, one column per key, floats with all their digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
