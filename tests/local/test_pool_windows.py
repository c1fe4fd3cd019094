"""Boxes behind pools from windows of the input: every point stays inside, as with whole rows."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local import boxes
from tf_lyapunov.local.boxes import Effort, surround
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.windows import Windows
from tf_lyapunov.program.network import read_network

POOLS = {
    "pairs": lambda: layers.MaxPooling2D(2),
    "overlapping": lambda: layers.MaxPooling2D(3, 2, padding="same"),
    "thirds": lambda: layers.MaxPooling2D((3, 2), 3),
}


def built(pool):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((20, 19, 1)),
            layers.Conv2D(3, 3, padding="same"),
            POOLS[pool](),
            layers.Conv2D(2, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    for weight in model.weights:
        weight.assign(weight * 2)
    return model


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("pool", POOLS)
def test_boxes_from_windows_hold_every_point_and_are_those_of_whole_rows(pool, norm, monkeypatch):
    flow = flow_of(read_network(built(pool)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 19, 1))
    traced = trace(flow, x)
    source = next(k for k, link in enumerate(flow.links) if link.name.startswith("flatten")) - 1
    radius = 0.5 if norm == "l2" else 0.05
    region = Region.ball(x, radius, norm)
    effort = Effort(0, (0.0, 0.2), 0, (0.0,))
    assert Windows(flow, traced, source).applies
    around = surround(flow, traced, region, effort, target=source + 1)
    low, high = around.box(source)
    e = rng.normal(size=(150, 20, 19, 1))
    if norm == "l2":
        # Towards single units: concentrated on small patches.
        mask = np.zeros_like(e)
        for i, (a, b) in enumerate(rng.integers(0, 15, size=(150, 2))):
            mask[i, a : a + 5, b : b + 5] = 1
        e = e * mask
        e *= radius / np.linalg.norm(e.reshape(150, -1), axis=1).reshape(-1, 1, 1, 1)
    else:
        e = radius * np.sign(e)
    values = np.concatenate([trace(flow, x + step).values[source] for step in e])
    assert np.all(values >= low) and np.all(values <= high)
    monkeypatch.setattr(boxes, "Windows", lambda *_: type("None", (), {"applies": False})())
    whole = surround(flow, traced, region, effort, target=source + 1)
    widths = [np.mean(b[1] - b[0]) for b in (around.box(source), whole.box(source))]
    # Balls of windows are smaller, those of whole rows better explored.
    assert 0.5 * widths[1] <= widths[0] <= widths[1] * 1.1
