"""NumPy archives (`.npz`) read without trusting a byte of them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np

Refuse = Callable[..., NoReturn]


def read_arrays(
    path: Path, refuse: Refuse, *, kinds: str = "fiub", members: int = 2**16, largest: int = 2**40
) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed archive, in memory that the file's own size bounds.

    Compressed members are refused (this library writes none), and an array is made only if it is as
    long as its shape says.

    Args:
        path: `.npz` file.
        refuse: called with a reason and an exception or None, and raises.
        kinds: NumPy's kinds of dtype that may occur.
        members: largest number of arrays.
        largest: largest size of the file in bytes.

    Returns:
        Read-only arrays by name.
    """
    if not path.is_file():
        refuse("there is no such file", None)
    size = path.stat().st_size
    if size > largest:
        refuse(f"it is longer than {largest} bytes", None)
    try:
        with zipfile.ZipFile(path) as file:
            infos = file.infolist()
            names = [info.filename for info in infos]
            if len(infos) > members or len(set(names)) != len(names):
                refuse(f"it holds {len(infos)} members, or one of them twice", None)
            found = {}
            for info in infos:
                name = info.filename
                if not name.endswith(".npy"):
                    refuse(f"it holds {name[:80]!r}, which is no array", None)
                is_stored = info.compress_type == zipfile.ZIP_STORED and info.flag_bits & 1 == 0
                if not is_stored or info.file_size > size or info.compress_size != info.file_size:
                    refuse(f"its member {name!r} is compressed or longer than the file", None)
                found[name[:-4]] = _array(name, file.read(info), kinds, refuse)
            return found
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        refuse("it is truncated, corrupt or no NumPy archive", error)


def _array(name, data, kinds, refuse):
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        refuse(f"its member {name!r} is in another format", None)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    rest = len(data) - stream.tell()
    if dtype.kind not in kinds or dtype.hasobject or dtype.names is not None:
        refuse(f"its member {name!r} holds something else than numbers", None)
    if any(n < 0 for n in shape) or len(shape) > 16 or math.prod(shape) * dtype.itemsize != rest:
        refuse(f"its member {name!r} is not as long as its shape says", None)
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")
