"""First-order search: its derivative, its bracket of the optimum, and sizes that only it fits."""

import time

import chain_nets
import numpy as np
import pytest

from tf_lyapunov.bounds.chains import Chain, product_gain, scaled_chain
from tf_lyapunov.bounds.eclipse import closed_form
from tf_lyapunov.bounds.lipsdp import estimated_cost, lipsdp
from tf_lyapunov.bounds.multipliers import smallest_squared_gain
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.theory.sectors import Sector

SECTORS = [Sector(0.0, 1.0), Sector(0.1, 1.0), Sector(-0.13, 1.13), Sector(0.9, 1.0)]


def searched(chain, **options):
    scaled = scaled_chain(chain)
    reach = lambda lam: smallest_squared_gain(scaled, lam)  # noqa: E731
    return scaled, first_order.search(scaled.weights, scaled.alphas, scaled.betas, reach, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_the_gradient_is_the_derivative(tied, with_shortcut):
    rng = np.random.default_rng(0)
    scaled = scaled_chain(chain_nets.random_chain((4, 5, 6, 4), SECTORS[2]))
    shortcut = rng.normal(size=(4, 4)) if with_shortcut else None
    dual = first_order._Dual(scaled.weights, scaled.alphas, scaled.betas, tied, shortcut)
    point = rng.normal(size=dual.rows * 3)
    _, gradient = dual.cost(point)
    # Central differences err by about step² + 2⁻⁵³/step.
    step = 1e-5
    for k in range(0, len(point), 4):
        shift = step * np.eye(len(point))[k]
        slope = (dual.cost(point + shift)[0] - dual.cost(point - shift)[0]) / (2 * step)
        assert gradient[k] == pytest.approx(slope, abs=1e-8)


def test_every_value_of_the_dual_is_below_the_optimum():
    chain = chain_nets.random_chain((4, 5, 6, 3), seed=1)
    scaled = scaled_chain(chain)
    dual = first_order._Dual(scaled.weights, scaled.alphas, scaled.betas, False, None)
    optimum = lipsdp(chain).gain_upper_bound
    rng = np.random.default_rng(0)
    values = [dual.candidate(rng.normal(size=(dual.rows, 1 + k % 6)))[0] for k in range(300)]
    assert scaled.gain(max(values)) <= optimum
    assert scaled.gain(max(values)) > 0.2 * optimum  # power: not trivially so


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("widths", [(3, 1, 2), (5, 7, 3), (9, 5, 6, 2), (3, 4, 4, 4, 6)])
def test_it_equals_the_interior_point_method(widths, sector):
    chain = chain_nets.random_chain(widths, sector, seed=2)
    for variant in ("neuron", "layer"):
        scaled, found = searched(chain, tied=variant == "layer")
        expected = lipsdp(chain, variant=variant, solver="interior").gain_upper_bound
        assert scaled.gain(found.squared) == pytest.approx(expected, rel=2e-6)
        assert found.gap < 5e-6


def test_tied_multipliers_are_equal_within_a_layer():
    _, found = searched(chain_nets.random_chain((4, 6, 5, 3)), tied=True)
    assert all(np.ptp(lam) == 0 for lam in found.multipliers)


def test_too_few_columns_are_noticed_by_the_gap_and_doubled():
    chain = chain_nets.random_chain((100, 64, 64, 10), seed=2)
    _, narrow = searched(chain, columns=1)
    assert narrow.gap < 1e-6 and narrow.columns > 1
    _, once = searched(chain, columns=1, iterations=1)
    assert once.gap > 1e-3 and once.columns == 1


def test_it_is_deterministic():
    chain = chain_nets.random_chain((10, 20, 15, 4), seed=3)
    first, second = searched(chain)[1], searched(chain)[1]
    assert first.squared == second.squared
    for a, b in zip(first.multipliers, second.multipliers, strict=True):
        np.testing.assert_array_equal(a, b)


def test_more_steps_never_loosen_the_bound():
    chain = chain_nets.random_chain((30,) + (20,) * 12 + (5,), seed=4)
    bounds = [searched(chain, iterations=n, tol=1e-12)[1].squared for n in (1, 500, 1500)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_units_that_are_dead_or_unread_do_not_disturb(seed):
    chain = chain_nets.random_chain((6, 8, 7, 3), seed=seed)
    first, second, last = (np.array(w) for w in chain.weights)
    first[2], second[:, 4], last[:, 1] = 0.0, 0.0, 0.0
    second[3] = 0.0
    crippled = Chain((first, second, last), chain.sectors)
    keep, kept = [0, 1, 3, 5, 6, 7], [0, 2, 4, 5, 6]
    small = Chain((first[keep], second[np.ix_(kept, keep)], last[:, kept]), chain.sectors)
    expected = lipsdp(small, solver="interior").gain_upper_bound
    assert lipsdp(crippled).gain_upper_bound == pytest.approx(expected, rel=1e-4)


def test_equal_rows_and_rank_one_weights_are_handled():
    chain = Chain((np.ones((6, 4)), np.ones((5, 6)), np.ones((2, 5))), (Sector(0, 1),) * 2)
    exact = np.linalg.norm(np.linalg.multi_dot(chain.weights[::-1]), 2)
    assert lipsdp(chain).gain_upper_bound == pytest.approx(exact, rel=1e-6)


def test_a_wide_net_gets_lipsdp_where_an_interior_point_method_takes_hours():
    chain = chain_nets.random_chain((60, 500, 400, 5), seed=5)
    begin = time.monotonic()
    bound = lipsdp(chain)
    assert bound.verdict == "PROVED" and bound.method == "lipsdp"
    assert bound.gain_upper_bound < 0.9 * closed_form(chain).gain_upper_bound
    assert bound.gain_upper_bound <= bound.least * (1 + 1e-5)
    assert time.monotonic() - begin < 60  # 1 s alone
    assert estimated_cost(chain.widths)[0] < 20


def test_a_time_budget_ends_the_search_and_what_it_has_is_proved():
    chain = chain_nets.random_chain((60,) * 30, seed=6)
    begin = time.monotonic()
    bound = lipsdp(chain, seconds=0.5)
    assert time.monotonic() - begin < 20  # one round of steps ends, then the proof
    assert bound.verdict == "PROVED"
    assert bound.gain_upper_bound <= closed_form(chain).gain_upper_bound < product_gain(chain)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(784, 1024, 1024, 10), (784, 2000, 10), (64,) * 41])
def test_wide_and_deep_nets_reach_the_optimum(widths):
    bound = lipsdp(chain_nets.random_chain(widths, seed=7), seconds=300)
    assert bound.gain_upper_bound <= bound.least * (1 + 1e-3)
