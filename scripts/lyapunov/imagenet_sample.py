#!/usr/bin/env python
"""Writes a small data set of JPEG images in TFDS' own format, in the place of ImageNet.

    python scripts/lyapunov/imagenet_sample.py DIR [--train 512] [--validation 128] [--classes 10]

The images are noise of many sizes over a colour gradient that tells the class; they only serve
to run the real reading, decoding and augmentation where ImageNet is not to be had.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path

import numpy as np


def write(directory, train=512, validation=128, classes=10, side=(160, 400), shards=8, seed=0):
    """Writes DIR/imagenet2012/5.1.0 with TFDS' builder, offline; returns that path."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=classes),
                "file_name": tfds.features.Text(),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("image", "label")
            )

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples("train", train),
                "validation": self._generate_examples("validation", validation),
            }

        def _generate_examples(self, split, count):
            rng = np.random.default_rng([seed, len(split)])
            for number in range(count):
                name = f"{split}_{number:06d}.JPEG"
                label = int(rng.integers(classes))
                jpeg = io.BytesIO(picture(rng, label, classes, side))
                yield name, {"image": jpeg, "label": label, "file_name": name}

    target = Path(directory, "imagenet2012", "5.1.0")
    if not (target / "dataset_info.json").is_file():
        target.parents[1].mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parents[1]) as own:
            builder = Imagenet2012(data_dir=own)
            config = tfds.download.DownloadConfig(num_shards=shards)
            builder.download_and_prepare(download_config=config)
            # Several workers may write the same data at once: the first to finish counts.
            try:
                os.rename(Path(own, "imagenet2012"), target.parent)
            except OSError:
                if not (target / "dataset_info.json").is_file():
                    raise
    return target


def picture(rng, label, classes, side):
    """A JPEG file: a gradient whose direction and colour tell the class, and noise."""
    from PIL import Image

    height, width = (int(n) for n in rng.integers(side[0], side[1] + 1, size=2))
    angle = 2 * np.pi * label / classes
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j] - 0.5
    ramp = np.cos(angle) * x + np.sin(angle) * y
    colour = np.cos(angle + np.array([0.0, 2.1, 4.2]))
    pixels = 128 + 120 * ramp[..., None] * colour + rng.normal(0, 25, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--validation", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    options = vars(parser.parse_args())
    print(write(options.pop("directory"), **options))
