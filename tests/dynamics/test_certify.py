"""`certify_dynamics`: never below the truth, close to it, and what it refuses."""

import keras
import numpy as np
import pytest
from equilibria import SUPPLIES, array, built, draw, responses

import tf_lyapunov as tfl
from tf_lyapunov.dynamics import (
    Contracting,
    L2Gain,
    Supply,
    System,
    certify_dynamics,
    split_gain,
    supplies_of,
)
from tf_lyapunov.dynamics.systems import system_of
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import RecurrentEquilibrium, RecurrentEquilibriumCell
from tf_lyapunov.theory.sectors import Indices

CVXPY = pytest.importorskip("cvxpy")


def largest_response(a, b, c, d):
    """H∞ norm of x⁺ = Ax + Bu, y = Cx + Du from below (a grid) and above (a bisection).

    Above: γ exceeds the norm if γ > ‖D‖ and the symplectic pencil of the bounded real lemma has no
    eigenvalue on the unit circle.
    """
    from scipy.linalg import eigvals

    eye = np.eye(len(a))
    points = np.exp(1j * np.linspace(0, np.pi, 2001))
    low = max(np.linalg.norm(d + c @ np.linalg.solve(z * eye - a, b), 2) for z in points)

    def is_above(gamma):
        r = gamma**2 * np.eye(b.shape[1]) - d.T @ d
        shifted = a + b @ np.linalg.solve(r, d.T @ c)
        cross = b @ np.linalg.solve(r, b.T)
        q = c.T @ (np.eye(len(c)) + d @ np.linalg.solve(r, d.T)) @ c
        zero = np.zeros_like(eye)
        left = np.block([[eye, -cross], [zero, shifted.T]])
        right = np.block([[shifted, zero], [-q, eye]])
        roots = eigvals(right, left)
        return np.min(np.abs(np.abs(roots) - 1)) > 1e-7

    high = low * 1.001
    while not is_above(high):
        high *= 1.001
    return low, high


@pytest.mark.parametrize("seed", range(3))
def test_the_gain_of_a_linear_system_is_its_largest_response(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 3))
    a *= 0.9 / np.max(np.abs(np.linalg.eigvals(a)))
    b, c, d = rng.normal(size=(3, 2)), rng.normal(size=(2, 3)), rng.normal(size=(2, 2))
    low, high = largest_response(a, b, c, d)
    found = certify_dynamics(System.linear(a, b, c, d))
    assert low <= found.gain_upper_bound <= 1.03 * low
    assert high <= 1.03 * low
    # Without a solver it holds too, and is looser.
    assert low <= certify_dynamics(System.linear(a, b, c, d), optimise=False).gain_upper_bound


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(1)
    return draw(built(L2Gain(0.7)), np.random.default_rng(1), spread=0.3)


def test_the_proved_gain_is_at_most_the_nominal_one_and_above_what_is_found(layer):
    found = certify_dynamics(layer, claim=L2Gain(0.7))
    assert found.proved and found.gain_upper_bound <= 0.7
    without = certify_dynamics(layer, optimise=False).gain_upper_bound
    assert found.gain_upper_bound <= without <= 0.7
    system, rng, reached = system_of(layer), np.random.default_rng(0), 0.0
    for scale in (1e-3, 0.1, 1.0, 30.0):
        u = rng.normal(size=(10, 2)) * scale
        # Ascend the ratio by finite differences along random directions.
        du = rng.normal(size=(10, 2)) * scale

        def ratio(du, u=u):
            dy = responses(system, u + du) - responses(system, u)
            return np.linalg.norm(dy) / np.linalg.norm(du)

        best = ratio(du)
        for _ in range(60):
            trial = du + rng.normal(size=du.shape) * 0.3 * np.linalg.norm(du) / np.sqrt(du.size)
            if ratio(trial) > best:
                du, best = trial, ratio(trial)
        reached = max(reached, best)
    assert 0 < reached <= found.gain_upper_bound


def test_different_initial_states_are_part_of_the_bound(layer):
    found = certify_dynamics(layer)
    system, rng = system_of(layer), np.random.default_rng(0)
    for _ in range(10):
        u = rng.normal(size=(8, 2))
        x, z = rng.normal(size=(2, 3))
        dy = np.linalg.norm(responses(system, u, x) - responses(system, u, z))
        assert dy <= found.output_upper_bound(0.0, x - z)
        assert dy > found.output_upper_bound(0.0)
    with pytest.raises(ValueError, match="Received: 2"):
        found.output_upper_bound(1.0, x, z)


def test_an_infeasible_claim_is_not_proved_and_the_nearest_one_is_said(layer):
    found = certify_dynamics(layer, claim=L2Gain(1e-3))
    assert found.verdict == "NOT_PROVED" and found.nearest.gamma > 1e-3
    assert "nearest claim that is proved" in found.explain() and "NOT_PROVED" in repr(found)
    assert certify_dynamics(layer, claim=L2Gain(found.nearest.gamma * 1.001)).proved


@pytest.mark.parametrize("claim", [None, L2Gain(3.0), Contracting(0.9)])
def test_an_unstable_system_is_not_proved_and_told_so(claim):
    found = certify_dynamics(System.linear([[1.2]], [[1.0]], [[1.0]], [[0.0]]), claim=claim)
    assert found.verdict == "NOT_PROVED" and found.gain_upper_bound == np.inf
    assert "spectral radius 1.2" in found.explain() and found.nearest is None


@pytest.mark.parametrize("name", ["indices", "strict", "general", "contracting"])
def test_every_kind_of_claim_is_proved_of_a_layer_made_for_it_and_no_more(name):
    supply = SUPPLIES[name](2, 2)
    layer = draw(built(supply), np.random.default_rng(2), spread=0.3)
    found = certify_dynamics(layer, claim=supply)
    assert found.proved, found
    if name in ("indices", "strict"):
        assert found.indices.delta == supply.delta and found.indices.nu >= supply.nu
        beyond = Indices(supply.delta, 0.2499 / supply.delta)
        refused = certify_dynamics(layer, claim=beyond)
        assert not refused.proved and refused.nearest.nu < beyond.nu
    if name == "general":
        less = Supply(supply.Q * 50, supply.S, supply.R)
        refused = certify_dynamics(layer, claim=less)
        assert not refused.proved
        assert certify_dynamics(
            layer, claim=Supply(less.Q, less.S, refused.nearest.R + 1e-6 * np.eye(2))
        ).proved
    if name == "contracting":
        assert found.rate <= 0.8
        assert not certify_dynamics(layer, claim=Contracting(1e-9)).proved


def test_rates_that_are_proved_bound_how_states_approach():
    layer = draw(built(Contracting(0.8)), np.random.default_rng(4), spread=0.3)
    system = system_of(layer)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(20, 2))
    x, z = rng.normal(size=(2, 3))
    n = system.states
    states = []
    for state in (x, z):
        for at in u:
            w = np.zeros(system.units)
            for _ in range(system.units):
                w = np.maximum(system.neurons @ np.concatenate([state, w, at]), 0)
            state = system.step @ np.concatenate([state, w, at])
        states.append(state)
    first, last = x - z, states[0] - states[1]
    stored = np.sqrt([first @ system.storage @ first, last @ system.storage @ last])
    assert stored[1] <= 0.8**20 * stored[0] * (1 + 1e-9)
    assert n == 3


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((6, 2)),
            keras.layers.Dense(3, activation="tanh"),
            RecurrentEquilibrium(3, 3, L2Gain(1.5), return_sequences=True, neurons=3),
            keras.layers.Dropout(0.2),
            RecurrentEquilibrium(3, 3, L2Gain(1.5), activation="tanh", neurons=3),
            keras.layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6, 2)).astype("float32")
    y = np.argmax(x.sum(axis=1) @ rng.normal(size=(2, 3)), axis=1)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.learning_rate = 0.02
    model.fit(x, y, epochs=8, verbose=0)
    return model, x, y


def test_radii_of_whole_sequences_hold_against_an_attack(classifier):
    model, x, y = classifier
    found = certify_dynamics(model, x, y, optimise=False)
    assert found.proved and found.radius.shape == (40,) and np.median(found.radius) > 0
    assert len(found.stages) == 4 and len(found.storages) == 2
    share = found.certified_accuracy(0.0)
    assert share == np.mean(found.predictions == y)
    right = found.predictions == y
    attack = tfl.attacks.PGD(radius=tfl.L2(float(np.median(found.radius[right]))), steps=20)
    result = attack(model, x, y)
    flipped = np.argmax(array(model(result.x_adv)), axis=1) != found.predictions
    moved = np.linalg.norm((result.x_adv - x).reshape(40, -1), axis=1)
    assert not np.any(flipped & (moved < found.radius))


def test_logits_in_float64_are_those_of_the_model_within_their_errors(classifier):
    from tf_lyapunov.dynamics.simulating import margins
    from tf_lyapunov.dynamics.stages import stages_of

    model, x, _ = classifier
    found = certify_dynamics(model, x, optimise=False)
    stages = stages_of(model)
    logits, errors = margins(
        stages, found.storages, [s.gain_upper_bound for s in found.stages], x.astype("float64")
    )
    assert np.max(errors) < 1e-10
    np.testing.assert_allclose(logits, array(model(x)), atol=1e-4)


def test_what_cannot_be_proved_is_refused_by_name(layer, classifier):
    model, x, y = classifier
    keras_layers = keras.layers

    def chain(*layers):
        return keras.Sequential([keras.Input((4, 2)), *layers])

    refused = [
        (lambda: certify_dynamics(chain(keras_layers.LSTM(3))), "LSTM"),
        (lambda: certify_dynamics(keras_layers.GRU(3)), "GRU"),
        (
            lambda: certify_dynamics(
                chain(keras_layers.Bidirectional(RecurrentEquilibrium(1, 2, L2Gain(1.0))))
            ),
            "Bidirectional",
        ),
        (lambda: certify_dynamics(RecurrentEquilibrium(1, 2, L2Gain(1.0))), "unbuilt"),
        (lambda: certify_dynamics(model, np.full_like(x, np.nan)), "NaN"),
        (lambda: certify_dynamics(model, x[0]), "shape"),
        (lambda: certify_dynamics(model, x, y + 7), "labels"),
        (lambda: certify_dynamics(layer, x), "zero states"),
        (lambda: certify_dynamics(model, claim=Indices(1.0, -1.0)), "several stages"),
        (lambda: certify_dynamics(model, claim=2.0), "claim=2.0"),
        (lambda: Supply([[1.0]], [[0.0]], [[1.0]]), "negative definite"),
        (lambda: Contracting(1.5), "rate=1.5"),
        (lambda: L2Gain(0.0), "gamma=0.0"),
        (lambda: chain(keras_layers.Masking(), RecurrentEquilibrium(1, 2, L2Gain(1.0))), "mask"),
    ]  # fmt: skip
    for call, words in refused:
        with pytest.raises((ValueError, TypeError), match=words):
            call()


def test_weights_that_are_not_finite_are_named():
    layer = built(L2Gain(1.0))
    layer.cell.factor.assign(np.full(layer.cell.factor.shape, np.nan, "float32"))
    with pytest.raises(ValueError, match="diverged"):
        certify_dynamics(layer)


def test_a_cell_in_a_keras_rnn_is_certified_too():
    rnn = keras.layers.RNN(RecurrentEquilibriumCell(1, 2, L2Gain(2.0)), return_sequences=True)
    rnn.build((None, 4, 1))
    assert certify_dynamics(rnn, claim=L2Gain(2.0), optimise=False).proved


@pytest.mark.parametrize(("gain", "layers", "fixed"), [(3.0, 3, ()), (0.1, 7, (0.3, 5.0))])
def test_split_gains_multiply_to_no_more_than_the_claim(gain, layers, fixed):
    from fractions import Fraction

    parts = split_gain(gain, layers, fixed=fixed)
    product = Fraction(1)
    for value in (*(p.gamma for p in parts), *fixed):
        product *= Fraction(value)
    assert len(parts) == layers and 0.999999 * gain < float(product) and product <= Fraction(gain)
    with pytest.raises(ValueError, match="positive"):
        split_gain(gain, 0)
    with pytest.raises(ValueError, match="positive"):
        split_gain(-gain, 1)


def test_a_design_is_split_over_layers_with_memory_and_holds_for_the_chain(capsys):
    from command_line import call

    design = tfl.spectral_design(Indices(0.4, -2.0), ["tanh", "linear", "linear"])
    first, supply, head = supplies_of(design, [1])
    assert isinstance(supply, L2Gain)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5, 2)),
            layers.Dense(3, "tanh", kernel_constraint=tfl.constraints.SpectralBound(first)),
            RecurrentEquilibrium(2, 2, supply),
            layers.Dense(2, kernel_constraint=tfl.constraints.SpectralBound(head)),
        ]
    )
    tfl.project(model)
    assert certify_dynamics(model, claim=L2Gain(design.gain), optimise=False).proved
    arguments = "--gain", 3, "--layers", 2, "--recurrent"
    code, out, _ = call(capsys, "design", *arguments, "1")
    assert code == 0 and "Layer 1 has memory: supply=L2Gain" in out
    assert call(capsys, "design", *arguments, "3")[0] == 2
    for wrong, numbers, words in (
        (tfl.spectral_design(Indices(0.4, -2.0), ["relu"]), [0], "sector"),
        (design, [3], "from 0 to 2"),
        (tfl.spectral_design(Indices(0.4, 0.2), ["linear"]), [0], "sound"),
    ):
        with pytest.raises(ValueError, match=words):
            supplies_of(wrong, numbers)


def test_other_certificates_name_the_one_about_sequences():
    layer = RecurrentEquilibrium(2, 3, L2Gain(1.0))
    model = keras.Sequential([keras.Input((4, 2)), layer, keras.layers.Dense(2)])
    with pytest.raises(UnsupportedLayerError, match=r"certify_dynamics\(model, x, y\)"):
        tfl.certify(model, np.zeros((1, 4, 2)))


def test_changes_of_states_must_fit_the_states():
    layer = RecurrentEquilibrium(2, 6, L2Gain(1.0), return_sequences=True)
    model = keras.Sequential([keras.Input((4, 2)), layer])
    proof = certify_dynamics(model, optimise=False)
    assert proof.output_upper_bound(0.1, np.ones(6)) > proof.output_upper_bound(0.1)
    for wrong in (np.ones(5), np.ones((1, 6)), np.full(6, np.nan), 1.0):
        with pytest.raises(ValueError, match="vector of 6 numbers"):
            proof.output_upper_bound(0.1, wrong)
    for wrong in (-0.1, np.nan):
        with pytest.raises(ValueError, match="must be a norm"):
            proof.output_upper_bound(wrong)
