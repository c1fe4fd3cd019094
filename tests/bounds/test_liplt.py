"""LipLT against a direct evaluation of its formula, and in exact cases."""

import chain_nets
import numpy as np
import pytest

from tf_lyapunov.bounds.chains import Chain, product_gain
from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.theory.sectors import Sector


def test_two_layers_follow_the_formula():
    chain = chain_nets.random_chain((5, 6, 4))
    first, last = chain.weights
    norm = lambda a: np.linalg.norm(a, 2)  # noqa: E731
    expected = norm(last @ first) / 2 + norm(last) * norm(first) / 2
    assert liplt(chain).gain_upper_bound == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sector", [Sector(0, 1), Sector(0.1, 1), Sector(-0.2, 1.1), Sector(-1, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_it_lies_between_the_sampled_gain_and_the_product(sector, seed):
    chain = chain_nets.random_chain((4, 7, 6, 5, 3), sector, seed)
    bound = liplt(chain).gain_upper_bound
    assert chain_nets.sampled_gain(chain, seed, 8, 10) <= bound <= product_gain(chain)


def test_weights_and_sectors_may_be_given_without_a_chain():
    chain = chain_nets.random_chain((4, 7, 3))
    assert liplt(chain.weights, chain.sectors).gain_upper_bound == liplt(chain).gain_upper_bound


def test_deep_chains_of_extreme_gain_stay_finite():
    weights = tuple(np.eye(3) * 2.0**60 for _ in range(20))
    bound = liplt(Chain(weights, (Sector(0, 1),) * 19)).gain_upper_bound
    assert bound == np.inf  # 2^1200 is beyond float64: no finite claim
    halves = tuple(np.eye(3) * 2.0 ** (60 * (-1) ** k) for k in range(20))
    assert liplt(Chain(halves, (Sector(0, 1),) * 19)).gain_upper_bound == pytest.approx(1.0)
