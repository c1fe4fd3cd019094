"""`certify --proof` and `verify`: 0 if the proof holds, 1 if it does not, 2 for bad files."""

import json

import keras
import numpy as np
import pytest
from command_line import call

from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify")
    layers = [keras.Input((6,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    model.save(path / "model.keras")
    data = ("--data", "blobs", "--samples", "12", "--method", "lipsdp")
    proof = ("--proof", str(path / "proof.npz"))
    assert main(["certify", str(path / "model.keras"), *data, *proof]) == DONE
    return path


def test_a_proof_that_certify_wrote_holds(folder, capsys):
    code, out, _ = call(capsys, "verify", folder / "proof.npz", folder / "model.keras")
    assert code == DONE and "VERIFIED" in out and "lipsdp" in out
    code, out, _ = call(capsys, "verify", folder / "proof.npz", folder / "model.keras", "--json")
    record = json.loads(out)
    assert code == DONE and record["holds"] is True and record["reasons"] == []
    assert record["examples"] == 12
    assert 0 < record["gain_upper_bound"] <= record["claimed_gain_upper_bound"]


def test_a_changed_weight_does_not_hold_and_says_where(folder, tmp_path, capsys):
    model = keras.saving.load_model(folder / "model.keras")
    kernel = np.array(model.layers[0].kernel)
    kernel[0, 0] += 1e-3
    model.layers[0].kernel.assign(kernel)
    model.save(tmp_path / "changed.keras")
    code, out, _ = call(capsys, "verify", folder / "proof.npz", tmp_path / "changed.keras")
    assert code == NOT_PROVED and "REFUSED" in out and model.layers[0].name in out
    code, out, _ = call(
        capsys, "verify", folder / "proof.npz", tmp_path / "changed.keras", "--json"
    )  # fmt: skip
    record = json.loads(out)
    assert code == NOT_PROVED and record["holds"] is False and record["reasons"]
    assert record["gain_upper_bound"] is None


def test_bad_files_are_bad_input(folder, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes((folder / "proof.npz").read_bytes()[:-50])
    (tmp_path / "cut.keras").write_bytes((folder / "model.keras").read_bytes()[:-50])
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for proof, model, message in (
        (tmp_path / "cut.npz", folder / "model.keras", "proof file"),
        (tmp_path / "other.npz", folder / "model.keras", "proof file"),
        (tmp_path / "absent.npz", folder / "model.keras", "absent.npz"),
        (folder / "proof.npz", tmp_path / "cut.keras", "truncated"),
        (folder / "proof.npz", tmp_path / "absent.keras", "no such file"),
    ):
        code, out, err = call(capsys, "verify", proof, model)
        assert code == BAD_INPUT and message in err and out == "", (proof, model)


def test_a_proof_file_must_be_named_as_one(folder, capsys):
    code, _, err = call(
        capsys, "certify", folder / "model.keras", "--data", "blobs", "--proof", "proof.json"
    )
    assert code == BAD_INPUT and "`--proof` must end in .npz" in err


def test_radii_around_inputs_in_a_norm_and_within_bounds(folder, tmp_path, capsys):
    proof = tmp_path / "around.npz"
    code, out, _ = call(
        capsys, "certify", folder / "model.keras", "--data", "blobs", "--samples", "4",
        "--method", "linear", "--norm", "linf", "--bounds", "-9", "9", "--proof", proof,
    )  # fmt: skip
    assert code == DONE and "with l∞ norm up to r that stays within -9.0 to 9.0" in out
    code, out, _ = call(capsys, "verify", proof, folder / "model.keras")
    assert code == DONE and "VERIFIED" in out and "method, as the file says: linear" in out
    assert "radii in l∞ for" in out and "stay within -9.0 to 9.0" in out
    code, out, _ = call(capsys, "verify", proof, folder / "model.keras", "--json")
    record = json.loads(out)
    assert record["holds"] and record["norm"] == "linf" and record["within"] == "-9.0 to 9.0"
    for option, message in (("--norm l0", "`norm` must be one of"), ("--bounds 2 1", "low ≤ high"),
                            ("--bounds 0 0.01", "within `bounds`")):  # fmt: skip
        code, _, err = call(
            capsys, "certify", folder / "model.keras", "--data", "blobs", "--samples", "4",
            "--method", "linear", *option.split(),
        )  # fmt: skip
        assert code == BAD_INPUT and message in err, (option, err)
