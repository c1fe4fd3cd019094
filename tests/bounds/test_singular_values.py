"""What a layer keeps of a change at least: `smallest_singular_value` of layers of every kind."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import CayleyDense, SkewOrthogonalConv2D, SpectralConv2D

IMAGE = (None, 5, 5, 2)
L = keras.layers


def built(layer, shape):
    layer.build(shape)
    return layer


def true_value(layer, shape):
    """By a singular value decomposition of the layer's own answers to unit vectors."""
    size = int(np.prod(shape[1:]))
    eye = np.eye(size, dtype="float32").reshape(size, *shape[1:])
    matrix = keras.ops.convert_to_numpy(layer(eye)).reshape(size, -1).astype(float)
    return np.linalg.svd(matrix, compute_uv=False).min()


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: L.Dense(7), (None, 4)),
        (lambda: L.Conv2D(3, 3, padding="same"), IMAGE),
        (lambda: L.Conv2D(12, 2, strides=2), IMAGE),
        (lambda: L.Conv2DTranspose(3, 3, strides=2), IMAGE),
        (lambda: L.DepthwiseConv2D(2, depth_multiplier=2), IMAGE),
        (lambda: CayleyDense(4), (None, 4)),
        (lambda: SpectralConv2D(3, 3), IMAGE),
    ],
)
def test_it_is_that_of_the_layer_s_own_map(make, shape):
    layer = built(make(), shape)
    # float32 answers of size 1 to unit vectors.
    assert tfl.smallest_singular_value(layer) == pytest.approx(true_value(layer, shape), abs=2e-6)


def test_an_orthogonal_layer_keeps_everything():
    assert tfl.smallest_singular_value(built(CayleyDense(6), (None, 6))) > 1 - 1e-5


def test_other_maps_are_refused_by_name():
    for layer, shape, message in [
        (SkewOrthogonalConv2D(2, 3), IMAGE, "SkewOrthogonalConv2D"),
        (L.SeparableConv2D(2, 3), IMAGE, "two maps"),
        (L.BatchNormalization(), (None, 3), "BatchNormalization"),
        (L.Conv2D(2, 3), (None, None, None, 1), "any size"),
        (L.Dense(3000), (None, 2000), "4194304 entries"),
    ]:
        with pytest.raises(UnsupportedLayerError, match=message):
            tfl.smallest_singular_value(built(layer, shape))

    class Doubled(L.Dense):
        def call(self, x):
            return 2 * super().call(x)

    patched = built(L.Dense(2), (None, 2))
    patched.call = lambda x: 2 * x
    for layer in (built(Doubled(2), (None, 2)), patched):
        with pytest.raises(UnsupportedLayerError, match="one linear map"):
            tfl.smallest_singular_value(layer)
    with pytest.raises(ValueError, match="built"):
        tfl.smallest_singular_value(L.Dense(3))
