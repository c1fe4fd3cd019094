"""What a model needs, found before anything of its size is allocated."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import threading
from typing import Any, BinaryIO

from tf_lyapunov.modelfile.contents import objects


@dataclasses.dataclass(frozen=True)
class Needs:
    """Sizes that a configuration declares.

    Attributes:
        weights: number of entries of all weights.
        variables: number of weights.
        bytes: of all weights.
        signal: bytes of the largest output of a layer, for one input.
        layer: name of that layer.
    """

    weights: int
    variables: int
    bytes: int
    signal: int
    layer: str


def needs(config: dict[str, Any]) -> Needs:
    """Builds a model's graph and the shapes of its weights, without their values.

    Keras leaves variables without values where state is given apart from them. It keeps a list of
    these in the state of the thread, so a thread of our own is used up.

    Args:
        config: of a `.keras` file, already known to name harmless classes only.

    Raises:
        Exception: whatever Keras raises for a configuration that it cannot build.
    """
    found: list = []
    thread = threading.Thread(target=_build, args=(_bare(config), found))
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _bare(config):
    """The configuration without optimizer and constraints, which hold state of their own."""
    config = copy.deepcopy(config)
    config.pop("compile_config", None)
    for item in objects(config):
        for key in item:
            if isinstance(key, str) and key.endswith(("_constraint", "_regularizer")):
                item[key] = None
    return config


def _build(config, found):
    import keras

    try:
        with keras.StatelessScope(initialize_variables=False):
            model = keras.saving.deserialize_keras_object(config, safe_mode=True)
            variables = [(math.prod(v.shape), v.dtype) for v in model.weights]
            largest, name = _largest_signal(model)
        weights = sum(size for size, _ in variables)
        taken = sum(size * _item_size(dtype) for size, dtype in variables)
        found.append(Needs(weights, len(variables), taken, largest, name))
    except BaseException as error:  # handed to the thread that waits
        found.append(error)


def _largest_signal(model):
    largest, name = 0, model.name
    stack = [model]
    while stack:
        layer = stack.pop()
        stack.extend(getattr(layer, "layers", ()))
        for node in getattr(layer, "_inbound_nodes", ()):
            for tensor in node.output_tensors:
                size = math.prod(n or 1 for n in tensor.shape[1:]) * _item_size(tensor.dtype)
                if size > largest:
                    largest, name = size, layer.name
    return largest, name


def _item_size(dtype):
    text = str(dtype)
    digits = "".join(c for c in text if c.isdigit())
    return max(int(digits) // 8, 1) if digits else 1


def stored_entries(file: BinaryIO) -> tuple[int, list[str]]:
    """Number of weights in an HDF5 file, those of the optimizer left out, and what is odd in it.

    Returns:
        `(entries, objections)`: data sets that other files hold, or whose bytes are not there.
    """
    import h5py

    sizes: list[int] = []
    objections: list[str] = []

    def count(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        if item.is_virtual or item.external:
            objections.append(f"the values of {name!r} lie in another file")
        elif item.size and item.id.get_storage_size() < item.size * item.dtype.itemsize:
            objections.append(f"{name!r} is compressed, or its values are missing")
        if not name.startswith("optimizer"):
            sizes.append(int(item.size))

    with h5py.File(file, "r") as content:
        content.visititems(count)
    return sum(sizes), objections


def available_memory() -> int | None:
    """Bytes that can be allocated here, or None where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
