"""Graphs as one problem: LipSDP on chains, another solver's optimum on skips, above all slopes."""

import dataclasses

import chain_nets
import numpy as np
import pytest

from tf_lyapunov.bounds.blocks import residual_gain
from tf_lyapunov.bounds.joint import FormBuilder, bounded, joint_gain
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.theory.sectors import Sector

RELU = chain_nets.RELU
SECTORS = [RELU, Sector(0.1, 1.0), Sector(-0.13, 1.13), Sector(-1.0, 0.5)]


def chain_form(chain):
    builder = FormBuilder(chain.widths[0])
    form = builder.signal(0)
    for weight, error, sector in zip(
        chain.weights, chain.errors, (*chain.sectors, None), strict=True
    ):
        form = builder.times(weight, error, form)
        form = form if sector is None else builder.activated(form, sector)
    return builder.finish(form)


def residual_blocks(depth, width, seed, inner=None):
    rng = np.random.default_rng(seed)
    inner = inner or width
    return [
        (rng.normal(size=(inner, width)) / 4, rng.normal(size=(width, inner)) / 4)
        for _ in range(depth)
    ]


def residual_form(blocks, sector=RELU):
    builder = FormBuilder(blocks[0][0].shape[1])
    form = builder.signal(0)
    for first, second in blocks:
        branch = builder.activated(builder.times(first, 0.0, form), sector)
        form = builder.total([form, builder.times(second, 0.0, branch)], [1.0, 1.0])
    return builder.finish(form)


def steepest(blocks, starts=30, rounds=8):
    """Largest norm of a Jacobian of the ReLU residual net that random walks uphill find."""
    rng, best = np.random.default_rng(0), 0.0
    width = blocks[0][0].shape[1]
    for _ in range(starts):
        x = 3 * rng.normal(size=width)
        for _ in range(rounds):
            jacobian, signal = np.eye(width), x
            for first, second in blocks:
                inner = first @ signal
                jacobian = jacobian + second @ ((inner > 0)[:, None] * (first @ jacobian))
                signal = signal + second @ np.maximum(inner, 0)
            _, values, rows = np.linalg.svd(jacobian)
            best, x = max(best, values[0]), x + rng.normal() * rows[0]
    return best


@pytest.mark.parametrize("sector", SECTORS)
@pytest.mark.parametrize("widths", [(4, 6, 3), (5, 3, 6, 4, 2)])
def test_a_chain_gives_lipsdp(sector, widths):
    chain = chain_nets.random_chain(widths, sector, seed=1)
    expected = lipsdp(chain).gain_upper_bound
    bound = joint_gain(chain_form(chain))
    assert bound.gain_upper_bound == pytest.approx(expected, rel=3e-6)
    assert bound.least <= bound.gain_upper_bound


@pytest.mark.parametrize("sector", SECTORS[:3])
def test_one_block_gives_the_bound_of_a_residual_block(sector):
    (block,) = residual_blocks(1, 6, seed=2, inner=9)
    expected = residual_gain(block, [sector]).gain_upper_bound
    found = joint_gain(residual_form([block], sector)).gain_upper_bound
    assert found == pytest.approx(expected, rel=3e-6)


def test_two_blocks_equal_an_independent_solver():
    cp = pytest.importorskip("cvxpy", reason="the second formulation needs cvxpy")
    (u, v), (s, t) = residual_blocks(2, 4, seed=3)
    eye, zero = np.eye(4), np.zeros((4, 4))
    rho, first, second = cp.Variable(), cp.Variable(4, nonneg=True), cp.Variable(4, nonneg=True)
    # Rows of (x, z, w): z = relu(u x), w = relu(s (x + v z)), f = x + v z + t w.
    read = np.hstack([u, zero, zero]), np.hstack([s, s @ v, zero])
    unit = np.hstack([zero, eye, zero]), np.hstack([zero, zero, eye])
    out, start = np.hstack([eye, v, t]), np.hstack([eye, zero, zero])
    form = out.T @ out - rho * start.T @ start
    for lam, y, z in zip((first, second), read, unit, strict=True):
        diagonal = cp.diag(lam)
        form = form + z.T @ diagonal @ y + y.T @ diagonal @ z - 2 * z.T @ diagonal @ z
    cp.Problem(cp.Minimize(rho), [(form + form.T) / 2 << 0]).solve(solver="CLARABEL")
    found = joint_gain(residual_form([(u, v), (s, t)])).gain_upper_bound
    assert found == pytest.approx(np.sqrt(rho.value), rel=1e-5)


@pytest.mark.parametrize("depth", [3, 5])
def test_the_joint_bound_lies_between_slopes_and_far_below_the_product_of_blocks(depth):
    blocks = residual_blocks(depth, 16, seed=depth)
    bound = joint_gain(residual_form(blocks)).gain_upper_bound
    product = np.prod([residual_gain(b, [RELU]).gain_upper_bound for b in blocks])
    slope = steepest(blocks)
    assert slope <= bound < product / 2
    assert slope > 0.25 * bound  # the slopes found are no strawmen


def test_entry_errors_and_extreme_sizes_keep_the_bound_sound():
    chain = chain_nets.random_chain((4, 6, 5, 3), seed=5)
    plain = joint_gain(chain_form(chain)).gain_upper_bound
    loose = dataclasses.replace(chain, errors=tuple(1e-3 * abs(w) for w in chain.weights))
    bound = joint_gain(chain_form(loose)).gain_upper_bound
    assert plain < bound < 1.1 * plain
    rng = np.random.default_rng(0)
    for _ in range(5):
        moved = [w * (1 + 1e-3 * rng.choice([-1, 1], w.shape)) for w in chain.weights]
        found = joint_gain(chain_form(dataclasses.replace(chain, weights=tuple(moved))))
        assert found.gain_upper_bound <= bound
    weights = [np.ldexp(w, p) for w, p in zip(chain.weights, (90, -200, 110), strict=True)]
    moved = joint_gain(chain_form(dataclasses.replace(chain, weights=tuple(weights))))
    assert moved.gain_upper_bound == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1e-9])
def test_wrong_multipliers_prove_nothing_or_more(share):
    form = residual_form(residual_blocks(2, 5, seed=6)).scaled()
    best = bounded(form)
    wrong = [np.where(np.arange(len(v)) % 2, share * v, v) for v in best.multipliers]
    found = bounded(form, multipliers=wrong)
    assert found.gain_upper_bound >= best.gain_upper_bound * (1 - 1e-6)
    garbage = [np.full_like(v, np.nan) for v in best.multipliers]
    assert bounded(form, multipliers=garbage).gain_upper_bound == np.inf


def test_linear_functions_need_no_multipliers():
    rng = np.random.default_rng(7)
    first, second = rng.normal(size=(5, 4)), rng.normal(size=(3, 5))
    builder = FormBuilder(4)
    form = builder.activated(builder.times(first, 0.0, builder.signal(0)), Sector(0.5, 0.5))
    bound = joint_gain(builder.finish(builder.times(second, 0.0, form)))
    exact = np.linalg.norm(0.5 * second @ first, 2)
    assert exact <= bound.gain_upper_bound <= exact * (1 + 1e-12)
