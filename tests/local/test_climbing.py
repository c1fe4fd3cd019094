"""Random steps find what gradients pass by, stay in the region, and prove nothing by themselves."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local.attacking import Attacker
from tf_lyapunov.local.climbing import Climber
from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.property import Property
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.network import read_network

TARGET = np.array([0.31, -0.42, 0.17, 0.05])


def distance():
    """Σ |x_i - a_i| with weights that differ, by pairs of ReLUs: least at one point, a corner."""
    size = len(TARGET)
    model = keras.Sequential(
        [keras.Input((size,)), layers.Dense(2 * size, "relu"), layers.Dense(1)]
    )
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    first = np.concatenate([turn, -turn], axis=1)
    weights = np.tile(4.0 ** np.arange(size), 2)[:, None] / 4.0
    model.set_weights([first, -TARGET @ first, weights, np.zeros(1)])
    return model


def climber(region, property, seed=0):
    network = read_network(distance())
    flow = flow_of(network)
    rng = np.random.default_rng(seed)
    attacker = Attacker(network, flow, region, property.resolved(1), "logits", rng)
    return Climber(attacker)


@pytest.mark.parametrize(
    "region",
    [Region.box(np.full(4, -1.0), np.full(4, 1.0)), Region.ball(np.zeros(4), 1.0)],
    ids=["box", "ball"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_small_unsafe_set_in_a_corner_of_all_inputs_is_found(region, seed):
    # Less than 10⁻⁹ of the region, where gradients with signs jump across four corners.
    found, own = None, climber(region, Property.linear([-1.0], -0.02), seed)
    none = np.zeros((0, 4))
    for _ in range(300):
        found = own.step(none)
        if found is not None:
            break
    assert found is not None
    wide = found.x.astype(np.float64)
    assert np.all(region.low <= wide) and np.all(wide <= region.high)
    assert np.linalg.norm(wide - region.center) <= region.radius
    assert float(np.asarray(distance()(found.x[None]))[0, 0]) <= 0.02 + 1e-6


def test_every_point_lies_in_the_region_and_none_becomes_worse():
    region = Region.ball(np.zeros(4), 0.3, bounds=(-0.2, 0.25))
    own, seen = climber(region, Property.linear([-1.0], 1.0)), []
    show = own.attacker.shown

    def shown(points, outputs):
        seen.append(points)
        return show(points, outputs)

    own.attacker.shown = shown
    own.step(np.zeros((1, 4)))
    for _ in range(10):
        before = own.values.copy()
        assert own.step(np.zeros((0, 4))) is None
        assert np.all(own.values <= before)
    points = np.concatenate(seen)
    assert np.all(points >= -0.2 - 1e-12) and np.all(points <= 0.25 + 1e-12)
    assert np.all(np.linalg.norm(points, axis=1) <= 0.3 * (1 + 1e-12))
    assert np.isfinite(own.attacker.least)
