"""Indices of linear plants and loops of two systems: identities, simulations, refusals."""

import numpy as np
import pytest

from tf_lyapunov import Indices
from tf_lyapunov.control import linear_indices, passive_feedback

pytest.importorskip("cvxpy")


def test_a_delay_has_the_shortage_one():
    found = linear_indices([[0.0]], [[1.0]], [[1.0]])
    # V = p y²: -p y² ∓ uy + (-ν - p)u² ≤ 0 needs p(-ν - p) ≥ 1/4, best at p = 1/2.
    assert found and -1 - 1e-4 <= found.indices.nu <= -1 + 1e-6
    assert "PROVED" in repr(found) and found.storage[0, 0] == pytest.approx(0.5, abs=1e-2)


def plants():
    rng = np.random.default_rng(3)
    for n, m, delta, has_feedthrough in [(1, 1, 0.0, True), (3, 1, 0.1, True), (3, 2, 0.0, False)]:
        a = rng.normal(size=(n, n))
        a *= 0.8 / np.max(np.abs(np.linalg.eigvals(a)))
        d = 0.5 * np.eye(m) if has_feedthrough else None
        yield a, rng.normal(size=(n, m)), rng.normal(size=(m, n)), d, delta


@pytest.mark.parametrize("plant", plants())
def test_indices_hold_on_every_trajectory_and_are_nearly_the_largest(plant):
    a, b, c, d, delta = plant
    found = linear_indices(a, b, c, d, delta=delta)
    assert found
    d = np.zeros((len(c), len(c))) if d is None else d
    rng, nu = np.random.default_rng(0), found.indices.nu
    x, u = rng.normal(size=(500, len(a))), rng.normal(size=(500, b.shape[1]))
    value = lambda y: np.einsum("ij,jk,ik->i", y, found.storage, y)  # noqa: E731
    y = x @ c.T + u @ d.T
    supply = np.sum(u * y, 1) - delta * np.sum(y * y, 1) - nu * np.sum(u * u, 1)
    assert np.all(value(x @ a.T + u @ b.T) - value(x) <= supply + 1e-9)
    assert np.min(np.linalg.eigvalsh(found.storage)) >= 0
    # On the circle, the real part of the transfer function less δ|g|² is at least ν.
    worst = np.inf
    for z in np.exp(1j * np.linspace(0, np.pi, 2000)):
        g = c @ np.linalg.solve(z * np.eye(len(a)) - a, b) + d
        form = (g + g.conj().T) / 2 - delta * g.conj().T @ g
        worst = min(worst, float(np.linalg.eigvalsh(form)[0]))
    assert worst - 1e-3 * (1 + abs(worst)) <= nu <= worst + 1e-6


@pytest.mark.parametrize("seed", [2, 4, 6, 8, 12, 19, 32])
def test_plants_of_any_units_and_slow_poles_are_proved(seed):
    """Their inequality, solved in units in which its numbers are far apart, is not verified."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(1, 7)), int(rng.integers(1, 3))
    a = rng.normal(size=(n, n))
    a *= rng.choice([0.3, 0.9, 0.99, 0.999]) / np.max(np.abs(np.linalg.eigvals(a)))
    b = rng.normal(size=(n, m)) * 10 ** rng.uniform(-2, 2)
    c = rng.normal(size=(m, n)) * 10 ** rng.uniform(-2, 2)
    found = linear_indices(a, b, c, delta=0.1)
    near = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 400)])
    angles = np.angle(np.linalg.eigvals(a))[:, None] + np.concatenate([-near, near])
    worst = np.inf
    for z in np.exp(1j * np.append(np.linspace(0, np.pi, 400), angles.ravel())):
        g = c @ np.linalg.solve(z * np.eye(n) - a, b)
        form = (g + g.conj().T) / 2 - 0.1 * g.conj().T @ g
        worst = min(worst, float(np.linalg.eigvalsh(form)[0]))
    assert found and worst - 1e-2 * (1 + abs(worst)) <= found.indices.nu <= worst * (1 - 1e-6)


def test_an_unstable_plant_needs_a_negative_delta():
    refused = linear_indices([[1.2]], [[1.0]], [[1.0]])
    assert refused.verdict == "NOT_PROVED" and "not stable" in refused.reason
    assert refused.indices is None and "negative δ" in refused.reason
    # The nearest claim is one that is proved, and none with both a little larger is.
    near = refused.nearest
    assert near.delta == near.nu < 0 and "Nearest claim" in refused.reason
    again = linear_indices([[1.2]], [[1.0]], [[1.0]], delta=near.delta)
    assert again and again.indices.nu >= near.nu - 1e-5
    beyond = linear_indices([[1.2]], [[1.0]], [[1.0]], delta=near.delta + 1e-3)
    assert not beyond or beyond.indices.nu < near.nu + 1e-3
    found = linear_indices([[1.2]], [[1.0]], [[1.0]], delta=-0.5)
    assert found and found.indices.delta == -0.5
    with pytest.raises(ValueError, match="not stable"):
        passive_feedback(refused, Indices(1.0, 0.0))


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_a_mode_that_is_not_seen_has_no_nearest_claim():
    """It grows by itself: no storage that is bounded from below pays for it where it is fed."""
    refused = linear_indices(np.diag([1.5, 0.5]), [[1.0], [1.0]], [[0.0, 1.0]])
    assert refused.verdict == "NOT_PROVED"
    assert refused.nearest is None and "Nearest" not in refused.reason


def test_a_loop_that_is_proved_is_stable_within_its_gain():
    # A lag under the sector nonlinearity y_c = ψ(u_c) with slopes in [0.1, 0.5].
    a, b, c = np.array([[0.5]]), np.array([[1.0]]), np.array([[1.0]])
    plant = linear_indices(a, b, c)
    controller = Indices.from_slopes(0.1, 0.5)
    loop = passive_feedback(plant, controller)
    assert loop and min(loop.margins) > 0
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(50):
        r1, r2 = rng.normal(size=(2, 60)) * (rng.random(60) < 0.3)
        x, yp, yc = 0.0, [], []
        for t in range(60):
            y = x
            out = (0.1 + 0.4 * rng.random()) * (r2[t] + y)
            yp.append(y)
            yc.append(out)
            x = 0.5 * x + r1[t] - out
        size = np.sqrt(np.sum(r1**2 + r2**2))
        worst = max(worst, np.sqrt(np.sum(np.square(yp) + np.square(yc))) / max(size, 1e-9))
    assert 0 < worst <= loop.gain_upper_bound
    assert "gain" in repr(loop) and "PROVED" in loop.explain()


def test_margins_decide_and_the_nearest_claim_is_named():
    loop = passive_feedback(Indices(0.2, -1.0), Indices(0.4, 0.0))
    assert loop.verdict == "NOT_PROVED" and loop.gain_upper_bound == np.inf
    assert loop.margins == (0.2, pytest.approx(-0.6)) and "δ > 1" in loop.explain()
    # Exactly zero is not positive, although 0.1 + 0.2 > 0.3 in floats.
    assert not passive_feedback(Indices(0.0, 0.0), Indices(1.0, 0.0))
    assert not passive_feedback(Indices(0.3, 0.0), Indices(1.0, -0.3))


@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        (dict(output=[[1.0], [1.0]]), ValueError, "as many outputs as inputs"),
        (dict(state=[[np.nan]]), ValueError, "finite"),
        (dict(delta=np.inf), ValueError, "delta"),
        (dict(solver="simplex"), ValueError, "solver"),
    ],
)
def test_other_plants_are_refused(given, kind, why):
    with pytest.raises(kind, match=why):
        linear_indices(**(dict(state=[[0.5]], input=[[1.0]], output=[[1.0]]) | given))


def test_indices_are_indices():
    with pytest.raises(TypeError, match="plant_indices"):
        passive_feedback((0.1, 0.1), Indices(1.0, 0.0))
