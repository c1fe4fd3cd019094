"""Neurons that solve an equation: one solution, found by the layer, and what its rest costs."""

import keras
import numpy as np
import pytest
from equilibria import SUPPLIES, array, built, draw
from test_inequality import nominal_holds

from tf_lyapunov.dynamics import Contracting, L2Gain, certify_dynamics
from tf_lyapunov.dynamics.systems import system_of
from tf_lyapunov.layers import RecurrentEquilibrium, refresh
from tf_lyapunov.verification import verify
from tf_lyapunov.verification.dissipation import (
    Recurrence,
    Slopes,
    is_explicit,
    is_well_posed,
    monotone,
    residual_gain,
)


def exact(system, u, rest=None, bias=0.0):
    """Outputs (steps, outputs) with w = φ(v + r) to float64; Newton's method on max(v, 0)."""
    n, q = system.states, system.units
    state, outputs = np.zeros(n), []
    inside = system.neurons[:, n : n + q]
    for t, at in enumerate(u):
        known = system.neurons[:, :n] @ state + system.neurons[:, n + q :] @ at
        known = known + (0.0 if rest is None else rest[t])
        w = np.zeros(q)
        for _ in range(100):
            on = (inside @ w + known > 0).astype(float)
            w = np.linalg.solve(np.eye(q) - on[:, None] * inside, on * known)
        assert np.max(np.abs(w - np.maximum(inside @ w + known, 0))) < 1e-9 * (
            1 + np.max(np.abs(w))
        )
        signal = np.concatenate([state, w, at])
        outputs.append(system.output @ signal)
        state = system.step @ signal
    return np.array(outputs)


@pytest.mark.parametrize("name", ["gain", "strict", "general", "contracting"])
def test_every_value_of_the_weights_satisfies_the_inequality_and_is_well_posed(name):
    rng = np.random.default_rng(len(name))
    layer = built(SUPPLIES[name](2, 2), implicit=True, neurons=5)
    for _ in range(12):
        draw(layer, rng)
        system = system_of(layer)
        assert nominal_holds(layer) and not is_explicit(system)
        assert monotone(system, system.multipliers) >= 0.2


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(0)
    return draw(
        built(L2Gain(0.7), implicit=True, neurons=6, iterations=60, use_bias=False),
        np.random.default_rng(3), spread=0.2,
    )  # fmt: skip


def test_the_layer_solves_its_equation_and_keeps_its_gain(layer):
    system, rng = system_of(layer), np.random.default_rng(0)
    found = certify_dynamics(layer, claim=L2Gain(0.7), optimise=False)
    assert found.proved and found.stages[0].residual_gain < np.inf
    assert "rest of the equation" in found.explain() and "splitting" in found.explain()
    for scale in (0.1, 10.0):
        u, v = rng.normal(size=(2, 5, 2)) * scale
        own = array(layer(u[None].astype("float32")))[0]
        np.testing.assert_allclose(own, exact(system, u), atol=2e-4 * scale)
        change = np.linalg.norm(exact(system, u) - exact(system, v))
        assert 0 < change <= found.gain_upper_bound * np.linalg.norm(u - v)


def test_what_is_left_of_the_equation_moves_outputs_by_no_more_than_its_gain(layer):
    system, rng = system_of(layer), np.random.default_rng(1)
    gain = residual_gain(system, system.storage, system.multipliers)
    reached = 0.0
    for _ in range(20):
        u, rest = rng.normal(size=(8, 2)), rng.normal(size=(8, 6)) * 10.0 ** rng.uniform(-3, 1)
        change = np.linalg.norm(exact(system, u, rest) - exact(system, u))
        reached = max(reached, change / np.linalg.norm(rest))
    assert 0.01 * gain < reached <= gain < np.inf
    assert residual_gain(system, -system.storage, system.multipliers) == np.inf


def test_it_trains_saves_and_is_verified_from_its_file(tmp_path):
    keras.utils.set_random_seed(0)
    made = RecurrentEquilibrium(
        1, 3, Contracting(0.9), "tanh", implicit=True, iterations=20, return_sequences=True
    )
    model = keras.Sequential([keras.Input((5, 2)), made])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 5, 2)).astype("float32")
    y = np.cumsum(x[..., :1], axis=1)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    before = array(made.cell.inner_skew)
    loss = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert loss[-1] < loss[0] and np.any(array(made.cell.inner_skew) != before)
    proof = certify_dynamics(model, claim=Contracting(0.9))
    proof.save(tmp_path / "proof.npz")
    assert verify(tmp_path / "proof.npz", model)
    refresh(model)
    own = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), own, atol=1e-6)
    with pytest.raises(ValueError, match="implicit=True"):
        certify_dynamics(model, x, optimise=False)


def test_an_equation_that_may_have_no_solution_proves_nothing():
    # w = max(2w + b, 0) has two solutions or none.
    system = Recurrence(
        np.array([[0.5, 0.0, 0.0]]), np.array([[0.0, 2.0, 1.0]]), np.array([[1.0, 0.0, 0.0]]),
        Slopes(0.0, 1.0),
    )  # fmt: skip
    assert not is_explicit(system) and not is_well_posed(system, np.ones(1))
    assert not is_well_posed(system, np.zeros(1))
    assert residual_gain(system, np.eye(1), np.ones(1)) == np.inf
