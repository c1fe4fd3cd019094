"""The scripts of systems in time: what their tables are made of."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
PACKAGES = ("control", "dynamics")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
        sys.modules.pop(name)


@pytest.mark.parametrize("name", ["gain", "contracting"])
def test_drawn_weights_are_proved_and_a_broken_rate_is_not(script, name, monkeypatch):
    module = script("dynamics.random_weights")
    monkeypatch.setattr(module, "SIZES", 1)
    monkeypatch.setattr(module, "compiled", lambda cell: lambda *s: cell._compute(list(s)))
    assert module.failures_of_draws(name, 3) == (3, 0)
    layer = next(module.layers(name, np.random.default_rng(0)))
    values = [np.array(layer.cell.effective_values()[n]) for n in layer.cell._effective_names]
    assert module.holds(layer, values)
    values[0] = values[0] + 5.0  # of A and C₁
    assert not module.holds(layer, values)


def test_a_claim_about_the_steering_controller_is_one_about_the_yaw_loop(script):
    pytest.importorskip("cvxpy")
    import keras

    import tf_lyapunov as tfl
    from tf_lyapunov.control import linear_indices, passive_feedback

    module = script("control.steering")
    a, b, c = module.yaw()
    plant = linear_indices(a, b, c, delta=0.1)
    gain = module.room(plant.indices)
    delta = -plant.indices.nu + 0.01
    assert passive_feedback(plant, module.enough(gain, delta))
    assert not passive_feedback(plant, module.enough(1.2 * gain, delta))
    # Indices of every map with that gain.
    u = np.random.default_rng(0).normal(size=1000)
    y, found = gain * u * np.random.default_rng(1).uniform(-1, 1, 1000), module.enough(gain, delta)
    assert np.all(u * y >= found.delta * y * y + found.nu * u * u)
    claim = tfl.Indices(delta, -plant.indices.delta + 0.005)
    design = tfl.spectral_design(claim, sectors=["tanh", "linear"])
    model = module.network(1, design)
    model.set_weights([10 * w for w in model.get_weights()])
    tfl.project(model)
    assert np.prod([np.linalg.norm(w, 2) for w in model.get_weights()]) <= gain * (1 + 1e-6)
    share = module.rest(a, b, c, model, np.random.default_rng(0), count=20)
    assert share == 1.0 and isinstance(model, keras.Model)
    feedback = module.regulator(module.lane())
    roots = np.linalg.eigvals(module.lane().state - module.lane().input @ feedback)
    assert np.max(np.abs(roots)) < 1


def test_observers_forget_where_they_started_at_the_rate_that_is_proved(script):
    from tf_lyapunov.dynamics import certify_dynamics

    module = script("dynamics.peer_examples")
    rng = np.random.default_rng(0)
    x, y = module.boxes(6, rng, steps=12)
    assert x.shape == (6, 12, 1) and y.shape == (6, 12, 2)
    _, layer = module.observer_network(0.9, 2)
    layer.build(x.shape)
    rate = certify_dynamics(layer, claim=layer.current_supply).rate
    assert 0 < module.forgetting(layer, x, rng) <= rate**12 * (1 + 1e-3)


def test_the_sandwich_network_of_the_peer_has_its_gain(script):
    import tf_lyapunov as tfl

    module = script("dynamics.peer_examples")
    proof = tfl.certify(module.classifier(True), np.zeros((1, 784), "float32"))
    assert proof.gain_upper_bound <= module.GAIN
