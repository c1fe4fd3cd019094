"""ECLipsE: closed form against its formula, depth without overflow, and its place in the order."""

import chain_nets
import numpy as np
import pytest

from tf_lyapunov.bounds.chains import Chain, product_gain, scaled_chain
from tf_lyapunov.bounds.eclipse import closed_form, closed_form_multipliers, eclipse
from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.bounds.multipliers import certified_squared_gain, smallest_squared_gain
from tf_lyapunov.theory.sectors import Sector


def test_the_closed_form_is_the_published_recursion_for_relu():
    chain = chain_nets.random_chain((6, 5, 7, 4))
    x = np.eye(6)
    for weight in chain.weights[:-1]:
        k = weight @ np.linalg.inv(x) @ weight.T
        lam = 2 / np.linalg.norm(k, 2)
        x = lam * np.eye(len(weight)) - lam**2 / 4 * k
    last = chain.weights[-1]
    expected = np.sqrt(np.linalg.norm(last @ np.linalg.inv(x) @ last.T, 2))
    assert closed_form(chain).gain_upper_bound == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sector", [Sector(0, 1), Sector(0.3, 1), Sector(-0.2, 1.1)])
def test_one_hidden_layer_leaves_nothing_to_lose_for_the_layerwise_program(sector):
    chain = chain_nets.random_chain((9, 6, 3), sector, seed=1)
    assert eclipse(chain).gain_upper_bound == pytest.approx(
        lipsdp(chain).gain_upper_bound, rel=1e-5
    )


def test_a_hundred_layers_take_seconds_and_stay_finite():
    chain = chain_nets.random_chain((24,) * 101)
    bound = closed_form(chain)
    assert bound.verdict == "PROVED" and bound.seconds < 20
    assert 0 < bound.gain_upper_bound < product_gain(chain) * 1e-3


def test_the_certified_bound_is_that_of_its_multipliers_and_not_less():
    scaled = scaled_chain(chain_nets.random_chain((5, 5, 5, 4), seed=9))
    multipliers = closed_form_multipliers(scaled)
    raw = smallest_squared_gain(scaled, multipliers)
    proved, kept = certified_squared_gain(scaled, multipliers)
    assert raw <= proved <= raw * (1 + 1e-9)
    assert len(kept) == 2


def test_multipliers_off_the_feasible_set_are_repaired_at_a_small_cost():
    chain = chain_nets.random_chain((8, 7, 6, 5), seed=3)
    scaled = scaled_chain(chain)
    bound = lipsdp(chain)
    # A solver's usual error: a little outside.
    outside = [lam * (1 - 1e-7 * k) for k, lam in enumerate(bound.multipliers[::-1])][::-1]
    squared, _ = certified_squared_gain(scaled, outside)
    assert scaled.gain(squared) == pytest.approx(bound.gain_upper_bound, rel=1e-4)
    assert scaled.gain(squared) >= bound.gain_upper_bound * (1 - 1e-6)


def test_a_time_budget_of_zero_gives_the_closed_form():
    chain = chain_nets.random_chain((8, 7, 6, 5))
    assert eclipse(chain, seconds=0.0).gain_upper_bound == pytest.approx(
        closed_form(chain).gain_upper_bound, rel=1e-9
    )


def test_constant_weights_of_rank_one_are_handled():
    chain = Chain((np.ones((4, 3)), np.ones((5, 4)), np.ones((1, 5))), (Sector(0, 1),) * 2)
    exact = np.linalg.norm(np.ones((1, 5)) @ np.ones((5, 4)) @ np.ones((4, 3)), 2)
    for method in (closed_form, eclipse, lipsdp):
        assert method(chain).gain_upper_bound == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bound", [closed_form, liplt, lipsdp])
@pytest.mark.parametrize("sector", [Sector(0.0, 1.0), Sector.linear()])
def test_gains_beyond_the_range_of_floats_are_neither_zero_nor_errors(bound, sector):
    for size in (1e-110, 1e-170):
        chain = Chain((size * np.eye(2),) * 3, (sector,) * 2)
        assert 0 < bound(chain).gain_upper_bound < 1e-300
    if sector != Sector.linear():
        assert bound(Chain((1e110 * np.eye(2),) * 3, (sector,) * 2)).gain_upper_bound == np.inf
