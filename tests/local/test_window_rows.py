"""Linearised maps on windows, and norms of one matrix under many weights."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local import maps, relaxation
from tf_lyapunov.local.boxes import Effort, surround
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.local.scalable import Scalable
from tf_lyapunov.local.windowrows import Rows, WindowRows, rows_behind
from tf_lyapunov.program.families.elementwise import Elementwise as Activation
from tf_lyapunov.program.network import read_network
from tf_lyapunov.theory.operators import LinearMap


def chain():
    return [
        keras.Input((12, 11, 2)),
        layers.Conv2D(3, 3, strides=2, padding="same", activation="relu"),
        layers.DepthwiseConv2D(2, padding="same"),
        layers.BatchNormalization(),
        layers.LeakyReLU(),
        layers.Conv2D(4, 3, padding="same", activation="relu"),
    ]


def pooled():
    return [
        keras.Input((14, 16, 1)),
        layers.Conv2D(3, 3),
        layers.MaxPooling2D(2),
        layers.Conv2D(2, 2, padding="same", activation="relu"),
    ]


@pytest.fixture(scope="module", params=[chain, pooled])
def around(request):
    keras.utils.set_random_seed(0)
    inputs, *first = request.param()
    model = keras.Sequential([inputs, *first, layers.Flatten(), layers.Dense(2)])
    flow = flow_of(read_network(model))
    x = np.random.default_rng(0).normal(size=inputs.shape[1:])
    return surround(flow, trace(flow, x), Region.ball(x, 0.5), Effort(0))


def sources(around):
    """Positions that elementwise steps of images read."""
    found = (around.flow.links[k - 1].inputs[0] for k in around.steps)
    return [k for k in found if len(around.trace.shape(k)) == 3]


def test_rows_on_windows_are_whole_rows(around):
    assert len(sources(around)) == 3
    for source in sources(around):
        size = around.trace.values[source].size
        used = np.flatnonzero(np.random.default_rng(1).random(size) < 0.5)
        rows = rows_behind(around, source, used)
        assert isinstance(rows, WindowRows)
        whole, own = Rows(around, source, used), rows.units()
        c = whole.units()
        np.testing.assert_array_equal(rows.columns(source, own), whole.columns(source, c))
        for k in range(source, 0, -1):
            if k in around.gains.middles:
                roots, middle = around.gains.roots[k], around.gains.middles[k]
                found, expected = rows.columns(k, own, roots), whole.columns(k, c, roots)
                assert found.shape == expected.shape == (len(used), np.count_nonzero(roots))
                np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
                own, c = rows.scaled(k, own, middle), whole.scaled(k, c, middle)
            else:
                (own,), (c,) = rows.back(k, own), whole.back(k, c)
        assert own[0].size < c[0].size
        np.testing.assert_allclose(rows.columns(0, own), whole.columns(0, c), atol=1e-13)


def test_gains_from_windows_are_those_from_whole_rows(around, monkeypatch):
    weights = {k: around.gains.weighed[k][0] for k in around.steps}
    found = {k: around.gains.weigh(k, w) for k, w in weights.items()}
    monkeypatch.setattr("tf_lyapunov.local.localgains.rows_behind", Rows)
    around.gains.linearised.clear()
    for k, w in weights.items():
        assert found[k] == pytest.approx(around.gains.weigh(k, w), rel=1e-5)


def test_windows_are_worth_what_their_parts_take(around, monkeypatch):
    first = min(sources(around))
    size, inputs = around.trace.values[first].size, around.trace.values[0].size
    monkeypatch.setattr("tf_lyapunov.local.localgains._ENTRIES", 20 * inputs)
    assert around.gains._is_worth(first, 20) and not around.gains._is_worth(first, 21)
    monkeypatch.setattr("tf_lyapunov.local.localgains._SIDE", 19)
    assert around.gains._is_worth(first, 19) and not around.gains._is_worth(first, 20)
    assert size > 20


@pytest.mark.parametrize("shape", [(5, 9), (200, 300), (40, 20), (1, 3)])
def test_norms_under_weights_of_rows_are_bounded_closely(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    held = Scalable(matrix)
    for scale in (1.0, 1e-160, 1e150):
        for _ in range(3):
            at = np.flatnonzero(rng.random(shape[0]) < 0.8)
            d = scale * rng.random(len(at))
            exact = np.linalg.norm(d[:, None] / scale * matrix[at], 2) if len(at) else 0.0
            bound = held.norm(at, d) / scale
            assert exact * (1 - 1e-14) <= bound <= exact * (1 + 3e-6)
            if len(at):
                found, vector = held.estimate(at, d / scale)
                found, _ = held.estimate(at, d / scale, vector)
                assert 0.8 * exact <= found <= 1.009 * exact
    assert held.norm(np.arange(shape[0]), np.zeros(shape[0])) == 0
    assert Scalable(np.zeros(shape)).norm(np.arange(shape[0]), np.ones(shape[0])) == 0


def test_norms_of_sparse_matrices_are_bounded_closely():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(90, 40)) * (rng.random((90, 40)) < 0.04)
    d, every = rng.random(90), np.arange(90)
    held = Scalable(matrix)
    assert held.is_sparse and not Scalable(matrix + 1).is_sparse
    for at in (every, every[:60]):
        exact = np.linalg.norm(d[at, None] * matrix[at], 2)
        assert exact <= held.norm(at, d[at]) <= exact * (1 + 3e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 4, 6))
    linear_map = LinearMap("conv", (9, 8, 4), (2, 1), (1, 1), "same", 1)
    x, c = rng.normal(size=(7, 9, 8, 4)), rng.normal(size=(7, 5, 8, 6))
    z = rng.normal(size=(7, 5))
    step = Elementwise(Activation("relu", (), None), z, z - 1, z + 1, 0.7)
    rows = rng.normal(size=(7, 5))
    multipliers = step.start(rows)
    multipliers.log_lam[:] = 0.1

    def found():
        g, h, memory = step.backward(rows, multipliers)
        return (
            maps.convolved_back(c, kernel, linear_map, (9, 8, 4)),
            maps.convolved_forth(x, kernel, linear_map),
            h,
            *step.forward(g, memory),
        )

    whole = found()
    monkeypatch.setattr(maps, "_CLOSE", 1)
    monkeypatch.setattr(relaxation, "_CLOSE", 11)
    for one, other in zip(whole, found(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
