"""What can be certified and attacked: a run directory, or a model file with data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import arrays, streams
from ..errors import ConfigError, ModelFileError, RunDirectoryError
from ..modelfile import load_model
from ..program.inputs import Inputs
from . import files
from .config import AttackConfig, ExperimentConfig
from .reading import load_config

Say = Callable[[str], None]
DEFAULT_RADII = (0.1, 0.2, 0.3)
DEFAULT_ATTACKS = (AttackConfig(name="pgd"),)


@dataclass
class Opened:
    """A model that can be certified and attacked, with the data to do it on.

    Attributes:
        model: the Keras model.
        data: its data set.
        config: the run's configuration; None for a bare model file.
        design: the run's `Design`, or None.
        run: the open run directory that results are written to, or None.
        certificate: the certificate of the arrays in `certified`, once computed.
        check: whether the trained layers still prove the design's claim; set with the certificate.
        certified: (split, samples) of the certificate.
    """

    model: Any
    data: arrays.Dataset
    config: ExperimentConfig | None = None
    design: Any = None
    run: files.RunDirectory | None = None
    certificate: Any = None
    check: dict | None = None
    certified: tuple = ()
    say: Say = field(default=lambda message: None, repr=False)

    @property
    def radii(self) -> list[float]:
        """Radii of the configuration, or the default ones."""
        return list(self.config.radii if self.config else DEFAULT_RADII)

    @property
    def is_proved(self) -> bool:
        """Whether radii were proved and, where a claim was designed, the claim holds too."""
        claim = self.design is None or (
            self.design.is_proved and bool((self.check or {}).get("holds"))
        )
        return claim and self.certificate is not None and self.certificate.verdict == "PROVED"

    @property
    def attacks(self) -> list[AttackConfig]:
        """Attacks of the configuration, or the default ones."""
        return list(self.config.attacks if self.config else DEFAULT_ATTACKS)

    def arrays(self, split: str, samples: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs in the model's shape, and labels."""
        if samples is not None and samples < 1:
            raise ValueError(f"`samples` must be positive. Received: samples={samples}.")
        taken = Inputs.of(self.model)
        if taken.several:
            raise ValueError(
                "The data has one array, so that the model must have one input. Received: model "
                f"{taken.model!r} with the inputs {', '.join(map(repr, taken.names))}, and data "
                f"{self.data.name!r}. In Python, `certify`, `bracket` and the attacks take a list "
                "or dict with an array for each."
            )
        x, y = self.data.split(split)
        x, y = x[:samples], y[:samples]
        shape = tuple(self.model.input_shape[1:])
        have = x.shape[1:]
        if len(shape) != len(have) or any(
            size not in (None, given) for size, given in zip(shape, have, strict=True)
        ):
            if None in shape or math.prod(shape) != math.prod(x.shape[1:]):
                raise ValueError(
                    f"The model does not take the data. Received: inputs of shape {x.shape[1:]} "
                    f"from {self.data.name!r} for a model of input shape {shape}."
                )
            if len(have) == 3 and shape == (have[-1], *have[:-1]):
                x = np.ascontiguousarray(np.moveaxis(x, -1, 1))  # channels first, as PyTorch's
            x = x.reshape(-1, *shape)
        self._check_labels(y)
        return x, y

    def _check_labels(self, y):
        outputs = self.model.output_shape
        classes = outputs[-1] if isinstance(outputs, tuple) and len(outputs) == 2 else None
        if len(y) == 0:
            raise ValueError(
                "There must be examples. Received: a split without any. Data without parts are "
                "test data as a whole: use `--split test`."
            )
        names = self.data.class_names
        if names is not None and classes is not None and len(names) != max(classes, 2):
            raise ValueError(
                "Names of classes are numbered in alphabetical order, so that each class of the "
                f"model, which has {max(classes, 2)}, must occur. Received: "
                f"{', '.join(names[:10])}. Write class numbers in place of names."
            )
        if classes is not None and int(np.max(y)) >= max(classes, 2):
            raise ValueError(
                f"Labels must be classes of the model, which has {max(classes, 2)}. "
                f"Received: labels from {np.min(y)} to {np.max(y)} from {self.data.name!r}."
            )


def load_data(
    config: ExperimentConfig, data_dir: str | os.PathLike | None = None, download: bool = False
) -> arrays.Dataset:
    """The configured data set."""
    spec = config.dataset
    if spec.name in arrays.STREAMED:
        return _stream(spec, data_dir, download)
    data = arrays.load(
        spec.name,
        data_dir,
        download=download,
        validation=spec.validation,
        crop=spec.crop,
        limit=spec.limit,
        seed=config.seed,
        label=spec.label,
        pixels=spec.pixels,
    )
    return _centred(data) if spec.centre == "channel_mean" else data


def _stream(spec, data_dir, download) -> streams.ImageStream:
    if download:
        arrays.load(spec.name, data_dir, download=True)
    if spec.centre != "half":
        raise ConfigError(
            f"Streamed images are centred at one half. Received: dataset.centre={spec.centre!r} "
            f"for {spec.name!r}."
        )
    return streams.load(
        spec.name,
        data_dir,
        validation=spec.validation,
        size=spec.crop,
        limit=spec.limit,
        on_damage=spec.on_damage,
        cache=spec.cache,
        deterministic=spec.deterministic,
    )


def _centred(data: arrays.Dataset) -> arrays.Dataset:
    """The data with the channels' means over the training split subtracted: distances stay."""
    axes = tuple(range(data.x_train.ndim - 1))
    mean = data.x_train.mean(axis=axes, dtype=np.float64).astype("float32")
    low, high = data.pixel_range
    return dataclasses.replace(
        data,
        **{key: getattr(data, key) - mean for key in ("x_train", "x_val", "x_test")},
        preprocessing=f"{data.preprocessing}, channel means subtracted",
        # Valid for every channel.
        pixel_range=(low - float(mean.max()), high - float(mean.min())),
    )


@contextlib.contextmanager
def open_run(path: str | os.PathLike) -> Iterator[files.RunDirectory]:
    """An existing run, open for writing.

    Raises:
        RunDirectoryError: there is no run.
    """
    run = files.RunDirectory(path)
    if not run.is_run:
        raise RunDirectoryError(
            f"There is no run here (no {files.CONFIG}). Received: {run.path}. Start one with: "
            "tf-lyapunov train CONFIG --run-dir DIR"
        )
    with run.open(resume=True):
        yield run


@contextlib.contextmanager
def open_target(
    target: str | os.PathLike,
    data: str | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    *,
    load: Callable[[Path], Any] = load_model,
    label: str | None = None,
    pixels: str | None = None,
    say: Say = lambda message: None,
) -> Iterator[Opened]:
    """A run directory or a model file, with data to test it on.

    Args:
        target: run directory, or model file.
        data: name of a data set, or path of data of one's own; default that of the run.
        data_dir: TensorFlow Datasets directory.
        download: fetch the data set if it is missing.
        load: reads a model file; by default `.keras` files alone.
        label, pixels: of data of one's own, see `data.arrays.load`; not for a run's own data.
        say: called with messages for the user.

    Raises:
        RunDirectoryError: the directory holds no trained run.
        ModelFileError: the model file is missing or refused.
        ValueError: a model file was given without data.
    """
    target = Path(target)
    if not target.is_dir():
        if not target.exists():
            raise ModelFileError(
                f"There is neither a run directory nor a model file. Received: {target}."
            )
        if data is None:
            raise ValueError(
                "A model file does not say which data it is for. Received: no `--data`. Choose "
                f"one of {', '.join(arrays.NAMES)}, or a path to data of your own."
            )
        model = load(target)
        loaded = _tested(data, data_dir, download, label, pixels, say)
        yield Opened(model, loaded, say=say)
        return
    with open_run(target) as run:
        config = load_config(run.file(files.CONFIG))
        if not run.has(files.MODEL):
            raise RunDirectoryError(
                f"The run is not trained to its end (no {files.MODEL}). Received: {run.path}. "
                "Continue it with: tf-lyapunov train CONFIG --resume --run-dir DIR"
            )
        model = load_model(run.file(files.MODEL))
        if data is None or data == config.dataset.name:
            if label is not None or pixels is not None:
                raise ValueError(
                    "A run knows its data. Received: "
                    f"label={label!r}, pixels={pixels!r} for {run.path}. Leave them out."
                )
            loaded = load_data(config, data_dir, download)
        else:
            loaded = _tested(data, data_dir, download, label, pixels, say)
        yield Opened(model, loaded, config, load_design(run), run, say=say)


def _tested(name, data_dir, download, label, pixels, say):
    """Data that a model was not trained on here: what has no parts is test data as a whole."""
    options = {"label": label, "pixels": pixels, "whole": name not in arrays.NAMES}
    data = arrays.load(name, data_dir, download=download, **options)
    if name not in arrays.NAMES:
        say(
            f"{name}: {len(data.x_test)} test examples of shape {data.x_test.shape[1:]}, "
            f"{data.num_classes} classes, pixels: {data.preprocessing}."
        )
        if data.class_names:
            named = ", ".join(f"{i} {n}" for i, n in enumerate(data.class_names[:10]))
            say(f"Classes by name: {named}{', …' if len(data.class_names) > 10 else ''}.")
        if not len(data.x_train):
            say("All of it is test data. Examples that the model was trained on say little here.")
    return data


def load_design(run: files.RunDirectory):
    if not run.has(files.DESIGN):
        return None
    from ..design import Design

    path = run.file(files.DESIGN)
    record = files.read_json(path)
    with files.understood(path):
        return Design.from_json(json.dumps(record))
