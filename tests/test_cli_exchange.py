"""`export-mat` and `import-mat`: what goes out comes back, and void certificates are said to be."""

import json

import keras
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tf_lyapunov.certification import Certificate, certify
from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED, main
from tf_lyapunov.design import Design, spectral_design
from tf_lyapunov.matlab import import_mat


@pytest.fixture
def run(tmp_path):
    """The files of a run that `export-mat` reads."""
    layers = [keras.Input((4,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(3)]
    model = keras.Sequential(layers, name="exchanged")
    design = spectral_design(gain=50.0, sectors=["relu", "linear"])
    x = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
    folder = tmp_path / "run"
    folder.mkdir()
    model.save(folder / "model.keras")
    (folder / "design.json").write_text(design.to_json())
    certify(model, x).save(folder / "certificate.json")
    return folder


@pytest.fixture
def exported(run, tmp_path, capsys):
    assert main(["export-mat", str(run), str(tmp_path / "run.mat")]) == DONE
    assert "network, design, certificate" in capsys.readouterr().out
    return tmp_path / "run.mat"


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, " ".join(err.split())


def weights(path):
    return keras.saving.load_model(path, compile=False).get_weights()


def edited(path, out, kernel=None):
    """The exported file with one weight changed, as MATLAB would save it."""
    content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    maps = content["network"]["maps"][0, 0]
    maps[0, 0]["kernel"][0, 0][0, 0] = 9.0 if kernel is None else kernel
    savemat(out, content)
    return out


def test_a_run_goes_to_matlab_and_comes_back_bit_for_bit(run, exported, tmp_path, capsys):
    arguments = ("--model", run, "--out", tmp_path / "new.keras")
    files = ("--design-out", tmp_path / "d.json", "--certificate-out", tmp_path / "c.json")
    code, out, err = call(capsys, "import-mat", exported, *arguments, *files)
    assert code == DONE and "void" not in err
    assert "It is of these weights" in out and "the exported ones" in out
    for a, b in zip(weights(run / "model.keras"), weights(tmp_path / "new.keras"), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert (tmp_path / "d.json").read_text() == (run / "design.json").read_text()
    assert (tmp_path / "c.json").read_text() == (run / "certificate.json").read_text()


def test_a_bare_model_is_exported_with_the_named_parts(run, tmp_path, capsys):
    out = tmp_path / "model.mat"
    code, _, _ = call(capsys, "export-mat", run / "model.keras", out)
    assert code == DONE and import_mat(out).design is None
    arguments = ("--design", run / "design.json", "--overwrite", "--json")
    code, text, _ = call(capsys, "export-mat", run / "model.keras", out, *arguments)
    assert code == DONE
    assert json.loads(text) == {"written": str(out), "holds": ["network", "design"]}
    assert import_mat(out).design.claim == Design.from_json(
        (run / "design.json").read_text()
    ).claim  # fmt: skip


def test_edited_weights_arrive_and_void_the_certificate(run, exported, tmp_path, capsys):
    changed = edited(exported, tmp_path / "edited.mat")
    new, proof = tmp_path / "new.keras", tmp_path / "c.json"
    arguments = ("import-mat", changed, "--model", run / "model.keras", "--out", new)
    code, out, err = call(capsys, *arguments)
    assert code == DONE and "certificate is void" in err and "changed since export" in out
    assert weights(new)[0][0, 0] == 9.0
    code, out, _ = call(
        capsys, *arguments, "--certificate-out", proof, "--overwrite", "--json"
    )  # fmt: skip
    record = json.loads(out)
    assert code == NOT_PROVED and not proof.exists()
    assert record["certificate"]["void"] is True and record["written"] == [str(new)]
    assert record["model_digest"] != record["certificate"]["model_digest"]


def test_without_a_model_the_certificate_is_given_as_written(exported, tmp_path, capsys):
    proof = tmp_path / "c.json"
    code, out, _ = call(capsys, "import-mat", exported, "--certificate-out", proof)
    assert code == DONE and "told with --model" in out and "PROVED" in out
    assert Certificate.load(proof).model_digest == import_mat(exported).model_digest
    code, out, _ = call(capsys, "import-mat", exported, "--json")
    record = json.loads(out)
    assert record["certificate"]["void"] is None and record["weights"] == 4
    assert Design.from_json(json.dumps(record["design"])).is_proved


def test_files_are_replaced_only_on_request(run, exported, tmp_path, capsys):
    before = exported.read_bytes()
    code, _, err = call(capsys, "export-mat", run, exported)
    assert code == BAD_INPUT and "--overwrite" in err and exported.read_bytes() == before
    there = tmp_path / "d.json"
    there.write_text("mine")
    code, _, err = call(capsys, "import-mat", exported, "--design-out", there)
    assert code == BAD_INPUT and "--overwrite" in err and there.read_text() == "mine"
    assert call(capsys, "import-mat", exported, "--design-out", there, "--overwrite")[0] == DONE
    assert Design.from_json(there.read_text()).is_proved
    twice = ("--design-out", tmp_path / "x", "--certificate-out", tmp_path / "x")
    code, _, err = call(capsys, "import-mat", exported, *twice)
    assert code == BAD_INPUT and "its own file" in err and not (tmp_path / "x").exists()


def test_bad_files_are_one_clean_message(run, exported, tmp_path, capsys):
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="other")
    other.save(tmp_path / "other.keras")
    (tmp_path / "junk.mat").write_bytes(exported.read_bytes()[:-40])
    (tmp_path / "junk.json").write_text("{}")
    (tmp_path / "no_model").mkdir()
    out = tmp_path / "out.mat"
    for arguments, message in (
        (("export-mat", tmp_path / "absent.keras", out), "no such file"),
        (("export-mat", tmp_path / "no_model", out), "no such file"),
        (("export-mat", run, tmp_path / "out.m"), "end in .mat"),
        (("export-mat", run, out, "--design", tmp_path / "junk.json"), "`--design` must be"),
        (("export-mat", run, out, "--certificate", tmp_path / "junk.json"), "certificate"),
        (("export-mat", run, out, "--input-shape", "4,x"), "--input-shape"),
        (
            (
                "export-mat",
                tmp_path / "other.keras",
                out,
                "--certificate",
                run / "certificate.json",
            ),
            "must be this model's",
        ),
        (("import-mat", tmp_path / "absent.mat"), "no such file"),
        (("import-mat", tmp_path / "junk.mat"), "truncated"),
        (("import-mat", exported, "--model", run / "model.keras"), "go together"),
        (
            ("import-mat", exported, "--model", tmp_path / "other.keras", "--out", "new.keras"),
            "same variables",
        ),
    ):
        code, text, err = call(capsys, *arguments)
        assert code == BAD_INPUT and message in err and text == "", arguments
    assert not out.exists()
    edited(exported, tmp_path / "nan.mat", kernel=np.nan)
    code, _, err = call(capsys, "import-mat", tmp_path / "nan.mat")
    assert code == BAD_INPUT and "NaN" in err


def test_a_file_without_the_part_that_is_asked_for_is_refused(run, tmp_path, capsys):
    bare = tmp_path / "bare.mat"
    assert call(capsys, "export-mat", run / "model.keras", bare)[0] == DONE
    for option in ("--design-out", "--certificate-out"):
        code, _, err = call(capsys, "import-mat", bare, option, tmp_path / "part.json")
        assert code == BAD_INPUT and "does not hold" in err


def test_open_sizes_are_given_on_the_command_line(tmp_path, capsys):
    model = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(2, 3)])
    model.save(tmp_path / "open.keras")
    arguments = ("export-mat", tmp_path / "open.keras", tmp_path / "open.mat")
    assert call(capsys, *arguments)[0] == BAD_INPUT
    assert call(capsys, *arguments, "--input-shape", "6,7,1")[0] == DONE
    axes = loadmat(tmp_path / "open.mat", simplify_cells=True)["network"]["maps"]["axes"]
    assert axes[:, 3].tolist() == [6, 7]
