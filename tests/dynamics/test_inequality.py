"""The inequality of one step: at every value of the weights, and against trajectories."""

import numpy as np
import pytest
from equilibria import SUPPLIES, array, built, draw, responses

from tf_lyapunov.dynamics.systems import System, system_of
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.supply_rates import Contracting, feedthrough_form, supply_matrices
from tf_lyapunov.verification.dissipation import form, proves, smallest_theta


def nominal_holds(layer):
    """Whether the layer's own storage and multipliers prove the rate that it was made for."""
    system = system_of(layer)
    pair = system.storage, system.multipliers
    if isinstance(system.supply, Contracting):
        return proves(system, *pair, squared_rate=np.nextafter(system.supply.rate**2, 0))
    supply = supply_matrices(system.supply, system.outputs, system.inputs)
    return proves(system, *pair, supply)


@pytest.mark.parametrize("name", SUPPLIES)
def test_every_value_of_the_weights_satisfies_the_inequality(name):
    """40 settings a rate, with 8 sizes; 2000 in the slow test."""
    check_drawn(name, draws=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPLIES)
def test_thousands_of_values_of_the_weights_satisfy_the_inequality(name):
    check_drawn(name, draws=250)


def check_drawn(name, draws):
    rng = np.random.default_rng(len(name))
    failures = []
    for size in range(8):
        inputs, units, states = (int(v) for v in rng.integers(1, 8, 3))
        neurons, blocks = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        trained = name in ("gain", "strict", "indices") and size % 2 == 0
        layer = built(
            SUPPLIES[name](units, inputs), inputs, units, states, neurons, blocks=blocks,
            train_supply=trained,
        )  # fmt: skip
        for _ in range(draws):
            draw(layer, rng)
            if not nominal_holds(layer):
                failures.append((inputs, units, states, neurons, blocks))
    assert failures == []


@pytest.mark.parametrize("logarithms", [(-10.0, -10.0), (10.0, -3.0), (3.0, 10.0)])
def test_trained_indices_hold_up_to_the_most_that_any_system_has(logarithms):
    """4δν near 1: D₂₂ is known in float32 far less well than it must differ from u/2δ."""
    layer = built(SUPPLIES["strict"](4, 4), 4, 4, 4, 4, train_supply=True)
    rng = np.random.default_rng(0)
    for _ in range(8):
        draw(layer, rng)
        layer.cell.supply_logarithms.assign(logarithms)
        assert nominal_holds(layer)


def test_states_of_very_different_sizes_hold():
    """X of condition 10⁷: its Gram matrix has none of the small directions in float32."""
    layer = built(SUPPLIES["gain"](2, 2))
    rng = np.random.default_rng(0)
    for _ in range(8):
        draw(layer, rng, spread=0.0)
        factor = array(layer.cell.factor)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] * 10.0 ** np.array([0, -3.5, -7])
        factor[:, :3], factor[:, -3:] = factor[:, :3] @ turn, factor[:, -3:] @ turn
        layer.cell.factor.assign(factor.astype("float32"))
        assert nominal_holds(layer)


@pytest.mark.parametrize("name", ["gain", "indices", "general"])
def test_no_trajectory_takes_more_than_its_supply_and_its_first_storage(name):
    rng = np.random.default_rng(3)
    layer = draw(built(SUPPLIES[name](2, 2)), rng, spread=0.5)
    system = system_of(layer)
    q, s, r = supply_matrices(system.supply, 2, 2)
    for _ in range(20):
        u, v = rng.normal(size=(2, 12, 2)) * 10.0 ** rng.uniform(-1, 1)
        x, z = rng.normal(size=(2, 3))
        dy = responses(system, u, x) - responses(system, v, z)
        du, dx = u - v, x - z
        supplied = np.einsum("ti,ij,tj->", dy, q, dy) + np.einsum("ti,ij,tj->", du, r, du)
        supplied += 2 * np.einsum("ti,ij,tj->", du, s, dy)
        stored = dx @ system.storage @ dx
        # 12 steps of sums of ten products each.
        assert supplied >= -stored - 1e-11 * (np.sum(du**2) * np.max(np.abs(r)) + stored)


def test_the_matrix_is_the_one_of_the_implicit_equations():
    """(T) of the parametrisation and the explicit form agree: one minus the other is ⪰ 0."""
    layer = built(SUPPLIES["gain"](2, 2), dtype="float64")
    system = system_of(layer)
    values = layer.cell.effective_values()
    e, p, lam = values["implicit"], values["metric"], values["multipliers"]
    n, q = system.states, system.units
    explicit = form(system, system.storage, lam, supply_matrices(system.supply, 2, 2))[0]
    implicit = np.array(explicit)
    implicit[:n, :n] += e + e.T - p - system.storage
    assert np.linalg.eigvalsh(implicit)[0] > 0
    assert np.linalg.eigvalsh(explicit - implicit)[0] > -1e-12
    blocks = system.neurons[:, n : n + q]
    assert np.all(blocks[np.triu_indices(q)] == 0)


def test_another_sector_is_another_matrix():
    """φ with slopes in [0.2, 0.9]: random slopes never make the form of T negative."""
    rng = np.random.default_rng(0)
    n, q, m = 2, 3, 1
    system = System(
        "drawn", rng.normal(size=(n, n + q + m)), rng.normal(size=(q, n + q + m)),
        np.zeros((1, n + q + m)), Sector(0.2, 0.9),
    )  # fmt: skip
    lam = rng.uniform(0.5, 2, q)
    zero = np.zeros((n, n))
    none = np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1))
    negative = form(system, zero, lam, none)[0]
    for _ in range(50):
        slopes = rng.uniform(0.2, 0.9, q)
        x, u = rng.normal(size=n), rng.normal(size=m)
        known = system.neurons[:, :n] @ x + system.neurons[:, n + q :] @ u
        inside = system.neurons[:, n : n + q]
        w = np.linalg.solve(np.eye(q) - slopes[:, None] * inside, slopes * known)
        z = np.concatenate([x, w, u])
        assert z @ negative @ z <= 1e-12 * (z @ z)


def test_errors_of_entries_cover_exact_arithmetic():
    from fractions import Fraction

    rng = np.random.default_rng(1)
    system = System.linear(*(rng.normal(size=(2, 2)) for _ in range(4)))
    storage = np.array([[2.0, 0.3], [0.3, 1.7]])
    supply = -np.eye(2) / 3, 0.1 * np.ones((2, 2)), np.eye(2)
    value, error = form(system, storage, np.zeros(0), supply, theta=0.7)
    exact = np.vectorize(Fraction, otypes=[object])
    step, output = exact(system.step), exact(system.output)
    wanted = -step.T @ exact(storage) @ step + output.T @ exact(supply[0]) @ output
    cross = output.T @ exact(supply[1]).T @ exact(np.eye(4)[2:])
    wanted = wanted + cross + cross.T
    wanted[:2, :2] += exact(storage)
    wanted[2:, 2:] += exact(supply[2]) + Fraction(0.7) * exact(np.eye(2))
    distance = np.abs(exact(value) - wanted)
    assert np.all(distance <= exact(error))
    assert np.max(error) < 1e-13


def test_a_storage_that_is_not_positive_or_negative_multipliers_prove_nothing():
    lag = System.linear([[0.5]], [[1.0]], [[1.0]], [[0.0]])
    rate = -np.eye(1), np.zeros((1, 1)), np.zeros((1, 1))
    assert proves(lag, np.array([[2.0]]), np.zeros(0), rate, theta=5.0)
    assert not proves(lag, np.array([[-2.0]]), np.zeros(0), rate, theta=5.0)
    assert not proves(lag, np.array([[np.nan]]), np.zeros(0), rate, theta=5.0)
    assert smallest_theta(lag, np.array([[0.1]]), np.zeros(0), rate) == np.inf


def test_a_feedthrough_of_the_form_satisfies_the_rate():
    rng = np.random.default_rng(2)
    for supply in (Indices(0.5, 0.3), Indices(2.0, -1.0), SUPPLIES["general"](3, 3)):
        center, half, root = feedthrough_form(supply, 3, 3)
        q, s, r = supply_matrices(supply, 3, 3)
        z = rng.normal(size=(3, 3))
        z *= 0.9 / np.linalg.norm(z, 2)
        d = center + half @ z @ root
        left = r + s @ d + d.T @ s.T + d.T @ q @ d
        np.testing.assert_allclose(left, root.T @ (np.eye(3) - z.T @ z) @ root, atol=1e-12)


@pytest.mark.parametrize(
    ("supply", "sizes"),
    [(Indices(0.0, -1.0), (2, 2)), (Indices(0.5, 0.1), (1, 2)), (Indices(0.5, 0.5), (2, 2))],
)
def test_rates_that_leave_no_room_are_refused_with_a_way_out(supply, sizes):
    with pytest.raises(ValueError, match="Received"):
        feedthrough_form(supply, *sizes)
