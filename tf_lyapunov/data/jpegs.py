"""Decoding of JPEG images inside `tf.data`: only the crop that is used, and damage as a value."""

from __future__ import annotations

from .prepared import import_tfds

# Random crops as Szegedy et al. (2015): share of the area, and width / height.
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def parsed(features, record) -> dict:
    """The example of a record, its image left as it is in the file."""
    tfds = import_tfds()
    return features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})


def decoder(features, size: int, *, augment: bool = False):
    """Function from (record, seed pair) to (image in [-0.5, 0.5], label)."""
    import tensorflow as tf

    def decode(record, pair):
        example = parsed(features, record)
        window = random_window if augment else central_window
        jpeg = example["image"]
        crop = window(tf.image.extract_jpeg_shape(jpeg), size, pair)
        image = tf.image.decode_and_crop_jpeg(jpeg, crop, channels=3)
        image = tf.image.resize(image, (size, size))
        if augment:
            image = tf.image.stateless_random_flip_left_right(
                image, pair + tf.constant([1, 0], tf.int64)
            )
        return tf.ensure_shape(image / 255.0 - 0.5, (size, size, 3)), example["label"]

    return decode


def central_window(shape, size: int, pair):
    """Window (y, x, height, width): the central square of size/(size + 32) of the shorter side."""
    import tensorflow as tf

    height, width = shape[0], shape[1]
    side = tf.cast(tf.minimum(height, width), tf.float32) * (size / (size + 32))
    side = tf.maximum(tf.cast(side, tf.int32), 1)
    return tf.stack([(height - side) // 2, (width - side) // 2, side, side])


def random_window(shape, size: int, pair):
    """Window (y, x, height, width) of random area and aspect, a function of the seed pair."""
    import tensorflow as tf

    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=pair,
        min_object_covered=0.0,
        aspect_ratio_range=_ASPECT,
        area_range=_AREA,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)


def is_intact(features, record):
    """Whether the whole image of a record can be decoded; an error where it cannot be read."""
    import tensorflow as tf

    return tf.size(tf.io.decode_jpeg(parsed(features, record)["image"], channels=3)) > 0


def guarded(decode, size: int, record, pair):
    """(whether it worked, image, label): a data set of one image that may turn out empty."""
    import tensorflow as tf

    one = tf.data.Dataset.from_tensors((record, pair)).map(decode).ignore_errors()
    options = tf.data.Options()  # rewriting its graph would take longer than it
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    blank = (tf.constant(False), tf.zeros((size, size, 3)), tf.constant(0, tf.int64))
    tried = one.with_options(options)
    return tried.reduce(blank, lambda state, item: (tf.constant(True), *item))
