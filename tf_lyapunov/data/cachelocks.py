"""Locks of TensorFlow's file caches, which outlive a process that is killed."""

from __future__ import annotations

import glob
import os
import socket
from pathlib import Path

from ..writing import write_text


def take_over(where: str) -> None:
    """Notes that this process writes a cache, and removes the lock of one that was killed.

    A lock that a running process of this machine, or any process of another one, may hold is left
    alone: TensorFlow then refuses to write the cache.

    Args:
        where: file name that `tf.data.Dataset.cache` gets.
    """
    if not Path(where).parent.is_dir():
        return
    owner, host = Path(f"{where}.owner"), socket.gethostname()
    before = owner.read_text(encoding="utf-8").split() if owner.exists() else []
    if len(before) == 2 and (before[0] != host or _runs(int(before[1]))):
        return
    if before:
        for lock in glob.glob(f"{glob.escape(where)}*.lockfile"):
            Path(lock).unlink(missing_ok=True)
    write_text(owner, f"{host} {os.getpid()}\n")


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is none that asks only
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
