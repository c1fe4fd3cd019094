"""Saving `.keras` files whole, and loading them without trusting what they declare."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.modelfile import contents, sizes
from tf_lyapunov.writing import atomic_path

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_LARGEST_CONFIG = 64 * 2**20
# Weights with the state of an optimizer, and what HDF5 adds to each of them.
_COPIES, _OVERHEAD = 16, 2**16


def save_model(model, path: str | os.PathLike) -> None:
    """Save a Keras model as a `.keras` file that is whole or absent."""
    with atomic_path(path) as temporary:
        model.save(temporary)


def load_model(path: str | os.PathLike):
    """Load a `.keras` file without running any code from it.

    The archive's list of files and checksums, the classes and functions it names, and the sizes it
    asks for (weights and signals, from the shapes of its graph) are checked against what it holds
    and against memory before Keras allocates anything; Keras then loads it with `safe_mode=True`
    and without its compile state. Certificates must be computed from the loaded weights: a file can
    declare any constraint and hold weights that break it.

    Args:
        path: a `.keras` file.

    Returns:
        The model, not compiled.

    Raises:
        ModelFileError: the file is missing, truncated or corrupt; it holds a Lambda or another
            layer that runs stored code; a class is unknown; a function is no activation; it asks
            for more than it holds or than memory has; or its weights are not finite.
    """
    path = Path(path)
    if not path.is_file():
        _refuse(path, "there is no such file")
    if path.suffix != ".keras":
        _refuse(path, "only files that end in .keras are read")

    import keras

    needed = _checked(path)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except KeyboardInterrupt:
        raise
    except MemoryError as error:
        _refuse(path, "it needs more memory than there is", error)
    except Exception as error:  # Keras raises many kinds for a malformed file
        _refuse(path, f"Keras cannot load it ({_first_line(error)})", error)
    if sum(int(np.prod(v.shape, dtype=object)) for v in model.weights) != needed.weights:
        _refuse(path, "its weights are not those of its configuration")
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable.value)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            _refuse(path, f"the weight {variable.path!r} holds NaN or infinite values")
    return model


def _refuse(path: Path, reason: str, error: BaseException | None = None):
    raise ModelFileError(f"The model file is refused: {reason}. Received: {path}.") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def _checked(path: Path) -> sizes.Needs:
    """`Needs` of a file that holds what it declares."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = _members(path, archive)
            config = json.loads(archive.read(_CONFIG))
            for objection in contents.objections(config):
                _refuse(path, objection)
            needed = _needs(path, config)
            _check_sizes(path, infos, needed)
            broken = archive.testzip()
            if broken is not None:
                _refuse(path, f"it is corrupt: the checksum of {broken} is wrong")
            stored, objections = sizes.stored_entries(io.BytesIO(archive.read(_WEIGHTS)))
    except zipfile.BadZipFile as error:
        _refuse(path, "it is truncated or not a Keras file (the zip archive is damaged)", error)
    except ModelFileError:
        raise
    except Exception as error:  # zlib.error, h5py's and others of a damaged archive
        _refuse(path, f"it is corrupt ({error})", error)
    for objection in objections:
        _refuse(path, objection)
    if stored < needed.weights:  # Keras would leave the others at random values, with a warning
        _refuse(path, f"it holds {stored} weights, and its model needs {needed.weights}")
    return needed


def _members(path, archive):
    infos = {info.filename: info for info in archive.infolist()}
    for name in infos:
        if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
            _refuse(path, f"it holds a file outside the archive ({name!r})")
    if len(infos) != len(archive.infolist()):
        _refuse(path, "it holds a file twice")
    if _CONFIG not in infos or _WEIGHTS not in infos:
        _refuse(path, "it is not a Keras archive (no config.json or no weights)")
    if infos[_CONFIG].file_size > _LARGEST_CONFIG:
        _refuse(path, "its config.json is larger than any model's")
    return infos


def _needs(path, config):
    try:
        return sizes.needs(config)
    except Exception as error:  # Keras raises many kinds for a malformed configuration
        _refuse(path, f"Keras cannot load it ({_first_line(error)})", error)


def _check_sizes(path, infos, needed):
    weights = infos[_WEIGHTS].file_size
    if needed.weights > weights:  # an entry takes a byte at least
        _refuse(
            path,
            f"it declares {needed.weights} weights but holds only {weights} bytes of weights",
        )
    limit = _COPIES * (needed.bytes + _OVERHEAD * (needed.variables + 1))
    held = sum(info.file_size for info in infos.values()) - infos[_CONFIG].file_size
    if held > limit:
        _refuse(path, f"it holds {held} bytes, and its model needs {needed.bytes}")
    memory = sizes.available_memory()
    if memory is not None and needed.bytes + weights > memory:
        _refuse(path, f"its {needed.weights} weights need more memory than there is")
    if memory is not None and needed.signal > memory:
        _refuse(
            path,
            f"the layer {needed.layer!r} makes {needed.signal} bytes of one input, more than there "
            "is memory",
        )
