"""Input pipelines: images a second beside what a training step takes, and how JPEG decoding scales.

CIFAR-shaped: `Batches`, plain and augmented, against AlexNet's training step in the same run.
ImageNet-shaped: generated JPEG files of about ImageNet's size in TFDS' format, read, shuffled and
batched by `streams.ImageStream`, against decoding of the same records from memory on all cores. A
ratio near 1 says that decoding alone limits it; the CPU seconds per second of wall time are the
cores that it keeps busy, where nobody else uses them.
"""

import os
import statistics
import tempfile
import time

TITLE = "Input pipelines / the model's consumption"
SCALE = True
BATCH = 128


def measure(quick):
    """Throughputs, and their ratios within one run."""
    return {"rows": [*_cifar(quick), *_imagenet(quick)]}


def _cifar(quick):
    import keras
    import numpy as np

    from tf_lyapunov import datasets
    from tf_lyapunov import models as zoo
    from tf_lyapunov.experiments.augmentation import AugmentedBatches

    rng = np.random.default_rng(0)
    steps = 4 if quick else 12
    x = rng.normal(size=(BATCH * steps, 28, 28, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    model = zoo.alexnet_cifar()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    feeds = {
        "arrays, shuffled": datasets.Batches(x, y, BATCH),
        "arrays, shifted and mirrored": AugmentedBatches(x, y, BATCH, crop=4, flip=True),
    }
    model.train_on_batch(*feeds["arrays, shuffled"][0])
    seconds = {name: [] for name in ("model", *feeds)}
    for _ in range(2 if quick else 5):
        for name, batches in feeds.items():
            seconds[name].append(_timed(lambda b=batches: [b[i] for i in range(steps)]))
        batch = feeds["arrays, shuffled"][0]
        start = time.perf_counter()
        model.train_on_batch(*batch)
        model.train_on_batch(*batch)
        seconds["model"].append((time.perf_counter() - start) * steps / 2)
    rate = {name: len(x) / statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "pipeline": f"CIFAR, {name}",
            "images / s": rate[name],
            "model's images / s": rate["model"],
            "ratio": rate[name] / rate["model"],
        }
        for name in feeds
    ]


def _imagenet(quick):
    import tensorflow as tf

    from lyapunov.imagenet_sample import write
    from tf_lyapunov.data import jpegs, streams

    count, cores = (64 if quick else 1024), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        write(directory, train=count + 8, validation=8, side=(375, 500))
        stream = streams.load("imagenet2012", directory, validation=8, shuffle_buffer=64)
        decode = jpegs.decoder(stream._train.features, 224, augment=True)
        records = [record.numpy() for record in stream._records(stream._train)]
        bare = tf.data.Dataset.from_tensor_slices(records).enumerate()
        bare = bare.map(
            lambda n, record: decode(record, tf.stack([n, n])), num_parallel_calls=tf.data.AUTOTUNE
        )
        feeds = {
            "bare": lambda epoch: bare.batch(32).prefetch(2),
            "stream": lambda n: stream.epoch(32, n),
        }
        walls, busy = ({name: [] for name in feeds} for _ in range(2))
        for attempt in range((2 if quick else 5) + 1):
            for name, feed in feeds.items():
                batches, cpu = feed(attempt), time.process_time()
                wall = _timed(lambda b=batches: [None for _ in b])
                if attempt:  # the first starts threads
                    walls[name].append(wall)
                    busy[name].append((time.process_time() - cpu) / wall)
    rate = {name: count / statistics.median(values) for name, values in walls.items()}
    return [
        {
            "pipeline": f"ImageNet-shaped JPEG files, {cores} cores",
            "images / s": rate["stream"],
            "decoding alone, images / s": rate["bare"],
            "of decoding alone": rate["stream"] / rate["bare"],
            "cores kept busy": statistics.median(busy["stream"]),
            "by decoding alone": statistics.median(busy["bare"]),
        }
    ]


def _timed(act):
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
