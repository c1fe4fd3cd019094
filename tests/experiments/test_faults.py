"""A full disk and a corrupt checkpoint cost an epoch, never the run."""

import contextlib
import errno

import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.errors import RunDirectoryError
from tf_lyapunov.experiments import checkpoints, files, training
from tf_lyapunov.experiments.reading import parse_config

resource = pytest.importorskip("resource")

CONFIG = """
name: faulty
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
training: {epochs: 3, batch_size: 40, optimizer: {name: adam, learning_rate: 0.02}}
"""


def trained(path, *, resume=False, on_epoch=None, say=print):
    with files.RunDirectory(path).open(resume=resume) as run:
        data = datasets.load("blobs")
        config = parse_config(CONFIG)
        return training.train(config, run, data, resume=resume, on_epoch=on_epoch, say=say)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole") / "run").model.get_weights()


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def finish(path, whole, said=None):
    done = trained(path, resume=True, say=(said if said is not None else []).append)
    assert [row["epoch"] for row in done.history] == [1, 2, 3]
    for a, b in zip(done.model.get_weights(), whole, strict=True):
        assert np.array_equal(a, b)
    assert [p.name for p in path.rglob("*") if ".tmp" in p.name] == []
    return done.resumed_from


def test_no_room_for_a_checkpoint_keeps_the_one_before_and_says_how_to_go_on(tmp_path, whole):
    path = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        small = files_of_at_most(1000)

        def fill(done, of, row):
            if done == 1:
                stack.enter_context(small)

        with pytest.raises(RunDirectoryError, match=r"Epoch 2 could not be written.*--resume"):
            trained(path, on_epoch=fill)
    assert [p.name for p in (path / files.CHECKPOINTS).iterdir()] == ["epoch-000001.npz"]
    assert finish(path, whole) == 1


def test_a_disk_that_fills_up_while_metrics_are_written_loses_nothing(tmp_path, whole, monkeypatch):
    path, write = tmp_path / "run", files.write_text

    def full(where, text):
        if where.name == files.METRICS_JSON and '"epoch": 2' in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(where, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        trained(path)
    monkeypatch.undo()
    assert finish(path, whole) == 2  # the checkpoint was complete


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, whole, damage):
    path = tmp_path / "run"

    class Stop(Exception):
        pass

    def stop(done, of, row):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        trained(path, on_epoch=stop)
    newest = path / files.CHECKPOINTS / "epoch-000002.npz"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": content[:-200], "flipped": content, "empty": b""}[damage]
    newest.write_bytes(bytes(damaged))
    said = []
    assert finish(path, whole, said) == 1
    assert any(newest.name in text and "Falling back" in text for text in said)


def test_all_checkpoints_damaged_means_from_the_beginning_and_says_so(tmp_path, whole):
    path = tmp_path / "run"
    trained(path)
    for file in (path / files.CHECKPOINTS).iterdir():
        file.write_bytes(b"?")
    said = []
    assert finish(path, whole, said) == 0
    assert any("from the beginning" in text for text in said)
    assert checkpoints.newest_checkpoint(path / files.CHECKPOINTS)[0].epoch == 3
