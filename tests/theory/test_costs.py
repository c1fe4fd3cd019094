"""What takes long is said before it begins."""

import warnings

import keras
import numpy as np
import pytest

from tf_lyapunov import certify, constrain, lipschitz_upper_bound, project, projection
from tf_lyapunov.errors import CostWarning
from tf_lyapunov.theory import costs, norms
from tf_lyapunov.theory.operators import LinearMap


@pytest.fixture
def slow_machine(monkeypatch):
    """One on which matrices of 30 rows take long."""
    monkeypatch.setattr(costs, "speed", lambda: 1e3)
    for module in (norms, projection):
        monkeypatch.setattr(module, "SMALLEST_SIDE", 30)
    monkeypatch.setattr(norms, "SVD_SIZE", 0)
    norms.forget()


def test_the_norm_of_a_large_matrix_is_announced_and_then_remembered(slow_machine):
    kernel = np.random.default_rng(0).normal(size=(40, 30))
    with pytest.warns(CostWarning, match=r"matrix of 40×30 takes about 63 s"):
        norms.norm_upper_bound(kernel, LinearMap("dense"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms.norm_upper_bound(kernel, LinearMap("dense"))
        norms.norm_upper_bound(kernel[:, :20], LinearMap("dense"))


@pytest.mark.parametrize("ask", ["bound", "certify", "constrain", "project"])
def test_whoever_asks_for_the_norm_of_a_large_layer_hears_of_its_cost_before_it_begins(
    slow_machine, monkeypatch, ask
):
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(30)])
    if ask == "project":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            constrain(model, 1.0)
        norms.forget()
    asked = {
        "bound": lambda: lipschitz_upper_bound(model),
        "certify": lambda: certify(model, np.zeros((2, 40), "float32")),
        "constrain": lambda: constrain(model, 1.0),
        "project": lambda: project(model),
    }
    begun = []
    monkeypatch.setattr(norms, "largest_eigenvalue", lambda *_: begun.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CostWarning)
        with pytest.raises(CostWarning, match="40×30"):
            asked[ask]()
    assert not begun


def test_a_guarantee_at_every_step_is_announced_with_the_way_out(slow_machine):
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(30, name="large")])
    with pytest.warns(CostWarning, match=r"large.*40×30.*guarantee='monitor'"):
        constrain(model, 1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        constrain(model, 1.0, guarantee="monitor")
    assert not [w for w in seen if "every step" in str(w.message)]


def test_the_speed_of_a_machine_is_that_of_its_products():
    costs.speed.cache_clear()
    assert 1e6 < costs.speed() < 1e15 and costs.speed() == costs.speed()
