"""Operations that place entries: evaluated as they are, with the norm of their matrix as gain."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

RNG = np.random.default_rng(0)
INDEX = np.array([0, 2, 2, 1, 2])
CASES = {
    "flip": (lambda x: ops.flip(x, axis=1), (3, 2)),
    "flip two axes": (lambda x: ops.flip(x, axis=(1, 2)), (3, 2)),
    "roll": (lambda x: ops.roll(x, 2, axis=1), (5, 2)),
    "swapaxes": (lambda x: ops.swapaxes(x, 1, 2), (3, 2)),
    "moveaxis": (lambda x: ops.moveaxis(x, 1, -1), (3, 2, 2)),
    "rot90": (lambda x: ops.rot90(x, axes=(1, 2)), (3, 2)),
    "tril": (lambda x: ops.tril(x), (3, 3)),
    "repeat": (lambda x: ops.repeat(x, 3, axis=1), (3, 2)),
    "tile": (lambda x: ops.tile(x, (1, 2, 3)), (3, 2)),
    "take": (lambda x: ops.take(x, INDEX, axis=1), (3, 2)),
    "diagonal": (lambda x: ops.diagonal(x, axis1=1, axis2=2), (3, 3)),
    "split": (lambda x: ops.split(x, 3, axis=-1)[1], (2, 6)),
    "split at places": (lambda x: ops.split(x, [1, 3], axis=1)[2], (5,)),
    "unstack": (lambda x: ops.unstack(x, axis=1)[2], (3, 2)),
    "unfold": (lambda x: ops.image.extract_patches(x, (2, 2), strides=(1, 1)), (4, 4, 1)),
    "patches": (lambda x: ops.image.extract_patches(x, 2), (4, 4, 2)),
    "pad": (lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1))), (3, 2)),
    "pad by a number": (
        lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=-3.7),
        (3, 2),
    ),
    "pad reflect": (lambda x: ops.pad(x, ((0, 0), (2, 2)), mode="reflect"), (3,)),
    "pad symmetric": (lambda x: ops.pad(x, ((0, 0), (2, 1)), mode="symmetric"), (3,)),
}
NOT_ON_TORCH = {
    "pad edge": (lambda x: ops.pad(x, ((0, 0), (2, 3)), mode="edge"), (3,)),
    "pad wrap": (lambda x: ops.pad(x, ((0, 0), (2, 3)), mode="wrap"), (4,)),
}
if keras.backend.backend() == "jax":
    CASES |= NOT_ON_TORCH


def model_of(name):
    function, shape = CASES[name]
    x = keras.Input(shape)
    return keras.Model(x, function(x)), shape


@pytest.mark.parametrize("name", CASES)
def test_placed_entries_are_read_with_the_norm_of_their_matrix(name):
    model, shape = model_of(name)
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps >= 1
    eye = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    apply = lambda x: np.asarray(keras.ops.convert_to_numpy(model(x)), np.float64)  # noqa: E731
    matrix = (apply(eye) - apply(np.zeros_like(eye))).reshape(len(eye), -1)
    truth = np.linalg.norm(matrix, 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert truth * (1 - 1e-6) <= bound <= truth * (1 + 1e-6)


def test_parts_of_a_split_can_be_used_apart_and_together():
    x = keras.Input((6,))
    a, b, c = ops.split(x, 3, axis=1)
    model = keras.Model(x, layers.Concatenate()([c, layers.ReLU()(a), b]))
    assert validate_on_probes(read_network(model)).steps == 5
    # Each part is bounded by the whole: √3, not the exact 1.
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(np.sqrt(3), rel=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.flip(x, axis=0),
        lambda x: ops.flip(x),
        lambda x: ops.roll(x, 1, axis=0),
        lambda x: ops.roll(x, 1),
        lambda x: ops.tril(x),
        lambda x: ops.rot90(x),
        lambda x: ops.pad(x, ((0, 0), (0, 0))) + ops.roll(x, 1),
    ],
)
def test_what_mixes_samples_is_refused(function):
    x = keras.Input((3,))
    with pytest.raises(UnsupportedLayerError, match="samples"):
        lipschitz_upper_bound(keras.Model(x, function(x)))


def test_open_sizes_have_a_gain_where_it_does_not_depend_on_them():
    x = keras.Input((None, 2))
    y = ops.pad(ops.flip(ops.roll(x, 1, axis=1), axis=1), ((0, 0), (1, 1), (0, 0)))
    assert lipschitz_upper_bound(keras.Model(x, y)).gain_upper_bound == 1.0
    with pytest.raises(UnsupportedLayerError, match="unknown"):
        lipschitz_upper_bound(keras.Model(x, ops.pad(x, ((0, 0), (1, 1), (0, 0)), mode="reflect")))
