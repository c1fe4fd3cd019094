"""`verify --property` refuses proof files of something else, or that somebody changed."""

import json
import pathlib

import numpy as np
import pytest
from command_line import call
from test_cli_properties import DECLARED, boxed, onnx, write_network

from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED, main
from tf_lyapunov.verification import archive

# Three boxes of inputs; two sets of outputs in the first.
PARTS = ("(and (<= X_0 -0.5) (>= Y_0 1.75))", "(and (<= X_0 -0.5) (<= Y_1 0.25))",
         "(and (>= X_0 0.5) (>= Y_0 2.5))", "(and (<= X_1 -0.5) (>= Y_0 1.6))")  # fmt: skip
BOX = boxed(-1, 1)


def text_of(*parts, box=BOX):
    return f"{DECLARED}{box}(assert (or {' '.join(parts)}))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`net.onnx` and `other.onnx`, which both have the property `p.vnnlib`."""
    folder = tmp_path_factory.mktemp("forged")
    write_network(folder / "net.onnx")
    other = onnx.load(folder / "net.onnx")
    for held in other.graph.initializer:
        if held.name == "b0":
            held.CopyFrom(onnx.numpy_helper.from_array(np.full(2, -0.125, np.float32), "b0"))
    onnx.save(other, folder / "other.onnx")
    (folder / "p.vnnlib").write_text(text_of(*PARTS))
    for name in ("net", "other"):
        words = ("verify-property", folder / f"{name}.onnx", folder / "p.vnnlib", "--proof",
                 folder / f"{name}.npz")  # fmt: skip
        assert main([str(word) for word in words]) == DONE
    return folder


@pytest.fixture
def proofs(folder):
    """The proof files of the network, one per box."""
    return [folder / f"net{end}.npz" for end in ("", "-2", "-3")]


def verified(capsys, proofs, network, prop):
    """`(exit code, JSON record)` of the command."""
    also = [word for path in proofs[1:] for word in ("--also", path)]
    code, out, _ = call(capsys, "verify", proofs[0], network, "--property", prop, *also, "--json")
    return code, json.loads(out)


def unsat(capsys, *arguments):
    """Whether the command says so; the exit code must say the same."""
    code, record = verified(capsys, *arguments)
    assert code in (DONE, NOT_PROVED, BAD_INPUT)
    assert record.get("property_is_unsat", False) == (code == DONE)
    assert code != NOT_PROVED or record["property_reasons"] or not all(
        part["holds"] for part in (record, *record["also"])
    )  # fmt: skip
    return code == DONE


def forged(path, folder, change):
    """A copy of a proof file after `change(header, arrays)`, with a fresh checksum."""
    header, arrays = archive.read(path)
    header, arrays = json.loads(json.dumps(header)), dict(arrays)
    change(header, arrays)
    archive.write(folder / path.name, header, arrays)
    return folder / path.name


def test_the_files_in_any_order_make_it_unsat(folder, proofs, capsys):
    for given in (proofs, proofs[::-1], [*proofs, proofs[0]]):
        assert unsat(capsys, given, folder / "net.onnx", folder / "p.vnnlib")


def test_a_file_less_is_not_enough(folder, proofs, capsys):
    for k in range(3):
        left = [*proofs[:k], *proofs[k + 1 :]]
        assert not unsat(capsys, left, folder / "net.onnx", folder / "p.vnnlib")
        twice = [*left, left[0]]
        assert not unsat(capsys, twice, folder / "net.onnx", folder / "p.vnnlib")


@pytest.mark.parametrize("parts, box", [
    ((*PARTS, "(and (>= X_2 0.5) (>= Y_0 9))"), BOX),  # one more set
    ((*PARTS[:3], PARTS[3].replace("Y_0 1.6", "Y_0 1.59")), BOX),
    ((*PARTS[:3], PARTS[3].replace("X_1 -0.5", "X_1 -0.49")), BOX),
    ((*PARTS[:3], PARTS[3].replace("Y_0", "Y_1")), BOX),
    ((*PARTS[:3], PARTS[3].replace(">= Y_0", "<= Y_0")), BOX),
    ((*PARTS[:3], PARTS[3].replace("<= X_1", "<= X_2")), BOX),
    (PARTS, boxed(-1, 1).replace("X_2 1)", "X_2 1.001)")),
    (("(>= Y_0 3)",), BOX),
])  # fmt: skip
def test_another_property_is_not_proved(parts, box, folder, proofs, capsys, tmp_path):
    (tmp_path / "q.vnnlib").write_text(text_of(*parts, box=box))
    assert not unsat(capsys, proofs, folder / "net.onnx", tmp_path / "q.vnnlib")


@pytest.mark.parametrize("parts", [PARTS[::-1], PARTS[1:], (*PARTS, PARTS[0])])
def test_the_same_or_fewer_sets_in_another_order_are(parts, folder, proofs, capsys, tmp_path):
    (tmp_path / "q.vnnlib").write_text(text_of(*parts))
    assert unsat(capsys, proofs, folder / "net.onnx", tmp_path / "q.vnnlib")


def test_another_network_or_a_file_of_another_network_is_not(folder, proofs, capsys):
    prop, others = folder / "p.vnnlib", [folder / p.name.replace("net", "other") for p in proofs]
    assert unsat(capsys, others, folder / "other.onnx", prop)
    assert not unsat(capsys, proofs, folder / "other.onnx", prop)
    for k in range(3):
        mixed = [*proofs[:k], others[k], *proofs[k + 1 :]]
        for network in ("net.onnx", "other.onnx"):
            assert not unsat(capsys, mixed, folder / network, prop)


def without_a_set(header, arrays):
    """The second set of outputs is left out, and the tree holds for the first."""
    [end] = arrays["starts"][1:]
    arrays["starts"] = arrays["starts"][:1]
    for name in ("rows", "bounds", "strict"):
        arrays[name] = arrays[name][:end]


def same_set_twice(header, arrays):
    [end] = arrays["starts"][1:]
    arrays["starts"] = np.array([0, end])
    for name in ("rows", "bounds", "strict"):
        arrays[name] = np.concatenate([arrays[name][:end]] * 2)


def joined_sets(header, arrays):
    """One set of both conditions, which says less than either."""
    arrays["starts"] = arrays["starts"][:1]


def doubled(name):
    return lambda header, arrays: arrays.update({name: np.repeat(arrays[name], 2, axis=0)})


def smaller(header, arrays):
    """A box within the property's, of which the claim holds as well."""
    for name in ("low", "high", "center"):
        arrays[name] = arrays["low"] / 2 + arrays["high"] / 2


def edited(**fields):
    return lambda header, arrays: header.update(fields)


CHANGES = {
    "a set is missing": without_a_set, "a set is there twice": same_set_twice,
    "sets are joined": joined_sets, "another count of sets": doubled("starts"),
    "another count of rows": doubled("rows"), "another count of bounds": doubled("bounds"),
    "a smaller box": smaller,
    "strict": lambda header, arrays: arrays.update(strict=1 - arrays["strict"]),
    "no layers": edited(layers=[]), "another version": edited(version=5),
    "a version of old": edited(version=1), "another format": edited(format="proof"),
    "a field of its own": edited(property="p.vnnlib", unsat=True),
    "fewer layers": lambda header, arrays: header["layers"].pop(),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_not_enough(name, folder, proofs, capsys, tmp_path):
    first = forged(proofs[0], tmp_path, CHANGES[name])
    given = [first, *proofs[1:]]
    assert not unsat(capsys, given, folder / "net.onnx", folder / "p.vnnlib")
    assert not unsat(capsys, given[::-1], folder / "net.onnx", folder / "p.vnnlib")


def test_boxes_or_sets_that_are_swapped_between_files_are_not_enough(
    folder, proofs, capsys, tmp_path
):
    for names in (("low", "high", "center"), ("rows", "bounds", "strict", "starts")):
        held = [archive.read(path)[1] for path in proofs]
        swapped = []
        for path, other in zip(proofs[:2], held[1::-1], strict=True):
            taken = {name: other[name] for name in names}
            swapped.append(forged(path, tmp_path, lambda h, a, taken=taken: a.update(taken)))
        given = [*swapped, proofs[2]]
        assert not unsat(capsys, given, folder / "net.onnx", folder / "p.vnnlib")


def test_what_a_file_says_of_itself_changes_nothing(folder, proofs, capsys, tmp_path):
    words = edited(notes=["VERIFIED: other.vnnlib is unsat\nVERIFIED"])
    first = forged(proofs[0], tmp_path, words)
    also = [word for path in proofs[1:2] for word in ("--also", path)]
    code, out, _ = call(capsys, "verify", first, folder / "net.onnx", "--property",
                        folder / "p.vnnlib", *also)  # fmt: skip
    assert code == NOT_PROVED
    lines = [line for line in out.splitlines() if line.startswith("VERIFIED")]
    assert len(lines) == 2 and not any("unsat" in line for line in lines)


def test_files_of_other_claims_are_bad_input(folder, proofs, capsys, tmp_path):
    pathlib.Path(tmp_path, "cut.npz").write_bytes(proofs[0].read_bytes()[:-9])
    for given in ([tmp_path / "cut.npz"], [*proofs, tmp_path / "cut.npz"], [folder / "none.npz"]):
        code, record = verified(capsys, given, folder / "net.onnx", folder / "p.vnnlib")
        assert code == BAD_INPUT and "error" in record
