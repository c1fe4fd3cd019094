"""Proof files of radii by bounds around inputs: written, verified, and of a bounded size."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from forging import array, forged
from small_networks import KINDS, network_of, points, signals
from small_proofs import filled, inputs_of

from tf_lyapunov.certification import Certificate, certify
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.local import recording
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.evidence import WEIGHTS, Part, Piece, read
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.relaxation import Relaxation
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.contents import unpack
from tf_lyapunov.verification.operations import Activation
from tf_lyapunov.verification.reading import read as network_read

CASES = [
    ("dense", "l2", None),
    ("dense", "linf", (-3.0, 3.0)),
    ("dense", "l1", None),
    ("convolutional", "l2", (-3.0, 3.0)),
    ("convolutional", "linf", None),
    ("residual", "l2", None),
    ("residual", "linf", (-3.0, 3.0)),
    ("residual", "l1", (-3.0, 3.0)),
    ("pooled", "l2", None),
    ("pooled", "l1", (-3.0, 3.0)),
    ("overlapping", "l2", None),
]


@functools.cache
def certified(kind, norm="l2", bounds=None, count=1, method="linear"):
    model = network_of(kind)
    x = np.clip(inputs_of(model, count), -3, 3)
    return certify(model, x, method=method, norm=norm, bounds=bounds)


def written(kind, path, *arguments, **options):
    certificate = certified(kind, *arguments, **options)
    certificate.save(path)
    return network_of(kind), certificate


@pytest.mark.parametrize(("kind", "norm", "bounds"), CASES)
def test_radii_around_inputs_are_written_and_verified(kind, norm, bounds, tmp_path):
    path = tmp_path / "p.npz"
    model, certificate = written(kind, path, norm, bounds)
    assert archive.read(path)[0]["version"] == 2
    found, copy = verify(path, model), Certificate.load(path)
    assert found.holds and found.reasons == () and found.notes == ()
    assert np.any(certificate.radius > 1.05 * certificate.proof.radius)
    assert np.all(copy.radius <= certificate.radius)
    # The same multipliers prove nearly the same: rounded shares, and balls of the verifier's own.
    assert np.all(copy.radius >= certificate.radius * (1 - 2e-3))
    assert np.array_equal(found.radius, np.maximum(found.radius, copy.radius))
    assert copy.norm == found.norm == norm and copy.within == certificate.within == found.within
    words = str(found)
    assert {"l2": "in l2", "linf": "in l∞", "l1": "in l1"}[norm] in words
    assert ("stay within -3.0 to 3.0" in words) == (bounds is not None)


def test_files_without_bounds_around_inputs_are_of_the_first_version(tmp_path):
    path = tmp_path / "p.npz"
    model, _ = written("dense", path, method="lipsdp")
    header, arrays = archive.read(path)
    assert header["version"] == 1 and "norm" not in header
    assert not any(name.startswith("around") for name in arrays)
    assert verify(path, model).holds and Certificate.load(path).norm == "l2"
    assert verify(path, model).norm == "l2" and verify(path, model).within is None


def test_other_norms_of_global_radii_are_verified(tmp_path):
    path = tmp_path / "p.npz"
    model, certificate = written("dense", path, norm="linf", method="composition")
    found = verify(path, model)
    assert found.holds and found.norm == "linf" and Certificate.load(path).norm == "linf"
    assert np.any(certificate.radius > 0)
    assert np.allclose(Certificate.load(path).radius, certificate.radius, rtol=1e-6)

    def as_l2(header, arrays):
        header["norm"] = "l2"

    def as_l1(header, arrays):
        header["norm"] = "l1"

    # What holds in l∞ holds in l2 and l1 too, as these balls are smaller.
    assert forged(path, as_l2, model).holds and forged(path, as_l1, model).holds


def test_auto_writes_the_best_of_every_input(tmp_path):
    path = tmp_path / "p.npz"
    model, certificate = written("dense", path, count=2, method="auto")
    copy = Certificate.load(path)
    assert verify(path, model).holds
    assert np.all(copy.radius >= certificate.radius * (1 - 2e-3))


def test_single_logits_integers_and_half_precision(tmp_path):
    layers, path = keras.layers, tmp_path / "p.npz"
    x = np.random.default_rng(0).integers(0, 255, size=(3, 4)).astype("uint8")
    model = filled(
        keras.Sequential([keras.Input((4,)), layers.Dense(5, "relu"), layers.Dense(1, "sigmoid")])
    )
    certificate = certify(model, x, method="linear", norm="linf", bounds=(0, 255))
    certificate.save(path)
    assert verify(path, model).holds and np.any(certificate.radius > 0)
    assert np.all(Certificate.load(path).radius >= 0.99 * certificate.radius)
    half = keras.Input((4,), dtype="float16")
    model = keras.Model(half, layers.Dense(3)(layers.Dense(5, "relu")(half)))
    x = (np.random.default_rng(1).normal(size=(3, 4)) * (1 + 2.0**-14)).astype("float64")
    certificate = certify(filled(model), x, method="linear")
    certificate.save(path)
    assert verify(path, model).holds and np.any(certificate.radius > certificate.proof.radius)


def test_inputs_that_the_model_casts_across_a_bound_are_verified(tmp_path):
    path, model = tmp_path / "p.npz", network_of("dense")
    x = np.array([[0.3, -0.3, 0.1, 0.2, 0.3]])  # in float32 the first lies above its bound
    assert float(np.float32(0.3)) > 0.3
    certificate = certify(model, x, method="linear", bounds=(-0.3, 0.3))
    certificate.save(path)
    assert verify(path, model).holds and np.any(certificate.radius > certificate.proof.radius)
    assert Certificate.load(path).radius[0] > 0.99 * certificate.radius[0]


def test_the_centre_lies_in_every_box_even_where_bounds_exclude_it():
    """Slopes between a signal and that of the centre are read on the box of both."""
    network = network_read(network_of("dense"))
    gains, center = Gains(network.gains()[1]), np.full(5, 0.5)
    region = Region(center, 1.4, "l2", (0.9, 1.2))
    around, rng = Surroundings(network, gains, region), np.random.default_rng(0)
    for name, value in around.values.items():
        assert np.all(around.boxes[name][0] <= value) and np.all(value <= around.boxes[name][1])
    x = np.clip(rng.uniform(0.9, 1.2, size=(2000, 5)), 0.9, 1.2)
    x = x[np.linalg.norm(x - center, axis=1) <= 1.4]
    assert len(x) > 100
    for name, value in signals(network, x).items():
        away = np.linalg.norm((value - around.values[name]).reshape(len(x), -1), axis=1)
        assert np.all(away <= around.radii[name] + 1e-9), name


def test_a_large_record_keeps_the_balls_alone_and_says_what_it_loses(tmp_path, monkeypatch):
    path = tmp_path / "p.npz"
    monkeypatch.setattr(recording, "LARGEST", 16)
    model = network_of("convolutional")
    certificate = certify(model, np.clip(inputs_of(model, 1), -3, 3), method="linear")
    certificate.save(path)
    found, copy = verify(path, model), Certificate.load(path)
    assert found.holds
    (pieces,) = unpack(*archive.read(path))[1].around.values()
    boxes = [part for piece in pieces if len(piece.units) for part in piece.parts]
    assert boxes and all(part.shares.size == 0 and len(part.logs) for part in boxes)
    lost = 1 - copy.radius / certificate.radius
    assert np.all(lost < 0.2) and np.any(lost > 0)
    assert any("smaller than those of the certificate" in s for s in copy.assumptions) == bool(
        np.any(lost > 2e-3)
    )


def test_multipliers_that_are_too_large_are_refused_by_their_size(tmp_path, monkeypatch):
    from tf_lyapunov.local import linear

    monkeypatch.setattr(linear, "LARGEST_RECORDS", 100)
    model = network_of("dense")
    certificate = certify(model, inputs_of(model, 2), method="linear")
    with pytest.raises(ValueError, match="Certify the inputs in parts"):
        certificate.save(tmp_path / "p.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [*KINDS, "pooled in pairs"])
def test_bounds_hold_whatever_multipliers_a_file_holds(kind):
    """Boxes, balls and margins against points, with multipliers drawn at random."""
    rng = np.random.default_rng(0)
    model = network_of(kind.split()[0])
    network = network_read(model)
    own = network.gains()[1]
    if kind.endswith("pairs"):
        network, own = expanded(network, own)
        pool = next(name for name in own if name.startswith("max_pooling2d"))
        assert own[pool] > 1.4 and len(own) == len(network.steps)
    gains = Gains(own)
    (center,) = np.clip(inputs_of(model, 1), -3, 3).astype(np.float64)
    numbers = {step.name: number for number, step in enumerate(network.steps)}
    first = Surroundings(network, gains, Region(center, 0.5, "l2"))
    for norm, bounds, radius in (("l2", None, 0.6), ("linf", (-3, 3), 0.2), ("l1", None, 1.0)):
        pieces = []
        for relaxed in first.relaxed:
            (source,) = network[relaxed].inputs
            size = int(np.prod(network[source].shape))
            units = rng.choice(size, max(size // 2, 1), replace=False).astype(np.int32)
            pieces.append(drawn(network, first, numbers[source], units, 2 * len(units), rng))
        logits = network[network.logits].shape[-1]
        none = np.zeros(0, np.int32)
        pieces.append(drawn(network, first, numbers[network.logits], none, logits, rng))
        weights = drawn(network, first, numbers[network.logits], none, 1, rng, Activation)
        pieces.append(dataclasses.replace(weights, margin=WEIGHTS))
        given = read(network, pieces, logits)
        region = Region(center, radius, norm, bounds or (-np.inf, np.inf))
        around = Surroundings(network, gains, region, given.groups)
        around.weigh(given.weights)
        plain = Surroundings(network, gains, region)
        values = signals(network, points(center, radius, norm, bounds, rng))
        for known in (around, plain):
            for name, value in values.items():
                low, high = known.boxes[name]
                room = 1e-9 * (1 + np.abs(value))
                assert np.all(value >= low - room) and np.all(value <= high + room), name
                away = (value - known.values[name]).reshape(len(value), -1)
                assert np.all(np.linalg.norm(away, axis=1) <= known.radii[name] + 1e-9)
            for name, relaxed in known.relaxed.items():
                (source,) = network[name].inputs
                away = (values[source] - known.values[source]).reshape(len(value), -1)
                weights = relaxed.units.astype(float)
                if isinstance(relaxed, Relaxation):
                    weights = weights * relaxed.weights
                    weighed = known is around and bool(np.any(relaxed.units))
                    assert np.any(weights[relaxed.units] != 1) == weighed
                moved = np.sqrt(away**2 @ weights)
                assert np.all(moved <= relaxed.radius + 1e-9)
            rows = Functionals(np.eye(logits))
            for multipliers in (given.last, None):
                found = known.lower(network.logits, rows, multipliers)
                assert np.all(found <= values[network.logits].min(axis=0) + 1e-9)
        # Not by being empty: random shares are worse than none, and still say something.
        assert np.all(np.isfinite(plain.lower(network.logits, rows)))


def drawn(network, around, target, units, rows, rng, kinds=object):
    """A `Piece` with multipliers at random for every step of some kinds before `target`."""
    parts = []
    for name, relaxed in around.relaxed.items():
        if not isinstance(network[name].operation, kinds):
            continue
        number = [s.name for s in network.steps].index(name)
        if number > target:
            continue
        width = len(relaxed.bent)
        shares = rng.normal(size=(rows, width)).astype(np.float16)
        logs = np.where(rng.random(rows) < 0.5, -np.inf, rng.normal(size=rows) * 3)
        columns = rng.permutation(width).astype(np.int32)
        parts.append(Part(number, columns, shares, None, logs.astype(np.float32)))
    return Piece(target, units, rows, tuple(parts))


def test_files_with_malformed_evidence_are_refused(tmp_path):
    path = tmp_path / "p.npz"
    model, _ = written("dense", path)
    _, arrays = archive.read(path)
    changes = {
        "around_layout": [lambda a: a[:-1], lambda a: np.append(a, 0), lambda a: a * 10**9,
                          lambda a: -a, lambda a: a.astype(np.int32)],
        "around_units": [lambda a: a[:-1], lambda a: np.append(a, a[:1])],
        "around_shares": [lambda a: a[1:], lambda a: np.full_like(a, 255)],
        "around_numbers": [lambda a: a * np.float32(np.nan), lambda a: a[:-1]],
        "around_inputs": [lambda a: a + 10, lambda a: -1 - a, lambda a: a[::-1] if len(a) > 1
                          else a[:0]],
    }  # fmt: skip
    for name, several in changes.items():
        for change in several:
            with pytest.raises(ProofFileError, match="incomplete"):
                forged(path, array(name, change(arrays[name])), model)
    with pytest.raises(ProofFileError, match="incomplete"):
        forged(path, lambda h, a: h.update(norm="l0"), model)
    with pytest.raises(ProofFileError, match="incomplete"):
        forged(path, lambda h, a: a.update(bounds_low=np.zeros(1)), model)
    with pytest.raises(ProofFileError, match="incomplete"):
        forged(path, lambda h, a: a.update(bounds_low=np.ones(1), bounds_high=np.zeros(1)), model)
    with pytest.raises(ProofFileError, match="incomplete"):
        forged(path, lambda h, a: a.update(around_more=np.zeros(1)), model)
    with pytest.raises(ProofFileError, match="incomplete"):
        forged(path, lambda h, a: h.update(version=1), model)
    # Units that the model does not have are evidence that fails, not a file that cannot be read.
    found = forged(path, array("around_units", lambda a: a + np.int32(10**6)), model)
    assert not found.holds and "multipliers around input" in found.reasons[0]

    def outside(header, arrays):
        arrays |= {"bounds_low": np.full(1, -0.01), "bounds_high": np.full(1, 0.01)}

    found = forged(path, outside, model)
    assert not found.holds and "not within the bounds" in found.reasons[0]
