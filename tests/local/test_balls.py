"""Norms of linearised maps, and balls weighted unit by unit."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local import branching
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import Effort, Memory, reweigh, surround, weigh
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.localgains import LocalGains
from tf_lyapunov.local.radii import Prover, margin_rows
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.local.scalable import spectral_norm
from tf_lyapunov.program.network import read_network


@pytest.mark.parametrize("shape", [(5, 9), (260, 300), (400, 230), (1, 3)])
def test_spectral_norms_are_bounded_closely(shape):
    rng = np.random.default_rng(0)
    for matrix in (rng.normal(size=shape), np.outer(rng.normal(size=shape[0]), np.ones(shape[1]))):
        exact = np.linalg.norm(matrix, 2)
        assert exact <= spectral_norm(matrix) <= exact * 1.03
    # The power method does not see the second of two equal directions; the factor does not care.
    equal = np.zeros(shape)
    np.fill_diagonal(equal, 2.0)
    assert 2.0 <= spectral_norm(equal) <= 2.0 * 1.03
    assert spectral_norm(np.zeros(shape)) == 0


def network(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(12, "relu"),
            layers.Dense(3),
        ]
    )
    for weight in model.weights:
        weight.assign(weight * 2.0)
    return model


def test_weighted_balls_hold_every_point_and_raise_the_bound():
    model = network()
    read = read_network(model)
    flow, rng = flow_of(read), np.random.default_rng(2)
    x = rng.normal(size=(8, 8, 1))
    traced, region = trace(flow, x), Region.ball(x, 0.6)
    effort, memory = Effort(2, margin_steps=25), Memory()
    around = surround(flow, traced, region, effort, memory)
    c = margin_rows(3, 0)
    before, _ = tried(around, c, flow.output)
    ascend(around, c, flow.output, before, 25)
    plain = around.lower(c, flow.output, before)
    weigh(around, c, flow.output, before, memory)
    held, _ = tried(around, c, flow.output)
    ascend(around, c, flow.output, held, 25)
    weighted = around.lower(c, flow.output, held)
    # Once more with weights of another sort, and back: radii do not depend on the way.
    radii = {k: step.radius for k, step in around.steps.items()}
    chosen = memory.weights
    memory.weights = {k: (units, 1 / w) for k, (units, w) in chosen.items()}
    reweigh(around, memory)
    memory.weights = chosen
    reweigh(around, memory)
    assert radii == {k: step.radius for k, step in around.steps.items()}
    assert weighted.mean() > plain.mean()
    e = rng.normal(size=(4000, 8, 8, 1))
    e *= 0.6 / np.linalg.norm(e.reshape(4000, -1), axis=1).reshape(-1, 1, 1, 1)
    # Towards the steepest descent too, where the bound is nearest.
    values = read.program.logits(x + e) @ c.T
    assert np.all(values.min(axis=0) >= weighted)
    signals = [trace(flow, x + step).values for step in e[:200]]
    for k, step in around.steps.items():
        assert len(memory.weights[k][1]) == len(step.columns)
        assert np.ptp(step.weights) > 0
        source = flow.links[k - 1].inputs[0]
        away = np.array([s[source].ravel() for s in signals]) - traced.values[source].ravel()
        reached = np.sqrt((away[:, step.columns] ** 2 * step.weights).sum(axis=1))
        assert reached.max() <= step.radius
        assert step.radius <= 12 * reached.max()


def test_branches_keep_the_weights_of_their_ball(monkeypatch):
    flow = flow_of(read_network(network()))
    x = np.random.default_rng(2).normal(size=(8, 8, 1))
    traced, memory = trace(flow, x), Memory()
    around = surround(flow, traced, Region.ball(x, 0.5), Effort(0), memory)
    c = margin_rows(3, 0)
    weigh(around, c, flow.output, {}, memory)
    made, begin = [], Elementwise.__init__

    def noted(self, *args):
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(Elementwise, "__init__", noted)
    multipliers = {}
    around.backward(c, flow.output, multipliers)
    branching.split_lower(around, c, multipliers, 2, 0)
    assert made
    for split in made:
        step = next(s for s in around.steps.values() if s.shape == split.shape)
        assert split.radius == step.radius and np.ptp(split.weights) > 0
        own = dict(zip(step.columns.tolist(), step.weights[0].tolist(), strict=True))
        assert [own[u] for u in split.columns.tolist()] == split.weights[0].tolist()


def test_remembered_weights_are_taken_over_unit_by_unit():
    flow = flow_of(read_network(network()))
    x = np.random.default_rng(2).normal(size=(8, 8, 1))
    traced, memory = trace(flow, x), Memory()
    around = surround(flow, traced, Region.ball(x, 0.5), Effort(0), memory)
    c = margin_rows(3, 0)
    weigh(around, c, flow.output, {}, memory)
    again = surround(flow, traced, Region.ball(x, 0.4), Effort(0))
    again_units = {k: set(s.columns) for k, s in again.steps.items()}
    reweigh(again, memory)
    for k, (columns, weights) in memory.weights.items():
        known = dict(zip(columns.tolist(), weights.tolist(), strict=True))
        own = again.steps[k]
        assert set(own.columns) == again_units[k]
        assert np.allclose(own.weights[0], [known.get(u, 1.0) for u in own.columns.tolist()])


def test_linearised_maps_are_used_again_for_other_weights():
    flow = flow_of(read_network(network()))
    x = np.random.default_rng(2).normal(size=(8, 8, 1))
    traced = trace(flow, x)
    around = surround(flow, traced, Region.ball(x, 0.5), Effort(0))
    source = flow.links[-2].inputs[0]
    rng = np.random.default_rng(0)
    for _ in range(4):
        weights = rng.random(12) * (rng.random(12) < 0.7)
        fresh = LocalGains(around)
        fresh.middles, fresh.roots = around.gains.middles, around.gains.roots
        fresh.signals = around.gains.signals
        assert around.gains.radius(source, weights) == pytest.approx(
            fresh.radius(source, weights), rel=1e-9
        )


def test_a_proved_radius_holds_with_weights():
    model = network(1)
    flow = flow_of(read_network(model))
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8, 8, 1))
    logits = read_network(model).program.logits(x[None])[0]
    label = int(np.argmax(logits))
    answer = Prover(flow).radius(x, margin_rows(3, label), lambda r: 0.0)
    assert any(np.ptp(w) > 0 for _, w in answer.memory.weights.values())
    e = rng.normal(size=(3000, 8, 8, 1))
    e *= answer.radius / np.linalg.norm(e.reshape(3000, -1), axis=1).reshape(-1, 1, 1, 1)
    decided = np.argmax(read_network(model).program.logits(x + e), axis=1)
    assert answer.radius > 0 and np.all(decided == label)
