"""Proof files of models with memory: what the verifier accepts, and what it refuses."""

import keras
import numpy as np
import pytest
from equilibria import draw

from tf_lyapunov.dynamics import Contracting, L2Gain, Supply, certify_dynamics
from tf_lyapunov.errors import ProofFileError, UnsupportedLayerError
from tf_lyapunov.layers import RecurrentEquilibrium
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.verification import archive, memoryfiles, verify
from tf_lyapunov.verification.sequences import read_sequences


def single(supply, **arguments):
    keras.utils.set_random_seed(0)
    layer = RecurrentEquilibrium(2, 2, supply, neurons=3, return_sequences=True, **arguments)
    model = keras.Sequential([keras.Input((5, 2)), layer])
    draw(layer, np.random.default_rng(0), spread=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return single(Indices(0.6, -0.4))


@pytest.fixture(scope="module")
def chain():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6, 2)),
            keras.layers.Dense(3, activation="tanh"),
            RecurrentEquilibrium(3, 2, L2Gain(1.5), return_sequences=True, go_backwards=True),
            keras.layers.Dropout(0.2),
            RecurrentEquilibrium(2, 2, L2Gain(0.8), activation="tanh", neurons=3),
            keras.layers.LeakyReLU(),
            keras.layers.Dense(3),
        ]
    )


def test_a_chain_is_verified_from_its_weights_and_its_file(chain, tmp_path, capsys):
    from command_line import call

    proof = certify_dynamics(chain, claim=L2Gain(50.0), optimise=False)
    proof.save(tmp_path / "proof.npz")
    found = verify(tmp_path / "proof.npz", chain)
    assert found and found.gain_upper_bound <= found.claim.gain
    assert found.claim.gain == pytest.approx(proof.gain_upper_bound, rel=1e-9)
    assert "VERIFIED" in found.explain() and "equal initial states" in found.explain()
    chain.save(tmp_path / "model.keras")
    code, out, _ = call(capsys, "verify", tmp_path / "proof.npz", tmp_path / "model.keras")
    assert code == 0 and "VERIFIED" in out
    # Another model of the same layers.
    weights = chain.get_weights()
    chain.layers[-1].kernel.assign(chain.layers[-1].kernel * 1.5)
    try:
        refused = verify(tmp_path / "proof.npz", chain)
        assert not refused and "certified weights" in refused.reasons[0]
        with pytest.raises(ValueError, match="may have changed"):
            proof.save(tmp_path / "again.npz")
        assert not (tmp_path / "again.npz").exists()
    finally:
        chain.set_weights(weights)


@pytest.mark.parametrize(
    "supply", [Indices(0.6, -0.4), Contracting(0.8)], ids=["indices", "contracting"]
)
def test_claims_of_one_layer_are_verified(supply, tmp_path):
    model = single(supply)
    proof = certify_dynamics(model, claim=supply, optimise=False)
    proof.save(tmp_path / "proof.npz")
    found = verify(tmp_path / "proof.npz", model)
    assert found, found.explain()
    if isinstance(supply, Contracting):
        assert found.claim.rate == proof.rate <= 0.8
    else:
        assert found.claim.supply[2][0, 0] == -2 * proof.indices.nu


def test_a_supply_rate_is_printed_to_its_last_digit(model, tmp_path):
    """R = 0.79999996·I as 0.8·I would be read as less than was proved, or as more."""
    proof = certify_dynamics(model, claim=Indices(0.6, -0.4), optimise=False)
    proof.save(tmp_path / "proof.npz")
    found = verify(tmp_path / "proof.npz", model)
    _, _, r = found.claim.supply
    printed = found.explain().split("R = ")[1].split("]")[0].strip("[ ").split(",")
    assert [float(v) for v in printed] == r[0].tolist()
    own = Supply(np.array([[-1.0]]), np.zeros((1, 1)), np.array([[4.0 + 2.0**-40]]))
    assert repr(4.0 + 2.0**-40) in repr(own)


def test_files_of_neurons_that_solve_an_equation_say_that_they_are_exact(tmp_path):
    model = single(L2Gain(2.0), implicit=True)
    certify_dynamics(model, optimise=False).save(tmp_path / "proof.npz")
    found = verify(tmp_path / "proof.npz", model)
    name = model.layers[-1].name
    assert found and found.solved == (name,) and "comes on top" in found.explain()


def test_no_claim_that_is_changed_is_believed(model, tmp_path):
    import dataclasses

    held = certify_dynamics(model, claim=Indices(0.6, -0.4), optimise=False).evidence
    _, chain = read_sequences(model)
    q, s, r = held.supply
    changes = {
        "gain": {"gain": held.gain * 0.99},
        "theta": {"squared": (held.squared[0] * 0.9,)},
        "storage": {"storages": (-held.storages[0],)},
        "lopsided": {"storages": (held.storages[0] + np.triu(np.ones((2, 2)), 1),)},
        "multipliers": {"multipliers": (-held.multipliers[0],)},
        "supply": {"supply": (q, s, r - 0.3 * np.eye(2))},
        "asymmetric": {"supply": (q, s, r + np.triu(np.ones((2, 2)), 1))},
        "rate": {"supply": None, "rate": 1e-6},
    }
    assert memoryfiles.objections(chain, held)[0] == []
    for name, change in changes.items():
        claim = dataclasses.replace(held, **change)
        archive.write(tmp_path / "changed.npz", *memoryfiles.pack(chain, claim))
        found = verify(tmp_path / "changed.npz", model)
        assert not found and found.reasons, name
        assert "NOT VERIFIED" in found.explain()


def test_files_that_are_no_proofs_are_refused(model, tmp_path):
    proof = certify_dynamics(model, optimise=False)
    proof.save(tmp_path / "proof.npz")
    header, arrays = archive.read(tmp_path / "proof.npz")
    wrong = [
        {"sizes": arrays["sizes"][:, :3]},
        {"sizes": arrays["sizes"] + 1},
        {"storages": arrays["storages"][:-1]},
        {"squared": -arrays["squared"]},
        {"squared": arrays["squared"] * np.nan},
        {"supply": np.zeros(0)},
        {"rate": np.array([0.5])},
        {"gain": np.array([1, 2])},
    ]
    for change in wrong:
        archive.write(tmp_path / "wrong.npz", header, arrays | change)
        with pytest.raises(ProofFileError, match="incomplete"):
            verify(tmp_path / "wrong.npz", model)
    data = (tmp_path / "proof.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ProofFileError):
        verify(tmp_path / "cut.npz", model)


def test_nothing_is_written_where_nothing_is_proved(model, tmp_path):
    refused = certify_dynamics(model, claim=L2Gain(1e-3), optimise=False)
    with pytest.raises(ValueError, match="NOT_PROVED"):
        refused.save(tmp_path / "proof.npz")
    with pytest.raises(TypeError, match="RecurrentEquilibrium"):
        certify_dynamics(model.layers[-1], optimise=False).save(tmp_path / "proof.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_otherwise_is_noticed(model, tmp_path):
    certify_dynamics(model, optimise=False).save(tmp_path / "proof.npz")
    layer = model.layers[-1]
    layer.call = lambda *a, **k: type(layer).call(layer, *a, **k) * 2
    try:
        with pytest.raises(UnsupportedLayerError, match="call"):
            verify(tmp_path / "proof.npz", model)
    finally:
        del layer.call
