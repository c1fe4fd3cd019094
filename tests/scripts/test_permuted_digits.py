"""The sequences of scripts/dynamics: what its table is made of."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

from tf_lyapunov.dynamics import certify_dynamics

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("dynamics.permuted_digits")
    for name in ("dynamics", "dynamics.permuted_digits"):
        sys.modules.pop(name, None)


def test_certified_shares_are_at_most_those_under_attack(script):
    x, y, x_test, y_test = script.data()
    assert x.shape[1:] == (16, 4) and len(x) + len(x_test) == 1797
    assert 0 <= x.min() and x.max() == 1
    model = script.recurrent(4, 2.0)
    assert script.trained(model, x[:64], y[:64], 1) > 0
    proof = certify_dynamics(model, x_test[:20], y_test[:20], optimise=False)
    assert proof.gain_upper_bound <= 2.0
    attacked = script.under_attack(model, x_test[:20], y_test[:20], 2)
    certified = [proof.certified_accuracy(radius) for radius in script.RADII]
    assert np.all(np.array(certified) <= attacked)
