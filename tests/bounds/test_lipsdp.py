"""LipSDP: equals independent optima, reaches exact cases, and never undercuts a sampled gain."""

import chain_nets
import numpy as np
import pytest

from tf_lyapunov.bounds.chains import Chain, product_gain, scaled_chain
from tf_lyapunov.bounds.eclipse import closed_form, eclipse
from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.bounds.lipsdp import check_size, lipsdp
from tf_lyapunov.theory.sectors import Sector

# Relative slack for the orders between bounds of which one is a solver's optimum: its tolerance.
SOLVED = 1e-6
SECTORS = [Sector(0.0, 1.0), Sector(0.1, 1.0), Sector(-0.13, 1.13), Sector(-1.0, 0.5)]


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("widths", [(4, 6, 3), (9, 5, 6, 2), (3, 4, 4, 4, 6)])
def test_lipsdp_equals_the_published_dense_formulation(widths, sector):
    pytest.importorskip("cvxpy", reason="the second formulation needs cvxpy")
    chain = chain_nets.random_chain(widths, sector)
    ours = lipsdp(chain)
    assert ours.verdict == "PROVED" and ours.method == "lipsdp"
    assert ours.gain_upper_bound == pytest.approx(chain_nets.plain_lipsdp(chain), rel=1e-5)


def test_lipsdp_equals_scs_at_high_accuracy():
    pytest.importorskip("cvxpy", reason="the second solver needs cvxpy")
    chain = chain_nets.random_chain((3, 5, 4, 2), seed=3)
    expected = chain_nets.plain_lipsdp(chain, "SCS")
    assert lipsdp(chain).gain_upper_bound == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("solver", ["clarabel", "scs", "interior"])
def test_every_solver_gives_the_same_proven_bound(solver):
    pytest.importorskip("cvxpy", reason="these solvers need cvxpy")
    chain = chain_nets.random_chain((6, 5, 5, 3), seed=4)
    other = lipsdp(chain, solver=solver, tol=1e-8)
    assert other.verdict == "PROVED" and other.solver == solver
    assert other.gain_upper_bound == pytest.approx(lipsdp(chain).gain_upper_bound, rel=1e-5)


def test_the_difference_of_two_relus_has_lipschitz_constant_one():
    chain = Chain(
        (np.array([[1.0], [1.0]]), np.array([[1.0, -1.0]])),
        (chain_nets.RELU,),
        biases=(np.array([0.0, -1.0]), np.zeros(1)),
    )
    x = np.linspace(-1, 2, 301)
    f = np.maximum(x, 0) - np.maximum(x - 1, 0)
    true = np.max(np.abs(np.diff(f) / np.diff(x)))
    assert true == pytest.approx(1.0)
    for bound in (lipsdp(chain), eclipse(chain), closed_form(chain), liplt(chain)):
        assert bound.gain_upper_bound >= 1.0 - 1e-12
    assert lipsdp(chain).gain_upper_bound == pytest.approx(1.0, rel=1e-6)


def test_multipliers_for_pairs_of_units_would_claim_almost_nothing():
    # Negative control: LipSDP-Network's T = Σ λ_i e_ie_iᵀ + Σ λ_ij (e_i-e_j)(e_i-e_j)ᵀ is unsound.
    cp = pytest.importorskip("cvxpy", reason="the unsound formulation needs cvxpy")
    first, last = np.array([[1.0], [1.0]]), np.array([[1.0, -1.0]])
    rho, lam = cp.Variable(), cp.Variable(3, nonneg=True)
    difference = np.array([[1.0, -1.0], [-1.0, 1.0]])
    t = cp.diag(lam[:2]) + lam[2] * difference
    cross = -first.T @ t
    matrix = cp.bmat(
        [[cp.reshape(rho, (1, 1), order="F"), cross], [cross.T, 2 * t - last.T @ last]]
    )
    cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 >> 0]).solve(solver="CLARABEL")
    assert np.sqrt(max(rho.value, 0.0)) < 1e-3  # and the function has Lipschitz constant 1
    sound = lipsdp([first, last], [chain_nets.RELU]).gain_upper_bound
    assert sound == pytest.approx(1.0, rel=1e-6)


def greedy_seqlip(first, last, seed):
    """SeqLip by greedy flips of slopes, as it is run: a local maximum of ‖W_2 diag(s) W_1‖."""
    slopes = np.random.default_rng(seed).integers(0, 2, len(first)).astype(float)
    best = np.linalg.norm(last * slopes @ first, 2)
    improved = True
    while improved:
        improved = False
        for unit in range(len(first)):
            slopes[unit] = 1 - slopes[unit]
            value = np.linalg.norm(last * slopes @ first, 2)
            if value > best + 1e-12:
                best, improved = value, True
            else:
                slopes[unit] = 1 - slopes[unit]
    return best


def test_seqlip_undercuts_the_true_gain_and_no_bound_of_ours_does():
    undercut = 0
    for seed in range(40):
        chain = chain_nets.random_chain((5, 8, 4), seed=seed)
        first, last = chain.weights
        patterns = (np.arange(256)[:, None] >> np.arange(8)) & 1
        true = max(np.linalg.norm(last * slopes @ first, 2) for slopes in patterns)
        undercut += greedy_seqlip(first, last, seed) < 0.999 * true
        for method in (lipsdp, liplt):
            assert method(chain).gain_upper_bound >= true * (1 - 1e-12)
    assert undercut >= 2


@pytest.mark.parametrize("widths", [(5, 7, 3), (4, 6, 5, 4), (8, 3, 3, 3, 2)])
def test_non_negative_weights_make_the_norm_of_the_product_exact(widths):
    chain = chain_nets.random_chain(widths, seed=5, nonnegative=True)
    exact = np.linalg.norm(np.linalg.multi_dot(chain.weights[::-1]), 2)
    bound = lipsdp(chain).gain_upper_bound
    assert exact * (1 - 1e-12) <= bound <= exact * (1 + SOLVED)
    # Negative control: the product of norms does not reach it.
    assert product_gain(chain) > 1.0001 * exact


@pytest.mark.parametrize("sector", SECTORS)
def test_scaling_the_first_layer_scales_every_bound(sector):
    chain = chain_nets.random_chain((6, 5, 5, 3), sector)
    scaled = Chain((3.0 * chain.weights[0], *chain.weights[1:]), chain.sectors)
    for method in (lipsdp, eclipse, closed_form, liplt):
        ratio = method(scaled).gain_upper_bound / method(chain).gain_upper_bound
        assert ratio == pytest.approx(3.0, rel=1e-4)


def assert_in_order(chain, seed, starts=6, rounds=8):
    """product ≥ closed form ≥ eclipse ≥ LipSDP ≥ every gain found by ascent; likewise LipLT."""
    product = product_gain(chain)
    tight, layer = lipsdp(chain), lipsdp(chain, variant="layer")
    greedy, simple, pairs = eclipse(chain), closed_form(chain), liplt(chain)
    assert {b.verdict for b in (tight, layer, greedy, simple, pairs)} == {"PROVED"}
    assert product >= simple.gain_upper_bound >= greedy.gain_upper_bound
    assert product >= pairs.gain_upper_bound
    assert greedy.gain_upper_bound >= tight.gain_upper_bound * (1 - SOLVED)
    assert layer.gain_upper_bound >= tight.gain_upper_bound * (1 - SOLVED)
    # The optimum that the dual leaves room for, up to its accuracy.
    assert tight.least * (1 - SOLVED) <= tight.gain_upper_bound <= tight.least * (1 + 1e-5)
    lower = chain_nets.sampled_gain(chain, seed, starts, rounds)
    assert lower <= min(tight.gain_upper_bound, pairs.gain_upper_bound) * (1 + 1e-12)
    return product / tight.gain_upper_bound, tight.gain_upper_bound / lower


@pytest.mark.parametrize("block", range(4))
def test_bounds_are_ordered_and_above_every_gain_found_on_a_hundred_nets(block):
    ratios = []
    for seed in range(25 * block, 25 * (block + 1)):
        rng = np.random.default_rng(seed)
        widths = tuple(rng.integers(2, 9, size=rng.integers(3, 6)))
        chain = chain_nets.random_chain(widths, SECTORS[seed % 4], seed)
        ratios.append(assert_in_order(chain, seed))
    # Power: the orders are strict, and the gains found are no strawmen.
    gained, loose = np.median(ratios, axis=0)
    assert gained > 1.2 and loose < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_bounds_are_ordered_on_larger_nets(seed):
    rng = np.random.default_rng(seed)
    widths = tuple(rng.integers(20, 120, size=rng.integers(3, 8)))
    chain = chain_nets.random_chain(widths, SECTORS[seed % 4], seed)
    assert_in_order(chain, seed, starts=16, rounds=20)


def test_one_output_at_a_time_is_tighter_than_all_of_them():
    chain = chain_nets.random_chain((7, 6, 4), seed=8)
    whole = lipsdp(chain).gain_upper_bound
    row = np.array([[1.0, -1.0, 0.0, 0.0]])
    pair = lipsdp(chain.with_output(row)).gain_upper_bound
    assert pair <= np.sqrt(2) * whole * (1 + SOLVED)
    difference = Chain((chain.weights[0], row @ chain.weights[1]), chain.sectors)
    assert pair == pytest.approx(lipsdp(difference).gain_upper_bound, rel=1e-7)
    assert pair >= chain_nets.sampled_gain(difference)


def test_wide_inputs_and_outputs_are_eliminated_without_loss():
    chain = chain_nets.random_chain((40, 4, 5, 30), seed=2)
    reduced = np.linalg.qr(chain.weights[0].T, mode="r").T
    small = Chain((reduced, *chain.weights[1:]), chain.sectors)
    expected = lipsdp(small).gain_upper_bound
    assert lipsdp(chain).gain_upper_bound == pytest.approx(expected, rel=1e-6)


def test_linear_layers_constant_layers_and_single_layers_are_exact():
    chain = chain_nets.random_chain((5, 4, 6, 3), Sector.linear())
    exact = np.linalg.norm(np.linalg.multi_dot(chain.weights[::-1]), 2)
    for method in (lipsdp, eclipse, closed_form, liplt):
        bound = method(chain).gain_upper_bound
        assert exact <= bound * (1 + 1e-15) and bound <= exact * (1 + 1e-9)
    constant = Chain(chain.weights, (Sector(0.0, 0.0),) * 2)
    assert lipsdp(constant).gain_upper_bound == 0.0 == closed_form(constant).gain_upper_bound
    single = Chain((np.diag([3.0, 1.0]),), ())
    assert lipsdp(single).gain_upper_bound == pytest.approx(3.0, rel=1e-12)


def test_gains_of_extreme_size_neither_overflow_nor_vanish():
    chain = chain_nets.random_chain((4,) * 6, seed=1)
    reference = lipsdp(chain).gain_upper_bound
    for exponent in (-150, 150):
        weights = (np.ldexp(chain.weights[0], exponent), *chain.weights[1:])
        bound = lipsdp(Chain(weights, chain.sectors)).gain_upper_bound
        assert bound == pytest.approx(np.ldexp(reference, exponent), rel=1e-6)


def test_entry_errors_enlarge_the_bound():
    chain = chain_nets.random_chain((5, 6, 3), seed=6)
    error = tuple(1e-3 * np.abs(w) for w in chain.weights)
    loose = Chain(chain.weights, chain.sectors, errors=error)
    rng = np.random.default_rng(0)
    for method in (lipsdp, closed_form, liplt):
        bound = method(loose).gain_upper_bound
        assert bound > method(chain).gain_upper_bound
        for _ in range(5):
            pairs = zip(chain.weights, error, strict=True)
            moved = [w + e * rng.choice([-1, 1], w.shape) for w, e in pairs]
            assert method(Chain(tuple(moved), chain.sectors)).gain_upper_bound <= bound * 1.0005


def test_a_search_cut_short_still_returns_a_proof():
    chain = chain_nets.random_chain((12, 20, 20, 20, 5))
    bound = lipsdp(chain, seconds=0.0)
    assert bound.verdict == "PROVED"
    assert lipsdp(chain).gain_upper_bound <= bound.gain_upper_bound * (1 + SOLVED)
    assert bound.gain_upper_bound <= closed_form(chain).gain_upper_bound


def test_a_solver_that_fails_is_reported_and_replaced_by_a_proven_bound(monkeypatch):
    from tf_lyapunov.bounds import lipsdp as module
    from tf_lyapunov.errors import SolverFailure

    def fails(*args, **kwargs):
        raise SolverFailure("no", "structured", "error")

    chain = chain_nets.random_chain((12, 16, 16, 4))
    monkeypatch.setattr(module, "solve", fails)
    # The first-order method steps in for ours, under its own name.
    helped = lipsdp(chain, solver="interior")
    assert (helped.verdict, helped.solver) == ("PROVED", "structured") and not helped.cut_short
    assert helped.gain_upper_bound == lipsdp(chain).gain_upper_bound
    monkeypatch.setattr(module.first_order, "search", fails)
    bound = lipsdp(chain, solver="interior")
    assert bound.verdict == "SOLVER_FAILED" and bound.method == "closed form"
    assert bound.gain_upper_bound == closed_form(chain).gain_upper_bound


def test_an_interior_search_that_stops_early_is_not_the_bound(monkeypatch):
    import dataclasses

    from tf_lyapunov.bounds import lipsdp as module

    chain, solve = chain_nets.random_chain((12, 16, 16, 4)), module.solve

    weak = []

    def stops(*args, **options):
        found = solve(*args, **options)
        theta, lam = found.points[-1]  # the first of its path
        weak.append(dataclasses.replace(found, theta=theta, multipliers=lam, status="cut short"))
        return weak[-1]

    monkeypatch.setattr(module, "solve", stops)
    bound = lipsdp(chain, solver="interior")
    best = lipsdp(chain).gain_upper_bound
    assert scaled_chain(chain).gain(weak[0].theta) > 1.01 * best
    assert bound.solver == "structured" and not bound.cut_short
    assert bound.gain_upper_bound == best


def test_what_a_search_falls_back_to_keeps_its_own_name(monkeypatch):
    from tf_lyapunov.bounds import lipsdp as module

    chain = chain_nets.random_chain((12, 16, 16, 4))
    simple = closed_form(chain)
    monkeypatch.setattr(
        module, "_search", lambda scaled, *a: module._Found(
            tuple(3.0 * lam for lam in simple.multipliers), 0.0, "interior", True))  # fmt: skip
    bound = lipsdp(chain, solver="interior")
    assert (bound.method, bound.solver, bound.cut_short) == ("closed form", "", True)
    assert bound.gain_upper_bound == simple.gain_upper_bound


@pytest.mark.parametrize("garbage", [np.nan, -1.0, 0.0, 1e-30, 1e300])
def test_wrong_multipliers_from_a_solver_never_become_a_wrong_bound(monkeypatch, garbage):
    import dataclasses

    from tf_lyapunov.bounds import lipsdp as module

    chain = chain_nets.random_chain((5, 6, 4, 3))
    honest, solve = lipsdp(chain).gain_upper_bound, module.solve
    search = module.first_order.search

    def lies(*args, **kwargs):
        result = solve(*args, **kwargs)
        wrong = np.where(np.arange(10) % 3 == 0, garbage, result.multipliers)
        return dataclasses.replace(result, multipliers=wrong, theta=1e-9, status="optimal")

    def also_lies(*args, **kwargs):
        found = search(*args, **kwargs)
        wrong = [np.where(np.arange(len(v)) % 3 == 0, garbage, v) for v in found.multipliers]
        return dataclasses.replace(found, multipliers=tuple(wrong), squared=1e-9, value=1e-9)

    monkeypatch.setattr(module, "solve", lies)
    monkeypatch.setattr(module.first_order, "search", also_lies)
    for solver in ("interior", "structured"):
        bound = lipsdp(chain, solver=solver)
        assert honest * (1 - SOLVED) <= bound.gain_upper_bound
        assert bound.gain_upper_bound <= closed_form(chain).gain_upper_bound


def test_too_large_problems_say_their_cost_and_what_fits():
    with pytest.raises(ValueError, match=r"minutes and \d+ GB.*Use method='composition'"):
        check_size((3072, 20000, 20000, 10))
    check_size((3072, 4096, 4096, 10))


def test_bad_arguments_are_refused():
    chain = chain_nets.random_chain((3, 3, 2))
    with pytest.raises(ValueError, match="`variant` must be one of"):
        lipsdp(chain, variant="network")
    with pytest.raises(ValueError, match="`solver` must be one of"):
        lipsdp(chain, solver="guess")
    with pytest.raises(ValueError, match="one sector per hidden layer"):
        lipsdp(chain.weights, [])
    with pytest.raises(ValueError, match="must be finite"):
        Chain((np.array([[np.nan]]),), ())
    with pytest.raises(ValueError, match="must read what the one before"):
        Chain((np.ones((2, 3)), np.ones((2, 3))), (chain_nets.RELU,))
