"""Block reflector layers: orthogonal by construction, contractions where V is degenerate."""

import keras
import numpy as np
import pytest
from linear_layers import assert_within_gain, exact_matrix, set_kernel

from tf_lyapunov.layers import BlockReflectorConv2D, BlockReflectorDense
from tf_lyapunov.spectral.reflection import block_reflection


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (5, 5)])
def test_the_reflection_is_that_of_the_formula(shape):
    rng = np.random.default_rng(0)
    v = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    for part in (v.real, v):
        exact = np.eye(len(v)) - 2 * part @ np.linalg.pinv(part)
        imag = np.imag(part).astype("float32") if np.iscomplexobj(part) else None
        found = block_reflection(np.real(part).astype("float32"), imag)
        if imag is not None:
            found = keras.ops.convert_to_numpy(found[0]) + 1j * keras.ops.convert_to_numpy(found[1])
        found = np.asarray(found)
        assert np.allclose(found, exact, atol=1e-3 if shape == (5, 5) else 2e-5)
        assert np.linalg.norm(found.astype(complex), 2) <= 1.0
        assert np.allclose(found @ found, np.eye(len(v)), atol=1e-3)


def test_a_degenerate_v_is_a_contraction_and_not_a_number_spreads():
    v = np.repeat(np.arange(4.0)[:, None], 3, axis=1).astype("float32")
    for value in (v, 0 * v, 1e30 * v, 1e-30 * v):
        w = np.asarray(block_reflection(value), np.float64)
        assert np.all(np.isfinite(w)) and np.linalg.norm(w, 2) <= 1.0
    assert np.allclose(np.asarray(block_reflection(0 * v)), np.eye(4), atol=1e-5)
    v[0, 0] = np.nan
    assert np.all(np.isnan(np.asarray(block_reflection(v))))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    ("kind", "arguments", "shape"),
    [
        (BlockReflectorDense, (5,), (7,)),
        (BlockReflectorDense, (6,), (3,)),
        (BlockReflectorConv2D, (4, 3), (4, 5, 3)),
        (BlockReflectorConv2D, (3, 2, 2), (5, 4, 2)),
    ],
)
def test_maps_are_orthogonal_within_their_gain(kind, arguments, shape, dtype):
    layer = kind(*arguments, max_gain=0.7, dtype=dtype)
    layer.build((None, *shape))
    set_kernel(layer, 1, 2.0)
    for training in (False, True):
        values = assert_within_gain(layer, shape, training)
        # Zeros that fill an odd side are dropped again.
        room = {"float32": 1e-4, "mixed_bfloat16": 0.02}[dtype]
        whole = kind is BlockReflectorDense or shape[0] % layer.strides[0] == 0
        assert values[-1] >= 0.7 * (1 - room) or not whole
    set_kernel(layer, 7, 1.0)  # one column, repeated
    assert_within_gain(layer, shape)


def test_the_gradient_of_a_layer_trains_it_and_its_rank_is_bounded():
    model = keras.Sequential([keras.Input((6,)), BlockReflectorDense(6, use_bias=False, rank=3)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype("float32")
    turned = x @ (np.eye(6) - 2 * np.ones((6, 6)) / 6)
    losses = model.fit(x, turned, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    layer = model.layers[0]
    again = BlockReflectorDense.from_config(layer.get_config())
    assert again.rank == 3 and again.get_config() == layer.get_config()
    with pytest.raises(ValueError, match="rank=9"):
        BlockReflectorDense(3, rank=9).build((None, 4))
    with pytest.raises(ValueError, match="rank=9"):
        BlockReflectorConv2D(3, 3, rank=9).build((None, 4, 4, 2))
    assert exact_matrix(layer, (6,)).shape == (6, 6)
