"""Residual blocks: exact where shortcut and branch cancel, never below a sampled gain."""

import chain_nets
import keras
import numpy as np
import pytest

from tf_lyapunov.bounds.blocks import residual_blocks, residual_gain, with_blocks
from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.composition import lipschitz_constants
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.program.network import read_network
from tf_lyapunov.theory.sectors import Sector

RELU = chain_nets.RELU


def sampled_residual_gain(chain, shortcut, seed=0, draws=400):
    """Largest norm of S + W_n D … D W_1 over random slopes that a network may have."""
    rng = np.random.default_rng(seed)
    best = 0.0
    for _ in range(draws):
        jacobian = np.eye(chain.widths[0])
        for weight, sector in zip(chain.weights, (*chain.sectors, None), strict=True):
            jacobian = weight @ jacobian
            if sector is not None:
                slopes = rng.choice([sector.alpha, sector.beta], len(weight))
                jacobian = slopes[:, None] * jacobian
        best = max(best, np.linalg.norm(shortcut + jacobian, 2))
    return best


def test_a_branch_that_cancels_the_shortcut_costs_nothing():
    # x - relu(x) has gain 1; the sum of the gains is 2.
    bound = residual_gain([np.eye(4), -np.eye(4)], [RELU])
    assert bound.method == "residual" and bound.verdict == "PROVED"
    assert 1.0 <= bound.gain_upper_bound < 1.0 + 1e-6


def test_convex_potential_steps_are_proved_non_expansive():
    # z = x - 2/σ² Wᵀφ(Wx + b): 1-Lipschitz by theory, and the inequality finds it.
    weight = np.random.default_rng(0).normal(size=(9, 6))
    step = 2 / np.linalg.norm(weight, 2) ** 2
    assert residual_gain([weight, -step * weight.T], [RELU]).gain_upper_bound < 1 + 1e-5


@pytest.mark.parametrize("sector", [RELU, Sector(0.1, 1.0), Sector(-0.13, 1.13), Sector(-1.0, 0.5)])
@pytest.mark.parametrize("widths", [(4, 6, 4), (5, 3, 7, 5)])
def test_the_bound_lies_between_samples_and_the_sum_of_the_gains(widths, sector):
    chain = chain_nets.random_chain(widths, sector, seed=1)
    rng = np.random.default_rng(2)
    for shortcut in (np.eye(widths[0]), rng.normal(size=(widths[-1], widths[0]))):
        bound = residual_gain(chain, shortcut=shortcut).gain_upper_bound
        summed = np.linalg.norm(shortcut, 2) + lipsdp(chain).gain_upper_bound
        assert sampled_residual_gain(chain, shortcut) <= bound * (1 + 1e-12)
        assert bound <= summed * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_equals_an_independent_solver(seed):
    cp = pytest.importorskip("cvxpy", reason="the second formulation needs cvxpy")
    chain = chain_nets.random_chain((4, 6, 4), seed=seed)
    first, last = chain.weights
    rho, lam = cp.Variable(), cp.Variable(6, nonneg=True)
    # ReLU: λ(z - 0)(z - y) ≤ 0 per unit.
    cross = -cp.diag(lam) @ first / 2 - last.T
    matrix = cp.bmat([[(rho - 1) * np.eye(4), cross.T], [cross, cp.diag(lam) - last.T @ last]])
    cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 >> 0]).solve(solver="CLARABEL")
    assert residual_gain(chain).gain_upper_bound == pytest.approx(np.sqrt(rho.value), rel=1e-5)


def test_a_linear_branch_is_exact():
    weight = np.random.default_rng(3).normal(size=(5, 5))
    exact = np.linalg.norm(np.eye(5) + weight, 2)
    assert residual_gain([weight]).gain_upper_bound == pytest.approx(exact, rel=1e-12)
    assert residual_gain([-np.eye(3)]).gain_upper_bound < 1e-12


def test_layers_of_extreme_size_and_entry_errors_keep_the_bound_sound():
    chain = chain_nets.random_chain((4, 6, 4), seed=5)
    plain = residual_gain(chain).gain_upper_bound
    moved = Chain((np.ldexp(chain.weights[0], 80), np.ldexp(chain.weights[1], -80)), chain.sectors)
    assert residual_gain(moved).gain_upper_bound == pytest.approx(plain, rel=1e-5)
    loose = Chain(chain.weights, chain.sectors, errors=tuple(1e-3 * abs(w) for w in chain.weights))
    assert residual_gain(loose).gain_upper_bound > plain


def test_shortcuts_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="the identity needs equal widths"):
        residual_gain([np.ones((3, 2)), np.ones((4, 3))], [RELU])


def residual_model(kind, seed=0):
    keras.utils.set_random_seed(seed)
    k = keras.layers
    inputs = keras.Input((4, 4, 2) if kind == "convolutions" else (6,))
    if kind == "dense":
        x = k.Dense(5, activation="relu")(inputs)
        y = k.Dense(5)(k.Dense(7, activation="relu")(x))
    elif kind == "pre-activation":
        x = k.Dense(5)(inputs)
        y = k.Dense(5)(k.ReLU()(k.Dense(7)(k.ReLU()(x))))
    else:
        x = k.Conv2D(3, 3, padding="same", activation="relu")(inputs)
        y = k.Conv2D(3, 3, padding="same")(x)
        y = k.Conv2D(3, 3, padding="same")(k.ReLU()(y))
    x = k.ReLU()(k.Add()([x, y]))
    x = k.Flatten()(x) if kind == "convolutions" else x
    return keras.Model(inputs, k.Dense(3)(k.Dense(4, activation="relu")(x)))


@pytest.mark.parametrize("kind", ["dense", "pre-activation", "convolutions"])
def test_residual_blocks_are_read_from_a_model_and_tighten_its_composition(kind):
    network = read_network(residual_model(kind))
    (block,) = residual_blocks(network)
    assert block.shortcut is None and block.chain.widths[0] == block.chain.widths[-1]
    before = lipschitz_constants(network)[network.logits]
    after = lipschitz_constants(with_blocks(network))[network.logits]
    assert after < before * 0.999
    rng = np.random.default_rng(0)
    shape = network.model.input_shape[1:]
    x = rng.normal(size=(200, *shape)).astype("float32")
    y = (x + 0.1 * rng.normal(size=x.shape)).astype("float32")
    f = lambda a: np.asarray(network.model(a), dtype=np.float64)  # noqa: E731
    moved = np.linalg.norm((x - y).reshape(200, -1).astype(np.float64), axis=1)
    ratio = np.linalg.norm(f(x) - f(y), axis=1) / moved
    assert np.max(ratio) <= after * (1 + 1e-4)


def test_the_branch_read_from_a_model_computes_what_the_model_does():
    network = read_network(residual_model("convolutions"))
    (block,) = residual_blocks(network)
    model = keras.Model(network.model.inputs, [layer.output for layer in network.model.layers[1:5]])
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype("float32")
    outputs = [np.asarray(v, dtype=np.float64) for v in model(x)]
    signal = outputs[0].reshape(3, -1).T
    for weight, bias, sector in zip(
        block.chain.weights, block.chain.biases, (*block.chain.sectors, None), strict=True
    ):
        signal = weight @ signal + bias[:, None]
        signal = signal if sector is None else np.maximum(signal, 0)
    np.testing.assert_allclose(signal.T.reshape(outputs[3].shape), outputs[3], atol=1e-5)


def test_branches_that_do_not_meet_in_one_signal_are_left_alone():
    k = keras.layers
    inputs = keras.Input((4,))
    two = k.Add()([k.Dense(3, activation="relu")(inputs), k.Dense(3, activation="tanh")(inputs)])
    network = read_network(keras.Model(inputs, k.Dense(2)(two)))
    assert residual_blocks(network) == ()
