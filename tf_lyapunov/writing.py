"""Files that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from tf_lyapunov.errors import OutputFileError

# Prefix, digest of the target's name, digest of the machine, process, random part.
_NAME = re.compile(r"\.tf_lyapunov-([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}\.tmp(\.\w+)?")
_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Name of a temporary file beside `path` that replaces it, on disk, when the block succeeds.

    A kill at any moment leaves either the old file or the new one, never a part; the next write
    to the same place removes what the killed one left. A symbolic link is followed, the
    permissions of a replaced file are kept. The temporary name keeps the suffix, since Keras
    reads the format from it.

    Args:
        path: of the file to write; its directory exists.

    Raises:
        OutputFileError: `path` is a directory, device, pipe, socket or read-only file, its
            directory is missing, or the system refuses to write (no space, a limit on the size
            of files, no permission). What was there before is untouched.
    """
    received, path = Path(path), writable_target(path)
    for left in leftovers(path.parent, path.name):
        with contextlib.suppress(OSError):
            left.unlink()
    temporary = path.with_name(
        f".tf_lyapunov-{_digest(path.name)}-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}"
        f".tmp{path.suffix}"
    )
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _keep_mode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, OutputFileError):
            raise _refused(received, path, error) from error
        raise
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def writable_target(path: str | os.PathLike) -> Path:
    """The regular file that a path stands for, links followed.

    Raises:
        OutputFileError: something else is there, or the file is read-only.
    """
    received = Path(path)
    try:
        target = Path(os.path.realpath(received)) if received.is_symlink() else received
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:  # a loop of links, a file where a directory is meant
        raise OutputFileError(
            f"The file cannot be written: {error.strerror}. Received: {received}. Choose another "
            "path.",
            error.errno,
        ) from error
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OutputFileError(
                f"Results are written to regular files only. Received: {received}, a {name}. "
                "Choose another path."
            )
    # The superuser may write to any file, but whoever made it read-only meant it.
    if not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(target, os.W_OK):
        raise OutputFileError(
            f"A read-only file is not replaced. Received: {received}. Choose another path, or make "
            "it writable."
        )
    return target


def leftovers(folder: str | os.PathLike, name: str | None = None, before: float | None = None):
    """Temporary files of writers that were killed, never anything that others made.

    Args:
        folder: directory to look in; its subdirectories are not.
        name: of the target whose temporary files are meant; by default of every target.
        before: time in seconds; files of other machines count only if they are older. By default
            those of other machines, whose processes cannot be seen, are left alone.

    Returns:
        List of paths of regular files.
    """
    found = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return found
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is None or (name is not None and match[1] != _digest(name)):
            continue
        with contextlib.suppress(OSError):
            if not entry.is_file(follow_symlinks=False):
                continue
            if match[2] == _machine():
                dead = not _is_alive(int(match[3]))
            else:
                dead = before is not None and entry.stat(follow_symlinks=False).st_mtime < before
            if dead:
                found.append(Path(entry.path))
    return found


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a whole file, or leave the old one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a whole UTF-8 text file, or leave the old one."""
    write_bytes(path, text.encode("utf-8"))


def _refused(received, path, error):
    reason = error.strerror or str(error)
    kept = "The file that was there is unchanged" if path.exists() else "Nothing was written"
    return OutputFileError(
        f"The file cannot be written: {reason}. Received: {received}. {kept}; make room or choose "
        "another path.",
        error.errno,
    )


def _keep_mode(path, temporary):
    """Permissions (and owner, where that is allowed) of the file to be replaced."""
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return
    new = os.stat(temporary)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid) and hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@functools.cache
def _machine():
    """Digest of host, boot and container: where a process number can be looked up."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return _digest("|".join(parts))


def _is_alive(process):
    if os.name != "posix":
        return True  # asking would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
