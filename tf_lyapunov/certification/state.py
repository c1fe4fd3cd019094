"""Searches around inputs that are finished, in a file from which the same call continues."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np

from tf_lyapunov.archives import read_arrays
from tf_lyapunov.errors import DistributionError, OutputFileError
from tf_lyapunov.interruption import uninterrupted
from tf_lyapunov.local import recording
from tf_lyapunov.local.findings import Finding
from tf_lyapunov.writing import writable_target, write_bytes

FORMAT = "tf_lyapunov searches around inputs 1"
# Seconds between two writings, and how many times longer than a writing they are at least.
_PAUSE, _SHARE = 2.0, 30
# What a record is made of.
_KINDS = {
    kind.__name__: kind
    for kind in vars(recording).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == recording.__name__
}
_BELONGS = {
    "model": "another model",
    "inputs": "other inputs",
    "labels": "other labels",
    "settings": "other settings",
    "rounding": "logits of another precision or device",
}


class Kept:
    """Findings around inputs, in memory and, with a path, in a file.

    The file is replaced whole, every few seconds and when `keeping` ends, however it ends. Only
    searches that ended by themselves are written: one that time cut short is done again. A disk
    that is full in the meantime ends no search: a warning says so.

    Args:
        path: of the file, or None.
        identity: dict of what the findings belong to, under the keys of `_BELONGS`; plain data.
        count: number of inputs.

    Raises:
        ValueError: if the file is damaged, or belongs to something else.
        OutputFileError: if it cannot be written.
    """

    def __init__(self, path, identity, count):
        self.path, self.identity, self.count = path, identity, count
        self.findings, self.has_records = {}, True
        self._written, self._pause = time.monotonic(), _PAUSE
        if path is None:
            return
        path = Path(path)
        if os.path.lexists(path) and writable_target(path).exists():
            self.findings, self.has_records = _read(path, identity, count)
        else:
            self._replace()  # where it cannot be written, this is known before hours of work

    def add(self, number, finding):
        """Takes in one more."""
        if not finding.is_final:
            return
        self.findings[number] = finding
        if not self.has_records:
            self.drop_records()
        if self.path is not None and time.monotonic() - self._written > self._pause:
            self._write()

    def drop_records(self):
        """Radii alone are kept: what proves them is too large."""
        self.has_records = False
        for number, finding in self.findings.items():
            if finding.record is not None:
                self.findings[number] = dataclasses.replace(finding, record=None)

    @contextlib.contextmanager
    def keeping(self):
        """Writes the file when the block ends; says in an interruption's message what it holds."""
        try:
            yield
        except KeyboardInterrupt:
            self._write()
            raise KeyboardInterrupt(f"Interrupted. {self._words()}") from None
        except DistributionError as error:
            self._write()
            raise DistributionError(f"{error} {self._words()}") from error.__cause__
        except BaseException:
            self._write()
            raise
        self._write()

    def _words(self):
        done = f"{len(self.findings)} of {self.count} inputs are finished"
        if self.path is None:
            return f"{done} and lost. Pass `state=` a file that keeps them."
        return f"{done} and kept in {self.path}: the same call continues there."

    def _write(self):
        if self.path is None:
            return
        begin = time.monotonic()
        try:
            self._replace()
        except OutputFileError as error:
            warnings.warn(f"Finished inputs could not be kept. {error}", stacklevel=3)
        self._written = time.monotonic()
        self._pause = max(_PAUSE, _SHARE * (self._written - begin))

    def _replace(self):
        with uninterrupted():
            write_bytes(self.path, _packed(self.identity, self.findings, self.has_records))


def digest_of(*arrays):
    """SHA-256 of arrays, with their dtypes and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# Files ------------------------------------------------------------------------------------------


def _packed(identity, findings, has_records):
    numbers = sorted(findings)
    arrays = []
    header = {
        "format": FORMAT,
        "identity": identity,
        "has_records": has_records,
        "records": [_encoded(findings[i].record, arrays) for i in numbers],
        "arrays": [[a.dtype.str, list(a.shape)] for a in arrays],
    }
    text = json.dumps(header).encode()
    content = {
        "header": np.frombuffer(text, np.uint8),
        "numbers": np.array(numbers, np.int64),
        "start": np.array([findings[i].start for i in numbers], np.float64),
        "radius": np.array([findings[i].radius for i in numbers], np.float64),
        "bytes": np.frombuffer(b"".join(a.tobytes() for a in arrays), np.uint8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **content, sha256=_seal(content))
    return buffer.getvalue()


def _seal(content):
    names = ("header", "numbers", "start", "radius", "bytes")
    return np.frombuffer(bytes.fromhex(digest_of(*(content[n] for n in names))), np.uint8)


def _read(path, identity, count):
    def refuse(reason, error):
        raise ValueError(reason) from error

    try:
        content = read_arrays(path, refuse)
        if not np.array_equal(_seal(content), content["sha256"]):
            refuse("its content does not fit its checksum", None)
        header = json.loads(content["header"].tobytes())
        if header["format"] != FORMAT:
            refuse("it is of another version", None)
        theirs = header["identity"]
        findings = _findings(content, header, count) if theirs == identity else {}
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`state` holds no searches around inputs, or is damaged: {error}. Received: {path}. "
            "Name a new file, or delete it."
        ) from None
    for key, other in _BELONGS.items():
        if theirs.get(key) != identity[key]:
            raise ValueError(
                f"`state` belongs to {other}{_differing(theirs.get(key), identity[key])}. "
                f"Received: {path}. Name a new file, or delete it."
            )
    return findings, bool(header["has_records"])


def _differing(theirs, ours):
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    names = [k for k in ours if theirs.get(k) != ours[k]]
    return ": " + ", ".join(f"{k}={theirs.get(k)!r} there, {ours[k]!r} here" for k in names)


def _findings(content, header, count):
    arrays, begin, data = [], 0, content["bytes"].tobytes()
    for kind, shape in header["arrays"]:
        kind = np.dtype(kind)
        end = begin + kind.itemsize * int(np.prod(shape))
        arrays.append(np.frombuffer(data[begin:end], kind).reshape(shape))
        begin = end
    found = {}
    columns = content["numbers"], content["start"], content["radius"], header["records"]
    for number, start, radius, record in zip(*columns, strict=True):
        if not (0 <= number < count and radius >= start >= 0):
            raise ValueError("it holds impossible numbers")
        found[int(number)] = Finding(float(start), float(radius), _decoded(record, arrays))
    return found


def _encoded(value, arrays):
    """Plain data of a record, its arrays replaced by their numbers."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if type(value).__name__ in _KINDS:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {type(value).__name__: {k: _encoded(v, arrays) for k, v in fields.items()}}
    if isinstance(value, dict):
        return {"dict": [[k, _encoded(v, arrays)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return [_encoded(v, arrays) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _decoded(value, arrays):
    if isinstance(value, list):
        return tuple(_decoded(v, arrays) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {k: _decoded(v, arrays) for k, v in content}
    return _KINDS[kind](**{k: _decoded(v, arrays) for k, v in content.items()})
