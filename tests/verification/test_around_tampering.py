"""Random edits of files of bounds around inputs: caught, or all that they still claim is true.

The checksum is made anew after every edit. What is accepted is attacked: no point of a claimed ball
may be decided against the label, by an evaluation of the network that shares nothing with the
verifier.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from small_networks import network_of, points
from small_proofs import inputs_of

from tf_lyapunov.certification import certify
from tf_lyapunov.local import radii
from tf_lyapunov.verification import archive
from tf_lyapunov.verification.checking import derive, objections, unpack
from tf_lyapunov.verification.contents import differences
from tf_lyapunov.verification.reading import read

FILES = [("l2", None, True), ("linf", (-3.0, 3.0), False), ("l1", None, False)]


@functools.cache
def contents(norm, bounds, splits):
    """`(header, arrays)` of a file of the dense network."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not splits:
            patch.setattr(radii, "_MANY", 0)
            patch.setattr(radii, "_ENOUGH", 0)
        path = Path(folder) / "proof.npz"
        x = np.clip(inputs_of(network_of("dense"), 1), -3, 3)
        certify(network_of("dense"), x, method="linear", norm=norm, bounds=bounds).save(path)
        return archive.read(path)


@functools.cache
def present():
    return read(network_of("dense"))


def outcome(header, arrays):
    """`(why it is refused, claim)`, as `verify` finds it."""
    try:
        layers, evidence, claim, _, _ = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return ("unreadable",), None
    reasons = list(differences(layers, present().layers))
    if not reasons:
        with np.errstate(all="ignore"):
            try:
                reasons, _ = objections(present(), derive(present(), evidence), claim)
            except OverflowError as error:
                reasons = [str(error)]
    return tuple(reasons), claim


def logits(x):
    """The dense network in float64."""
    held = [np.asarray(w, dtype=np.float64) for w in network_of("dense").get_weights()]
    x = np.maximum(x @ held[0] + held[1], 0)
    return np.tanh(x @ held[2] + held[3]) @ held[4] + held[5]


def attacked(claim, rng):
    """Whether every point tried within the claimed balls keeps its label."""
    for i in range(len(claim.radius)):
        center = claim.inputs[i].astype(np.float64)
        radius = float(claim.radius[i])
        if radius == 0 or not np.all(np.isfinite(center)):
            continue
        tried = points(center, min(radius, 1e6), claim.norm, claim.bounds, rng, 1000)
        if np.any(logits(tried).argmax(axis=1) != claim.labels[i]):
            return False
    return True


def edited(header, arrays, rng):
    """Header and arrays with one number changed."""
    header, arrays = {**header, "certificate": {**header["certificate"]}}, dict(arrays)
    names = [*arrays, "radius", "radius", "inputs", "labels", "norm", "gain", "bounds"]
    name = names[rng.integers(len(names))]
    if name == "norm":
        header["norm"] = ("l2", "linf", "l1")[rng.integers(3)]
    elif name == "gain":
        header["certificate"]["gain_upper_bound"] *= float(rng.uniform(0.2, 1.5))
    elif name == "bounds":
        low = float(rng.uniform(-6, 1))
        arrays |= {"bounds_low": np.full(1, low), "bounds_high": np.full(1, low + 4.0)}
    else:
        value = np.array(arrays[name])
        if not value.size:
            return header, arrays
        spot = tuple(rng.integers(n) for n in value.shape)
        kind = rng.integers(3)
        if kind == 0:
            raw = value.reshape(-1).view(np.uint8)
            raw[rng.integers(len(raw))] ^= np.uint8(1 << rng.integers(8))
        elif kind == 1:
            value[spot] = value.reshape(-1)[rng.integers(value.size)]
        elif value.dtype.kind == "f":
            value[spot] = value[spot] * rng.choice([1 + 1e-9, 1.01, 1.5, 10, -1])
        else:
            value[spot] = rng.integers(0, 3)
        arrays[name] = value
    return header, arrays


def tamper(count, seed):
    """Numbers of edits that were caught, and that were harmless."""
    rng = np.random.default_rng(seed)
    caught = harmless = 0
    for k in range(count):
        header, arrays = contents(*FILES[k % len(FILES)])
        changed = edited(header, arrays, rng)
        with np.errstate(all="ignore"):
            reasons, claim = outcome(*changed)
        if reasons:
            caught += 1
            continue
        harmless += 1
        assert attacked(claim, rng), (k, "a claim that is false was accepted")
    return caught, harmless


def test_the_files_hold_and_resist_attack():
    for file in FILES:
        reasons, claim = outcome(*contents(*file))
        assert reasons == () and np.all(claim.radius > 0)
        assert attacked(claim, np.random.default_rng(0))
        splits = [p for p in unpack(*contents(*file))[1].around[0] if p.splits]
        assert bool(splits) == file[2]
    # The attack has power: at three times the radius it succeeds on each.
    for file in FILES:
        header, arrays = contents(*file)
        claim = unpack(header, {**arrays, "radius": 3 * arrays["radius"]})[2]
        assert not attacked(claim, np.random.default_rng(0))


def test_edits_of_a_file_are_caught_or_harmless():
    caught, harmless = tamper(60, 0)
    assert caught >= 20 and harmless >= 5


@pytest.mark.slow
def test_a_thousand_edits_of_a_file_are_caught_or_harmless():
    caught, harmless = tamper(1000, 1)
    assert caught >= 400 and harmless >= 100


@pytest.mark.parametrize("file", FILES)
def test_larger_radii_other_labels_and_smaller_balls_are_caught(file):
    header, arrays = contents(*file)
    for factor in (1.05, 2.0, 1e3, np.inf):
        assert outcome(header, {**arrays, "radius": arrays["radius"] * factor})[0]
    assert outcome(header, {**arrays, "labels": (arrays["labels"] + 1) % 3})[0]
    assert outcome(header, {**arrays, "inputs": -arrays["inputs"]})[0]
    if file[0] != "linf":
        assert outcome({**header, "norm": "linf"}, arrays)[0]
    # A region that is smaller is proved by the same multipliers, or more easily.
    smaller = {**arrays, "radius": arrays["radius"] * 0.9}
    assert outcome(header, smaller)[0] == ()
    if file[1] is None:
        limited = {"bounds_low": np.full(1, -3.0), "bounds_high": np.full(1, 3.0)}
        assert outcome(header, {**arrays, **limited})[0] == ()
    # Without multipliers nothing is left but the global gains.
    none = {k: v[:0] for k, v in arrays.items() if k.startswith("around_")}
    assert outcome(header, {**arrays, **none})[0]
