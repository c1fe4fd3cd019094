"""Proof files: NumPy archives of plain arrays, read without trusting a byte of them."""

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.writing import write_bytes

FORMAT = "tf_lyapunov.proof"
VERSION = 1
_MEMBERS = 64
_LARGEST_HEADER, _LARGEST_FILE = 2**26, 2**32
_KINDS = "fiub"


def write(path, header, arrays):
    """Writes a proof file: whole or absent, uncompressed, without pickles.

    Args:
        path: file name ending in `.npz`.
        header: JSON-safe dict.
        arrays: dict of numeric arrays.
    """
    text = json.dumps({"format": FORMAT, "version": VERSION, **header}, allow_nan=False)
    members = {"header": np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
    members = {name: np.ascontiguousarray(array) for name, array in members.items()}
    members["sha256"] = np.frombuffer(_digest(members), dtype=np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, array in members.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, version=(1, 0), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(name + ".npy"), data.getvalue())
    write_bytes(path, buffer.getvalue())


def read(path):
    """`(header, arrays)` of a proof file.

    Memory is bounded by the file's own size: compressed members are refused (none is written), and
    every array must be as long as its shape says before it is made.

    Raises:
        ProofFileError: if the file is missing, truncated, corrupt, of another kind or version.
    """
    path = Path(path)
    if not path.is_file():
        _refuse(path, "there is no such file")
    if path.stat().st_size > _LARGEST_FILE:
        _refuse(path, f"it is longer than {_LARGEST_FILE} bytes")
    try:
        with zipfile.ZipFile(path) as file:
            members = _members(path, file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        _refuse(path, "it is truncated, corrupt or no proof file", error)
    except (OSError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, ProofFileError):
            raise
        _refuse(path, f"it is corrupt ({error})", error)
    if "header" not in members or "sha256" not in members:
        _refuse(path, "it is a NumPy archive, but no proof file")
    try:
        header = json.loads(
            members["header"].tobytes().decode(),
            object_pairs_hook=_once,
            parse_constant=_no_number,
        )
        kind, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _refuse(path, "its header is corrupt", error)
    if kind != FORMAT:
        _refuse(path, f"its format is {str(kind)[:40]!r}, not {FORMAT!r}")
    if version != VERSION or isinstance(version, (bool, float)):
        _refuse(path, f"its version is {repr(version)[:40]}; this library reads version {VERSION}")
    stored = members.pop("sha256").tobytes()
    if stored != _digest(members):
        _refuse(path, "its contents do not fit its checksum")
    members.pop("header")
    return header, members


def _members(path, file):
    infos = file.infolist()
    names = [info.filename for info in infos]
    if len(infos) > _MEMBERS or len(set(names)) != len(names):
        _refuse(path, f"it holds {len(infos)} members, or one of them twice")
    size = path.stat().st_size
    found = {}
    for info in infos:
        if info.filename == "header.npy" and info.file_size > _LARGEST_HEADER + 2**16:
            _refuse(path, "its header is larger than any")
        if not info.filename.endswith(".npy"):
            _refuse(path, f"it holds {info.filename[:80]!r}, which is no array")
        is_stored = info.compress_type == zipfile.ZIP_STORED and info.flag_bits & 1 == 0
        if not is_stored or info.file_size > size or info.compress_size != info.file_size:
            _refuse(path, f"its member {info.filename!r} is compressed or longer than the file")
        found[info.filename[:-4]] = _array(path, info.filename, file.read(info))
    return found


def _array(path, name, data):
    stream = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(stream)
    if major != 1:
        _refuse(path, f"its member {name!r} is in another format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    rest = len(data) - stream.tell()
    if dtype.kind not in _KINDS or dtype.hasobject or fortran or dtype.names is not None:
        _refuse(path, f"its member {name!r} holds something else than numbers")
    if any(n < 0 for n in shape) or len(shape) > 16 or math.prod(shape) * dtype.itemsize != rest:
        _refuse(path, f"its member {name!r} is not as long as its shape says")
    if name == "header.npy" and rest > _LARGEST_HEADER:
        _refuse(path, "its header is larger than any")
    return np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)


def _once(pairs):
    """A JSON object; of two fields of one name, readers could believe either."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _no_number(text):
    raise ValueError(f"{text} is no number of JSON")


def _digest(members):
    state = hashlib.sha256()
    for name in sorted(members):
        array = members[name]
        state.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        state.update(array.tobytes())
    return state.digest()


def _refuse(path, reason, error=None):
    raise ProofFileError(f"The proof file is refused: {reason}. Received: {path}.") from error
