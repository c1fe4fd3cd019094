"""Balls and input as one problem: forms bound what they say, and their bound what it bounds."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.certification import certify
from tf_lyapunov.local import maps, radii
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import Effort, Memory, reweigh, surround, weigh
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.forms import Forms, JointAround
from tf_lyapunov.local.radii import Prover, margin_rows
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.network import read_network
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.around.joint import Joint

RADIUS = 0.6


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(),
        layers.Dense(12, "relu"), layers.Dense(3),
    ])  # fmt: skip
    for weight in model.weights:
        weight.assign(weight * 2.0)
    return model


@pytest.fixture(scope="module")
def found():
    """`(flow, trace, around, multipliers)` of a small convolutional network."""
    flow, rng = flow_of(read_network(network())), np.random.default_rng(2)
    traced = trace(flow, rng.normal(size=(8, 8, 1)))
    region = Region.ball(traced.values[0][0], RADIUS)
    memory = Memory()
    around = surround(flow, traced, region, Effort(2, margin_steps=25), memory)
    c = margin_rows(3, 0)
    multipliers, _ = tried(around, c, flow.output)
    weigh(around, c, flow.output, multipliers, memory)
    reweigh(around, memory)
    ascend(around, c, flow.output, multipliers, 25)
    return flow, traced, around, multipliers


def moves(rng, count, size=64):
    """Points of the ball around 0, half of them at its edge."""
    d = rng.normal(size=(count, size))
    d *= RADIUS / np.linalg.norm(d, axis=1, keepdims=True)
    d[::2] *= rng.random((len(d[::2]), 1)) ** (1 / 4)
    return d


def signals(flow, x):
    values = [x]
    for link in flow.links:
        values.append(maps.applied(link.operation, [values[k] for k in link.inputs]))
    return values


def test_forms_are_above_how_far_signals_move(found):
    flow, traced, around, _ = found
    forms, rng = Forms(around), np.random.default_rng(0)
    assert len(forms.steps) == 2
    d = moves(rng, 400)
    values = signals(flow, traced.values[0] + d.reshape(-1, 8, 8, 1))
    for k in forms.steps:
        lam = {j: np.full(1, float(j == k)) for j in forms.steps}
        weights, constant, most, _ = forms.coefficients(lam)
        source = flow.links[k - 1].inputs[0]
        away = (values[source] - traced.values[source]).reshape(len(d), -1)
        step = around.steps[k]
        moved = (away**2) @ step.all_weights()
        image = forms.apply(weights, d)
        form = np.einsum("ij,ij->i", d, image) + constant
        assert np.all(moved <= form * (1 + 1e-9))
        # Not above the ball's own bound by more than the other ways to bound it are better.
        assert np.max(form) <= RADIUS**2 * float(most[0]) * (1 + 1e-9) + float(constant[0])
        other = moves(rng, 400)
        crossed = (
            np.einsum("ij,ij->i", other, image),
            np.einsum("ij,ij->i", forms.apply(weights, other), d),
        )
        np.testing.assert_allclose(*crossed, rtol=1e-9, atol=1e-12)
        costs = forms.costs(d)[k]
        np.testing.assert_allclose(costs[0] + costs[1], form, rtol=1e-9)


def test_one_problem_is_bounded_from_both_sides(found):
    """Against the exact solution, by the eigenvectors of Q and a search for its multiplier."""
    _, _, around, _ = found
    forms, rng = Forms(around), np.random.default_rng(1)
    g = rng.normal(size=(3, 64))
    lam = {k: np.array([0.0, 0.3, 3.0]) for k in forms.steps}
    weights, constant, most, _ = forms.coefficients(lam)
    value, _, _ = forms.solve(g, lam, 12, True)
    for i in range(3):
        own = {k: w[[i]] for k, w in weights.items()}
        matrix = np.stack([forms.apply(own, e[None])[0] for e in np.eye(64)])
        theta, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        part = (vectors.T @ g[i]) ** 2
        # The dual, which is exact for one ball, on a grid that is 10⁻⁵ off at most.
        beyond = np.geomspace(1e-9, 1e4, 4000)
        dual = np.array([
            (np.sum(part / (theta[-1] + b - theta)) + (theta[-1] + b) * RADIUS**2) / 2
            for b in beyond
        ])  # fmt: skip
        exact = dual.min() + constant[i] / 2
        assert theta[-1] <= most[i] and value[i] >= exact * (1 - 1e-5)
        plain = np.linalg.norm(g[i]) * RADIUS + most[i] * RADIUS**2 / 2 + constant[i] / 2
        assert value[i] <= plain * (1 + 1e-2)
        # What is lost is no more than q̄ is above the largest eigenvalue.
        assert value[i] <= exact + (most[i] - theta[-1]) * RADIUS**2 / 2 + 0.02 * exact


def test_bounds_by_one_problem_hold_and_are_higher(found):
    flow, traced, around, multipliers = found
    c, rng = margin_rows(3, 0), np.random.default_rng(3)
    plain = around.lower(c, flow.output, multipliers)
    own = {k: m.copy() for k, m in multipliers.items()}
    ascend(JointAround(around), c, flow.output, own, 25)
    lower = JointAround(around, 8, True).lower(c, flow.output, own)
    assert np.all(lower > plain)
    x = traced.values[0] + moves(rng, 2000).reshape(-1, 8, 8, 1)
    assert np.all(signals(flow, x)[-1] @ c.T >= lower)
    # More steps only help; the multipliers may be anything.
    few = JointAround(around, 2, True).lower(c, flow.output, own)
    assert np.all(few <= lower + 1e-9)
    for m in own.values():
        m.log_lam = m.log_lam + rng.normal(size=m.log_lam.shape)
        m.share = m.share + 0.1 * rng.normal(size=m.share.shape)
    lower = JointAround(around, 8, True).lower(c, flow.output, own)
    assert np.all(signals(flow, x)[-1] @ c.T >= lower)


def test_derivatives_are_those_of_the_bound(found):
    flow, _, around, multipliers = found
    c, joint = margin_rows(3, 0), JointAround(around, 12)
    own = {k: m.copy() for k, m in multipliers.items()}
    ascend(joint, c, flow.output, own, 10)
    _, _, memory = joint.backward(c, flow.output, own, record=True)
    held = joint.derivatives(flow.output, memory, own)
    for k in joint.forms.steps:
        step = 1e-3
        ends = []
        for sign in (1, -1):
            other = {j: m.copy() for j, m in own.items()}
            other[k].log_lam = other[k].log_lam + sign * step
            ends.append(joint.backward(c, flow.output, other)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        # μ is one of a few values: its own changes are seen as steps.
        np.testing.assert_allclose(held[k][1], slope, rtol=0.15, atol=0.02)


def test_larger_radii_follow_and_keep_their_labels(monkeypatch):
    monkeypatch.setattr(radii, "_ENTRIES", 0)
    flow, rng = flow_of(read_network(network())), np.random.default_rng(2)
    x = rng.normal(size=(8, 8, 1))
    label = int(np.argmax(signals(flow, x[None])[-1]))
    rows = margin_rows(3, label)
    prover = Prover(flow)
    joint = prover.radius(x, rows, lambda r: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Forms, "apply_to", staticmethod(lambda around: False))
        plain = prover.radius(x, rows, lambda r: 0.0)
    assert joint.radius > plain.radius > 0
    d = rng.normal(size=(4000, 8, 8, 1))
    d *= joint.radius / np.linalg.norm(d.reshape(4000, -1), axis=1).reshape(-1, 1, 1, 1)
    assert np.all(signals(flow, x[None] + d)[-1].argmax(axis=1) == label)


def test_files_hold_what_the_forms_prove(monkeypatch, tmp_path):
    """The verifier has forms of its own; without them less follows, and the file says so."""
    monkeypatch.setattr(radii, "_ENTRIES", 0)
    model, rng = network(), np.random.default_rng(2)
    x = rng.normal(size=(1, 8, 8, 1)).astype("float32")
    found = certify(model, x, method="linear")
    held = []
    for name in ("joint", "plain"):
        path = tmp_path / f"{name}.npz"
        found.save(path)
        assert verify(path, model).holds
        header, arrays = archive.read(path)
        held.append((float(arrays["radius"][0]), "radii are smaller" in str(header["notes"])))
        monkeypatch.setattr(Joint, "applies", staticmethod(lambda around: False))
    (joint, _), (plain, says) = held
    assert 0 < plain < 0.999 * joint <= found.radius[0] and says


def test_steps_that_pay_nothing_for_their_ball_are_no_forms():
    """Normalizations are bounded on a ball without a multiplier: none may give anything back."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(),
        layers.Dense(12), layers.LayerNormalization(), layers.Dense(3),
    ])  # fmt: skip
    flow, rng = flow_of(read_network(model)), np.random.default_rng(2)
    traced = trace(flow, rng.normal(size=(8, 8, 1)))
    around = surround(flow, traced, Region.ball(traced.values[0][0], RADIUS), proof=True)
    curved = {k for k, s in around.steps.items() if type(s).__name__ == "Curved"}
    assert curved & set(around.gains.weighed) and not curved & set(Forms(around).steps)
    c = margin_rows(3, 0)
    joint = JointAround(around, 8, True)
    values = signals(flow, traced.values[0] + moves(rng, 400).reshape(-1, 8, 8, 1))
    least = (values[flow.output].reshape(len(values[0]), -1) @ c.T).min(axis=0)
    for log_lam in (-2.0, 2.0, 6.0):
        multipliers = {}
        around.backward(c, flow.output, multipliers)
        for own in multipliers.values():
            own.log_lam[:] = log_lam
        assert np.all(joint.lower(c, flow.output, multipliers) <= least)
    with pytest.raises(ValueError, match="whole boxes"):
        joint.backward(c, flow.output, multipliers, split={})


def test_nothing_is_given_back_for_steps_that_a_pass_does_not_reach(found):
    flow, traced, around, multipliers = found
    source = flow.links[min(around.steps) - 1].inputs[0]
    c = np.random.default_rng(4).normal(size=(2, *traced.shape(source)))
    exact = around.lower(c, source, {})  # of a linear function on the ball
    for log_lam in (-4.0, 0.0, 4.0):
        own = {k: m.of_rows([0, 0]) for k, m in multipliers.items()}
        for m in own.values():
            m.log_lam[:] = log_lam
        lower = JointAround(around, 8, True).lower(c, source, own)
        assert np.all(lower <= exact + 1e-9 * np.abs(exact))
