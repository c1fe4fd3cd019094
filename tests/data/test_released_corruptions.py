"""Released corruptions come from prepared files, in the units and crop of the data."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.data import prepared
from tf_lyapunov.errors import DatasetNotFound


def images(side, channels):
    x = np.zeros((1, side, side, channels), np.float32)
    y = np.zeros(1, np.int64)
    return datasets.Dataset("cifar10", x, y, x, y, x, y, pixel_range=(-0.5, 0.5))


def test_they_are_in_the_units_and_size_of_the_data_under_their_released_names(monkeypatch):
    raw = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    asked = []

    def read(name, directory, limit, splits):
        asked.append((name, limit, splits))
        return raw[:limit], np.arange(4)[:limit]

    monkeypatch.setattr(prepared, "read", read)
    provide = datasets.released_corruptions(images(28, 3), limit=3)
    x, y = provide("glass_blur", 2)
    provide("fog", 5)
    names = [name for name, *_ in asked]
    assert names == ["cifar10_corrupted/frosted_glass_blur_2", "cifar10_corrupted/fog_5"]
    assert asked[0][1:] == (3, ("test",))
    assert np.allclose(x, raw[:3, 2:30, 2:30] / 255 - 0.5, atol=1e-6) and list(y) == [0, 1, 2]


def test_only_the_test_split_is_read_from_prepared_files(tfds_dir, tmp_path):
    # MNIST under the other name: files of TFDS are all read alike.
    (tmp_path / "cifar10_corrupted").mkdir()
    (tmp_path / "cifar10_corrupted" / "fog_1").symlink_to(Path(tfds_dir).resolve() / "mnist")
    x, y = datasets.released_corruptions(images(28, 1), tmp_path, limit=5)("fog", 1)
    expected = datasets.load("mnist", tfds_dir, limit=5)
    assert np.array_equal(x, expected.x_test) and np.array_equal(y, expected.y_test)


def test_missing_files_and_other_data_are_refused(tmp_path):
    provide = datasets.released_corruptions(images(32, 3), tmp_path)
    with pytest.raises(DatasetNotFound, match=r"cifar10_corrupted/fog_1.*build") as caught:
        provide("fog", 1)
    assert "train CONFIG" not in str(caught.value)
    with pytest.raises(ValueError, match="mnist"):
        datasets.released_corruptions(dataclasses.replace(images(28, 1), name="mnist"))
