"""JSON records that carry a checksum of themselves, so that damage is seen and not printed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the SHA-256 of its content under the key `sha256`.

    It guards against damage, not forgery: whoever edits a record on purpose removes the key.

    Args:
        record: plain JSON data.

    Example:

    >>> unseal(seal({"radius": 0.25}))
    {'radius': 0.25}
    """
    content = {key: value for key, value in record.items() if key != KEY}
    return {**content, KEY: _digest(content)}


def unseal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `seal`; a record without a checksum is returned as it is.

    Raises:
        ValueError: the content is not what was sealed.
    """
    content = dict(record)
    expected = content.pop(KEY, None)
    if expected is not None and expected != _digest(content):
        raise ValueError(
            f"its content does not fit its checksum (remove the key {KEY!r} of a file that was "
            "edited on purpose)"
        )
    return content


def _digest(content):
    # Twice through JSON: keys become texts, numbers are written as they are read.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
