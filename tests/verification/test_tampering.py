"""Random bit flips in claims, multipliers, inputs, weights and files: caught, or harmless.

The archive's checksum is renewed after every flip of a number, as somebody who tampers would do.
Harmless means that what the file then says still follows, which is checked here independently.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from small_proofs import dense_model, saved

from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.checking import derive, objections, unpack
from tf_lyapunov.verification.contents import differences
from tf_lyapunov.verification.reading import read

METHODS = ("composition", "eclipse", "dissipativity")


@functools.cache
def contents(method):
    """Header and arrays of a proof file, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.npz"
        saved(dense_model(), path, method, count=6)
        return (*archive.read(path), path.read_bytes())


@functools.cache
def network():
    return read(dense_model())


def outcome(header, arrays, present=None):
    """`(why it is refused, claim)`, as `verify` finds it."""
    present = present or network()
    try:
        layers, evidence, claim, _, _ = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return ("unreadable",), None
    reasons = list(differences(layers, present.layers))
    if not reasons:
        with np.errstate(all="ignore"):
            reasons, _ = objections(present, derive(present, evidence), claim)
    return tuple(reasons), claim


def flipped(array, rng):
    """A copy with one random bit changed."""
    data = np.array(array)
    raw = data.reshape(-1).view(np.uint8)
    raw[rng.integers(len(raw))] ^= np.uint8(1 << rng.integers(8))
    return data


def exact_logits(x):
    """The model in float64, by other code than the verifier's."""
    held = [np.asarray(w, dtype=np.float64) for w in dense_model().get_weights()]
    x = np.maximum(x.astype(np.float64) @ held[0] + held[1], 0)
    x = x @ held[2] + held[3]
    slope = float(np.float64(0.1))
    return np.where(x > 0, x, slope * x) @ held[4] + held[5]


def test_files_without_tampering_hold():
    for method in METHODS:
        assert outcome(*contents(method)[:2])[0] == ()


@pytest.mark.parametrize("name", ["radius", "labels", "predictions", "margins"])
@pytest.mark.parametrize("method", METHODS)
def test_flips_in_claims_are_caught_unless_they_weaken_them(method, name):
    header, arrays, _ = contents(method)
    rng = np.random.default_rng(0)
    derived = derive(network(), unpack(header, arrays)[1])
    caught = 0
    for _ in range(40):
        changed = {**arrays, name: flipped(arrays[name], rng)}
        reasons, claim = outcome(header, changed)
        if reasons:
            caught += 1
            continue
        if name == "radius":
            logits = exact_logits(changed["inputs"])
            for i, label in enumerate(changed["labels"]):
                gaps = np.delete(logits[i, label] - logits[i], label)
                gains = np.delete(derived.pairs[label], label)
                assert claim.radius[i] <= np.min(gaps / gains) * (1 + 1e-12)
        elif name in ("labels", "predictions"):
            assert np.array_equal(changed[name], arrays[name])
        else:
            room = 2 * claim.float_allowance
            assert np.all(np.abs(claim.margins - arrays["margins"]) <= room)
    # Most bits of a radius lie below the allowance for float32 that the claim has left open.
    assert caught >= (1 if name == "radius" else 10)


@pytest.mark.parametrize("method", METHODS[1:])
def test_flips_in_multipliers_prove_what_the_file_says_or_are_caught(method):
    """Claims and weights are untouched: a flip that passes has made another proof of them."""
    header, arrays, _ = contents(method)
    names = [n for n in arrays if n.startswith(("whole_", "pairs_", "indices_"))]
    rng = np.random.default_rng(1)
    caught = 0
    for k in range(240):
        name = names[k % len(names)]
        changed = {**arrays, name: flipped(arrays[name], rng)}
        reasons, claim = outcome(header, changed)
        caught += bool(reasons)
        if not reasons:
            assert np.array_equal(claim.radius, arrays["radius"])
            assert claim.gain_upper_bound == header["certificate"]["gain_upper_bound"]
    assert 60 <= caught < 240


def test_flips_in_inputs_are_caught_unless_the_radius_holds_there_too():
    header, arrays, _ = contents("eclipse")
    derived = derive(network(), unpack(header, arrays)[1])
    rng = np.random.default_rng(2)
    caught = 0
    for _ in range(200):
        changed = {**arrays, "inputs": flipped(arrays["inputs"], rng)}
        reasons, claim = outcome(header, changed)
        caught += bool(reasons)
        if not reasons:
            logits = exact_logits(changed["inputs"])
            for i, label in enumerate(claim.labels):
                gaps = np.delete(logits[i, label] - logits[i], label)
                gains = np.delete(derived.pairs[label], label)
                assert claim.radius[i] <= np.min(gaps / gains) * (1 + 1e-12)
    assert caught >= 40


def test_flips_in_the_claimed_gains_are_caught_unless_they_weaken_them():
    header, arrays, _ = contents("eclipse")
    rng = np.random.default_rng(3)
    rows = header["certificate"]["contributions"]
    caught = 0
    for k in range(200):
        certificate = {**header["certificate"], "contributions": [dict(r) for r in rows]}
        target, key = certificate, "gain_upper_bound"
        if k % 2:
            target = certificate["contributions"][k % len(rows)]
            key = ("gain_upper_bound", "lipschitz_upper_bound")[k // 2 % 2]
        before = float(target[key])
        value = float(flipped(np.array([before]), rng)[0])
        target[key] = value if np.isfinite(value) else "nan"
        reasons, _ = outcome({**header, "certificate": certificate}, arrays)
        caught += bool(reasons)
        assert reasons or value > before or before - value <= 1e-9 * before
    assert caught >= 60


def test_flips_in_weights_are_caught_by_digest_and_without_it_by_the_bounds(tmp_path):
    model = keras.models.clone_model(dense_model())
    held = dense_model().get_weights()
    header, arrays, _ = contents("eclipse")
    rng = np.random.default_rng(4)
    passed = 0
    for _ in range(80):
        index = rng.integers(len(held))
        changed = [np.array(w) for w in held]
        changed[index] = flipped(held[index], rng)
        model.set_weights(changed)
        try:
            present = read(model)
        except ValueError as error:  # NaN or infinite
            assert "finite" in str(error)
            continue
        assert outcome(header, arrays, present)[0], "the digest did not notice"
        renewed = [[r.name, r.settings, r.weights] for r in present.layers]
        reasons, claim = outcome({**header, "layers": renewed}, arrays, present)
        if reasons:
            continue
        passed += 1
        for row, w in zip(claim.table[::2], [w for w in changed if w.ndim == 2], strict=True):
            assert np.linalg.svd(w.astype(np.float64), compute_uv=False)[0] <= row[1]
    assert passed > 0  # flips of low bits that leave every claim true


def test_flips_in_the_bytes_of_a_file_are_refused_or_change_nothing(tmp_path):
    header, arrays, data = contents("eclipse")
    rng = np.random.default_rng(5)
    path, harmless = tmp_path / "proof.npz", 0
    for _ in range(300):
        content = bytearray(data)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(content))
        try:
            found, members = archive.read(path)
        except ProofFileError:
            continue
        harmless += 1  # names of dates and the like in the archive's directory
        assert found == header
        assert all(np.array_equal(members[k], arrays[k], equal_nan=True) for k in arrays)
    assert harmless < 100


def test_nan_negative_and_missing_multipliers_prove_nothing():
    header, arrays, _ = contents("eclipse")
    _, evidence, claim, _, _ = unpack(header, arrays)
    for value in (np.nan, -1.0, -1e-300, np.inf):
        values = tuple(np.array(v) for v in evidence.whole.values)
        values[0][0] = value
        bad = dataclasses.replace(evidence.whole, values=values)
        found = derive(network(), dataclasses.replace(evidence, whole=bad))
        assert found.failures and "multiplier" in found.failures[0]
        assert found.gain > claim.gain_upper_bound
    for squared in (np.nan, -1.0, 0.0, 0.999 * evidence.whole.squared):
        bad = dataclasses.replace(evidence.whole, squared=squared)
        assert derive(network(), dataclasses.replace(evidence, whole=bad)).failures
    none = dataclasses.replace(evidence, whole=None, pairs={})
    assert derive(network(), none).gain > claim.gain_upper_bound


def test_a_consistently_forged_claim_is_refused(tmp_path):
    """Larger radii, gain and table all rewritten to fit each other."""
    header, arrays, _ = contents("eclipse")
    path = tmp_path / "proof.npz"
    forged = {**header["certificate"]}
    forged["gain_upper_bound"] /= 2
    squared = {k: v / 4 for k, v in arrays.items() if k.endswith("_squared")}
    archive.write(
        path,
        {**header, "certificate": forged},
        {**arrays, **squared, "radius": 2 * arrays["radius"]},
    )
    found = verify(path, dense_model())
    assert not found.holds and len(found.reasons) >= 3
    assert np.all(found.radius < 2 * arrays["radius"] + (arrays["radius"] == 0))
