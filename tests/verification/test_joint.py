"""Balls and input as one problem: above every sample term by term, and tighter than apart."""

import dataclasses

import keras
import numpy as np
import pytest
from small_networks import KINDS, network_of, points, signals
from small_proofs import filled, inputs_of

import tf_lyapunov as tfl
from tf_lyapunov.verification import archive
from tf_lyapunov.verification.around import claims, evidence
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.joint import Joint
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.relaxation import Multipliers
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.reading import read

layers = keras.layers
NONE = np.zeros(0, np.int32)


def surroundings(model, center, radius):
    network = read(model)
    network, own = expanded(network, network.gains()[1])
    return Surroundings(network, Gains(own), Region(center, radius, "l2"))


def priced(around, lam):
    """Multipliers of every relaxed step, with the usual shares and λ (rows,)."""
    return {name: Multipliers(NONE, np.zeros((len(lam), 0)), lam) for name in around.relaxed}


def form(joint, d):
    """dᵀQd of the first row, at points (n, inputs)."""
    found = np.zeros(len(d))
    for f in joint.forms.values():
        found += (d[:, f.columns] @ f.rows.T) ** 2 @ f.weights[0]
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_form_bounds_the_weighted_distances_that_it_is_of(kind):
    """(J) pointwise, for one step at a time."""
    model, rng = network_of(kind), np.random.default_rng(3)
    (center,) = inputs_of(model, 1).astype(np.float64)
    checked = 0
    for radius in (1e-3, 0.4):
        around = surroundings(model, center, radius)
        weighed = around.balls.weighed
        around.weigh({
            name: (np.flatnonzero(relaxed.units), rng.uniform(0.3, 2.0, relaxed.units.sum()))
            for name, relaxed in around.relaxed.items() if hasattr(relaxed, "weigh")
        })  # fmt: skip
        x = points(center, radius, "l2", None, rng)
        values, d = signals(around.network, x), (x - center).reshape(len(x), -1)
        for name in [n for n, term in weighed.items() if term is not None]:
            relaxed = around.relaxed[name]
            joint = Joint(around, {name: Multipliers(NONE, np.zeros((1, 0)), np.ones(1))}, 1)
            (source,) = around.steps[name].inputs
            away = (values[source] - around.values[source]).reshape(len(x), -1)
            weights = relaxed.units.astype(float)
            if hasattr(relaxed, "weigh"):
                weights = weights * relaxed.weights
            moved = away**2 @ weights
            bound = form(joint, d) + joint.constant[0]
            assert np.all(moved <= bound * (1 + 1e-9) + 1e-18)
            # No more than the ball, whose square is what the whole of (T) comes to.
            assert np.all(bound <= relaxed.radius**2 * (1 + 1e-6))
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_margins_are_bounded_whatever_the_multipliers(kind):
    model, rng = network_of(kind), np.random.default_rng(4)
    (center,) = inputs_of(model, 1).astype(np.float64)
    around = surroundings(model, center, 0.5)
    target = around.network.logits
    rows = Functionals(np.eye(around.values[target].size))
    x = points(center, 0.5, "l2", None, rng)
    least = signals(around.network, x)[target].reshape(len(x), -1).min(axis=0)
    for size in (0.0, 1e-3, 1.0, 1e3, 1e70):
        lam = size * rng.exponential(size=len(rows.rows))
        held = priced(around, lam)
        found = around.lower(target, rows, held, joint=Joint(around, held, len(lam)))
        assert np.all(found <= least + 1e-9)
        if size < 1:
            assert np.all(np.isfinite(found))


def test_without_balls_it_is_the_norm():
    """Q = 0: what remains is r‖g‖, which y = rg/‖g‖ and μ = ‖g‖/r attain."""
    model = network_of("dense")
    (center,) = inputs_of(model, 1).astype(np.float64)
    around = surroundings(model, center, 0.25)
    g = np.random.default_rng(0).normal(size=(4, 5))
    joint = Joint(around, {}, 4)
    value, _ = joint.minimum(Functionals(g))
    exact = 0.25 * np.linalg.norm(g, axis=1)
    assert np.all(-value >= exact) and np.all(-value <= exact * (1 + 1e-8))


def test_the_maximum_of_the_quadratic_is_met_from_above():
    """Against the trust-region problem solved by its eigenvectors."""
    model = network_of("dense")
    (center,) = inputs_of(model, 1).astype(np.float64)
    around = surroundings(model, center, 0.4)
    rng = np.random.default_rng(1)
    for size in (0.05, 0.5, 5.0):
        lam = np.full(3, size)
        joint = Joint(around, priced(around, lam), 3)
        g = rng.normal(size=(3, 5))
        value, _ = joint.minimum(Functionals(g))
        q = np.stack([joint.apply(np.tile(v, (3, 1)))[0] for v in np.eye(5)])
        assert np.linalg.eigvalsh(q)[-1] <= joint.most[0]
        theta, basis = np.linalg.eigh((q + q.T) / 2)
        grid = joint.most[0] + np.geomspace(1e-9, 1e3, 20_000)
        for k in range(3):
            h = (basis.T @ g[k]) ** 2
            dual = 0.5 * ((h / (grid[:, None] - theta)).sum(axis=1) + grid * 0.4**2)
            best = dual.min() + joint.constant[k] / 2
            assert best * (1 - 1e-9) <= -value[k] <= best * (1 + 5e-3)


def wide():
    hidden = [layers.Dense(n, activation="relu") for n in (100, 60, 40)]
    return filled(keras.Sequential([keras.Input((30,)), *hidden, layers.Dense(4)]), 2)


def test_files_hold_what_joint_multipliers_prove(tmp_path, monkeypatch):
    """Without them the verifier proves less of the same file."""
    monkeypatch.setattr("tf_lyapunov.local.radii._ENTRIES", 100)  # a large flow, as it were
    model = wide()
    x = inputs_of(model, 3)
    certificate = tfl.certify(model, x, method="linear", time_budget=60)
    path, plain = tmp_path / "p.npz", tmp_path / "plain.npz"
    certificate.save(path)
    assert tfl.verification.verify(path, model).holds
    monkeypatch.setattr(claims.Joint, "applies", staticmethod(lambda around: False))
    certificate.save(plain)
    assert not tfl.verification.verify(path, model).holds
    radius, less = (archive.read(p)[1]["radius"] for p in (path, plain))
    assert np.all(less <= radius) and np.any(less < 0.99 * radius)
    assert np.all(radius <= certificate.radius)
    # What did not need them holds none.
    assert plain.stat().st_size < path.stat().st_size


def test_joint_multipliers_that_do_not_fit_are_refused():
    model = network_of("dense")
    network = read(model)
    number = [s.name for s in network.steps].index(network.logits)
    piece = evidence.Piece(number, NONE, 2, (), (), evidence.JOINT)
    assert evidence.read(network, [piece], 2).joint == {}
    for pieces in ([piece, piece], [dataclasses.replace(piece, rows=3)],
                   [dataclasses.replace(piece, margin=-4)]):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            evidence.read(network, pieces, 2)
