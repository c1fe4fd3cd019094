"""Network indices: against an independent program, sampled pairs, and the layers' own indices."""

import chain_nets
import keras
import numpy as np
import pytest

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.dissipativity import network_indices
from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.errors import SolverFailure, UnsupportedLayerError
from tf_lyapunov.theory.cascade import scaled_cascade
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.supply import supply


def plain_program(chain, delta):
    """Largest ν by cvxpy: quadratic forms of all signals, one dense cone."""
    cp = pytest.importorskip("cvxpy", reason="the second formulation needs cvxpy")
    sizes = chain.widths[:-1]
    total, ends = sum(sizes), np.cumsum([0, *sizes])
    pick = [np.eye(total)[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    out, nu = chain.weights[-1] @ pick[-1], cp.Variable()
    eye = np.eye(chain.widths[-1], sizes[0])
    cross = out.T @ eye @ pick[0]
    form = (cross + cross.T) / 2 - delta * out.T @ out - nu * pick[0].T @ pick[0]
    for layer, sector in enumerate(chain.sectors):
        lam = cp.diag(cp.Variable(sizes[layer + 1], nonneg=True))
        low = pick[layer + 1] - sector.alpha * chain.weights[layer] @ pick[layer]
        high = pick[layer + 1] - sector.beta * chain.weights[layer] @ pick[layer]
        form = form + (low.T @ lam @ high + high.T @ lam @ low) / 2
    cp.Problem(cp.Maximize(nu), [(form + form.T) / 2 >> 0]).solve(solver="CLARABEL")
    return float(nu.value)


def with_identity(seed, width=4, sector=chain_nets.RELU):
    rng = np.random.default_rng(seed)
    weights = [np.eye(width) + 0.3 * rng.normal(size=(width, width)) for _ in range(3)]
    return Chain(tuple(weights), (sector,) * 2)


@pytest.mark.parametrize("delta", [-0.1, 0.2, 1.5])
@pytest.mark.parametrize("sector", [Sector(0, 1), Sector(0.2, 1), Sector(-0.1, 1.1)])
def test_nu_is_the_optimum_of_the_joint_program(sector, delta):
    for chain in (with_identity(0, sector=sector), chain_nets.random_chain((5, 4, 3), sector)):
        found = network_indices(chain, delta=delta)
        assert found.verdict == "PROVED"
        assert found.nu == pytest.approx(plain_program(chain, delta), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_of_inputs_violates_the_proven_supply_rate(seed):
    chain = with_identity(seed, sector=Sector(0.1, 1.0))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 4000, 4)) * np.geomspace(1e-2, 3, 4000)[:, None]
    y = x
    for weight, sector in zip(chain.weights, (*chain.sectors, Sector.linear()), strict=True):
        y = y @ weight.T
        y = np.where(y > 0, sector.beta, sector.alpha) * y
    tight = np.inf
    for delta in (0.05, 0.5, 4.0):
        indices = network_indices(chain, delta=delta).indices
        values = supply(x[0] - x[1], y[0] - y[1], indices)
        scale = np.sum((x[0] - x[1]) ** 2, axis=1)
        assert np.all(values >= -1e-12 * scale)
        tight = min(tight, np.min(values / scale))
    assert tight < 1.0  # power: the pairs do come near the boundary


def test_the_joint_program_beats_the_cascade_of_layer_indices():
    chain = with_identity(1, sector=Sector(0.3, 1.0))
    delta = 1.0
    found = network_indices(chain, delta=delta)
    sectors = (*chain.sectors, Sector.linear())
    layers = [
        layer_indices(w.T, s, delta=delta).indices
        for w, s in zip(chain.weights, sectors, strict=True)
    ]
    better = Indices(delta, found.nu + 1e-3)
    assert not scaled_cascade(better, layers).holds
    assert found.nu > -50


def test_large_delta_recovers_lipsdp():
    chain = chain_nets.random_chain((4, 5, 3), seed=2)
    gain = lipsdp(chain).gain_upper_bound
    found = network_indices(chain, delta=100 / gain)
    assert gain * (1 - 1e-6) <= found.gain_upper_bound <= 1.02 * gain


def test_linear_hidden_layers_are_nearly_exact():
    chain = with_identity(2, sector=Sector.linear())
    matrix = np.linalg.multi_dot(chain.weights[::-1])
    exact = np.linalg.eigvalsh((matrix + matrix.T) / 2 - 0.4 * matrix.T @ matrix)[0]
    found = network_indices(chain, delta=0.4)
    assert found.nu <= exact + 1e-12
    assert found.nu == pytest.approx(exact, abs=1e-2)


def test_keras_models_are_read_and_other_models_refused():
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((2, 2)), keras.layers.Flatten(), dense(4, "relu"), dense(3)]
    )
    assert network_indices(model, delta=1.0).verdict == "PROVED"
    scaled = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(2.0), dense(3)])
    with pytest.raises(UnsupportedLayerError, match="from the input to the logits"):
        network_indices(scaled, delta=1.0)


def test_entry_errors_of_any_layer_lower_nu():
    chain = with_identity(3, sector=Sector(0.1, 1.0))
    exact = network_indices(chain, delta=0.5).nu
    for layer in range(3):
        errors = [0.0, 0.0, 0.0]
        errors[layer] = 1e-6 * np.abs(chain.weights[layer])
        loose = Chain(chain.weights, chain.sectors, errors=tuple(errors))
        assert network_indices(loose, delta=0.5).nu < exact - 1e-8
    unbounded = Chain(chain.weights, chain.sectors, errors=(np.inf, 0.0, 0.0))
    assert network_indices(unbounded, delta=0.5).verdict == "SOLVER_FAILED"


@pytest.mark.filterwarnings("error")
def test_hidden_units_that_no_weight_reaches_change_nothing():
    chain = with_identity(4, sector=Sector(0.1, 1.0))
    first, second, third = (np.array(w) for w in chain.weights)
    padded = Chain(
        (
            np.vstack([first, np.zeros((2, 4))]),
            np.hstack([second, np.ones((4, 2))]),
            third,
        ),
        chain.sectors,
    )
    found, expected = network_indices(padded, delta=0.5), network_indices(chain, delta=0.5)
    assert found.nu == pytest.approx(expected.nu, rel=1e-9)
    assert np.isinf(found.multipliers).tolist() == [False] * 4 + [True] * 2 + [False] * 4
    silent = Chain((0 * first, second, third), chain.sectors)
    assert -1e-3 < network_indices(silent, delta=0.5).nu <= 0


def test_a_failing_solver_proves_nothing(monkeypatch):
    from tf_lyapunov.bounds import dissipativity as module

    def fails(*args, **kwargs):
        raise SolverFailure("no", "structured", "error")

    monkeypatch.setattr(module, "solve", fails)
    found = module.network_indices(with_identity(0), delta=1.0)
    assert found.verdict == "SOLVER_FAILED" and found.gain_upper_bound == np.inf


def test_too_large_networks_say_what_fits():
    wide = Chain((np.ones((10, 5000)), np.ones((2, 10))), (chain_nets.RELU,))
    with pytest.raises(ValueError, match=r"minutes and \d+ GB.*eclipse"):
        network_indices(wide, delta=1.0)
