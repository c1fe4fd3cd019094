"""Proof files: every method comes back verified; other models, versions and files do not."""

import dataclasses
import io
import zipfile

import keras
import numpy as np
import pytest
from small_proofs import convolution_model, dense_model, filled, inputs_of, saved

from tf_lyapunov.bounds.choice import METHODS
from tf_lyapunov.certification import Certificate, certify, register_gain
from tf_lyapunov.errors import ModelFileError, ProofFileError, UnsupportedLayerError
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.checking import evaluate
from tf_lyapunov.verification.reading import read

layers = keras.layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_proof_file_that_verifies(method, tmp_path):
    path = tmp_path / "proof.npz"
    certificate = saved(dense_model(), path, method)
    found = verify(path, dense_model())
    assert found.holds and bool(found) and found.reasons == ()
    assert "VERIFIED" in str(found) and found.method == method
    copy = Certificate.load(path)
    assert copy.method == method and copy.model_digest == certificate.model_digest
    assert certificate.gain_upper_bound <= copy.gain_upper_bound
    assert copy.gain_upper_bound <= certificate.gain_upper_bound * (1 + 1e-6)
    assert found.gain_upper_bound <= copy.gain_upper_bound
    assert np.all(copy.radius <= certificate.radius) and np.all(copy.radius <= found.radius)
    assert np.all(copy.radius >= certificate.proof.radius * (1 - 1e-6))
    assert np.any(copy.radius > 0)
    if method == "local":
        assert np.any(certificate.radius > copy.radius)
        assert "left out" in found.notes[0] and any("left out" in s for s in copy.assumptions)
    assert [p.name for p in tmp_path.iterdir()] == ["proof.npz"]


def test_convolutions_pooling_and_branches_verify(tmp_path):
    path = tmp_path / "proof.npz"
    certificate = saved(convolution_model(), path)
    found = verify(path, convolution_model())
    assert found.holds, found
    assert found.gain_upper_bound == pytest.approx(certificate.gain_upper_bound, rel=1e-9)
    file = tmp_path / "model.keras"
    convolution_model().save(file)
    assert verify(path, file).holds and verify(str(path), str(file)).holds


def test_the_verifier_computes_the_logits_that_keras_computes():
    for model in (dense_model(), convolution_model()):
        network, x = read(model), inputs_of(model)
        logits, errors = evaluate(network, x)
        expected = model.predict(x, verbose=0)
        if model is not dense_model():
            logits = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert np.allclose(logits, expected, atol=1e-5)
        assert 0 < errors.max() < 1e-10


def test_integers_and_single_logits_verify(tmp_path):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, activation="relu"), layers.Dense(1, "sigmoid")]
    )
    x = np.random.default_rng(0).integers(0, 255, size=(9, 4)).astype("uint8")
    for method in ("composition", "lipsdp"):
        certificate = certify(filled(model), x, np.arange(9) % 2, method=method)
        certificate.save(tmp_path / "p.npz")
        assert verify(tmp_path / "p.npz", model).holds
        assert Certificate.load(tmp_path / "p.npz").verdict == certificate.verdict


def test_half_precision_and_normalised_models_verify(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")
    normalise = layers.Normalization()
    normalise.adapt(x * 3)
    model = keras.Sequential(
        [keras.Input((5,)), normalise, layers.Dense(6, dtype="mixed_float16"), layers.ReLU(),
         layers.Dense(3)]
    )  # fmt: skip
    certify(filled_keeping(model, normalise), x, precision="float64").save(tmp_path / "p.npz")
    assert verify(tmp_path / "p.npz", model).holds


def filled_keeping(model, layer):
    held = [np.array(w) for w in layer.get_weights()]
    filled(model)
    layer.set_weights(held)
    return model


def other_models():
    wrong = {}
    wrong["weight"] = dense_model(seed=1)
    wrong["slope"] = dense_model(slope=0.11)
    wrong["activation"] = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, activation="tanh", name="first"),
         layers.Dense(4, name="second"), layers.LeakyReLU(negative_slope=0.1, name="leak"),
         layers.Dense(3, name="logits")]
    )  # fmt: skip
    wrong["swapped"] = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, name="second"),
         layers.LeakyReLU(negative_slope=0.1, name="leak"),
         layers.Dense(5, activation="relu", name="first"), layers.Dense(3, name="logits")]
    )  # fmt: skip
    wrong["shorter"] = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    for name in ("activation", "swapped", "shorter"):
        filled(wrong[name])
    return wrong


@pytest.mark.parametrize("method", ["composition", "eclipse"])
def test_other_models_are_refused_with_the_layer_that_differs(method, tmp_path):
    path = tmp_path / "proof.npz"
    saved(dense_model(), path, method)
    for name, model in other_models().items():
        found = verify(path, model)
        assert not found.holds and found.reasons, name
        assert "REFUSED" in str(found)
    assert "'first'" in verify(path, other_models()["activation"]).reasons[0]
    assert "certified weights" in verify(path, dense_model(seed=1)).reasons[0]


def test_a_changed_activation_is_noticed_without_the_digests(tmp_path):
    """tanh has ReLU's sector; a steeper leaky ReLU does not, and its gain exceeds the table's."""
    path = tmp_path / "proof.npz"
    saved(dense_model(), path, "lipsdp")
    header, arrays = archive.read(path)
    steep = dense_model(slope=3.0)
    network = read(steep)
    header["layers"] = [[r.name, r.settings, r.weights] for r in network.layers]
    archive.write(path, header, arrays)
    found = verify(path, steep)
    assert not found.holds and any("outside the sector" in r for r in found.reasons)


def test_archives_that_are_damaged_foreign_or_of_another_version_are_refused(tmp_path):
    path = tmp_path / "proof.npz"
    saved(dense_model(), path)
    data = path.read_bytes()
    header, arrays = archive.read(path)
    broken = tmp_path / "broken.npz"
    for content in (b"", data[: len(data) // 2], data[:-1], b"PK" + data[50:], b"x" * 300):
        broken.write_bytes(content)
        with pytest.raises(ProofFileError):
            verify(broken, dense_model())
        with pytest.raises(ProofFileError):
            Certificate.load(broken)
    archive.write(broken, {**header, "version": 99}, arrays)
    with pytest.raises(ProofFileError, match="version is 99"):
        verify(broken, dense_model())
    archive.write(broken, {**header, "format": "other"}, arrays)
    with pytest.raises(ProofFileError, match="format"):
        verify(broken, dense_model())
    np.savez(broken, a=np.ones(3))
    with pytest.raises(ProofFileError, match="no proof file"):
        verify(broken, dense_model())
    for name in ("radius", "inputs", "labels"):
        archive.write(broken, header, {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(ProofFileError, match="incomplete"):
            verify(broken, dense_model())
    for name in ("layers", "chain", "certificate"):
        archive.write(broken, {k: v for k, v in header.items() if k != name}, arrays)
        with pytest.raises(ProofFileError, match="incomplete"):
            verify(broken, dense_model())
    with pytest.raises(ProofFileError, match="no such file"):
        verify(tmp_path / "absent.npz", dense_model())
    with pytest.raises(ModelFileError):
        verify(path, tmp_path / "absent.keras")


def _with_member(source, name, data, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            if info.filename != name:
                new.writestr(info.filename, old.read(info), zipfile.ZIP_STORED)
        new.writestr(name, data)
    return out.getvalue()


def test_bombs_pickles_and_huge_shapes_are_refused_before_memory_is_used(tmp_path):
    path, bad = tmp_path / "proof.npz", tmp_path / "bad.npz"
    saved(dense_model(), path)
    zeros = io.BytesIO()
    np.lib.format.write_array(zeros, np.zeros(10**6), version=(1, 0))
    bad.write_bytes(_with_member(path, "inputs.npy", zeros.getvalue(), zipfile.ZIP_DEFLATED))
    assert bad.stat().st_size < 20_000  # for eight megabytes
    with pytest.raises(ProofFileError, match="compressed"):
        verify(bad, dense_model())
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"shape": (10**12, 6), "fortran_order": False, "descr": "<f8"}
    )
    bad.write_bytes(_with_member(path, "inputs.npy", huge.getvalue() + b"\0" * 64))
    with pytest.raises(ProofFileError, match="shape"):
        verify(bad, dense_model())
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], dtype=object), allow_pickle=True)
    bad.write_bytes(_with_member(path, "inputs.npy", pickled.getvalue()))
    with pytest.raises(ProofFileError, match="something else than numbers"):
        verify(bad, dense_model())
    bad.write_bytes(_with_member(path, "evil.txt", b"x"))
    with pytest.raises(ProofFileError, match="no array"):
        verify(bad, dense_model())


def test_layers_that_the_verifier_does_not_know_are_refused_by_name(tmp_path):
    class Halving(layers.Layer):
        def call(self, x):
            return 0.5 * x

    register_gain(Halving, 0.5, assumption="Halving multiplies by 1/2.")
    model = keras.Sequential([keras.Input((4,)), Halving(name="half"), layers.Dense(2)])
    proof = certify(model, np.ones((2, 4), "float32"))
    with pytest.raises(UnsupportedLayerError, match="'half' of type Halving"):
        proof.save(tmp_path / "p.npz")
    register_gain(Halving, None)
    assert not list(tmp_path.iterdir())


def test_only_what_certify_returned_for_the_present_weights_is_saved(tmp_path):
    model = filled(keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)]))
    proof = certify(model, np.ones((2, 4), "float32"))
    edited = dataclasses.replace(proof, radius=2 * proof.radius)
    with pytest.raises(ValueError, match="without its proof"):
        edited.save(tmp_path / "p.npz")
    proof.save(tmp_path / "p.npz")
    with pytest.raises(ValueError, match="without its proof"):
        Certificate.load(tmp_path / "p.npz").save(tmp_path / "q.npz")
    model.layers[0].kernel.assign(2 * np.array(model.layers[0].kernel))
    with pytest.raises(ValueError, match="changed since"):
        proof.save(tmp_path / "q.npz")


def test_the_verifier_imports_nothing_that_made_the_proof():
    import ast
    import pathlib

    import tf_lyapunov.verification as package

    allowed = {"numpy", "hashlib", "json", "math", "io", "zipfile", "time", "dataclasses",
               "itertools", "functools", "pathlib", "os", "sys", "inspect", "types",
               "copy"}  # fmt: skip
    files = {
        f"tf_lyapunov.{name}" for name in ("errors", "writing", "archives", "modelfile", "digits")
    }
    for file in pathlib.Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                if name.startswith("tf_lyapunov"):
                    own = name.startswith("tf_lyapunov.verification")
                    assert own or name in files, file
                elif name.split(".")[0] == "keras":
                    assert file.name in (
                        "reading.py",
                        "layers.py",
                        "sequences.py",
                        "suspicion.py",
                        "translation.py",
                    )
                else:
                    assert name in allowed, (file, name)


def _masked():
    x = keras.Input((2,))
    mask = layers.Dense(2)(x)
    return keras.Model(x, layers.Softmax(name="odd")(layers.Dense(2)(x), mask=mask))


def _dropping():
    x = keras.Input((2,))
    return keras.Model(x, layers.Dense(2)(layers.Dropout(0.9, name="odd")(x, training=1)))


def _normalized_elsewhere():
    norm = layers.Normalization(axis=1, mean=[0.0, 0.0], variance=[1.0, 1e-4], name="odd")
    return keras.Sequential([keras.Input((2, 2)), norm, layers.Flatten(), layers.Dense(2)])


def _stretched():
    odd = layers.Rescaling(np.ones(4), name="odd")
    return keras.Sequential([keras.Input((1,)), odd])


@pytest.mark.parametrize(
    "build",
    [
        _masked,
        _dropping,
        _normalized_elsewhere,
        _stretched,
    ],
)
def test_layers_that_compute_more_than_the_verifier_reads_are_refused(build):
    with pytest.raises(UnsupportedLayerError, match="'odd'"):
        read(build())


def test_a_softmax_over_one_unit_is_refused():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, activation="softmax")])
    with pytest.raises(UnsupportedLayerError, match="one unit"):
        read(model)
