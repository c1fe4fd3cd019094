"""Files are whole or absent; a run directory is never overwritten by accident."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import tf_lyapunov
from tf_lyapunov.errors import RunDirectoryError
from tf_lyapunov.experiments import files

# Imports this module without the package's own imports (Keras), which take seconds.
IMPORT = (
    "import sys, types; package = types.ModuleType('tf_lyapunov')\n"
    f"package.__path__ = {list(tf_lyapunov.__path__)!r}; sys.modules['tf_lyapunov'] = package\n"
    "from tf_lyapunov.experiments import files\n"
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_temporary_name_keeps_the_suffix_and_is_hidden(tmp_path):
    with files.atomic_path(tmp_path / "model.keras") as temporary:
        assert temporary.suffix == ".keras" and temporary.name.startswith(".")
        temporary.write_bytes(b"x")


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    """A process that rewrites a file without end is killed at random moments."""
    path = tmp_path / "state.json"
    script = IMPORT + (
        "n = 0\n"
        "while True:\n"
        "    n += 1; files.write_json(sys.argv[1], {'n': n, 'rows': [n] * 20000})\n"
    )
    seen = 0
    for delay in (0.05, 0.08, 0.11, 0.14, 0.17):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        record = json.loads(path.read_text())
        assert record["rows"] == [record["n"]] * 20000
        seen += record["n"]
        path.unlink()
    assert seen > 3  # the kills fell between writes that really happened


def test_json_keeps_every_digit_and_numpy_values(tmp_path):
    value = {"x": np.float64(0.1) + np.float64(0.2), "a": np.arange(3), "n": np.int64(3)}
    files.write_json(tmp_path / "a.json", value)
    back = files.read_json(tmp_path / "a.json")
    assert back == {"x": 0.30000000000000004, "a": [0, 1, 2], "n": 3}


def test_csv_has_a_column_for_every_key_of_every_row(tmp_path):
    files.write_csv(tmp_path / "a.csv", [{"a": 1, "b": 0.1}, {"a": 2, "c": "x"}])
    assert (tmp_path / "a.csv").read_text() == "a,b,c\n1,0.1,\n2,,x\n"


def test_a_missing_or_damaged_json_file_is_a_run_error(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"has no x\.json"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(RunDirectoryError, match="damaged"):
        files.read_json(tmp_path / "x.json")


# ----------------------------------------------------------------------------- run directories


def a_run(path):
    path.mkdir()
    (path / files.CONFIG).write_text("x")
    (path / files.MODEL).write_text("model")
    (path / files.CHECKPOINTS).mkdir()
    (path / files.CHECKPOINTS / "epoch-000001.npz").write_text("c")
    return path


def test_a_new_or_empty_directory_is_taken(tmp_path):
    with files.RunDirectory(tmp_path / "a" / "b").open() as run:
        assert run.path.is_dir() and not run.is_run
    with files.RunDirectory(tmp_path / "a" / "b").open():
        pass  # a lock file alone does not make it a run


def test_an_existing_run_is_neither_overwritten_nor_continued_unasked(tmp_path):
    path = a_run(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"--resume.*--overwrite"):
        files.RunDirectory(path).open()
    assert (path / files.MODEL).read_text() == "model"
    with files.RunDirectory(path).open(resume=True):
        assert (path / files.MODEL).read_text() == "model"


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    path = a_run(tmp_path / "run")
    (path / "my notes.txt").write_text("keep")
    with files.RunDirectory(path).open(overwrite=True) as run:
        assert not run.is_run
        names = {p.name for p in path.iterdir() if not p.name.startswith(".")}
        assert names == {"my notes.txt"}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_directory_that_holds_something_else_is_never_touched(tmp_path, options):
    for name in ("thesis.tex", ".thesis.1.tmp.tex"):
        (tmp_path / name).write_text("years of work")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        files.RunDirectory(tmp_path).open(**options)
    for name in ("thesis.tex", ".thesis.1.tmp.tex"):
        assert (tmp_path / name).read_text() == "years of work"


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        files.RunDirectory(tmp_path / "f").open()
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        files.RunDirectory(tmp_path / "f" / "below").open()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere"
)
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunDirectoryError, match="cannot be written"):
            files.RunDirectory(tmp_path / "run").open()
    finally:
        tmp_path.chmod(0o700)


def test_an_unwritable_directory_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(RunDirectoryError, match="cannot be written: Permission denied"):
        files.RunDirectory(tmp_path / "run").open()


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    path = a_run(tmp_path / "run")
    left = []
    for target in (path / files.MODEL, path / files.CHECKPOINTS / "epoch-000008.npz"):
        left.append(killed_write(target))
    foreign = [path / ".notes.tmp", path / files.CHECKPOINTS / ".model.123.tmp.keras"]
    for file in foreign:
        file.write_text("of the user")
    (path / ".cache.tmp").mkdir()
    (path / "own").mkdir()
    foreign.append(killed_write(path / "own" / "model.keras"))  # not where a run writes
    with files.RunDirectory(path).open(resume=True):
        assert not any(file.exists() for file in left)
        assert all(file.exists() for file in foreign) and (path / ".cache.tmp").is_dir()


def killed_write(target):
    """The temporary file of a process that was killed while it wrote `target`."""
    script = IMPORT + (
        "import os\n"
        "with files.atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); print(t, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    assert done.returncode == -9
    left = target.parent / os.path.basename(done.stdout.decode().strip())
    assert left.exists()
    return left


@pytest.mark.skipif(files.fcntl is None, reason="no file locks on this platform")
def test_a_run_in_use_is_refused_and_free_again_when_its_process_is_killed(tmp_path):
    script = IMPORT + (
        "import time; run = files.RunDirectory(sys.argv[1]).open()\n"
        "print('open', flush=True); time.sleep(99)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"open\n"
    with pytest.raises(RunDirectoryError, match="Another process"):
        files.RunDirectory(tmp_path / "run").open()
    process.kill()
    process.wait()
    process.stdout.close()
    with files.RunDirectory(tmp_path / "run").open():
        pass


@pytest.mark.skipif(files.fcntl is None, reason="no file locks on this platform")
@pytest.mark.parametrize("trick", ["the lock is deleted", "moved", "another path"])
def test_a_run_has_one_writer_whatever_happens_to_its_directory(tmp_path, trick):
    path, other = tmp_path / "run", tmp_path / "other"
    with files.RunDirectory(path).open() as run:
        if trick == "the lock is deleted":
            (path / ".lock").unlink()
            other = path
        elif trick == "moved":
            path.rename(other)
        else:
            other.symlink_to(path)
        with pytest.raises(RunDirectoryError, match="Another process"):
            files.RunDirectory(other).open(resume=True)
        if trick == "moved":
            path.mkdir()  # another run may be here by now
            with pytest.raises(RunDirectoryError, match="moved, deleted or replaced"):
                run.file(files.MODEL)
        else:
            assert run.file(files.MODEL) == path / files.MODEL
    with files.RunDirectory(other).open(resume=True):
        pass


def test_versions_name_what_decides_the_numbers():
    info = files.version_info()
    assert {"keras", "numpy", "tf-lyapunov"} <= set(info["packages"])
    assert info["python"] and info["backend"]
