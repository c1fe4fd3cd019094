"""The polar factor by products: from near, from far, and at ranks that no step can mend."""

import keras
import numpy as np
import pytest

from tf_lyapunov.spectral.compilation import compiled
from tf_lyapunov.spectral.retraction import NEAR, polar_factor, tangent

SHAPES = [(9, 4), (4, 9), (3, 5, 5)]
FACTOR = compiled(polar_factor)


def orthogonal(rng, shape):
    left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return left @ right


def departure(q):
    q = np.asarray(keras.ops.convert_to_numpy(q), np.float64)
    turned = np.swapaxes(q, -1, -2)
    gram = turned @ q if q.shape[-2] >= q.shape[-1] else q @ turned
    return np.max(np.linalg.norm(gram - np.eye(gram.shape[-1]), 2, axis=(-2, -1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_nearest_orthogonal_matrix(shape):
    rng = np.random.default_rng(0)
    for size in (0.0, 1e-5, 1e-3, 0.02, 0.1, 0.15):
        x = orthogonal(rng, shape) + size * rng.standard_normal(shape) / np.sqrt(max(shape))
        x = x.astype("float32")
        left, values, right = np.linalg.svd(x.astype("float64"), full_matrices=False)
        e = np.max(np.abs(values**2 - 1))
        assert e < NEAR
        # What the series leaves, and a few roundings of entries below 1.
        found = keras.ops.convert_to_numpy(FACTOR(x))
        assert departure(found) <= 5e-6 + 1e-6
        assert np.max(np.abs(found - left @ right)) <= 5e-6 + 1e-6


@pytest.mark.parametrize("size", [1e-20, 30.0])
def test_from_far_away_the_manifold_is_reached(size):
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        x = (size * rng.standard_normal(shape)).astype("float32")
        # What the series leaves, and a few roundings.
        assert departure(FACTOR(x)) <= 5e-6 + 1e-6


def test_without_full_rank_no_singular_value_exceeds_one_and_nothing_is_hidden():
    zeros = np.zeros((9, 4), "float32")
    assert np.all(keras.ops.convert_to_numpy(FACTOR(zeros)) == 0)
    low = zeros + np.outer(np.arange(1.0, 10), [1.0, 2.0, 2.0, 5.0]).astype("float32")
    values = np.linalg.svd(keras.ops.convert_to_numpy(FACTOR(low)), compute_uv=False)
    assert np.all(values <= 1 + 1e-5)
    zeros[0, 1] = np.nan
    assert np.isnan(keras.ops.convert_to_numpy(FACTOR(zeros))).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_to_first_order_the_retraction_is_the_tangent_projection(shape):
    rng = np.random.default_rng(2)
    w, z = orthogonal(rng, shape), rng.standard_normal(shape)
    flat = np.asarray(keras.ops.convert_to_numpy(tangent(w.astype("float32"), z)))
    turned = np.swapaxes(w, -1, -2)
    product = turned @ flat if shape[-2] >= shape[-1] else flat @ turned
    assert np.max(np.abs(product + np.swapaxes(product, -1, -2))) < 1e-5
    assert np.max(np.abs(tangent(w.astype("float32"), flat) - flat)) < 1e-5
    step = 1e-3
    moved = keras.ops.convert_to_numpy(FACTOR((w + step * z).astype("float32")))
    size = np.linalg.norm(z, axis=(-2, -1)).max()
    # The second order, and float32's rounding of both ends.
    assert np.max(np.abs((moved - w) / step - flat)) <= step * size**2 + 4e-7 / step


def test_half_formats_are_retracted_in_float32_and_rounded():
    w = orthogonal(np.random.default_rng(3), (6, 3))
    q = polar_factor(keras.ops.cast(w, "bfloat16"))
    assert keras.backend.standardize_dtype(q.dtype) == "bfloat16"
    assert departure(keras.ops.cast(q, "float32")) < 2.0**-8 * 2 * np.sqrt(3)
