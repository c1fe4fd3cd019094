"""Augmented batches: what they may hold, what decides them, and that runs continue bit for bit."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov import datasets
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments import files, targets, training
from tf_lyapunov.experiments.augmentation import AugmentedBatches, training_batches
from tf_lyapunov.experiments.reading import parse_config

CONFIG = """
seed: 3
dataset: {name: digits, limit: 48}
model: {name: two_conv_two_dense, family: cayley, filters: [4], widths: []}
training:
  epochs: 3
  batch_size: 20
  optimizer: {name: adam, learning_rate: 0.02, schedule: {name: triangular}}
  loss: {name: multi_margin}
  augmentation: {crop: 2, flip: true}
"""


def images(count=40, height=5, width=4, channels=2):
    return np.arange(float(count * height * width * channels)).reshape(
        count, height, width, channels
    )


def candidates(image, crop, flip):
    """Every image that may come of one, by loops."""
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
    found = [
        padded[i : i + image.shape[0], j : j + image.shape[1]]
        for i in range(2 * crop + 1)
        for j in range(2 * crop + 1)
    ]
    return found + [v[:, ::-1] for v in found] if flip else found


@settings(max_examples=20)
@given(st.integers(0, 3), st.booleans(), st.integers(0, 99), st.integers(0, 5))
def test_every_image_is_a_shift_or_mirror_image_of_its_own(crop, flip, seed, epoch):
    x = images(7)
    batches = AugmentedBatches(x, np.arange(7), 3, seed, crop=crop, flip=flip)
    batches.set_epoch(epoch)
    plain = datasets.Batches(x, np.arange(7), 3, seed)
    plain.set_epoch(epoch)
    for i in range(len(batches)):
        got, labels = batches[i]
        assert np.array_equal(labels, plain[i][1]) and got.dtype == x.dtype
        for image, label in zip(got, labels, strict=True):
            assert any(np.array_equal(image, v) for v in candidates(x[label], crop, flip))


def test_all_shifts_and_both_orientations_occur_equally_often():
    x = np.broadcast_to(images(1), (6000, 5, 4, 2))
    got, _ = AugmentedBatches(x, np.zeros(6000), 6000, crop=1, flip=True)[0]
    counts = [np.sum(np.all(got == v, axis=(1, 2, 3))) for v in candidates(x[0], 1, True)]
    assert sum(counts) == 6000
    # Five standard deviations of a binomial count.
    assert max(abs(c - 6000 / 18) for c in counts) < 5 * np.sqrt(6000 / 18)


def test_content_depends_on_seed_epoch_and_batch_and_on_nothing_else():
    x, y = images(), np.arange(40)

    def batch(seed, epoch, index, before=0):
        batches = AugmentedBatches(x, y, 10, seed, shuffle=False, crop=2, flip=True)
        for i in range(before):
            batches.set_epoch(i)
            _ = [batches[j] for j in range(len(batches))]
        batches.set_epoch(epoch)
        return batches[index][0] - x[10 * index : 10 * index + 10]

    assert np.array_equal(batch(1, 4, 2), batch(1, 4, 2, before=4))
    for other in ((2, 4, 2), (1, 5, 2), (1, 4, 3), (1, 4, 0)):
        assert not np.array_equal(batch(1, 4, 2), batch(*other))


def test_data_without_images_or_with_small_ones_is_refused():
    for x, crop in ((np.zeros((3, 6)), 1), (images(2), 4), (images(2), -1)):
        with pytest.raises(ValueError, match="Augmentation"):
            AugmentedBatches(x, np.zeros(len(x)), crop=crop)
    config = parse_config(CONFIG.replace("digits, limit: 48", "blobs"))
    with pytest.raises(ConfigError, match=r"training\.augmentation"):
        training_batches(config, datasets.load("blobs"))
    plain = parse_config(CONFIG.replace("crop: 2, flip: true", "crop: 0"))
    assert type(training_batches(plain, datasets.load("blobs"))) is datasets.Batches


class Stop(Exception):
    """Raised in the middle of training in place of a kill."""


def trained(path, config, data, *, resume=False, stop=None):
    def on_epoch(done, of, row):
        if done == stop:
            raise Stop

    with files.RunDirectory(path).open(resume=resume) as run:
        return training.train(config, run, data, resume=resume, on_epoch=on_epoch)


def test_a_resumed_run_with_augmentation_equals_an_uninterrupted_one(tmp_path):
    config, data = parse_config(CONFIG), datasets.load("digits", limit=48)
    whole = trained(tmp_path / "whole", config, data)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", config, data, stop=2)
    resumed = trained(tmp_path / "cut", config, data, resume=True)
    assert resumed.resumed_from == 2
    plain = trained(
        tmp_path / "plain", parse_config(CONFIG.replace("crop: 2, flip: true", "crop: 0")), data
    )
    values = [run.model.get_weights() for run in (whole, resumed, plain)]
    assert all(np.array_equal(a, b) for a, b in zip(*values[:2], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(*values[::2], strict=True))


def test_channel_means_are_those_of_the_training_split_and_move_every_split():
    text = CONFIG.replace("limit: 48", "limit: 48, centre: channel_mean")
    data, plain = targets.load_data(parse_config(text)), datasets.load("digits", limit=48)
    assert abs(data.x_train.mean(dtype=np.float64)) < 1e-7
    mean = plain.x_train.mean(dtype=np.float64)
    for name in ("x_train", "x_val", "x_test"):
        shift = getattr(plain, name).astype(np.float64) - getattr(data, name)
        np.testing.assert_allclose(shift, mean, atol=1e-6)
    assert data.pixel_range == pytest.approx((-mean, 1 - mean), abs=1e-6)
    assert dataclasses.replace(data, **{f.name: getattr(plain, f.name) for f in
                                        dataclasses.fields(plain)}) == plain  # fmt: skip
