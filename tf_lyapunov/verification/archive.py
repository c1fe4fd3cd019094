"""Proof files: NumPy archives of plain arrays, read without trusting a byte of them."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from tf_lyapunov.archives import read_arrays
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.writing import write_bytes

FORMAT = "tf_lyapunov.proof"
# Version 2 has radii in other norms, within bounds, and by bounds around single inputs (margins by
# `around.joint` since 2026-12; readers before refuse these). Version 3 is about ranges of outputs
# over a region, versions 4 and 5 about a property of them: on boxes of inputs, and on parts that
# hidden units divide; version 6 is about gains on balls around inputs, version 7 about the region
# of attraction of a plant under the model's control, version 8 about models with memory.
VERSION, VERSIONS = 1, (1, 2, 3, 4, 5, 6, 7, 8)
RANGES, PROPERTIES, PARTITIONS, GAINS, LOOPS, MEMORIES = 3, 4, 5, 6, 7, 8
_MEMBERS = 64
_LARGEST_HEADER, _LARGEST_FILE = 2**26, 2**32
_KINDS = "fiub"


def write(path, header, arrays):
    """Writes a proof file: whole or absent, uncompressed, without pickles.

    Args:
        path: file name ending in `.npz`.
        header: JSON-safe dict; its `version` is `VERSION` where it names none.
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

    def refuse(reason, error):
        _refuse(path, reason, error)

    try:
        members = read_arrays(path, refuse, kinds=_KINDS, members=_MEMBERS, largest=_LARGEST_FILE)
    except (OSError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, ProofFileError):
            raise
        _refuse(path, f"it is corrupt ({error})", error)
    if members.get("header", np.zeros(0)).nbytes > _LARGEST_HEADER:
        _refuse(path, "its header is larger than any")
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
    if isinstance(version, (bool, float)) or version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        _refuse(path, f"its version is {repr(version)[:40]}; this library reads versions {known}")
    stored = members.pop("sha256").tobytes()
    if stored != _digest(members):
        _refuse(path, "its contents do not fit its checksum")
    members.pop("header")
    return header, members


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
