"""Saving and loading `.keras` files that may be damaged or hostile."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from ..errors import ModelFileError
from .files import atomic_path

# Classes that run code or read other files when they are loaded.
_FORBIDDEN = {
    "Lambda": "holds Python code, which could do anything",
    "TFSMLayer": "runs a TensorFlow program from another path",
    "TorchModuleWrapper": "runs pickled Python code",
    "JaxLayer": "runs stored code",
    "FlaxLayer": "runs stored code",
}
_SIZES = ("units", "filters", "output_dim", "input_dim", "depth_multiplier")
_LARGEST_CONFIG = 64 * 2**20
_WEIGHTS = "model.weights.h5"


def save_model(model, path: str | os.PathLike) -> None:
    """Save a Keras model as a `.keras` file that is whole or absent."""
    with atomic_path(path) as temporary:
        model.save(temporary)


def _refuse(path: Path, reason: str, error: BaseException | None = None):
    raise ModelFileError(f"The model file is refused: {reason}. Received: {path}.") from error


def load_model(path: str | os.PathLike):
    """Load a `.keras` file without running any code from it.

    The archive's checksums, its list of files, the classes it names and the sizes it asks for are
    checked before Keras sees it; Keras then loads it with `safe_mode=True` and without its
    compile state. Certificates must be computed from the loaded weights: a file can declare any
    constraint and hold weights that break it.

    Args:
        path: a `.keras` file.

    Returns:
        The model, not compiled.

    Raises:
        ModelFileError: the file is missing, truncated or corrupt; it holds a Lambda or another
            layer that runs stored code; a class is unknown; or its weights are not finite.
    """
    path = Path(path)
    if not path.is_file():
        _refuse(path, "there is no such file")
    if path.suffix != ".keras":
        _refuse(path, "only files that end in .keras are read")
    config = _checked_config(path)
    _check_classes(path, config)

    import keras

    from .. import constraints, losses, regularizers  # noqa: F401 (registers our classes)

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except KeyboardInterrupt:
        raise
    except MemoryError as error:
        _refuse(path, "it needs more memory than there is", error)
    except Exception as error:  # Keras raises many kinds for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        _refuse(path, f"Keras cannot load it ({reason.rstrip('.')})", error)
    needed = sum(math.prod(variable.shape) for variable in model.weights)
    stored = _stored_entries(path)
    if stored < needed:  # Keras would leave the others at random values, with a warning
        _refuse(path, f"it holds {stored} weights, and its model needs {needed}")
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable.value)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            _refuse(path, f"the weight {variable.path!r} holds NaN or infinite values")
    return model


def _checked_config(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            for name in infos:
                if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
                    _refuse(path, f"it holds a file outside the archive ({name!r})")
            if "config.json" not in infos or _WEIGHTS not in infos:
                _refuse(path, "it is not a Keras archive (no config.json or no weights)")
            if infos["config.json"].file_size > _LARGEST_CONFIG:
                _refuse(path, "its config.json is larger than any model's")
            # Keras stores weights uncompressed: a higher ratio is a decompression bomb.
            if infos[_WEIGHTS].file_size > 1024 * max(infos[_WEIGHTS].compress_size, 1):
                _refuse(path, "its weights are a decompression bomb")
            broken = archive.testzip()
            if broken is not None:
                _refuse(path, f"it is corrupt: the checksum of {broken} is wrong")
            config = json.loads(archive.read("config.json"))
            weights_size = infos[_WEIGHTS].file_size
    except zipfile.BadZipFile as error:
        _refuse(path, "it is truncated or not a Keras file (the zip archive is damaged)", error)
    except (OSError, EOFError, ValueError, RecursionError, NotImplementedError) as error:
        if isinstance(error, ModelFileError):
            raise
        _refuse(path, f"it is corrupt ({error})", error)
    except Exception as error:  # zlib.error and others of a damaged archive
        _refuse(path, f"it is corrupt ({error})", error)
    _check_sizes(path, config, weights_size)
    return config


def _stored_entries(path: Path) -> int:
    """Number of weights in the file, those of the optimizer left out."""
    import h5py

    sizes: list[int] = []

    def count(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer"):
            sizes.append(int(item.size))

    with zipfile.ZipFile(path) as archive, archive.open(_WEIGHTS) as member:
        with h5py.File(io.BytesIO(member.read()), "r") as file:
            file.visititems(count)
    return sum(sizes)


def _objects(node):
    """Every mapping in the configuration, without recursion (it may be nested without end)."""
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _check_classes(path: Path, config: dict) -> None:
    for item in _objects(config):
        name, module = item.get("class_name"), item.get("module")
        if not isinstance(name, str):
            continue
        if name in ("__lambda__", "function") and "code" in str(item.get("config", ""))[:200]:
            _refuse(path, "it holds Python code (a lambda function)")
        if name in _FORBIDDEN:
            layer = (
                (item.get("config") or {}).get("name")
                if isinstance(item.get("config"), dict)
                else None
            )
            _refuse(path, f"the layer {layer or name!r} is a {name}, which {_FORBIDDEN[name]}")
        if name == "__lambda__":
            _refuse(path, "it holds Python code (a lambda function)")
        if isinstance(module, str) and module.split(".")[0] not in (
            "keras",
            "tf_lyapunov",
            "builtins",
        ):
            _refuse(path, f"the class {module}.{name} belongs neither to Keras nor to tf_lyapunov")


def _check_sizes(path: Path, config: dict, weights_size: int) -> None:
    for item in _objects(config):
        for key in _SIZES:
            size = item.get(key)
            # A layer with n units stores at least n weights of at least one byte.
            if isinstance(size, int) and not isinstance(size, bool) and size > weights_size:
                _refuse(
                    path,
                    f"it declares {key}={size} but holds only {weights_size} bytes of weights",
                )
