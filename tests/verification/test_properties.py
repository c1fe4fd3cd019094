"""Proof files of properties: written, verified, attacked and tampered with."""

import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
from forging import array, forged
from small_networks import network_of
from small_proofs import filled

from tf_lyapunov import Property, Region, verify_property
from tf_lyapunov.cli import DONE, NOT_PROVED, main
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.local.verifying import Verification
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.boxtrees import LEAF, BoxTree, cut_of


@functools.cache
def network():
    """Three inputs, three classes, and a class whose margin shrinks over a box."""
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    layers = [keras.Input((3,)), dense(12, "relu"), dense(12, "relu"), dense(3)]
    return keras.Sequential(layers)


CENTER = np.array([0.3, -0.2, 0.5])
BOX = Region.box(CENTER - 0.3, CENTER + 0.2)


@functools.cache
def proved(kind):
    region = {
        "whole ball": Region.ball(CENTER, 0.02),
        "whole box": Region.ball(CENTER, 0.02, "linf"),
        "cut ball": Region.ball(CENTER, 0.05, bounds=(-1.0, CENTER + 0.01)),
        "parts": BOX,
    }[kind]
    found = verify_property(network(), region, Property.classified_as(1), timeout=60)
    assert found.is_proved
    return found


def outputs(x):
    return keras.ops.convert_to_numpy(network()(x.astype("float32"))).astype(np.float64)


@pytest.mark.parametrize("kind", ["whole ball", "whole box", "cut ball", "parts"])
def test_properties_are_written_and_verified(kind, tmp_path):
    path, found = tmp_path / "p.npz", proved(kind)
    assert (len(found.leaves) > 1) == (kind == "parts")
    found.save(path)
    proof = verify(path, network())
    assert proof.holds and proof.reasons == () and proof.notes == ()
    assert "VERIFIED: the logits lie in none of 2 sets" in str(proof)
    assert proof.leaves == np.sum(proof.claim.axes == LEAF) >= max(len(found.leaves), 1)


def test_the_leaves_cover_the_region_without_overlap(tmp_path):
    proved("parts").save(tmp_path / "p.npz")
    claim = verify(tmp_path / "p.npz", network()).claim
    low, high = claim.leaves()
    volume = float(np.prod(high - low, axis=1).sum())
    assert volume == pytest.approx(float(np.prod(BOX.high - BOX.low)), rel=1e-12)
    x = np.random.default_rng(0).uniform(BOX.low, BOX.high, size=(500, 3))
    inside = np.all((low[:, None] <= x) & (x <= high[:, None]), axis=2)
    assert np.all(np.sum(inside, axis=0) >= 1)
    assert np.all(np.argmax(outputs(x), axis=1) == 1)


def test_linear_rows_and_strict_ones_have_files(tmp_path):
    path = tmp_path / "p.npz"
    y = outputs(CENTER[None])[0]
    rule = Property.linear([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0]], [y[0] + 1, 1.0])
    rule = rule & Property.avoids([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [y[1] - 2, 5.0])
    verify_property(network(), Region.ball(CENTER, 0.1), rule).save(path)
    proof = verify(path, network())
    assert proof.holds and len(proof.claim.starts) == 3 and list(proof.claim.strict) == [1, 1, 0, 0]


# Tampering --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    proved("parts").save(tmp_path / "p.npz")
    return tmp_path / "p.npz"


def wider(header, arrays):
    arrays["low"], arrays["high"] = arrays["low"] - 3, arrays["high"] + 3


def another_class(header, arrays):
    arrays["rows"] = np.roll(arrays["rows"], 1, axis=1)


def one_leaf(header, arrays):
    arrays["axes"], arrays["points"] = np.array([LEAF]), np.zeros(0)


def with_points(header, arrays):
    """The same tree, with a point for every cut."""
    low, high = np.empty((2, len(arrays["axes"]), 3))
    low[0], high[0] = arrays["low"], arrays["high"]
    axes, points = arrays["axes"].astype(np.int64), []
    upper = BoxTree(axes, np.zeros(0)).upper
    for node in np.flatnonzero(axes != LEAF):
        a, point = axes[node], low[node, axes[node]] / 2 + high[node, axes[node]] / 2
        for k in (node + 1, upper[node]):
            low[k], high[k] = low[node], high[node]
        high[node + 1, a] = low[upper[node], a] = point
        points.append(point)
    arrays["axes"], arrays["points"] = np.where(axes == LEAF, LEAF, cut_of(axes)), np.array(points)


def as_before(header, arrays):
    """The same tree as earlier versions wrote it: a point for every node, leaves included."""
    axes = arrays["axes"].astype(np.int64)
    with_points(header, arrays)
    points = np.zeros(len(axes))
    points[axes != LEAF] = arrays["points"]
    arrays["axes"], arrays["points"] = axes, points


def moved(header, arrays):
    with_points(header, arrays)
    arrays["points"] = arrays["points"] + 10.0


def nearer(header, arrays):
    """Cuts near an end: the halves overlap nowhere, and one of each is nearly all of its box."""
    with_points(header, arrays)
    axis = cut_of(arrays["axes"][0])
    arrays["points"][0] = arrays["low"][axis] + 1e-9


@pytest.mark.parametrize("change", [with_points, as_before])
def test_trees_with_points_of_their_own_are_read(file, change):
    before = forged(file, lambda h, a: None, network())
    found = forged(file, change, network())
    assert found.holds and found.leaves == before.leaves
    assert np.array_equal(found.claim.leaves(), before.claim.leaves())
    assert not len(before.claim.points) and len(found.claim.points) == found.leaves - 1


def test_a_file_holds_two_bytes_a_node(file):
    assert archive.read(file)[1]["axes"].dtype == np.int16


@pytest.mark.parametrize(
    "change",
    [
        wider,
        another_class,
        one_leaf,
        array("bounds", lambda b: b + 0.5),
        array("axes", lambda a: np.append(a, LEAF)),
        array("axes", lambda a: a[:-1]),
        array("axes", lambda a: np.where(a == LEAF, a, 7)),
        moved,
        nearer,
        array("rows", lambda a: np.append(a, np.ones((len(a), 1)), axis=1)),
    ],
)
def test_other_claims_do_not_hold(file, change):
    assert forged(file, lambda h, a: None, network()).holds

    found = forged(file, change, network())
    assert not found.holds and found.reasons and "NOT VERIFIED" in str(found)


@pytest.mark.parametrize(
    "change",
    [
        array("points", np.zeros(1)),
        array("points", lambda p: np.zeros((0, 1))),
        lambda header, arrays: (with_points(header, arrays), arrays["points"].fill(np.nan)),
        array("axes", lambda a: cut_of(a)),
        array("axes", lambda a: a.astype(np.float64)),
        array("axes", lambda a: a.astype(np.uint16)),
        array("axes", lambda a: a[:, None]),
        array("axes", lambda a: a[:0]),
        array("starts", lambda s: s + 1),
        array("starts", lambda s: s[:0]),
        array("starts", lambda s: np.zeros_like(s)),
        array("starts", lambda s: np.array([0, 2**62, -(2**63)])),
        array("strict", lambda s: s + 2),
        array("bounds", lambda b: np.append(b, 1.0)),
        array("rows", lambda a: np.full_like(a, np.inf)),
        array("radii", np.array([1.0, np.inf])),
        array("low", lambda x: x + 10.0),
        array("extra", np.zeros(2)),
        lambda header, arrays: arrays.pop("rows"),
        lambda header, arrays: header.update(more=1),
        lambda header, arrays: header.update(version=3),
    ],
)
def test_files_that_are_not_whole_are_refused(file, change):
    with pytest.raises(ProofFileError, match=r"refused.*Received: "):
        forged(file, change, network())


@pytest.mark.parametrize("seed", range(40))
def test_random_edits_are_caught_or_harmless(file, seed):
    rng = np.random.default_rng(seed)

    def edited(header, arrays):
        if seed % 8 == 1 or seed % 3 == 0:
            with_points(header, arrays)
        name = ("axes", "points", "low", "high", "center", "rows", "bounds", "strict")[seed % 8]
        held = arrays[name].copy()
        place = tuple(rng.integers(n) for n in held.shape)
        held[place] = held[place] * rng.choice([0, -1, 2, 1.01]) + rng.choice([0.0, 1.0, -0.5])
        arrays[name] = held

    try:
        found = forged(file, edited, network())
    except ProofFileError:
        return
    if not found.holds:
        assert found.reasons
        return
    claim = found.claim
    y = outputs(rng.uniform(claim.low, claim.high, size=(2000, 3)))
    inside = y @ claim.rows.T <= claim.bounds - 1e-5
    assert not np.any(np.logical_and.reduceat(inside, claim.starts, axis=1))


# What is not written ----------------------------------------------------------------------------


def test_what_is_not_proved_or_by_other_branches_is_not_written(tmp_path):
    path, model = tmp_path / "p.npz", network()
    refuted = verify_property(model, BOX, Property.classified_as(0))
    assert refuted.is_refuted
    with pytest.raises(ValueError, match=r"that `verify_property` proved\. Received: .*REFUTED"):
        refuted.save(path)
    # As of a ball whose inputs were split.
    by_inputs = dataclasses.replace(proved("whole ball"), leaves=None)
    with pytest.raises(ValueError, match=r"inputs on a ball.* branching='units'"):
        by_inputs.save(path)
    found = proved("parts")
    left = ("unsafe", "leaves", "tree", "source")
    fields = {k: v for k, v in found.__dict__.items() if k not in left}
    with pytest.raises(ValueError, match=r"without what it was found by"):
        Verification(**fields).save(path)
    assert not path.exists()


def test_a_changed_model_and_probabilities_have_no_file(tmp_path):
    path, model = tmp_path / "p.npz", filled(keras.models.clone_model(network()), seed=3)
    label = int(np.argmax(keras.ops.convert_to_numpy(model(CENTER[None].astype("float32")))))
    found = verify_property(model, Region.ball(CENTER, 1e-3), Property.classified_as(label))
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    with pytest.raises(ValueError, match=r"weights have changed"):
        found.save(path)
    soft = network_of("dense")
    rule = Property.linear([1.0, 0.0, 0.0], 2.0)
    found = verify_property(soft, Region.ball(np.zeros(5), 0.1), rule, outputs="model")
    assert found.is_proved
    with pytest.raises(ValueError, match=r"about logits"):
        found.save(path)
    assert not path.exists()


def test_the_command_says_what_is_proved(file, tmp_path, capsys):
    network().save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras"), "--json"]) == DONE
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] and record["unsafe_sets"] == 2 and record["leaves"] > 1
    other = filled(keras.models.clone_model(network()), seed=1)
    other.save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras")]) == NOT_PROVED
    assert archive.read(file)[0]["version"] == archive.PROPERTIES
