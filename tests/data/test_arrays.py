"""Data sets: fixed splits, the papers' preprocessing, clear failures, shuffling that resumes."""

import shutil

import keras
import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.data import prepared
from tf_lyapunov.errors import DatasetNotFound


def test_digits_are_split_once_and_for_all():
    data = datasets.load("digits")
    parts = [data.x_train, data.x_val, data.x_test]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int64
    assert min(part.min() for part in parts) == 0.0 and max(part.max() for part in parts) == 1.0
    again = datasets.load("digits")
    assert np.array_equal(data.x_test, again.x_test)
    assert set(data.y_test) == set(range(10))


def test_no_example_is_in_two_splits():
    data = datasets.load("blobs")
    rows = np.concatenate([data.x_train, data.x_val, data.x_test])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_blobs_depend_on_the_seed_alone():
    assert np.array_equal(
        datasets.load("blobs", seed=1).x_test, datasets.load("blobs", seed=1).x_test
    )
    assert not np.array_equal(
        datasets.load("blobs", seed=1).x_test, datasets.load("blobs", seed=2).x_test
    )


def test_limit_shortens_every_split():
    data = datasets.load("digits", limit=7)
    assert [len(data.split(name)[1]) for name in ("train", "val", "test")] == [7, 7, 7]


def test_mnist_is_read_with_the_papers_preprocessing(tfds_dir):
    data = datasets.load("mnist", tfds_dir, limit=200)
    assert data.input_shape == (28, 28, 1)
    assert data.x_test.min() == -0.5 and data.x_test.max() == 0.5
    # x/255 - 0.5 of a whole number is found again by its inverse.
    levels = (data.x_test.astype(float) + 0.5) * 255
    assert np.abs(levels - np.round(levels)).max() <= 255 * np.finfo("float32").eps


@pytest.mark.slow
def test_the_whole_of_mnist_begins_with_the_limited_one(tfds_dir):
    data, full = datasets.load("mnist", tfds_dir, limit=200), datasets.load("mnist", tfds_dir)
    assert [len(full.y_train), len(full.y_val), len(full.y_test)] == [55000, 5000, 10000]
    assert np.array_equal(full.x_train[:200], data.x_train)
    assert np.array_equal(full.x_test[:200], data.x_test)
    # More than a split holds is all of it.
    most = datasets.load("mnist", tfds_dir, limit=20000)
    assert [len(most.y_train), len(most.y_test)] == [20000, 10000]


def test_the_central_crop_is_central(monkeypatch):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, 2:30, 2:30] = 255
    read = (images, np.array([0, 1]), images, np.array([0, 1]))
    monkeypatch.setattr(prepared, "read", lambda *unused: read)
    data = datasets.load("cifar10", validation=1)
    assert data.input_shape == (28, 28, 3)
    assert (data.x_test == 0.5).all()
    with pytest.raises(ValueError, match="crop=33"):
        datasets.load("cifar10", validation=1, crop=33)
    with pytest.raises(ValueError, match="must leave training examples"):
        datasets.load("cifar10", validation=2)


# ------------------------------------------------------------------------------------ failures


def test_an_unknown_data_set_lists_the_known_ones():
    with pytest.raises(DatasetNotFound, match=r"name='mnits'.*fashion_mnist"):
        datasets.load("mnits")


def test_a_missing_data_set_names_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(DatasetNotFound, match="--download"):
        datasets.load("mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(DatasetNotFound, match="elsewhere"):
        datasets.load("mnist")


def test_an_interrupted_preparation_is_recognised(tmp_path):
    (tmp_path / "mnist" / "incomplete.ABCDEF_3.0.1").mkdir(parents=True)
    with pytest.raises(DatasetNotFound, match=r"was interrupted.*incomplete\.ABCDEF"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "info"])
def test_damaged_files_are_reported_not_read(tfds_dir, tmp_path, damage):
    version = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(f"{tfds_dir}/mnist/3.0.1", version, copy_function=shutil.copy)
    version.chmod(0o755)
    shard = next(version.glob("*test.tfrecord*"))
    shard.chmod(0o644)
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    else:
        (version / "dataset_info.json").chmod(0o644)
        (version / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetNotFound, match="incomplete or damaged"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("option", ["validation", "limit"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_impossible_sizes_are_refused(option, value):
    with pytest.raises(ValueError, match=f"Received: {option}="):
        datasets.load("digits", **{option: value})


# ------------------------------------------------------------------------------------- batches


def epoch_of(batches):
    return np.concatenate([batches[i][1] for i in range(len(batches))])


def test_batches_hold_every_example_once_in_a_new_order_each_epoch():
    batches = datasets.Batches(np.arange(100.0), np.arange(100), batch_size=16, seed=5)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        orders.append(epoch_of(batches))
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = datasets.Batches(np.arange(50.0), np.arange(50), batch_size=8, seed=seed)
        batches.set_epoch(epoch)
        return epoch_of(batches)

    assert np.array_equal(order(1, 4), order(1, 4))
    assert not np.array_equal(order(1, 4), order(2, 4))
    # (seed, epoch) = (1, 2) and (2, 1) must not share an order, as a plain sum would.
    assert not np.array_equal(order(1, 2), order(2, 1))


def seen_in_fit(initial_epoch, epochs, with_callback=True):
    """Labels in the order in which `fit` really consumed them, by epoch."""
    batches = datasets.Batches(np.ones((20, 1), "float32"), np.arange(20.0), batch_size=5, seed=2)
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    seen = []

    def loss(y, prediction):
        seen.append(keras.ops.convert_to_numpy(y).ravel())
        return keras.ops.mean(prediction)

    model.compile("sgd", loss, run_eagerly=True)
    callbacks = [batches.epoch_callback()] if with_callback else []
    model.fit(
        batches,
        initial_epoch=initial_epoch,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    rows = np.concatenate(seen)
    assert len(rows) >= 20 * (epochs - initial_epoch)
    return rows[-20 * (epochs - initial_epoch) :].reshape(-1, 20)


def test_fit_sees_a_new_order_each_epoch_and_a_resumed_fit_sees_the_same():
    whole = seen_in_fit(0, 4)
    assert not np.array_equal(whole[0], whole[1])
    assert np.array_equal(whole[2:], seen_in_fit(2, 4))
    # Without the callback a fit from epoch 0 has the same orders.
    assert np.array_equal(whole, seen_in_fit(0, 4, with_callback=False))


def test_impossible_batches_are_refused():
    x, y = np.ones((4, 2)), np.zeros(4)
    for arguments, message in (
        ((x, y[:3]), "as long as each other"),
        ((x[:0], y[:0]), "not empty"),
        ((x, y, 0), "batch_size=0"),
        ((x, y, 2, -1), "seed=-1"),
        ((x, y, 2.5), "batch_size=2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.Batches(*arguments)
