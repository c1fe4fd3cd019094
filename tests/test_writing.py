"""Results replace regular files only, and what a killed writer left is removed by the next."""

import os
import stat
import subprocess
import sys

import pytest

from tf_lyapunov import writing
from tf_lyapunov.errors import OutputFileError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kinds of files of POSIX systems")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_pipe_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OutputFileError, match=r"regular files only\. Received: .*, a pipe"):
        writing.write_text(path, "new")
    assert stat.S_ISFIFO(path.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_device_and_a_directory_are_not_replaced(tmp_path):
    with pytest.raises(OutputFileError, match="a device"):
        writing.write_text(os.devnull, "new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFileError, match="a directory"):
        writing.write_text(tmp_path / "folder", "new")
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    with pytest.raises(OutputFileError, match="a device"):
        writing.write_text(link, "new")
    assert names(tmp_path) == ["folder", "link"]


def test_a_socket_is_not_replaced(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s")
        with pytest.raises(OutputFileError, match="a socket"):
            writing.write_text("s", "new")


def test_a_read_only_file_is_kept_even_from_the_superuser(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(OutputFileError, match="read-only"):
        writing.write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    for exists in (True, False):
        target, link = tmp_path / "far" / f"{exists}.txt", tmp_path / f"link{exists}"
        if exists:
            target.write_text("old")
        link.symlink_to(target)
        writing.write_text(link, "new")
        assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputFileError, match="symbolic links"):
        writing.write_text(tmp_path / "a", "new")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_of_a_replaced_file_is_kept(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    writing.write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


def test_a_missing_directory_is_named_with_the_file(tmp_path):
    path = tmp_path / "no" / "a.txt"
    with pytest.raises(OutputFileError, match=r"No such file.*Received: .*a\.txt\. Nothing was"):
        writing.write_text(path, "new")


def test_a_limit_on_the_size_of_files_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = (
        "import resource, sys, types\n"
        "p = types.ModuleType('tf_lyapunov')\n"
        f"p.__path__ = [{os.path.dirname(writing.__file__)!r}]\n"
        "sys.modules['tf_lyapunov'] = p\n"
        "from tf_lyapunov import writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    writing.write_bytes(sys.argv[1], bytes(5000))\n"
        "except OSError as error:\n    print(error, error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert "File too large. Received: " in done.stdout and "unchanged" in done.stdout, done
    assert str(path) in done.stdout and path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    path = tmp_path / "proof.npz"
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with writing.atomic_path(path) as mine:
        mine.write_text("whole")
        dead = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
        elsewhere = tmp_path / dead.name.replace(writing._machine(), "01234567")
        other = tmp_path / dead.name.replace(writing._digest(path.name), writing._digest("x"))
        users = [tmp_path / ".proof.tmp", tmp_path / ".proof.123.tmp.npz", tmp_path / "proof.tmp"]
        folder = tmp_path / dead.name.replace(dead.name[-24:-8], "0" * 16)
        kept = [elsewhere, other, *users]
        for file in (dead, *kept):
            file.write_text("half")
        folder.mkdir()
        assert writing.leftovers(tmp_path, path.name) == [dead]
        assert set(writing.leftovers(tmp_path)) == {dead, other}
    writing.write_text(path, "again")
    assert not dead.exists() and folder.is_dir() and all(file.exists() for file in kept)


def test_two_writers_of_one_file_do_not_remove_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with writing.atomic_path(path) as first:
        first.write_text("first")
        writing.write_text(path, "second")
        assert first.exists()
    assert path.read_text() == "first" and names(tmp_path) == ["a.txt"]
