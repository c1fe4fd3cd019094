"""Proof files of ranges of outputs: written, verified, attacked and tampered with."""

import functools
import json
import warnings

import keras
import numpy as np
import pytest
from forging import array, forged
from small_networks import KINDS, network_of, points
from small_proofs import filled, inputs_of

from tf_lyapunov import output_bounds
from tf_lyapunov.certification import Certificate, read_network
from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED, main
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.local.outputs import OutputBounds
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.logits import Float64Logits
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.around import surroundings

REGIONS = {
    "l2": lambda x: Region.ball(x, 0.3),
    "l2 within bounds": lambda x: Region.ball(x, 0.4, bounds=(-3.0, x + 0.05)),
    "linf": lambda x: Region.ball(x, 0.1, "linf"),
    "l1": lambda x: Region.ball(x, 0.5, "l1"),
    "l1 within bounds": lambda x: Region.ball(x, 0.5, "l1", bounds=(x - 0.1, np.inf)),
    "box": lambda x: Region.box(x - 0.02, x + np.linspace(0, 0.2, x.size).reshape(x.shape)),
}


@functools.cache
def bounded(kind, region):
    model = network_of(kind)
    x = np.clip(inputs_of(model, 1)[0], -3, 3).astype(np.float64)
    classes = model.output_shape[-1]
    rows = np.random.default_rng(0).normal(size=(4, classes))
    return output_bounds(model, REGIONS[region](x), rows)


def samples(region, rng, count=400):
    """Points of a region, most of them at its edge."""
    if np.isfinite(region.radius):
        found = points(region.center, region.radius, "l2", None, rng, count)
    elif np.isfinite(region.radius_l1):
        found = points(region.center, region.radius_l1, "l1", None, rng, count)
        # Corners of the ball, where linear functions have their ends.
        corners = np.zeros((count // 2, region.center.size))
        corners[np.arange(count // 2), rng.integers(region.center.size, size=count // 2)] = 1
        corners *= rng.choice([-1, 1], size=(count // 2, 1)) * region.radius_l1 * (1 - 1e-9)
        found[: count // 2] = region.center + corners.reshape(-1, *region.center.shape)
    else:
        shape = (count, *region.center.shape)
        corner = np.where(rng.random(shape) < 0.5, region.low, region.high)
        share = rng.random((count, *[1] * region.center.ndim))
        found = region.center + np.where(share < 0.5, 1.0, share) * (corner - region.center)
    # Moving back between bounds that hold the centre leaves no ball around it.
    return np.clip(found, region.low, region.high)


def values(model, x, rows):
    return Float64Logits(read_network(model)).predict(x, 100) @ rows.T


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_written_verified_and_hold(kind, region, tmp_path):
    path, model, found = tmp_path / "r.npz", network_of(kind), bounded(kind, region)
    found.save(path)
    proof = verify(path, model)
    assert proof.holds and proof.reasons == () and "VERIFIED" in str(proof)
    claim = proof.claim
    assert np.all(claim.lower <= found.lower) and np.all(found.upper <= claim.upper)
    # The verifier's own balls and boxes prove nearly the same.
    width = found.upper - found.lower
    assert np.all(claim.upper - claim.lower <= width * 1.02)
    assert (proof.notes == ()) or np.any(claim.upper - claim.lower > width * 1.002)
    # Soundness, and that a range says something: samples fill a part of it.
    seen = values(model, samples(found.source.region, np.random.default_rng(1)), claim.functionals)
    room = 1e-9 * np.abs(seen).max()
    assert np.all(claim.lower - room <= seen.min(axis=0))
    assert np.all(seen.max(axis=0) <= claim.upper + room)
    assert np.all(np.ptp(seen, axis=0) >= 0.1 * (claim.upper - claim.lower))


def test_every_logit_has_its_box(tmp_path):
    path, model = tmp_path / "r.npz", network_of("dense")
    x = np.clip(inputs_of(model, 1)[0], -3, 3).astype(np.float64)
    found = output_bounds(model, Region.ball(x, 0.1))
    found.save(path)
    proof = verify(path, model)
    assert proof.holds and np.array_equal(proof.claim.functionals, np.eye(3))
    assert np.all(proof.claim.upper - proof.claim.lower <= 1.02 * (found.upper - found.lower))


def test_a_linear_model_has_its_exact_range(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.set_weights([np.array([[3.0], [4.0]]), np.array([1.0])])
    found = output_bounds(model, Region.ball(np.zeros(2), 2.0))
    found.save(tmp_path / "r.npz")
    claim = verify(tmp_path / "r.npz", model).claim
    assert -9.0 - 1e-7 < claim.lower[0] <= -9.0 and 11.0 <= claim.upper[0] < 11.0 + 1e-7


def test_rows_are_passed_in_blocks(tmp_path, monkeypatch):
    path, model = tmp_path / "r.npz", network_of("dense")
    x = np.clip(inputs_of(model, 1)[0], -3, 3).astype(np.float64)
    rows = np.random.default_rng(0).normal(size=(40, 3))
    output_bounds(model, Region.ball(x, 0.2), rows).save(path)
    whole = verify(path, model)
    monkeypatch.setattr(surroundings, "_BLOCK", 1)
    parts = verify(path, model)
    assert whole.holds and parts.holds
    assert np.allclose(parts.lower, whole.lower, rtol=1e-9, atol=1e-12)
    assert np.allclose(parts.upper, whole.upper, rtol=1e-9, atol=1e-12)


# Tampering --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    bounded("dense", "l2").save(tmp_path / "r.npz")
    return tmp_path / "r.npz"


def narrower(header, arrays):
    width = arrays["upper"] - arrays["lower"]
    arrays["lower"] = arrays["lower"] + 1e-6 * width


def swapped(header, arrays):
    arrays["lower"], arrays["upper"] = arrays["upper"].copy(), arrays["lower"].copy()


@pytest.mark.parametrize(
    "change",
    [
        narrower,
        swapped,
        array("radii", lambda r: r * 1.1),
        array("radii", np.array([np.inf, 1.0])),
        array("functionals", lambda a: a * 1.01),
        array("functionals", lambda a: np.roll(a, 1, axis=1)),
        array("center", lambda x: x + 0.05),
    ],
)
def test_other_claims_do_not_hold(file, change):
    model = network_of("dense")
    assert forged(file, lambda h, a: None, model).holds
    found = forged(file, change, model)
    assert not found.holds and found.reasons and "NOT VERIFIED" in str(found)


@pytest.mark.parametrize(
    "change",
    [
        array("lower", lambda a: np.where(np.arange(len(a)) == 1, np.nan, a)),
        array("lower", lambda a: a[:-1]),
        array("lower", lambda a: a.astype(np.float32)),
        array("radii", np.array([-1.0, np.inf])),
        array("radii", np.array([1.0])),
        array("center", lambda x: x[:-1]),
        array("low", lambda x: np.full_like(x, 100.0)),
        array("functionals", lambda a: a[:0]),
        array("functionals", lambda a: np.full_like(a, np.inf)),
        array("extra", np.zeros(3)),
        array("around_layout", lambda a: a[:-1]),
        array("around_units", lambda a: a.astype(np.int64)),
        lambda header, arrays: arrays.pop("upper"),
        lambda header, arrays: header.update(notes="one"),
        lambda header, arrays: header.update(certificate={}),
        lambda header, arrays: header.update(version=2),
    ],
)
def test_files_that_are_not_whole_are_refused(file, change):
    with pytest.raises(ProofFileError, match=r"refused.*Received: "):
        forged(file, change, network_of("dense"))


def test_regions_without_an_end_and_of_other_shapes_are_not_verified(file):
    model = network_of("dense")
    found = forged(file, array("radii", np.array([np.inf, np.inf])), model)
    assert not found.holds and "not bounded" in str(found)
    for name in ("center", "low", "high"):
        assert archive.read(file)[1][name].shape == (5,)

    def wider(header, arrays):
        for name in ("center", "low", "high"):
            arrays[name] = np.repeat(arrays[name], 2)

    found = forged(file, wider, model)
    assert not found.holds and "shape" in str(found)


@pytest.mark.parametrize("seed", range(60))
def test_random_edits_are_caught_or_harmless(file, seed):
    rng = np.random.default_rng(seed)
    model = network_of("dense")

    def edited(header, arrays):
        name = sorted(n for n in arrays if arrays[n].size)[seed % 11]
        held = arrays[name].copy()
        place = tuple(rng.integers(n) for n in held.shape)
        with np.errstate(over="ignore"):
            held[place] = (held[place] * rng.choice([0, -1, 2, 1.001]) + rng.integers(2)).astype(
                held.dtype
            )
        arrays[name] = held

    try:
        found = forged(file, edited, model)
    except ProofFileError:
        return
    if not found.holds:
        assert found.reasons
        return
    claim = found.claim
    region = Region(claim.center, claim.low, claim.high, *claim.radii)
    seen = values(model, samples(region, rng), claim.functionals)
    room = 1e-9 * (1 + np.abs(seen).max())
    assert np.all(claim.lower - room <= seen) and np.all(seen <= claim.upper + room)


def test_other_weights_are_another_model(file):
    model = keras.models.clone_model(network_of("dense"))
    model.set_weights([w * 1.001 for w in network_of("dense").get_weights()])
    found = verify(file, model)
    assert not found.holds and "certified weights" in str(found)
    assert np.all(np.isinf(found.lower)) and np.all(np.isinf(found.upper))


# Edges -------------------------------------------------------------------------------------------


def center():
    return np.clip(inputs_of(network_of("dense"), 1)[0], -3, 3).astype(np.float64)


@pytest.mark.parametrize(
    "region",
    [
        lambda x: Region.ball(x, 0.0),
        lambda x: Region.ball(x, 0.0, "l1"),
        lambda x: Region.ball(x, 5e-324),
        lambda x: Region.box(x, x),
        lambda x: Region.box(x, x + np.array([0, 0, 0.1, 0, 0.2])),
        lambda x: Region.ball(x, 0.3, bounds=(x, np.inf)),
        lambda x: Region.ball(x, 1e30),
        lambda x: Region.ball(x, 1e160, bounds=(x - 0.1, x + 0.1)),
        lambda x: Region(x, np.full(5, -np.inf), np.full(5, np.inf), 0.3, 0.5),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning:tf_lyapunov.verification")
def test_regions_at_their_limits(region, tmp_path):
    path, model = tmp_path / "r.npz", network_of("dense")
    found = output_bounds(model, region(center()))
    found.save(path)
    claim = verify(path, model).claim
    width = found.upper - found.lower
    # Nothing to speak of is lost, and points are not said to lose many times their rounding.
    size = np.maximum(np.abs(claim.lower), np.abs(claim.upper))
    assert np.all(claim.upper - claim.lower <= 1.02 * width + 1e-8 * size)
    assert verify(path, model).notes == ()
    middle = values(model, found.source.region.center[None], np.eye(3))[0]
    assert np.all(claim.lower <= middle) and np.all(middle <= claim.upper)


def test_a_box_within_a_huge_ball_is_the_box(tmp_path):
    """1e160 squared is beyond all numbers: the ball has no say, whatever its radius."""
    x, model, claims = center(), network_of("dense"), []
    for radius in (1e10, 1e160, 1e308):
        region = Region.ball(x, radius, bounds=(x - 0.1, x + 0.1))
        output_bounds(model, region).save(tmp_path / "r.npz")
        claims.append(verify(tmp_path / "r.npz", model).claim)
    output_bounds(model, Region.box(x - 0.1, x + 0.1)).save(tmp_path / "r.npz")
    box = verify(tmp_path / "r.npz", model).claim
    for claim in claims:
        assert np.allclose(claim.lower, box.lower, rtol=1e-3, atol=1e-3)
        assert np.allclose(claim.upper, box.upper, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings(
    "error:invalid value encountered:RuntimeWarning:tf_lyapunov.local.ranges"
)
def test_functionals_of_zeros_and_beyond_all_numbers(tmp_path):
    path, model = tmp_path / "r.npz", network_of("dense")
    rows = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e130, 0.0, 0.0]])
    output_bounds(model, Region.ball(center(), 0.1), rows).save(path)
    proof = verify(path, model)
    claim = proof.claim
    assert proof.holds and -1e-20 < claim.lower[0] <= 0 <= claim.upper[0] < 1e-20
    assert np.isfinite(claim.lower[1]) and np.isneginf(claim.lower[2])
    record = json.loads(json.dumps(proof.fields()))
    assert record["lower"][2] is None and record["upper"][2] is None
    assert len(proof.notes) == 1 and len(proof.notes[0]) < 300 and "times as wide" in proof.notes[0]


def test_what_does_not_fit_is_named():
    model = network_of("dense")
    with pytest.raises(
        ValueError, match=r"one or more finite rows of 3 .*Received: shape \(0, 3\)"
    ):
        output_bounds(model, Region.ball(center(), 0.1), np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"finite in the model's input dtype\. Received: .*1e\+39"):
        output_bounds(model, Region.ball(np.full(5, 1e39), 1.0))


def test_a_centre_beyond_the_dtype_is_no_raw_error(tmp_path, monkeypatch):
    """bfloat16 ends below float32, in which its numbers are carried."""
    model = keras.Sequential(
        [keras.Input((2,), dtype="bfloat16"), keras.layers.Dense(1, dtype="bfloat16")]
    )
    found = output_bounds(model, Region.ball(np.array([3.4e38, 0.0]), 1.0))
    with pytest.raises(ValueError, match=r"no value overflows\. Received: an input is beyond"):
        found.save(tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()


@pytest.mark.parametrize("point", [300.0, -7.5])
def test_centres_that_whole_numbers_cannot_hold(point, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="int8"),
            keras.layers.Rescaling(1 / 127),
            keras.layers.Dense(2, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = output_bounds(filled(model), Region.ball(np.full(2, point), 3.0, "linf"))
        with pytest.raises(ValueError, match=r"reads int8.*Use whole ones"):
            found.save(tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()


# What is not written ----------------------------------------------------------------------------


def test_what_cannot_be_proved_is_not_written(tmp_path):
    path = tmp_path / "r.npz"
    model = filled(KINDS["dense"](), seed=5)
    region = Region.ball(np.zeros(5), 0.1)
    with pytest.raises(ValueError, match=r"about logits\. Received: outputs='model'"):
        output_bounds(model, region, outputs="model").save(path)
    found = output_bounds(model, region)
    edited = OutputBounds(found.lower + 1, found.upper, found.steps)
    with pytest.raises(ValueError, match=r"returned\. Received: edited"):
        edited.save(path)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    with pytest.raises(ValueError, match=r"weights have changed.*Received: model"):
        found.save(path)
    assert not path.exists()


def test_a_file_of_ranges_is_no_certificate(file):
    with pytest.raises(ProofFileError, match=r"outputs over a region.*Received: "):
        Certificate.load(file)


def test_the_command_says_what_is_proved(file, tmp_path, capsys):
    model = tmp_path / "model.keras"
    network_of("dense").save(model)
    assert main(["verify", str(file), str(model)]) == DONE
    assert "VERIFIED: ranges of 4 linear functions" in capsys.readouterr().out
    assert main(["verify", str(file), str(model), "--json"]) == DONE
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] and record["functionals"] == 4 and len(record["lower"]) == 4
    assert record["claimed_lower"] <= record["lower"] and "in l2" in record["region"]
    other = filled(KINDS["dense"](), seed=9)
    other.save(model)
    assert main(["verify", str(file), str(model)]) == NOT_PROVED
    capsys.readouterr()
    assert main(["verify", str(file), str(model), "--json"]) == NOT_PROVED
    # What is not proved is not given as a range.
    record = json.loads(capsys.readouterr().out)
    assert not record["holds"] and record["lower"] == [None] * 4 == record["upper"]
    assert None not in record["claimed_lower"]
    file.write_bytes(file.read_bytes()[:-40])
    assert main(["verify", str(file), str(model)]) == BAD_INPUT
