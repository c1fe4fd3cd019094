"""Proof files of local gains: written, verified, attacked and tampered with."""

import functools
import json

import keras
import numpy as np
import pytest
from falsifying import Model, forgery
from forging import array, forged
from small_networks import KINDS, network_of
from small_proofs import filled, inputs_of

from tf_lyapunov import gain_on
from tf_lyapunov.cli import DONE, NOT_PROVED, main
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import verify

RADIUS = {"l2": 0.3, "linf": 0.1}


def inputs(kind):
    return np.clip(inputs_of(network_of(kind), 2), -3, 3).astype(np.float64)


@functools.cache
def written(kind, norm, folder):
    path = folder / f"{kind}_{norm}.npz"
    found = gain_on(network_of(kind), inputs(kind), RADIUS[norm], norm=norm, proof=path)
    return path, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gains")


def largest_slope(model, center, radius, norm, rng, count=300):
    """Largest ‖f(u) - f(v)‖/‖u - v‖ over pairs of points of a ball, most of them close."""
    order = {"l2": 2, "linf": np.inf}[norm]

    def ball():
        step = rng.normal(size=(count, center.size))
        if norm == "linf":
            step = np.sign(step) * rng.random(step.shape) ** 0.2
        size = np.linalg.norm(step, order, axis=1)
        return step * (radius * rng.random(count) ** 0.3 / size)[:, None]

    u, away = ball(), ball()
    # Short steps towards another point of the ball stay in it.
    v = u + (away - u) * np.where(rng.random(count) < 0.7, 1e-3, 1.0)[:, None]
    u, v = (center + d.reshape(count, *center.shape) for d in (u, v))
    moved = np.linalg.norm(model(u) - model(v), order, axis=1)
    return float(np.max(moved / np.linalg.norm((u - v).reshape(count, -1), order, axis=1)))


@pytest.mark.parametrize("norm", RADIUS)
@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_written_verified_and_hold(kind, norm, folder):
    path, found = written(kind, norm, folder)
    proof = verify(path, network_of(kind))
    assert proof.holds and proof.reasons == () and "VERIFIED: gains of the logits" in str(proof)
    claim, rng = proof.claim, np.random.default_rng(0)
    assert claim.norm_name == norm and np.all(claim.radii == RADIUS[norm])
    # The verifier passes maxima by their gain, where the search knows which cells may be largest.
    room = 1.05 if kind in ("dense", "convolutional", "residual") or norm == "linf" else 3
    assert np.all(claim.gains >= found) and np.all(claim.gains <= found * room)
    assert (proof.notes == ()) or np.any(claim.gains > found * 1.002)
    for center, gain in zip(claim.centers, claim.gains, strict=True):
        slope = largest_slope(Model(network_of(kind)), center, RADIUS[norm], norm, rng)
        assert slope <= gain * (1 + 1e-9)
        # Samples see a part of what is possible.
        assert kind in ("pooled", "overlapping") or slope > 0.05 * gain


@pytest.mark.parametrize(("norm", "gain"), [("l2", 5.0), ("linf", 7.0)])
def test_a_linear_model_has_its_exact_gain(norm, gain, tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.set_weights([np.array([[3.0], [-4.0]]), np.array([1.0])])
    found = gain_on(model, np.zeros((1, 2)), 2.0, norm=norm, proof=tmp_path / "g.npz")
    claim = verify(tmp_path / "g.npz", model).claim
    assert found[0] == pytest.approx(gain) and gain <= claim.gains[0] <= gain * (1 + 1e-6)


# Tampering --------------------------------------------------------------------------------------


@pytest.fixture
def file(folder):
    return written("dense", "l2", folder)[0]


@pytest.mark.parametrize(
    "change",
    [
        array("gains", lambda g: g * 0.95),
        array("gains", lambda g: np.append(g[:1], 0.0)),
        array("radii", lambda r: r * 3),
        array("centers", lambda x: x[:, :-1]),
        array("centers", lambda x: x[::-1]),
    ],
)
def test_other_claims_do_not_hold(file, change):
    assert forged(file, lambda h, a: None, network_of("dense")).holds
    found = forged(file, change, network_of("dense"))
    assert not found.holds and found.reasons and "NOT VERIFIED" in str(found)


@pytest.mark.parametrize(
    "change",
    [
        array("gains", lambda g: g[:-1]),
        array("gains", lambda g: -g),
        array("gains", lambda g: g * np.nan),
        array("radii", lambda r: r * 0),
        array("radii", lambda r: r * np.inf),
        array("centers", lambda x: x * np.inf),
        array("centers", lambda x: x.reshape(-1)),
        array("norm", lambda n: n + 2),
        array("norm", lambda n: n[:0]),
        array("extra", np.zeros(2)),
        array("around_inputs", lambda i: i + 5),
        lambda header, arrays: arrays.pop("radii"),
        lambda header, arrays: header.update(version=3),
    ],
)
def test_files_that_are_not_whole_are_refused(file, change):
    with pytest.raises(ProofFileError, match=r"refused.*Received: "):
        forged(file, change, network_of("dense"))


@pytest.mark.parametrize("seed", range(12))
def test_random_edits_are_caught_or_harmless(file, seed):
    rng = np.random.default_rng(seed)
    found = forgery(file, network_of("dense"), rng)
    if found is None:
        return
    if not found.holds:
        assert found.reasons
        return
    claim, exact = found.claim, Model(network_of("dense"))
    for center, radius, gain in zip(claim.centers, claim.radii, claim.gains, strict=True):
        slope = largest_slope(exact, center, radius, claim.norm_name, rng)
        assert slope <= gain * (1 + 1e-6) + 1e-9


# What is not written ----------------------------------------------------------------------------


def test_what_a_file_cannot_hold_is_not_written(tmp_path):
    path, model = tmp_path / "g.npz", network_of("dense")
    with pytest.raises(ValueError, match=r"about logits\. Received: outputs='model'"):
        gain_on(model, np.zeros((1, 5)), 0.1, outputs="model", proof=path)
    with pytest.raises(ValueError, match=r"one input or more\. Received: none"):
        gain_on(model, np.zeros((0, 5)), 0.1, proof=path)
    assert not path.exists()


def test_the_command_says_what_is_proved(file, tmp_path, capsys):
    network_of("dense").save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras")]) == DONE
    said = capsys.readouterr().out
    assert "between any two points of a ball in l2" in said and "input 1: at most" in said
    assert main(["verify", str(file), str(tmp_path / "model.keras"), "--json"]) == DONE
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] and len(record["gains"]) == 2 and record["norm"] == "l2"
    filled(KINDS["dense"](), seed=9).save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras")]) == NOT_PROVED
