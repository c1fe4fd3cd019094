"""How `method="auto"` shares its time between gains and bounds around inputs."""

import time

import numpy as np
import pytest
from small_networks import network_of
from small_proofs import inputs_of

from tf_lyapunov.certification import certify, margins, widening
from tf_lyapunov.local import linear, radii


@pytest.fixture(autouse=True)
def without_splits(monkeypatch):
    """Splits of units take most of the time of searches on networks as small as these."""
    monkeypatch.setattr(radii, "_MANY", 0)
    monkeypatch.setattr(radii, "_ENOUGH", 0)


@pytest.fixture
def seconds(monkeypatch):
    """List that takes the seconds that each search for gains is given."""
    found, search = [], margins.network_gain

    def noted(*args, time_budget, **kwargs):
        found.append(time_budget)
        return search(*args, time_budget=time_budget, **kwargs)

    monkeypatch.setattr(margins, "network_gain", noted)
    return found


def slow(monkeypatch, pause, radius=None):
    """Searches around inputs take this long, and find this radius."""
    search = linear.Search.__call__

    def paused(self, task):
        time.sleep(pause)
        found = search(self, task)
        return found if radius is None else linear.Finding(task.start, task.start)

    monkeypatch.setattr(linear.Search, "__call__", paused)


def test_it_is_not_weaker_than_linear_and_says_what_it_learned(seconds):
    model = network_of("dense")
    x = inputs_of(model, 4)
    auto = certify(model, x, method="auto", time_budget=60)
    alone = certify(model, x, method="linear", time_budget=60)
    # A search from another start ends within its tolerance.
    assert np.all(auto.radius >= alone.radius * (1 - 4 * radii._TOLERANCE))
    assert any("went first on 3 inputs and enlarged" in text for text in auto.assumptions)
    assert not any("went first" in text for text in alone.assumptions)
    # What the others need at that pace is little here.
    assert 30 < seconds[0] < 60


def test_gains_take_a_small_share_where_bounds_pay_and_need_the_time(seconds, monkeypatch):
    slow(monkeypatch, 0.15)
    model = network_of("dense")
    certify(model, inputs_of(model, 60), method="auto", time_budget=6)
    assert seconds[0] <= widening._LEAST * 6 + 1e-9


def test_gains_take_half_where_bounds_enlarge_no_radius(seconds, monkeypatch):
    slow(monkeypatch, 0.15, radius="none")
    model = network_of("dense")
    certify(model, inputs_of(model, 60), method="auto", time_budget=6)
    # Up to what is left when the first inputs are done, on a machine that is busy.
    assert 2 * widening._LEAST * 6 < seconds[0] <= widening._EQUAL * 6


def test_what_the_first_inputs_gave_is_not_searched_again(monkeypatch):
    numbers, search = [], linear.Search.__call__

    def noted(self, task):
        numbers.append(task.number)
        return search(self, task)

    monkeypatch.setattr(linear.Search, "__call__", noted)
    model = network_of("dense")
    certify(model, inputs_of(model, 5), method="auto")
    assert sorted(numbers) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["linear", "lipsdp"])
def test_other_methods_keep_all_of_it(seconds, method):
    model = network_of("dense")
    certify(model, inputs_of(model, 2), method=method, time_budget=5)
    assert seconds == [5]
