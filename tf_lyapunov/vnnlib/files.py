"""Files of VNN-LIB, 1.0 and 2.0, plain or compressed."""

import gzip
import zlib
from pathlib import Path

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.vnnlib.reading import TOKEN, parse
from tf_lyapunov.vnnlib.version2 import parse_version_2

# Bytes of a file, unpacked, at most.
MOST_BYTES = 2**26
_VERSION_2 = ("vnnlib-version", "declare-network")


def read_vnnlib(path):
    """The `Query` of a VNN-LIB file, 1.0 or 2.0, plain or compressed (`.gz`).

    Args:
        path: file name.

    Raises:
        PropertyFileError: for a file that is missing, damaged, too large, or says anything that
            is not understood, with its line and column.
        ImportError: for a file of VNN-LIB 2.0 without the package `vnnlib` (extra `onnx`).
    """
    path = Path(path)
    text = _text(path)
    if _first_command(text) in _VERSION_2:
        return parse_version_2(text, str(path))
    return parse(text, str(path))


def _text(path):
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise PropertyFileError(
            f"The property file cannot be read ({type(error).__name__}: {error}). Received: {path}."
        ) from error
    if len(data) > MOST_BYTES:
        raise PropertyFileError(
            f"A property file may have {MOST_BYTES} bytes at most. Received: more, in {path}."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PropertyFileError(
            f"A property file must be text in UTF-8. Received: {path}, which is not at byte "
            f"{error.start}."
        ) from error


def _first_command(text):
    """The first word behind the first parenthesis; '' if the text begins otherwise."""
    words = (m for m in TOKEN.finditer(text) if m.lastindex)
    first, second = next(words, None), next(words, None)
    is_command = first is not None and first[1] == "(" and second is not None
    return second[2] or "" if is_command else ""
