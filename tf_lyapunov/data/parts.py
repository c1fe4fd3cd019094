"""Data of a user's own as named parts, and how they become training, validation and test data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dataset import Dataset

PIXELS = {
    "half": ("x/255 - 0.5", (-0.5, 0.5)),
    "unit": ("x/255", (0.0, 1.0)),
    "raw": ("none", (0.0, 255.0)),
}
# A label beyond this and beyond the number of examples is no class number.
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Parts:
    """What a file, a folder or a builder holds.

    Attributes:
        source: where it is from, for messages.
        arrays: dict from "all", or from some of "train", "val" and "test", to `(x, y)` as read.
        ordered: whether neighbours are alike (files of one class after the other).
    """

    source: str
    arrays: dict
    ordered: bool = False


def split(found, *, validation=None, pixels=None, whole=False, crop=None) -> Dataset:
    """Training, validation and test data of `Parts`.

    Parts that are named stay what they are. Without a test part the given validation part is it,
    and validation data are held out of the training part; without any parts a fifth is test data.
    What is held out is drawn by one fixed permutation, the same for everybody.

    Args:
        found: `Parts`.
        validation: number of examples to hold out; by default a tenth, at most 5000.
        pixels: a key of `PIXELS`; by default "half" for bytes, and "raw" for other numbers.
        whole: data without parts are test data, all of them, in their order; nothing is held out.
        crop: side of a central crop of images.

    Raises:
        ValueError: labels that name no classes, too few examples, shapes that differ, bytes that
            nothing says how to scale.
    """
    named, class_names = _labelled(found)
    inputs = {part: _inputs(x, found.source, part) for part, (x, _) in named.items()}
    labels = {part: y for part, (_, y) in named.items()}
    _check_shapes(inputs, found.source)
    are_bytes = any(x.dtype == np.uint8 for x in inputs.values())
    if pixels is None and are_bytes and whole:
        raise ValueError(
            "A model file does not say how its inputs were scaled. Received: bytes in "
            f"{found.source}, and no `--pixels`. Pass unit (x/255), half (x/255 - 0.5) or raw, as "
            "the model was trained."
        )
    pixels = pixels or ("half" if are_bytes else "raw")
    if pixels not in PIXELS:
        raise ValueError(f"`pixels` must be one of {tuple(PIXELS)}. Received: {pixels!r}.")
    words, limits = PIXELS[pixels]
    if pixels == "raw" and not are_bytes:
        limits = (-np.inf, np.inf)
    rows = _rows({part: len(y) for part, y in labels.items()}, found, validation, whole)
    arrays = {}
    for part in ("train", "val", "test"):
        source, index = rows[part]
        arrays[f"x_{part}"] = _scaled(_cropped(inputs[source], crop)[index], pixels)
        arrays[f"y_{part}"] = labels[source][index]
    return Dataset(
        name=found.source,
        num_classes=1 + max(int(y.max()) for y in labels.values()),
        preprocessing=words + (f", central {crop}×{crop} crop" if crop else ""),
        pixel_range=limits,
        class_names=class_names,
        **arrays,
    )


def _rows(sizes, found, validation, whole):
    """Part -> (part it is taken from, row numbers)."""
    none = np.arange(0)

    def drawn(part):
        return np.random.default_rng(0).permutation(sizes[part])

    def ordered(part):
        return drawn(part) if found.ordered else np.arange(sizes[part])

    if set(sizes) == {"train"}:
        sizes = {"all": sizes["train"]}
        first = "train"
    else:
        first = "all"
    if "all" in sizes:
        if whole:
            sizes = {first: sizes["all"]}
            return {"train": (first, none), "val": (first, none), "test": (first, ordered(first))}
        order = np.random.default_rng(0).permutation(sizes["all"])
        test = len(order) // 5
        rest, held = order[test:], _held_out(len(order), validation)
        _check_left(len(rest) - held, test, held, found.source)
        return {
            "test": (first, order[:test]),
            "val": (first, rest[:held]),
            "train": (first, rest[held:]),
        }
    test = "test" if "test" in sizes else "val"
    rows = {"test": (test, ordered(test))}
    if "train" not in sizes:
        if not whole:
            raise ValueError(
                f"Training needs training examples. Received: {found.source}, which holds only "
                f"{', '.join(sizes)}."
            )
        return {**rows, "train": (test, none), "val": (test, none)}
    if "val" in sizes and test != "val":
        return {**rows, "train": ("train", ordered("train")), "val": ("val", ordered("val"))}
    order, held = drawn("train"), _held_out(sizes["train"], validation)
    _check_left(len(order) - held, sizes[test], held, found.source)
    return {**rows, "val": ("train", order[:held]), "train": ("train", np.sort(order[held:]))}


def _held_out(count, validation):
    return min(5000, count // 10) if validation is None else validation


def _check_left(train, test, held, source):
    if min(train, test, held) < 1:
        raise ValueError(
            f"There must be examples for training, validation and test. Received: {source}, of "
            f"which {max(train, 0)}, {held} and {test} would be left."
        )


def _labelled(found):
    """The parts with labels as class numbers, by one coding for all, and the classes' names."""
    parts = found.arrays
    if not parts or any(len(y) == 0 for _, y in parts.values()):
        raise ValueError(f"Data must hold examples. Received: {found.source} without any.")
    everything = np.concatenate([np.asarray(y).ravel() for _, y in parts.values()])
    total = len(everything)
    if everything.dtype.kind in "US":
        names = np.unique(everything)
        numbers = {p: np.searchsorted(names, y).astype("int64") for p, (_, y) in parts.items()}
        class_names = tuple(map(str, names))
    else:
        numbers = {p: _numbers(y, everything, total, found.source) for p, (_, y) in parts.items()}
        class_names = None
    return {p: (x, numbers[p]) for p, (x, _) in parts.items()}, class_names


def _numbers(y, everything, total, source):
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] > 1:
        if not (np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1)):
            raise ValueError(
                f"Rows of labels must hold a single 1 and zeros. Received: other rows in {source}."
            )
        return np.argmax(y, axis=1).astype("int64")
    y = y.reshape(len(y))
    whole = everything.dtype.kind in "iub" or (
        everything.dtype.kind == "f" and np.all(everything == np.floor(everything))
    )
    if not whole:
        raise ValueError(
            f"Labels must be class numbers or names of classes. Received: {source} with labels of "
            f"dtype {everything.dtype} such as {everything[:3].tolist()}."
        )
    if set(np.unique(everything).tolist()) == {-1, 1}:
        return (y == 1).astype("int64")
    low, high = everything.min(), everything.max()
    if low < 0 or high >= max(total, _MOST_CLASSES):
        raise ValueError(
            "Labels must be class numbers from 0 on, or -1 and 1. "
            f"Received: labels from {low} to {high} in {source}, which has {total} examples."
        )
    return y.astype("int64")


def _inputs(x, source, part):
    if isinstance(x, list):
        shapes = sorted({np.shape(one) for one in x})
        if len(shapes) > 1:
            raise ValueError(
                f"All inputs must have one shape. Received: {source} ({part}) with inputs of "
                f"shapes {', '.join(map(str, shapes[:3]))}. Resize them first."
            )
        x = np.stack(x)
    if x.dtype.kind not in "iufb" or x.ndim < 2:
        raise ValueError(
            "Inputs must be an array of numbers, (n, …). "
            f"Received: {source} ({part}) with dtype {x.dtype} and shape {x.shape}."
        )
    if x.dtype.kind == "f" and not np.all(np.isfinite(x)):
        raise ValueError(f"Inputs must be finite. Received: NaN or infinity in {source} ({part}).")
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[..., None]  # greyscale images
    return x


def _check_shapes(inputs, source):
    shapes = {part: x.shape[1:] for part, x in inputs.items()}
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise ValueError(
            f"All parts must hold inputs of one shape. Received: {source} with {shown}."
        )


def _cropped(x, crop):
    if not crop:
        return x
    if x.ndim != 4 or not 0 < crop <= min(x.shape[1:3]):
        raise ValueError(
            f"`crop` must fit into the images. Received: crop={crop} for inputs of shape "
            f"{x.shape[1:]}."
        )
    top, left = (x.shape[1] - crop) // 2, (x.shape[2] - crop) // 2
    return x[:, top : top + crop, left : left + crop]


def _scaled(x, pixels):
    x = x.astype("float32")
    if pixels == "raw":
        return x
    x /= 255.0
    if pixels == "half":
        x -= 0.5
    return x
