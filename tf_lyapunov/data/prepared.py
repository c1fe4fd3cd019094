"""Data sets that TensorFlow Datasets has prepared: where they lie, and reading them whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from ..errors import DatasetNotFound
from .parts import Parts

# name -> (classes, examples held out of the training split, centre crop)
PREPARED = {
    "mnist": (10, 5000, None),
    "fashion_mnist": (10, 5000, None),
    "cifar10": (10, 5000, 28),
    "cifar100": (100, 5000, 28),
    "svhn_cropped": (10, 5000, 28),
}


def directory_of(data_dir: str | os.PathLike | None) -> Path:
    """The TensorFlow Datasets directory that is meant, by default."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or Path("~", "tensorflow_datasets")
    return Path(data_dir).expanduser()


def prepared_directory(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Where the newest prepared version of a data set lies.

    Raises:
        DatasetNotFound: it is not there; the message says how to get it.
    """
    return _version_directory(name, directory_of(data_dir))


def _how_to_get(name: str, directory: Path) -> str:
    if name == "imagenet2012":
        return (
            "ImageNet is not downloaded by any program: register at image-net.org, put "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
            f"{directory / 'downloads' / 'manual'}, and prepare them once (300 GB of disk, hours) "
            f"by `python -m tensorflow_datasets.scripts.cli.main build {name} --data_dir "
            f"{directory} --manual_dir {directory / 'downloads' / 'manual'}`; or point "
            "`--data-dir` (or the variable TFDS_DATA_DIR) to a directory that holds "
            f"{name}/<version>/."
        )
    train = f"`tf-lyapunov train CONFIG --download --data-dir {directory}` or "
    return (
        f"Prepare it once, with a network, by {train if name in PREPARED else ''}"
        f"`python -m tensorflow_datasets.scripts.cli.main build {name} "
        f"--data_dir {directory}`; or point `--data-dir` (or the variable TFDS_DATA_DIR) to a "
        f"directory that holds {name}/<version>/."
    )


def _version_directory(name: str, directory: Path) -> Path:
    """The newest prepared version of a data set, or DatasetNotFound with the reason."""
    root = directory / name
    try:
        versions = sorted(
            (entry for entry in root.iterdir() if (entry / "dataset_info.json").is_file()),
            key=lambda entry: [int(p) if p.isdigit() else -1 for p in entry.name.split(".")],
        )
        complete = [entry for entry in versions if "incomplete" not in entry.name]
        leftovers = [entry.name for entry in root.iterdir() if "incomplete" in entry.name]
    except OSError:
        complete, leftovers = [], []
    if complete:
        return complete[-1]
    if leftovers:
        raise DatasetNotFound(
            f"The preparation of '{name}' was interrupted: {root} holds only "
            f"{', '.join(sorted(leftovers))}. Delete that directory. {_how_to_get(name, directory)}"
        )
    raise DatasetNotFound(
        f"The data set '{name}' is not prepared. Received: data directory {directory}. "
        + _how_to_get(name, directory)
    )


def import_tfds():
    """tensorflow_datasets, or DatasetNotFound with what to install."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetNotFound(
            "This data set is read with tensorflow-datasets, which cannot be imported "
            f"({error}). Install the extra: pip install 'tf-lyapunov[datasets]'"
        ) from error
    return tfds


def read(name: str, directory: Path, limit: int | None = None, splits=("test", "train")):
    """Images and labels of each split in turn, in the order of the files."""
    path = _version_directory(name, directory)
    tfds = import_tfds()
    parts = []
    with _as_damage(name, path, directory):
        builder = tfds.builder_from_directory(str(path))
        for split in splits:
            expected = builder.info.splits[split].num_examples
            expected = expected if limit is None else min(limit, expected)
            batch = builder.as_dataset(
                split=split if limit is None else f"{split}[:{expected}]",
                shuffle_files=False,
                batch_size=-1,
                # One file after the other: the order of the examples is that of the files.
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            )
            batch = tfds.as_numpy(batch)
            if len(batch["label"]) != expected:
                raise ValueError(f"{len(batch['label'])} of {expected} {split} examples found")
            parts += [batch["image"], batch["label"].astype("int64")]
    return parts


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether there is a folder of this name in the data directory, with a version or without."""
    return (directory_of(data_dir) / name).is_dir()


def read_any(name: str, directory: Path, label: str | None = None) -> Parts:
    """All parts of a prepared data set of any builder, also of the user's own.

    Inputs and labels are those that the builder names as supervised, or its features "image" and
    "label".

    Args:
        name: of the builder, with its configuration if it has several (`name/configuration`).
        directory: the data directory.
        label: name of the feature with the labels.

    Raises:
        DatasetNotFound: the files are not there, incomplete or damaged.
        ValueError: the builder has no such features.
    """
    path = _version_directory(name, directory)
    tfds = import_tfds()
    with _as_damage(name, path, directory):
        builder = tfds.builder_from_directory(str(path))
        features = dict(builder.info.features.items())
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
        keys = builder.info.supervised_keys or ("image", "label")
    x_key, y_key = keys[0], label or keys[1]
    missing = [k for k in (x_key, y_key) if not isinstance(k, str) or k not in features]
    if missing:
        raise ValueError(
            "A builder must name one feature with inputs and one with labels; `--label` names the "
            f"latter. Received: {name} with {', '.join(sorted(features))}, without "
            f"{', '.join(map(str, missing))}."
        )
    known = {"train": "train", "validation": "val", "val": "val", "test": "test"}
    arrays = {}
    with _as_damage(name, path, directory):
        for split, expected in splits.items():
            if split not in known:
                continue
            examples = builder.as_dataset(
                split=split,
                shuffle_files=False,
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            )
            rows = [(row[x_key], row[y_key]) for row in tfds.as_numpy(examples)]
            if len(rows) != expected:
                raise ValueError(f"{len(rows)} of {expected} {split} examples found")
            if rows:
                arrays[known[split]] = [x for x, _ in rows], np.array([y for _, y in rows])
    if not arrays:
        raise ValueError(
            "A builder must have a split named train, validation or test. Received: "
            f"{name} with {', '.join(splits) or 'none'}."
        )
    return Parts(name, arrays)


@contextlib.contextmanager
def _as_damage(name, path, directory):
    """Failures of TensorFlow Datasets as `DatasetNotFound`."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # damaged files fail in TensorFlow, protobuf, JSON, or not at all
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DatasetNotFound(
            f"The files of '{name}' in {path} are incomplete or damaged ({reason}). A download "
            f"or preparation may have been interrupted: delete {path} and prepare it again. "
            + _how_to_get(name, directory)
        ) from error


def download(name: str, directory: Path) -> None:
    """Fetch and prepare a data set where it is not there."""
    try:
        _version_directory(name, directory)
        return
    except DatasetNotFound:
        pass
    tfds = import_tfds()
    try:
        tfds.builder(name, data_dir=str(directory)).download_and_prepare()
    except KeyboardInterrupt:
        raise
    except Exception as error:  # every network and file failure ends here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DatasetNotFound(
            f"The download of '{name}' to {directory} did not finish ({reason}). Nothing was "
            "changed elsewhere; run the same command again to continue. "
            + _how_to_get(name, directory)
        ) from error
