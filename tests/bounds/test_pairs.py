"""Pairs of outputs: shared layers lose nothing, and the words say what bounded which pair."""

import chain_nets
import keras
import numpy as np
import pytest

from tf_lyapunov.bounds import budget as budgets
from tf_lyapunov.bounds import choice, pairs
from tf_lyapunov.bounds.budget import Budget
from tf_lyapunov.bounds.chains import Chain, with_narrow_input
from tf_lyapunov.bounds.eclipse import closed_form, eclipse
from tf_lyapunov.bounds.liplt import Products, liplt
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.bounds.multipliers import certified_squared_gain
from tf_lyapunov.certification import certify
from tf_lyapunov.theory.sectors import Sector
from tf_lyapunov.verification import inequalities, network, verify

SECTORS = [Sector(0.0, 1.0), Sector(0.1, 1.0), Sector(-0.13, 1.13), Sector(-1.0, 0.5)]


def difference(chain, i, j):
    row = np.zeros((1, chain.widths[-1]))
    row[0, i], row[0, j] = 1.0, -1.0
    return chain.with_output(row)


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("widths", [(5, 7, 6, 4), (12, 5, 3, 6), (3, 4, 4, 4, 3)])
def test_shared_layers_give_what_the_closed_form_gives_pair_by_pair(sector, widths):
    chain = chain_nets.random_chain(widths, sector, seed=1)
    shared = pairs.SharedLayers.of(closed_form(chain))
    gains, bounds = shared.pairs(chain)
    for (i, j), bound in bounds.items():
        alone = difference(chain, i, j)
        assert gains[i, j] == bound.gain_upper_bound == gains[j, i]
        assert gains[i, j] == pytest.approx(closed_form(alone).gain_upper_bound, rel=1e-6)
        assert chain_nets.sampled_gain(alone, 0, 4, 6) <= gains[i, j] * (1 + 1e-12)
        # Its multipliers prove it by themselves.
        squared, _ = certified_squared_gain(bound.scaled, bound.multipliers)
        assert bound.scaled.gain(squared) == pytest.approx(gains[i, j], rel=1e-6)


def test_shared_layers_of_lipsdp_are_sound_for_every_pair():
    chain = chain_nets.random_chain((6, 8, 7, 5), seed=2)
    gains, _ = pairs.SharedLayers.of(lipsdp(chain)).pairs(chain)
    for i in range(5):
        for j in range(i):
            alone = difference(chain, i, j)
            assert chain_nets.sampled_gain(alone, 1, 8, 8) <= gains[i, j]
            assert lipsdp(alone).gain_upper_bound <= gains[i, j] * (1 + 1e-6)


def test_entry_errors_reach_the_pairs():
    chain = chain_nets.random_chain((5, 6, 4), seed=3)
    loose = Chain(chain.weights, chain.sectors, errors=tuple(1e-3 * abs(w) for w in chain.weights))
    exact, _ = pairs.SharedLayers.of(closed_form(chain)).pairs(chain)
    found, _ = pairs.SharedLayers.of(closed_form(loose)).pairs(loose)
    off = ~np.eye(4, dtype=bool)
    assert np.all(found[off] > exact[off] * (1 + 1e-4))


@pytest.mark.parametrize("sector", SECTORS)
def test_products_of_layers_give_what_liplt_gives_pair_by_pair(sector):
    chain = chain_nets.random_chain((5, 7, 6, 4), sector, seed=4)
    gains = Products(chain).pair_gains()
    for i in range(4):
        for j in range(i):
            # LipLT alone also takes the product of norms.
            alone = liplt(difference(chain, i, j)).gain_upper_bound
            assert alone <= gains[i, j] * (1 + 1e-12)
            assert gains[i, j] <= alone * (1 + 1e-9) or alone == pytest.approx(
                choice.product_gain(difference(chain, i, j)), rel=1e-9
            )


def test_a_narrow_input_and_given_multipliers_change_no_bound():
    chain = chain_nets.random_chain((40, 6, 5, 3), seed=5)
    narrow = with_narrow_input(chain)
    assert narrow.widths == (6, 6, 5, 3)
    whole = eclipse(chain)
    for i, j in ((1, 0), (2, 1)):
        alone = difference(chain, i, j)
        expected = eclipse(alone).gain_upper_bound
        found = eclipse(difference(narrow, i, j), known=whole)
        assert found.gain_upper_bound == pytest.approx(expected, rel=1e-5)


def test_words_say_which_pairs_were_bounded_by_what():
    chain = chain_nets.random_chain((8, 10, 9, 4), seed=6)
    whole = lipsdp(chain)
    found = pairs.pair_gains(chain, "lipsdp", Budget(), "structured", whole)
    assert pairs.named_pairs(found.methods) == "each of 6 by lipsdp"
    assert not found.cut_short
    # Time for two pairs.
    budget, seen = Budget(), []
    found = pairs._Found(4, whole.gain_upper_bound)
    found.take(*pairs.SharedLayers.of(whole).pairs(chain), pairs.SHARED)

    def counted(*args):
        seen.append(args)
        return pairs._lipsdp(*args)

    pairs._SEARCHES[counted] = lambda widths: 0.0 if len(seen) < 2 else np.inf
    budget.fits = lambda flops: len(seen) < 2
    try:
        assert not pairs._searched(found, counted, chain, budget, "structured", whole)
    finally:
        del pairs._SEARCHES[counted]
    done = [pair for pair, name in found.methods.items() if name == "lipsdp"]
    text = pairs.named_pairs(found.methods)
    names = ", ".join(f"{i}-{j}" for i, j in done)
    assert len(done) == 2 and text.startswith(f"of 6, 2 by lipsdp ({names})")
    assert text.endswith(f"the other 4 by {pairs.SHARED}")


def test_nothing_begins_that_does_not_fit_the_time(monkeypatch):
    monkeypatch.setattr(budgets, "measured_rate", lambda: 1.0)  # one flop per second

    def begins(*args, **options):
        raise AssertionError("a step of minutes began")

    for name in ("_layer_by_layer", "certified_squared_gain"):
        for module in ("eclipse", "multipliers", "pairs"):
            monkeypatch.setattr(f"tf_lyapunov.bounds.{module}.{name}", begins, raising=False)
    chain = Chain((np.eye(500),) * 3 + (np.ones((3, 500)),), (Sector(0, 1),) * 3)
    for method in ("closed_form", "eclipse", "product"):
        bound = choice._bound(chain, method, Budget(20.0), "structured", None)
        assert bound.method == "product" and bound.verdict == "PROVED"
        assert bound.cut_short == (method != "product")
    assert choice._cheapest(chain, Budget(20.0)) == "product"


def test_the_verifier_shares_products_too_and_finds_the_same_pairs(monkeypatch, tmp_path):
    chain = chain_nets.random_chain((6, 8, 7, 5), seed=1)
    theirs = network.Chain(
        tuple(chain.weights), tuple(chain.errors), tuple((s.alpha, s.beta) for s in chain.sectors)
    )
    gains = inequalities.liplt_pair_gains(theirs)
    for i in range(5):
        for j in range(i):
            alone = inequalities.liplt_gain(theirs.output_difference(i, j))
            assert gains[i, j] == pytest.approx(alone, rel=1e-9) and gains[j, i] == gains[i, j]
    # A certificate whose pairs LipLT bounds is saved with that, and verified.
    monkeypatch.setattr(choice, "choose", lambda chain, budget: "liplt")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), *(keras.layers.Dense(30, "relu") for _ in range(4)),
         keras.layers.Dense(3)]
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    found = certify(model, x, method="auto", time_budget=2.0)
    assert "liplt" in {bound.method for bound in found.proof.chain.pairs.values()}
    found.save(tmp_path / "proof.npz")
    assert verify(tmp_path / "proof.npz", model).holds
