"""Files that are whole or absent, and run directories that hold one run each."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunDirectoryError
from ..sealing import seal, unseal
from ..writing import atomic_path, leftovers, write_bytes, write_text

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not locked
    fcntl = None

__all__ = ["RunDirectory", "atomic_path", "write_bytes", "write_text"]

CONFIG = "config.yaml"
VERSIONS = "version.json"
METRICS_CSV = "metrics.csv"
METRICS_JSON = "metrics.json"
MODEL = "model.keras"
DESIGN = "design.json"
CERTIFICATE = "certificate.json"
ATTACK_CSV = "attack.csv"
ATTACK_JSON = "attack.json"
RECORD = "run.json"
RESULTS = "results.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
PLOTS = "plots"
# Everything a run writes; --overwrite deletes these and nothing else.
ARTIFACTS = (
    CONFIG,
    VERSIONS,
    METRICS_CSV,
    METRICS_JSON,
    MODEL,
    DESIGN,
    CERTIFICATE,
    ATTACK_CSV,
    ATTACK_JSON,
    RECORD,
    RESULTS,
    REPORT,
    CHECKPOINTS,
    PLOTS,
)
_LOCK = ".lock"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def to_json(value: Any) -> str:
    """JSON text of plain data and NumPy values; every float keeps all its digits."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain data and NumPy values as JSON, or leave the old file.

    Mappings are sealed: `read_json` sees damage.
    """
    if isinstance(value, Mapping):
        value = seal(json.loads(to_json(value)))
    write_text(path, to_json(value))


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return unseal(value) if isinstance(value, dict) else value
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path.parent} has no {path.name}. Received: {path}. Run the step that writes it."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


@contextlib.contextmanager
def understood(path: str | os.PathLike) -> Iterator[None]:
    """Turns what damaged content of a file raises into an error that names the file.

    Raises:
        RunDirectoryError: the block found a key missing, or a value of another kind.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, RunDirectoryError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise _damaged(path, reason) from error


def _damaged(path, reason):
    return RunDirectoryError(
        f"A file of the run is damaged ({reason}). Received: {path}. The other files are as "
        "they were; delete this one and run the step that writes it again."
    )


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with one column for every key, or leave the old file."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: repr(v) if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


class RunDirectory:
    """The files of one run, and the right to write them.

    Args:
        path: the directory.

    Example:

    >>> RunDirectory("runs/digits").file("model.keras").as_posix()
    'runs/digits/model.keras'
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock: Any = None
        self._folder: int | None = None
        self._guards: tuple = ()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def file(self, name: str) -> Path:
        """Path of one file of the run.

        Raises:
            RunDirectoryError: the directory was locked, and is no longer what its path leads to.
        """
        for handle, place in zip(self._guards, (self.path, self.path / _LOCK), strict=False):
            try:
                same = os.path.samestat(os.fstat(handle), os.stat(place))
            except OSError:
                same = False
            if not same:
                raise RunDirectoryError(
                    "The run directory was moved, deleted or replaced while it was written to. "
                    f"Received: {self.path}. Nothing more is written; continue it where it is "
                    "with --resume."
                )
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the run has written this file."""
        return self.file(name).exists()

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.has(CONFIG)

    def open(self, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Make the directory ready to write to, and lock it against other processes.

        Args:
            resume: continue the run that is there, if any.
            overwrite: delete the run that is there, if any; only files a run writes.

        Returns:
            This object.

        Raises:
            RunDirectoryError: the directory is not empty (and neither option was given), holds
                something that is not a run, cannot be written, or is in use.
        """
        if resume and overwrite:
            raise RunDirectoryError(
                "A run is either resumed or overwritten. Received: resume=True, overwrite=True."
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(
                f"The run directory is a file. Received: {self.path}. Choose another --run-dir."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            entries = [entry.name for entry in self.path.iterdir()]
            visible = [name for name in entries if not name.startswith(".")]
            if self.is_run or not visible:
                self._clean()
        except OSError as error:
            self.close()
            raise RunDirectoryError(
                f"The run directory cannot be written: {error.strerror or error}. Received: "
                f"{self.path}. Choose another --run-dir, or change its permissions."
            ) from error
        try:
            if visible and not self.is_run:
                raise RunDirectoryError(
                    f"The directory is not empty and holds no run. Received: {self.path} with "
                    f"{', '.join(sorted(visible)[:5])}. Choose another --run-dir."
                )
            if visible and not resume and not overwrite:
                raise RunDirectoryError(
                    f"The directory already holds a run. Received: {self.path}. Pass --resume to "
                    "continue it, --overwrite to start again, or choose another --run-dir."
                )
            if visible and overwrite:
                self._clear()
        except BaseException:
            self.close()
            raise
        return self

    def _acquire(self) -> None:
        """Write access is proved and the directory is taken.

        The directory itself is locked beside a file in it: the file can be deleted, and a
        directory can be moved or reached by another path, while its lock stays. Some network file
        systems lock files alone.
        """
        self._lock = open(self.file(_LOCK), "a")
        with contextlib.suppress(OSError):
            os.utime(self.file(_LOCK))
        if fcntl is None:
            return
        self._folder = os.open(self.path, os.O_RDONLY)
        self._guards = (self._folder,)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # the file's lock is all there is: it must stay in its place
                self._guards = (self._folder, self._lock.fileno())
        except BlockingIOError as error:
            self.close()
            raise RunDirectoryError(
                f"Another process is writing to this run directory. Received: {self.path}. "
                "Wait for it, or choose another --run-dir."
            ) from error

    def _clean(self) -> None:
        """Remove what killed writers left: in the rooms of a run only, and older than the lock."""
        taken = os.fstat(self._lock.fileno()).st_mtime
        for room in (self.path, self.file(CHECKPOINTS), self.file(PLOTS)):
            for left in leftovers(room, before=taken):
                left.unlink()

    def _clear(self) -> None:
        # The configuration goes last: until then the directory is recognised as a run.
        for name in sorted(ARTIFACTS, key=lambda name: name == CONFIG):
            path = self.file(name)
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise RunDirectoryError(
                    f"The old run cannot be deleted: {error.strerror or error}. Received: {path}."
                ) from error

    def close(self) -> None:
        """Release the lock; the operating system does so too when the process dies."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder, self._guards = None, ()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def version_info() -> dict:
    """Versions of Python, the platform and the packages that decide a run's numbers."""
    import importlib.metadata
    import platform

    import keras

    packages = {}
    for name in (
        "tf-lyapunov",
        "keras",
        "tensorflow",
        "jax",
        "torch",
        "numpy",
        "scipy",
        "scikit-learn",
        "tensorflow-datasets",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    if "tf-lyapunov" not in packages:
        from .. import __version__

        packages["tf-lyapunov"] = __version__
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "backend": keras.backend.backend(),
        "packages": packages,
    }
