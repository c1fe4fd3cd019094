"""Proof files of properties by splits of hidden units: written, verified and tampered with."""

import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
from falsifying import Model, forgery, least_margins
from forging import array, forged

from tf_lyapunov import Property, Region, verify_property
from tf_lyapunov.cli import DONE, NOT_PROVED, main
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.local import partfiles
from tf_lyapunov.local.partition import Leaf, Partition
from tf_lyapunov.verification import archive, partitions, verify
from tf_lyapunov.verification.properties import LEAF

layers = keras.layers


def weighted(model, seed, bias=0.2, gain=1.3):
    """The same weights on every backend."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if layer.weights:
            shapes = [v.shape for v in layer.get_weights()]
            size = gain / np.sqrt(np.prod(shapes[0][:-1])) if gain else 1.0
            layer.set_weights(
                [rng.normal(size=shapes[0]) * size, rng.normal(size=shapes[1]) * bias]
            )
    return model


@functools.cache
def network(kind):
    made = {
        "dense": [(4,), layers.Dense(9, "relu"), layers.Dense(8, "relu"), layers.Dense(3)],
        "curved": [(3,), layers.Dense(6, "tanh"), layers.Dense(5, "tanh"), layers.Dense(3)],
        "maxima": [
            (4, 1), layers.Conv1D(3, 2, activation="relu"), layers.MaxPooling1D(3, 1),
            layers.Flatten(), layers.Dense(2),
        ],
    }[kind]  # fmt: skip
    model = keras.Sequential([keras.Input(made[0]), *made[1:]])
    return weighted(model, 5, *((0.1, None) if kind == "maxima" else ()))


REGIONS = {
    "box": lambda x: Region.box(x - 0.35, x + 0.3),
    "ball": lambda x: Region.ball(x, 0.7),
    "l1": lambda x: Region.ball(x, 0.9, "l1"),
    "cut": lambda x: Region.ball(x, 0.7, bounds=(x - 0.2, x + 0.6)),
}
CASES = [("dense", region) for region in REGIONS] + [("curved", "box"), ("maxima", "box")]


def center(kind):
    return np.random.default_rng(3).normal(size=network(kind).input_shape[1:]) * 0.5


@functools.cache
def proved_class():
    """A class over a box, by splits of hidden units and of inputs."""
    x, model = np.random.default_rng(5).normal(size=(4, 1)), network("maxima")
    rule = Property.classified_as(int(np.argmax(Model(model)(x[None])[0])))
    region = Region.ball(x, 0.83, "linf")
    return verify_property(model, region, rule, branching="units", timeout=30)


@functools.cache
def proved(kind, region, sets="linear"):
    """A property that holds a little, by more than one branch."""
    if kind == "maxima":
        return proved_class()
    x, model = center(kind), network(kind)
    whole, exact = REGIONS[region](x), Model(model)
    claim = dataclasses.make_dataclass("Claim", ["center", "low", "high", "radii"])(
        x, np.array(whole.low), np.array(whole.high), np.array([whole.radius, whole.radius_l1])
    )
    rows = np.random.default_rng(0).normal(size=(2, 3))
    claim.rows, claim.bounds, claim.starts = -rows, np.zeros(2), np.arange(2)
    most = -least_margins(exact, claim, np.random.default_rng(0), 500, 5)
    spread = np.abs(most - exact(x[None])[0] @ rows.T)
    room = 0.05 if region == "l1" else 0.15
    bounds = most + room * spread
    rule = Property.linear(rows, bounds)
    if sets == "conjunction":
        rule = Property.avoids(-rows, 0.3 * spread - bounds)
        rule = rule & Property.linear(rows[0], bounds[0] + spread[0])
    return verify_property(model, REGIONS[region](x), rule, branching="units", timeout=30)


@pytest.mark.parametrize(("kind", "region"), CASES)
def test_trees_of_hidden_units_are_written_and_verified(kind, region, tmp_path):
    path, found = tmp_path / "p.npz", proved(kind, region)
    assert found.is_proved and found.branches > 1
    found.save(path)
    assert archive.read(path)[0]["version"] == archive.PARTITIONS
    proof = verify(path, network(kind))
    assert proof.holds and proof.reasons == () and "VERIFIED: the logits lie in none" in str(proof)
    assert (
        proof.leaves
        == max(len(found.tree.partition.leaves), 1)
        == np.sum(proof.claim.steps == LEAF)
    )
    least = least_margins(Model(network(kind)), proof.claim, np.random.default_rng(1))
    # Near the boundary: a slightly wider claim would be false.
    assert np.all(least > 0)


def test_trees_may_split_inputs_too(tmp_path):
    """Max pools are bounded, not split: what they lose is left to the inputs."""
    proved("maxima", "box").save(tmp_path / "p.npz")
    claim = verify(tmp_path / "p.npz", network("maxima")).claim
    assert np.any(claim.steps == 0) and np.any(claim.steps > 0)


def test_sets_of_several_rows_are_missed_by_their_combinations(tmp_path):
    found = proved("dense", "box", "conjunction")
    found.save(tmp_path / "p.npz")
    proof = verify(tmp_path / "p.npz", network("dense"))
    assert proof.holds and list(proof.claim.starts) == [0, 2] and list(proof.claim.sets) == [0]
    weights = [leaf.weights for leaf in partitions.nodes(proof.claim)[1]]
    assert all(len(w) == 2 for w in weights) and len({tuple(w > 0) for w in weights}) > 1


def test_boxes_need_not_be_bounded_anew(tmp_path, monkeypatch):
    """As in networks of many units, where that would take too long."""
    monkeypatch.setattr("tf_lyapunov.local.unittree._REFRESHED", 0)
    proved.__wrapped__("dense", "box").save(tmp_path / "p.npz")
    claim = verify(tmp_path / "p.npz", network("dense")).claim
    assert claim.renewed[0] == 0 and claim.leaves > 2


def test_what_the_verifier_does_not_prove_is_parted_further(tmp_path, monkeypatch):
    """Of the search's own parts none is left, and its slopes neither."""
    found = proved("dense", "ball")
    numbers = {leaf.number for leaf in found.tree.partition.leaves}
    whole = Partition(True)
    whole.leaves = [Leaf(number, None, None) for number in numbers]
    monkeypatch.setattr(found.tree, "partition", whole)
    found.save(tmp_path / "p.npz")
    proof = verify(tmp_path / "p.npz", network("dense"))
    assert proof.holds and proof.leaves > len(numbers)


# Tampering --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    proved("dense", "box").save(tmp_path / "p.npz")
    return tmp_path / "p.npz"


def wider(header, arrays):
    arrays["low"], arrays["high"] = arrays["low"] - 0.3, arrays["high"] + 0.3


def one_leaf(header, arrays):
    for name in ("steps", "units", "points"):
        arrays[name] = arrays[name][:1]
    arrays["steps"] = np.array([LEAF])
    arrays["sets"] = arrays["sets"][:1]
    for name in ("layout", "units", "slopes", "logs", "weights"):
        arrays[f"leaf_{name}"] = arrays[f"leaf_{name}"][:0]
    arrays["leaf_layout"], arrays["leaf_weights"] = np.zeros(1, np.int64), np.ones(1)


def no_tree(header, arrays):
    one_leaf(header, arrays)
    for name in ("sets", "steps", "units", "points", "leaf_layout", "leaf_weights"):
        arrays[name] = arrays[name][:0]


def other_splits(header, arrays):
    arrays["points"] = np.where(arrays["steps"] == LEAF, 0.0, arrays["points"] + 0.4)


@pytest.mark.parametrize(
    "change",
    [
        wider,
        one_leaf,
        no_tree,
        other_splits,
        array("bounds", lambda b: b + 0.5),
        array("rows", lambda a: a * 0.5),
        array("steps", lambda a: np.append(a, LEAF)),
        array("steps", lambda a: np.where(a == LEAF, a, 10**9)),
        array("steps", lambda a: np.where(a == LEAF, a, 1)),
        array("units", lambda a: a + 10**6),
        array("units", lambda a: a - 10**6),
        array("leaf_weights", np.zeros_like),
        array("leaf_slopes", lambda a: -a),
        array("leaf_units", lambda a: a + 10**6),
        array("leaf_layout", lambda a: a[:-1]),
        array("leaf_logs", lambda a: a[:-1]),
        array("leaf_slopes", lambda a: np.append(a, np.float32(1))),
    ],
)
def test_other_claims_do_not_hold(file, change):
    assert forged(file, lambda h, a: None, network("dense")).holds

    def whole(header, arrays):
        change(header, arrays)
        for name in ("units", "points"):
            arrays[name] = np.resize(arrays[name], len(arrays["steps"]))

    found = forged(file, whole, network("dense"))
    assert not found.holds and found.reasons and "NOT VERIFIED" in str(found)


def test_the_first_part_that_fails_is_named(file):
    found = forged(file, wider, network("dense"))
    assert "is not missed on part" in found.reasons[0] and "≤" in found.reasons[0]
    found = forged(file, no_tree, network("dense"))
    assert "has no parts" in found.reasons[0]


@pytest.mark.parametrize(
    "change",
    [
        array("points", lambda p: p[:-1]),
        array("points", lambda p: np.full_like(p, np.inf)),
        array("steps", lambda a: a.astype(np.int32)),
        array("sets", lambda s: s + 5),
        array("sets", lambda s: np.zeros(2, np.int64)),
        array("renewed", lambda r: r + 5),
        array("renewed", lambda r: r[:0]),
        array("leaf_weights", lambda w: -w),
        array("leaf_weights", lambda w: w * 1e300),
        array("leaf_slopes", lambda s: np.full_like(s, np.nan)),
        array("leaf_logs", lambda s: s[:, None]),
        array("extra", np.zeros(2)),
        lambda header, arrays: arrays.pop("leaf_units"),
        lambda header, arrays: header.update(version=4),
    ],
)
def test_files_that_are_not_whole_are_refused(file, change):
    with pytest.raises(ProofFileError, match=r"refused.*Received: "):
        forged(file, change, network("dense"))


def test_trees_that_are_too_deep_or_large_are_refused_before_they_are_made(file, monkeypatch):
    monkeypatch.setattr(partitions, "_NODES", 3)
    with pytest.raises(ProofFileError, match="more nodes than are read"):
        verify(file, network("dense"))
    monkeypatch.undo()
    monkeypatch.setattr(partitions, "_HELD", 0)

    def deep(header, arrays):
        step = arrays["steps"][0]
        arrays["steps"] = np.r_[np.full(60, step), np.full(62, LEAF)]
        arrays["units"], arrays["points"] = np.zeros(122, np.int64), np.zeros(122)
        arrays["leaf_layout"], arrays["leaf_weights"] = np.zeros(62, np.int64), np.ones(62)
        for name in ("units", "slopes", "logs"):
            arrays[f"leaf_{name}"] = arrays[f"leaf_{name}"][:0]

    assert "too deep" in forged(file, deep, network("dense")).reasons[0]


@pytest.mark.parametrize("seed", range(12))
def test_random_edits_are_caught_or_harmless(file, seed):
    rng = np.random.default_rng(seed)
    found = forgery(file, network("dense"), rng)
    if found is None:
        return
    if not found.holds:
        assert found.reasons
        return
    assert np.all(least_margins(Model(network("dense")), found.claim, rng, 200, 3) > -1e-9)


# What is not written ----------------------------------------------------------------------------


def test_parts_that_a_file_cannot_hold_are_not_written(tmp_path, monkeypatch):
    path, found = tmp_path / "p.npz", proved("dense", "box")
    other = Partition(True)
    other.leaves = None
    monkeypatch.setattr(found.tree, "partition", other)
    with pytest.raises(ValueError, match=r"Received: a proof by .* too many"):
        found.save(path)
    other.leaves = [Leaf(0, None, None)]
    monkeypatch.setattr(partfiles, "_ROUNDS", 0)
    with pytest.raises(ValueError, match=r"could not confirm .* is not missed on a part after"):
        found.save(path)
    assert not path.exists()


def test_the_command_says_what_is_proved(file, tmp_path, capsys):
    network("dense").save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras"), "--json"]) == DONE
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] and record["unsafe_sets"] == 2 and record["leaves"] > 1
    weighted(keras.models.clone_model(network("dense")), 9).save(tmp_path / "model.keras")
    assert main(["verify", str(file), str(tmp_path / "model.keras")]) == NOT_PROVED
