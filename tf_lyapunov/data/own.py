"""Files of a user's own: `.npz`, `.csv`, and folders of images by class."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np

from ..errors import DatasetNotFound
from .folders import read_folder
from .parts import Parts

SUFFIXES = (".npz", ".csv")
_INPUTS = ("x", "X", "images", "image", "data", "features", "inputs")
_LABELS = ("y", "labels", "label", "target", "targets", "class")
_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


def is_path(name: str) -> bool:
    """Whether a data set's name means a file or a folder, there or not."""
    looks = name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or "\\" in name
    return looks or Path(name).expanduser().exists()


def read(name: str, label: str | None = None) -> Parts:
    """The parts of a file or folder.

    Args:
        name: path of an `.npz`, a `.csv` or a folder.
        label: name of the array or column that holds the labels.

    Raises:
        DatasetNotFound: it is not there, cannot be read, or is of another kind.
        ValueError: its content does not fit.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise DatasetNotFound(f"There is no such data. Received: {name}.")
    if path.is_dir():
        if label is not None:
            raise ValueError(
                f"Folders name the classes. Received: label={label!r} for the folder {name}."
            )
        return read_folder(path)
    if path.suffix not in SUFFIXES:
        raise DatasetNotFound(
            "Data are read from .npz and .csv files and from folders of images by class. "
            f"Received: {name}."
        )
    try:
        return _read_npz(path, label) if path.suffix == ".npz" else _read_csv(path, label)
    except (OSError, EOFError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DatasetNotFound(f"The file cannot be read ({reason}). Received: {name}.") from error


def _read_npz(path, label):
    with np.load(path, allow_pickle=False) as held:
        names = list(held.files)
        found = _pairs(names, label, path)
        try:
            arrays = {p: (held[x], held[y]) for p, (x, y) in found.items()}
        except ValueError as error:  # objects, which only running code could read
            raise ValueError(
                f"Arrays must hold numbers or text. Received: {path.name} with an array that does "
                f"not ({str(error)[:120]})."
            ) from error
    for part, (x, y) in arrays.items():
        if x.ndim < 2 or y.ndim < 1 or len(x) != len(y):
            raise ValueError(
                "There must be one label per input. Received: "
                f"{path.name} with arrays of shapes {x.shape} and {y.shape} ({part})."
            )
    return Parts(path.name, arrays)


def _pairs(names, label, path):
    """Part -> names of its two arrays."""
    found = {}
    for part, words in _PARTS.items():
        for word in words:
            if f"x_{word}" in names:
                if f"y_{word}" not in names:
                    raise ValueError(
                        f"Inputs need labels. Received: {path.name} with x_{word} and without "
                        f"y_{word}."
                    )
                found[part] = f"x_{word}", f"y_{word}"
    if found and label is None:
        return found
    inputs = [name for name in _INPUTS if name in names]
    labels = [name for name in ((label,) if label else _LABELS) if name in names]
    if not inputs and label in names and len(names) == 2:
        inputs = [name for name in names if name != label]
    if not inputs or not labels:
        wanted = "x and y, or x_train, y_train, x_test, y_test"
        raise ValueError(
            f"The file must hold {wanted} (`--label` names the array of labels). "
            f"Received: {path.name} with {', '.join(names) or 'nothing'}"
            + (f", label={label!r}." if label else ".")
        )
    return {"all": (inputs[0], labels[0])}


def _read_csv(path, label):
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=first.count)
        rows = csv.reader(file, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(rows)]
        except StopIteration:
            raise ValueError(
                f"A CSV file must hold a header. Received: {path.name}, empty."
            ) from None
        lines = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    if len(set(header)) < len(header) or any(map(_is_number, header)):
        raise ValueError(
            "The first line of a CSV file must name its columns, each otherwise. Received: "
            f"{path.name} with {', '.join(header[:5])}."
        )
    target = _label_column(header, label, path)
    parts = header.index("split") if "split" in header and target != "split" else None
    place = header.index(target)
    columns = [i for i in range(len(header)) if i not in (place, parts)]
    if not columns:
        raise ValueError(f"There must be columns besides the label. Received: {path.name}.")
    values, labels, named = [], [], []
    for number, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"All lines must have as many cells as the header, {len(header)}. "
                f"Received: {path.name}, line {number} with {len(row)}."
            )
        values.append(_features(row, columns, header, path, number))
        labels.append(row[place].strip())
        if not labels[-1]:
            raise ValueError(
                f"Every line needs a label. Received: {path.name}, line {number} without one."
            )
        named.append("all" if parts is None else _part(row[parts], path, number))
    x = np.array(values, np.float64).reshape(len(values), len(columns))
    y = np.array([float(v) for v in labels] if all(map(_is_number, labels)) else labels)
    if not lines:
        raise ValueError(f"Data must hold examples. Received: {path.name} without any.")
    where = {part: np.array(named) == part for part in dict.fromkeys(named)}
    return Parts(path.name, {part: (x[rows], y[rows]) for part, rows in where.items()})


def _label_column(header, label, path):
    if label is not None:
        chosen = [label] if label in header else []
    else:
        chosen = [name for name in header if name.lower() in _LABELS]
    if len(chosen) != 1:
        raise ValueError(
            "One column must hold the labels; `--label` names it. Received: "
            f"{path.name} with the columns {', '.join(header[:12])}"
            + (" …" if len(header) > 12 else "")
            + (f", label={label!r}." if label else ".")
        )
    return chosen[0]


def _features(row, columns, header, path, number):
    found = []
    for i in columns:
        try:
            value = float(row[i])
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise ValueError(
                "All columns but the label must hold finite numbers. Received: "
                f"{row[i]!r} in {path.name}, line {number}, column {header[i]!r}."
            )
        found.append(value)
    return found


def _part(cell, path, number):
    for part, words in _PARTS.items():
        if cell.strip().lower() in words:
            return part
    raise ValueError(
        "The column 'split' must hold train, val or test. Received: "
        f"{cell!r} in {path.name}, line {number}."
    )


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
