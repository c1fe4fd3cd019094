"""MATLAB v7 files that may be damaged or hostile, read as raw arrays."""

from __future__ import annotations

import os
import warnings
import zlib

import numpy as np

from tf_lyapunov.errors import ModelFileError

# Weights seldom shrink tenfold; files beyond both limits exist to exhaust memory.
_LARGEST_CONTENT, _LARGEST_RATIO = 2**28, 100
VARIABLES = ("tf_lyapunov", "network", "design", "certificate")


def refuse(path, reason, error=None):
    raise ModelFileError(f"The MATLAB file is refused: {reason}. Received: {path}.") from error


def load(path, names=VARIABLES):
    """The raw variables of these names; others may be of kinds that cannot be read."""
    from scipy.io import loadmat

    if not path.is_file():
        refuse(path, "there is no such file")
    _check_container(path)
    try:
        with warnings.catch_warnings():
            # Asked for MATLAB's types, scipy drops imaginary parts with this warning alone.
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            return loadmat(
                path,
                mat_dtype=True,
                squeeze_me=False,
                struct_as_record=True,
                variable_names=names,
            )
    except np.exceptions.ComplexWarning as error:
        refuse(path, "it holds complex numbers", error)
    except MemoryError as error:
        refuse(path, "it needs more memory than there is", error)
    except Exception as error:  # scipy raises many kinds for a malformed file
        refuse(path, f"it is corrupt ({type(error).__name__}: {error})", error)


def _check_container(path):
    """Refuses other formats, truncated or damaged elements, and decompression bombs."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(128)
        if header.startswith((b"# Created by Octave", b"Octave-1-")):
            refuse(path, "it is in Octave's own format; write it with save('-v7', ...)")
        if header.startswith((b"MATLAB 7.3", b"\x89HDF")):
            refuse(path, "it is in MATLAB's v7.3 (HDF5) format; write it with save(..., '-v7')")
        orders = {b"IM": "little", b"MI": "big"}
        if len(header) < 128 or header[126:] not in orders:
            refuse(path, "it is not a MATLAB v7 file, or a truncated one")
        order = orders[header[126:]]
        total = 0
        while tag := file.read(8):
            kind = int.from_bytes(tag[:4], order)
            length = int.from_bytes(tag[4:], order)
            if len(tag) < 8 or file.tell() + length > size:
                refuse(path, "it is truncated")
            total += _content_size(path, file, length) if kind == 15 else length
            if total > max(_LARGEST_CONTENT, _LARGEST_RATIO * size):
                refuse(path, f"it unpacks to more than {_LARGEST_RATIO} times its size")
            if kind != 15:
                file.seek(length, os.SEEK_CUR)


def _content_size(path, file, length):
    """Size of one compressed element, whose checksum is verified on the way."""
    stream, total, limit = zlib.decompressobj(), 0, max(_LARGEST_CONTENT, _LARGEST_RATIO * length)
    try:
        while length > 0 and not stream.eof:
            data = file.read(min(length, 2**16))
            length -= len(data)
            while data and total <= limit:
                total += len(stream.decompress(data, 2**20))
                data = stream.unconsumed_tail
            if total > limit:
                return total
    except zlib.error as error:
        refuse(path, f"it is corrupt ({error})", error)
    if not stream.eof:
        refuse(path, "it is truncated")
    file.seek(length, os.SEEK_CUR)
    return total
