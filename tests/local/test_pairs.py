"""Maxima of two at a time: the same function, its adjoint, and gains of differences."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local import maps
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.pairs import Halves, Rejoined, difference_gain, paired
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.operation import EXACT, Signal

POOLS = [
    (Pooled("max", (2, 2), (2, 2), "valid", False), (5, 4, 3)),
    (Pooled("max", (4,), (4,), "same", False), (8, 2)),
    (Pooled("max", (2, 1), (2, 1), "valid", True), (3, 6, 5)),
]


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_a_chain_of_pairs_is_the_pool(pool, shape):
    x = np.random.default_rng(0).normal(size=(7, *shape))
    signal = Signal(x, np.zeros_like(x))
    for operation in paired(pool, shape):
        signal = operation.forward([signal], EXACT)
    exact = pool._pool(x, "max")
    assert signal.value.shape == exact.shape
    assert np.all(np.abs(signal.value - exact) <= signal.error) and np.max(signal.error) < 1e-12


@pytest.mark.parametrize(
    "pool",
    [
        Pooled("max", (3, 3), (3, 3), "valid", False),
        Pooled("max", (2, 2), (1, 1), "valid", False),
        Pooled("max", (2, 2), (2, 2), "same", False),
        Pooled("mean", (2, 2), (2, 2), "valid", False),
        Pooled("max", None, None, "valid", False),
    ],
)
def test_other_pools_have_no_such_chain(pool):
    assert paired(pool, (5, 5, 2)) is None


@pytest.mark.parametrize("operation", [Halves(1), Halves(3, True), Rejoined(), Rejoined(True)])
def test_adjoints_and_norms_are_those_of_the_matrix(operation):
    shape, rng = (4, 5, 6), np.random.default_rng(1)
    eye = np.eye(120).reshape(120, *shape)
    matrix = maps.forwards(operation, [eye]).reshape(120, -1).T
    out = maps.forwards(operation, [eye[:1]]).shape[1:]
    c = rng.normal(size=(3, *out))
    (found,) = maps.adjoint(operation, c, [shape])
    np.testing.assert_allclose(found.reshape(3, -1), c.reshape(3, -1) @ matrix, atol=1e-14)
    sizes = rng.random(size=(1, *shape))
    (norm,) = maps.norms(operation, [shape])
    exact = np.linalg.norm(matrix, 2)
    assert exact <= norm * (1 + 1e-12) and norm <= exact * (1 + 1e-12)
    np.testing.assert_allclose(
        maps.absolute(operation, [sizes]).ravel(), np.abs(matrix) @ sizes.ravel(), atol=1e-14
    )


@pytest.mark.parametrize(("strides", "padding"), [(1, "valid"), (1, "same"), (2, "same")])
def test_differences_of_neighbours_move_no_further_than_their_gain(strides, padding):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 11, 2)),
            layers.Conv2D(3, (3, 4), strides=strides, padding=padding),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    flow = flow_of(read_network(model))
    traced = trace(flow, np.zeros((12, 11, 2)))
    assert isinstance(flow.links[1].operation, Halves)
    gain, source = difference_gain(flow, traced, 2)
    assert source == 0 and difference_gain(flow, traced, 3) is None
    eye = np.eye(264).reshape(264, 12, 11, 2)
    z = maps.applied(flow.links[0].operation, [eye]) - traced.values[1]
    u, v = np.split(maps.forwards(flow.links[1].operation, [z]), 2, axis=-1)
    exact = np.linalg.norm(v.reshape(264, -1), 2)
    assert exact <= gain <= 1.3 * exact
    whole = np.linalg.norm(z.reshape(264, -1), 2) * np.sqrt(0.5)
    assert np.linalg.norm(u.reshape(264, -1), 2) <= whole * (1 + 1e-9)
