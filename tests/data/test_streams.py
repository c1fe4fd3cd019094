"""Streamed image data sets: TFDS' files as they are, decoded, augmented, repeated, and damaged."""

import contextlib
import importlib.util
import json
import pathlib
import shutil
import sys

import fresh_processes
import keras
import numpy as np
import pytest

from tf_lyapunov import datasets, streams
from tf_lyapunov.data import jpegs as jpegs_module
from tf_lyapunov.errors import DatasetNotFound
from tf_lyapunov.experiments.shares import Padded

tf = pytest.importorskip("tensorflow")
ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN, TEST = 160, 24


def sample_writer():
    spec = importlib.util.spec_from_file_location(
        "imagenet_sample", ROOT / "scripts/lyapunov/imagenet_sample.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # TFDS looks it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory):
    """A data set as TFDS' own builder writes it."""
    directory = tmp_path_factory.mktemp("tfds")
    sample_writer().write(directory, train=TRAIN, validation=TEST, classes=4, side=(50, 90))
    return directory


@pytest.fixture
def stream(jpegs):
    return opened(jpegs)


def opened(directory, **options):
    options = {"validation": 32, "size": 32, "shuffle_buffer": 64, **options}
    return streams.load("imagenet2012", directory, **options)


def epoch_of(stream, epoch, batch_size=16, **options):
    batches = list(stream.epoch(batch_size, epoch, **options).as_numpy_iterator())
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def plain_reading(jpegs, split, count):
    """Oracle: what TFDS itself yields, decoded whole."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(jpegs / "imagenet2012" / "5.1.0"))
    config = tfds.ReadConfig(interleave_cycle_length=1)
    rows = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    return list(tfds.as_numpy(rows.take(count)))


def damaged_copy(jpegs, tmp_path, harm):
    """A copy whose first training shard is passed through `harm`."""
    shutil.copytree(jpegs / "imagenet2012", tmp_path / "imagenet2012")
    shard = sorted((tmp_path / "imagenet2012" / "5.1.0").glob("*train.tfrecord*"))[0]
    shard.write_bytes(harm(bytearray(shard.read_bytes())))
    return shard.name


def break_a_checksum(data):
    data[len(data) // 2] ^= 0xFF
    return data


def truncated_jpeg(data):
    """The second record's image cut short, with valid checksums: only decoding can notice."""
    lines = [np.array(r) for r in tf.data.TFRecordDataset(tf_file(data)).as_numpy_iterator()]
    example = tf.train.Example.FromString(bytes(lines[1].item()))
    image = example.features.feature["image"].bytes_list
    image.value[0] = image.value[0][: len(image.value[0]) // 2]
    records = [bytes(line.item()) for line in lines]
    records[1] = example.SerializeToString()
    path = tf_file(b"")
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    return pathlib.Path(path).read_bytes()


def cut_between_records(data):
    """The first two records alone: a whole file, but not all of it."""
    path = tf_file(b"")
    with tf.io.TFRecordWriter(path) as writer:
        for record in tf.data.TFRecordDataset(tf_file(data)).take(2).as_numpy_iterator():
            writer.write(record)
    return pathlib.Path(path).read_bytes()


def emptied(data):
    return b""


def tf_file(data):
    import tempfile

    handle = tempfile.NamedTemporaryFile(suffix=".tfrecord", delete=False)
    handle.write(bytes(data))
    handle.close()
    return handle.name


# --------------------------------------------------------------------------------- contents


def test_splits_are_ranges_of_the_files_without_overlap(stream, jpegs):
    assert [len(stream.y_train), len(stream.y_val), len(stream.y_test)] == [TRAIN - 32, 32, TEST]
    labels = [int(row["label"]) for row in plain_reading(jpegs, "train", TRAIN)]
    assert stream.y_val.tolist() == labels[:32] and stream.y_train[:].tolist() == labels[32:]
    tested = [int(row["label"]) for row in plain_reading(jpegs, "validation", TEST)]
    assert stream.y_test[3:9].tolist() == tested[3:9]
    assert stream.num_classes == 4 and stream.input_shape == (32, 32, 3)


def test_test_images_are_central_crops_of_the_decoded_files(stream, jpegs):
    x = stream.x_test[:5]
    assert x.shape == (5, 32, 32, 3) and x.dtype == np.float32
    for image, row in zip(x, plain_reading(jpegs, "validation", 5), strict=True):
        height, width, _ = row["image"].shape
        side = int(np.float32(min(height, width)) * np.float32(32 / 64))
        top, left = (height - side) // 2, (width - side) // 2
        crop = row["image"][top : top + side, left : left + side]
        expected = tf.image.resize(crop, (32, 32)).numpy() / 255 - 0.5
        # Decoding a window of a file may interpolate colours otherwise at its edge.
        assert np.abs(image - expected).mean() < 2 / 255


def test_an_epoch_shows_every_training_example_once(jpegs):
    stream = opened(jpegs, validation=32)
    _, labels = epoch_of(stream, 0)
    assert stream.steps_per_epoch(16) * 16 == len(labels) == TRAIN - 32
    assert np.array_equal(np.bincount(labels), np.bincount(stream.y_train[:]))


def test_training_images_stay_in_the_pixel_range_and_vary(stream):
    x, _ = epoch_of(stream, 0)
    assert -0.5 <= x.min() < x.max() <= 0.5 and x.std() > 0.05


@pytest.mark.parametrize("shape", [(50, 90, 3), (300, 40, 3), (7, 5, 3)])
def test_windows_lie_in_the_image(shape):
    for number in range(20):
        pair = tf.constant([3, number], tf.int64)
        for window in (jpegs_module.random_window, jpegs_module.central_window):
            y, x, height, width = window(tf.constant(shape), 32, pair).numpy()
            assert 0 <= y and 0 <= x and 1 <= height <= shape[0] - y and 1 <= width <= shape[1] - x
        assert height == width == max(min(shape[:2]) // 2, 1)  # the central one, 32 of 64


def test_an_epoch_is_a_function_of_seed_and_number(jpegs):
    first, again = epoch_of(opened(jpegs), 3, seed=1), epoch_of(opened(jpegs), 3, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (epoch_of(opened(jpegs), 4, seed=1), epoch_of(opened(jpegs), 3, seed=2)):
        assert not np.array_equal(first[0], other[0])


def test_readers_of_their_own_share_no_example(jpegs):
    stream = opened(jpegs, validation=32)
    seen = [
        [record.numpy() for record in stream._records(stream._train, (k, 2), 5)] for k in range(2)
    ]
    whole = [record.numpy() for record in stream._records(stream._train)]
    assert not set(seen[0]) & set(seen[1])
    assert len(seen[0]) + len(seen[1]) == len(whole) == TRAIN - 32
    many = [sum(1 for _ in stream._records(stream._train, (k, 40), 5)) for k in range(40)]
    assert sum(many) == TRAIN - 32 and max(many) <= 4  # more readers than files


def test_a_cache_keeps_records_and_not_crops(jpegs, tmp_path):
    for cache in ("memory", str(tmp_path / "kept")):
        stream = opened(jpegs, cache=cache)
        first, second = epoch_of(stream, 0), epoch_of(stream, 1)
        assert np.array_equal(np.bincount(first[1]), np.bincount(second[1]))
        assert not np.array_equal(first[0], second[0])
    assert list(tmp_path.glob("kept-*-0*.index"))


def test_a_cache_of_other_images_is_not_read(jpegs, tmp_path):
    def records(**options):
        stream = opened(jpegs, cache=str(tmp_path / "kept"), **options)
        kept = stream._kept((0, 1)).as_numpy_iterator()
        found = [r if isinstance(r, bytes) else r[2] for r in kept]
        held = {r.numpy() for r in opened(jpegs)._records(stream._held_out)}
        assert not held & set(found)
        return found

    first = records(limit=24, validation=16)
    assert len(records(validation=40)) == TRAIN - 40 > len(first)
    assert sorted(records(limit=24, validation=16, on_damage="skip")) == sorted(first)


def test_a_cache_whose_writer_was_killed_is_written_again(jpegs, tmp_path):
    code = (
        "import os, sys\n"
        "from tf_lyapunov import streams\n"
        "stream = streams.load('imagenet2012', sys.argv[1], validation=32, size=32,\n"
        "                      shuffle_buffer=4, cache=sys.argv[2])\n"
        "kept = stream._kept((0, 1)).as_numpy_iterator()\n"
        "next(kept)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    where = tmp_path / "kept"
    killed = fresh_processes.run(code, jpegs, where)
    assert killed.returncode == -9 and list(tmp_path.glob("*.lockfile"))
    batches = opened(jpegs, cache=str(where)).batches(8)
    assert sum(len(batches[i][0]) for i in range(len(batches))) == len(batches) * 8


def test_batches_repeat_the_epoch_that_keras_asks_for(stream):
    batches = stream.batches(16, seed=1)
    assert len(batches) == (TRAIN - 32) // 16
    batches.set_epoch(2)
    ahead, back = batches[3], batches[1]
    x, y = epoch_of(stream, 2, seed=1)
    assert np.array_equal(ahead[0], x[48:64]) and np.array_equal(back[1], y[16:32])
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("on_damage", ["refuse", pytest.param("skip", marks=pytest.mark.slow)])
def test_workers_read_parts_of_the_batches_that_one_process_reads(jpegs, on_damage):
    batches = opened(jpegs, on_damage=on_damage).batches(12, seed=3)
    others = opened(jpegs, on_damage=on_damage).batches(12, seed=3)
    workers = [Padded(batches, 6, (0, 2)), Padded(others, 6, (1, 2))]
    for index in (0, 2, 1):  # and back
        parts = [worker[index] for worker in workers]
        whole = opened(jpegs).batches(12, seed=3)[index]
        for place in range(2):
            joined = np.concatenate([part[place] for part in parts])
            assert np.array_equal(joined, whole[place])
        assert all(np.array_equal(part[2], np.ones(6)) for part in parts)
    uneven = [Padded(data, 5, (k, 5))[0] for k, data in enumerate([batches] * 5)]
    assert [len(part[0]) for part in uneven] == [3] * 5  # 15 with padding
    with pytest.raises(ValueError, match="5 parts of 12"):
        batches.rows(0, (0, 5))


@pytest.mark.slow  # an experiment below does the same and more
def test_keras_trains_on_a_stream_and_continues_it(jpegs):
    def trained(stops):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(4)]
        )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        done = 0
        for stop in stops:
            batches = opened(jpegs).batches(16)
            model.fit(
                batches,
                shuffle=False,
                initial_epoch=done,
                epochs=stop,
                verbose=0,
                callbacks=[batches.epoch_callback()],
            )
            done = stop
        return model.get_weights()

    for a, b in zip(trained([2]), trained([1, 2]), strict=True):
        assert np.array_equal(a, b)


def test_an_experiment_on_a_stream_trains_certifies_and_resumes(jpegs, tmp_path):
    from tf_lyapunov.experiments import files, runner
    from tf_lyapunov.experiments.reading import parse_config

    text = """
    dataset: {name: imagenet2012, crop: 16, validation: 8, limit: 48}
    model: {name: cnn, filters: [2], widths: []}
    training: {epochs: 2, batch_size: 16}
    """

    def run(path, epochs):
        config = parse_config(text, overrides=[f"training.epochs={epochs}", "samples=4"])
        with files.RunDirectory(path).open(resume=True) as directory:
            trained = runner.train_experiment(config, directory, resume=True, data_dir=jpegs)
            data = trained_data(config)
            opened = runner.Opened(trained.model, data, config, trained.design, directory)
            proof = runner.certify_target(opened, "test", config.samples)
        return trained.model.get_weights(), proof

    def trained_data(config):
        from tf_lyapunov.experiments.targets import load_data

        return load_data(config, jpegs)

    whole, proof = run(tmp_path / "whole", 2)
    assert len(proof) == 4 and np.isfinite(proof.gain_upper_bound)
    run(tmp_path / "parts", 1)
    parts, _ = run(tmp_path / "parts", 2)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


# --------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_a_checksum, "cannot be read after record"),
        (truncated_jpeg, "record 1 is no intact"),
        (cut_between_records, "cannot be read after record 2"),
        (emptied, "cannot be read after record 0"),
    ],
)
def test_damage_is_refused_by_name_and_skipped_by_name(jpegs, tmp_path, harm, message):
    shard = damaged_copy(jpegs, tmp_path, harm)
    strict = opened(tmp_path, validation=1).batches(16)
    with pytest.raises(DatasetNotFound, match=rf"{shard}.*{message}.*on_damage"):
        for index in range(len(strict)):
            strict[index]
    lenient = opened(tmp_path, validation=1, on_damage="skip")
    with pytest.warns(UserWarning, match=message):
        x, y = epoch_of(lenient, 0)
    assert len(x) == len(y) == (TRAIN - 1) // 16 * 16
    assert lenient.damaged and all(shard in text for text in lenient.damaged)
    if harm is emptied:  # and the same again
        again = opened(tmp_path, validation=1, on_damage="skip")
        with contextlib.suppress(UserWarning), pytest.warns(UserWarning):
            assert np.array_equal(epoch_of(again, 0)[0], x)


def test_held_out_and_test_images_skip_what_is_damaged_with_their_labels(jpegs, tmp_path):
    damaged_copy(jpegs, tmp_path, truncated_jpeg)
    stream = opened(tmp_path, validation=8, on_damage="skip")
    with pytest.warns(UserWarning, match="record 1"):
        assert len(stream.x_val) == len(stream.y_val) == 7
    whole = opened(jpegs, validation=8)
    assert stream.y_val.tolist() == np.delete(whole.y_val, 1).tolist()


def test_undamaged_data_has_no_damage_to_name(stream):
    assert list(stream.find_damage()) == []


def test_missing_shards_and_other_formats_are_refused(jpegs, tmp_path):
    shutil.copytree(jpegs / "imagenet2012", tmp_path / "imagenet2012")
    version = tmp_path / "imagenet2012" / "5.1.0"
    gone = sorted(version.glob("*train.tfrecord*"))[1]
    gone.unlink()
    with pytest.raises(DatasetNotFound, match=rf"1 of 8 files.*{gone.name}"):
        opened(tmp_path)
    info = json.loads((version / "dataset_info.json").read_text())
    info["fileFormat"] = "array_record"
    (version / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetNotFound, match="no prepared image classification"):
        opened(tmp_path)


def test_absent_imagenet_says_where_to_get_it_and_where_to_put_it(tmp_path):
    for load in (streams.load, datasets.load):
        with pytest.raises(DatasetNotFound, match=r"image-net\.org.*ILSVRC2012_img_train\.tar"):
            load("imagenet2012", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": TRAIN}, "must leave training examples"),
        ({"size": 0}, "`size` must be"),
        ({"on_damage": "ignore"}, "on_damage"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
    ],
)
def test_impossible_options_are_refused(jpegs, options, message):
    with pytest.raises(ValueError, match=message):
        opened(jpegs, **options)


def test_rows_are_read_in_order_by_slices(stream):
    with pytest.raises(TypeError, match="slices only"):
        stream.x_test[[1, 2]]
    with pytest.raises(ValueError, match="step 2"):
        stream.x_test[::2]
    with pytest.raises(ValueError, match="must leave a batch"):
        stream.batches(TRAIN)


def test_load_of_datasets_opens_the_stream(jpegs):
    data = datasets.load("imagenet2012", jpegs, validation=8, crop=16, limit=20)
    assert data.input_shape == (16, 16, 3) and data.x_test.shape == (20, 16, 16, 3)
    assert [len(data.split(name)[1]) for name in ("train", "val", "test")] == [20, 8, 20]
