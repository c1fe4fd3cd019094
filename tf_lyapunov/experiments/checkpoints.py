"""Checkpoints from which training continues bit for bit.

A checkpoint is one `.npz` file per epoch with everything the next epoch depends on: weights,
optimizer variables, seed generators, the monitor's state, and the metrics so far. It carries the
SHA-256 digest of its own content; the one before it is kept until the next is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import read_arrays
from ..errors import RunDirectoryError
from .files import atomic_path

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"epoch-(\d{6,})\.npz")


@dataclass
class Checkpoint:
    """State of a run after a whole number of epochs.

    Attributes:
        epoch: epochs completed.
        variables: values in the order of `training_variables(model)`.
        names: names of the variables, for messages.
        history: one row of metrics for each epoch.
        state: plain data and arrays of the callbacks.
        identity: what the run depends on; it must be equal on resume.
    """

    epoch: int
    variables: list[np.ndarray]
    names: list[str]
    history: list[dict] = field(default_factory=list)
    state: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)


def training_variables(model) -> list:
    """Every variable that the next training step reads: weights, seeds, optimizer, once each.

    `model.variables` includes the states of seed generators (dropout), which `.keras` files leave
    out. Metrics are not needed: Keras resets them at the start of an epoch.
    """
    candidates = [*model.variables]
    if model.optimizer is not None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        candidates += model.optimizer.variables
    return list({id(variable): variable for variable in candidates}.values())


def snapshot(model, epoch: int, history: Sequence[dict], state: dict, identity: dict) -> Checkpoint:
    """Copy the training state of a compiled model."""
    variables = training_variables(model)
    return Checkpoint(
        epoch=epoch,
        variables=[np.array(v.numpy(), copy=True) for v in variables],
        names=[v.path for v in variables],
        history=[dict(row) for row in history],
        state=state,
        identity=identity,
    )


def restore(model, checkpoint: Checkpoint) -> None:
    """Put the training state of a checkpoint into a compiled model of the same architecture.

    Raises:
        RunDirectoryError: the variables do not match.
    """
    variables = training_variables(model)
    # Only the last part of a path is independent of what else the process has built.
    ours = [(v.path.split("/")[-1], tuple(v.shape)) for v in variables]
    theirs = [
        (name.split("/")[-1], value.shape)
        for name, value in zip(checkpoint.names, checkpoint.variables, strict=True)
    ]
    if ours != theirs:
        different = next(
            (pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]),
            (len(ours), len(theirs)),
        )
        raise RunDirectoryError(
            "The checkpoint belongs to another model or optimizer. Received: "
            f"{different[1]} where this run has {different[0]}. Pass --overwrite to start again."
        )
    for variable, value in zip(variables, checkpoint.variables, strict=True):
        variable.assign(value)


# ------------------------------------------------------------------------------------- files


def _encode(value: Any, arrays: list[np.ndarray]) -> Any:
    """Plain data with every array replaced by its number."""
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        arrays.append(np.asarray(value))
        return {"__array__": len(arrays) - 1}
    if isinstance(value, dict):
        return {"__dict__": [[k, _encode(v, arrays)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            return arrays[value["__array__"]]
        return {k: _decode(v, arrays) for k, v in value["__dict__"]}
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    return value


def _digest(header: bytes, arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(header)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole, then delete all but the newest two.

    Returns:
        Path of the new file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    extra: list[np.ndarray] = []
    header = {
        "format": FORMAT,
        "epoch": checkpoint.epoch,
        "names": checkpoint.names,
        "history": checkpoint.history,
        "state": _encode(checkpoint.state, extra),
        "identity": checkpoint.identity,
    }
    text = json.dumps(header).encode()
    arrays = [*checkpoint.variables, *extra]
    path = directory / f"epoch-{checkpoint.epoch:06d}.npz"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            header=np.frombuffer(text, np.uint8),
            sha256=np.frombuffer(bytes.fromhex(_digest(text, arrays)), np.uint8),
            **{f"array_{index:05d}": array for index, array in enumerate(arrays)},
        )
    for old in _files(directory)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its digest.

    Raises:
        RunDirectoryError: the file is truncated, corrupt, or of another format.
    """

    def refuse(reason, error):
        raise ValueError(reason) from error

    try:
        file = read_arrays(path, refuse, kinds="fiubcSUV")
        text = file["header"].tobytes()
        expected = file["sha256"].tobytes().hex()
        arrays = [file[name] for name in sorted(file) if name.startswith("array_")]
        if _digest(text, arrays) != expected:
            raise ValueError("its SHA-256 digest is wrong")
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']}, not {FORMAT}")
        count = len(header["names"])
        return Checkpoint(
            epoch=header["epoch"],
            variables=arrays[:count],
            names=header["names"],
            history=header["history"],
            state=_decode(header["state"], arrays[count:]),
            identity=header["identity"],
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"The checkpoint is corrupt: {error}. Received: {path}.") from error
    except Exception as error:  # zlib.error and struct.error of a damaged archive
        raise RunDirectoryError(f"The checkpoint is corrupt: {error}. Received: {path}.") from error


def _files(directory: Path) -> list[Path]:
    """Checkpoints of a directory, the newest first."""
    if not directory.is_dir():
        return []
    numbered = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return [
        path
        for _, path in sorted(
            ((int(match[1]), path) for match, path in numbered if match), reverse=True
        )
    ]


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is intact.

    Returns:
        The checkpoint, or None if there is none, and a message for each newer one that was corrupt.
    """
    messages: list[str] = []
    for path in _files(directory):
        try:
            return read_checkpoint(path), messages
        except RunDirectoryError as error:
            messages.append(f"{error} Falling back to the one before it.")
    return None, messages
