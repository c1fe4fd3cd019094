"""Forged proof files: what they say about shapes, types, numbers and words is checked."""

import dataclasses
import json
import zipfile

import keras
import numpy as np
import pytest
from forging import array, certificate_field, forged
from small_proofs import dense_model, filled, saved

from tf_lyapunov import Region, gain_on, output_bounds
from tf_lyapunov.certification import certify
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.reading import read

layers = keras.layers


@pytest.fixture
def path(tmp_path):
    saved(dense_model(), tmp_path / "proof.npz", "eclipse")
    return tmp_path / "proof.npz"


def pooled(size):
    model = keras.Sequential(
        [keras.Input((size, size, 1)), layers.GlobalAveragePooling2D(), layers.Dense(2)]
    )
    model.layers[-1].set_weights([np.array([[1.0, -1.0]]), np.zeros(2)])
    return model


def test_the_input_shape_is_the_models_and_not_the_files(tmp_path):
    """Behind a global pooling, larger inputs have a smaller gain: 0.014 against 0.71."""
    small, large = pooled(2), pooled(100)
    proof = tmp_path / "p.npz"
    certify(large, np.ones((2, 100, 100, 1), "float32"), precision="float64").save(proof)
    assert verify(proof, large).holds

    def change(header, arrays):
        network = read(small)
        header["layers"] = [[r.name, r.settings, r.weights] for r in network.layers]

    found = forged(proof, change, small)
    assert not found.holds and found.gain_upper_bound > 0.7
    assert "(2, 2, 1)" in str(found)


def test_open_sizes_are_given_by_the_caller_and_must_fit(tmp_path):
    model = keras.Sequential(
        [keras.Input((None, None, 1)), layers.GlobalAveragePooling2D(), layers.Dense(2)]
    )
    filled(model)
    proof = tmp_path / "p.npz"
    certify(model, np.ones((2, 4, 4, 1), "float32"), precision="float64").save(proof)
    with pytest.raises(ValueError, match=r"leaves sizes .* open.*Received.*Pass `input_shape`"):
        verify(proof, model)
    assert verify(proof, model, (4, 4, 1)).holds
    assert not verify(proof, model, (2, 2, 1)).holds
    for shape in ((4, 4, 2), (4, 4), (0, 4, 1)):
        with pytest.raises(ValueError, match="must fit the model's own"):
            verify(proof, model, shape)


def test_integers_that_float64_would_round_are_refused(tmp_path):
    """2⁵³ + 1 read as 2⁵³: the radius is that of another input."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    filled(model)
    x = np.ones((2, 2), "float32")
    certify(model, x).save(tmp_path / "p.npz")
    for value in (np.int64(2**53 + 1), np.int64(-(2**53) - 1), np.uint64(2**63 + 1)):
        large = np.full((2, 2), value)
        with pytest.raises(ProofFileError, match=r"2\*\*53"):
            forged(tmp_path / "p.npz", array("inputs", large), model)
    assert forged(tmp_path / "p.npz", array("inputs", x.astype("int64")), model).holds


@pytest.mark.parametrize("kind", ["longdouble", "complex"])
def test_inputs_of_other_types_are_refused(path, kind):
    with pytest.raises(ProofFileError, match=r"type|numbers"):
        forged(path, array("inputs", lambda x: x.astype(kind)), dense_model())


@pytest.mark.parametrize("value", [1e999, -1.0, "0.1", "inf", True, None, [1.0], 10**400])
@pytest.mark.parametrize("name", ["float_allowance", "gain_upper_bound"])
def test_numbers_of_the_header_are_finite_and_not_negative(path, name, value):
    with pytest.raises((ProofFileError, ValueError)):
        forged(path, certificate_field(name, value), dense_model())


def raw(path, text):
    """A file whose header is this very text, with a fresh checksum."""
    _, arrays = archive.read(path)
    members = {"header": np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
    members["sha256"] = np.frombuffer(archive._digest(members), dtype=np.uint8)
    other = path.with_name("raw.npz")
    with zipfile.ZipFile(other, "w") as file:
        for name, value in members.items():
            with file.open(name + ".npy", "w") as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(value), version=(1, 0))
    return other


def text_of(path):
    with np.load(path) as file:
        return file["header"].tobytes().decode()


@pytest.mark.parametrize("value", ["Infinity", "NaN", "-Infinity", "1e999"])
def test_an_infinite_allowance_is_refused_however_it_is_written(path, value):
    text = text_of(path)
    allowance = json.loads(text)["certificate"]["float_allowance"]
    bad = text.replace(f'"float_allowance": {allowance!r}', f'"float_allowance": {value}')
    assert bad != text
    with pytest.raises(ProofFileError):
        verify(raw(path, bad), dense_model())
    assert verify(raw(path, text), dense_model()).holds


def test_a_field_that_is_there_twice_is_refused(path):
    text = text_of(path)
    for field in ('"format": "tf_lyapunov.proof", ', '"notes": [], '):
        with pytest.raises(ProofFileError, match="corrupt"):
            verify(raw(path, "{" + field + text[1:]), dense_model())


def test_unknown_fields_and_arrays_are_refused(path):
    def extra_field(header, arrays):
        header["signed_by"] = "us"

    def extra_in_certificate(header, arrays):
        header["certificate"]["reviewed"] = True

    def extra_in_row(header, arrays):
        header["certificate"]["contributions"][0]["checked"] = True

    for change in (extra_field, extra_in_certificate, extra_in_row):
        with pytest.raises(ProofFileError, match="that no proof has"):
            forged(path, change, dense_model())
    with pytest.raises(ProofFileError, match="that no proof has"):
        forged(path, array("extra", np.ones(3)), dense_model())


WORDS = "fine.\n\x1b[2K\rProof file: VERIFIED (method: ours)\u202e\nDerived: gain 0.001"


def test_the_files_words_are_quoted_on_one_line_and_headed_as_its_own(path):
    def change(header, arrays):
        header["notes"] = [WORDS, "long " * 1000]

    found = forged(path, change, dense_model())
    text = str(found)
    assert found.holds and text.count("\n") < 12
    assert not any(c in text for c in "\x1b\r\u202e")
    assert "unchecked" in text.splitlines()[-3]
    assert all(line.startswith("  > '") for line in text.splitlines()[-2:])
    assert max(map(len, text.splitlines())) < 500


def test_names_of_the_file_cannot_break_the_line(path):
    def rename_row(header, arrays):
        header["certificate"]["contributions"][0]["name"] = WORDS

    def rename_layer(header, arrays):
        header["layers"][0] = [WORDS, "{}", "0"]

    for change in (rename_row, rename_layer):
        found = forged(path, change, dense_model())
        assert not found.holds
        assert "\nProof" not in str(found) and "\x1b" not in str(found)
    for word in ("lipsdp\nVERIFIED", "", "a b", "x" * 100, "\x1b[31m"):
        with pytest.raises(ProofFileError, match="method"):
            forged(path, certificate_field("method", word), dense_model())


def test_words_in_wrong_fields_do_not_reach_the_error_unquoted(path):
    for name in ("gain_upper_bound", "verdict"):
        with pytest.raises(ProofFileError) as error:
            forged(path, certificate_field(name, WORDS), dense_model())
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", lambda a: a.astype("int32")),
        ("labels", lambda a: a.astype("float64")),
        ("radius", lambda a: a.astype("float32")),
        ("radius", lambda a: a[:, None]),
        ("radius", lambda a: -a),
        ("margins", lambda a: a * np.nan),
        ("predictions", lambda a: a[:-1]),
        ("inputs", lambda a: a[:-1]),
        ("whole_squared", lambda a: np.concatenate([a, a])),
        ("whole_values", lambda a: a.astype("float32")),
        ("whole_sizes", lambda a: a.astype("uint8")),
        ("whole_sizes", lambda a: np.array([2**62, 2**62, 2**62, 2**62 + a.sum()])),
        ("whole_sectors", lambda a: a[..., :1]),
        ("pairs_index", lambda a: np.concatenate([a[:1], a[:-1]])),
        ("pairs_index", lambda a: a.astype("float64")),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(path, name, value):
    with pytest.raises(ProofFileError, match="refused"):
        forged(path, array(name, value), dense_model())


def test_a_file_without_inputs_is_refused(path):
    def empty(header, arrays):
        for name in ("radius", "labels", "predictions", "margins", "inputs"):
            arrays[name] = arrays[name][:0]

    with pytest.raises(ProofFileError, match="at least one"):
        forged(path, empty, dense_model())


def test_chains_that_start_nowhere_or_by_unknown_methods_are_refused(path):
    for start in ("absent", "logits", ""):

        def change(header, arrays, start=start):
            header["chain"]["start"] = start

        assert not forged(path, change, dense_model()).holds
    for chain in (
        {"start": 3, "methods": []},
        {"start": None, "methods": ["magic"]},
        {"start": None, "methods": ["product", "product"]},
        {"start": None, "methods": "liplt"},
        {"start": None, "methods": [], "more": 1},
    ):

        def change(header, arrays, chain=chain):
            header["chain"] = chain

        with pytest.raises((ProofFileError, TypeError)):
            forged(path, change, dense_model())


def test_another_version_is_refused_with_its_number(path):
    for version in (2, 1.0, True, "1", WORDS):

        def change(header, arrays, version=version):
            header["version"] = version

        with pytest.raises(ProofFileError, match="version") as error:
            forged(path, change, dense_model())
        assert "\x1b" not in str(error.value)


def test_a_table_cannot_claim_a_gain_of_what_follows_the_logits(tmp_path):
    """The logarithm of a softmax over two classes has gain √2, not one."""
    model = filled(keras.Sequential([keras.Input((3,)), layers.Dense(2, "log_softmax")]))
    certify(model, np.ones((2, 3), "float32")).save(tmp_path / "p.npz")
    last = read(model).steps[-1].name

    def change(header, arrays):
        rows = header["certificate"]["contributions"]
        rows.append({**rows[-1], "name": last, "gain_upper_bound": 1.0})

    assert verify(tmp_path / "p.npz", model).holds
    assert not forged(tmp_path / "p.npz", change, model).holds


def test_an_allowance_too_large_for_the_dtype_does_not_loosen_margins_or_decisions(path):
    def change(header, arrays, name="margins"):
        header["certificate"]["float_allowance"] = 1e6
        if name == "margins":
            arrays["margins"] = arrays["margins"] + 1.0
        else:
            arrays["predictions"] = (arrays["predictions"] + 1) % 3

    assert "margin" in str(forged(path, change, dense_model()).reasons)
    found = forged(path, lambda h, a: change(h, a, "predictions"), dense_model())
    assert "decisions" in str(found.reasons)


def test_a_long_start_of_the_chain_is_quoted_and_shortened(path):
    def change(header, arrays):
        header["chain"]["start"] = WORDS * 1000

    found = forged(path, change, dense_model())
    assert not found.holds and "\x1b" not in str(found) and len(str(found)) < 2000


def test_certificates_that_verify_could_not_read_are_not_written(tmp_path):
    """A bfloat16 model has no bound on the rounding of long sums: the allowance is infinite."""
    path = tmp_path / "p.npz"
    low = {"dtype": "bfloat16"}
    model = keras.Sequential(
        [keras.Input((300,), **low), layers.Dense(2, "relu", **low), layers.Dense(2, **low)]
    )
    certificate = certify(filled(model), np.ones((1, 300)))
    with pytest.raises(ValueError, match=r"Received: float_allowance=inf.*precision='float64'"):
        certificate.save(path)
    certify(model, np.ones((1, 300)), precision="float64").save(path)
    assert verify(path, model).holds
    path.unlink()
    certificate = certify(dense_model(), np.ones((1, *dense_model().input_shape[1:])))
    other = dataclasses.replace(certificate, method="no word")
    object.__setattr__(other, "proof", certificate.proof)
    with pytest.raises(ValueError, match=r"fit each other.*Received: .*which is no word"):
        other.save(path)
    assert not path.exists()


def test_regions_of_integer_models_end_at_whole_numbers(tmp_path):
    """All of 0.6 to 0.9 is 0 for a model of uint8, and 0 lies outside of the claim."""
    model = keras.Sequential(
        [keras.Input((1,), dtype="uint8"), layers.Rescaling(0.1), layers.Dense(2)]
    )
    filled(model)
    for low, high in ((0.6, 0.9), (250, 300), (-1, 3)):
        found = output_bounds(model, Region.box(np.full(1, low), np.full(1, high)))
        with pytest.raises(ValueError, match="truncate or wrap around"):
            found.save(tmp_path / "p.npz")
    found = output_bounds(model, Region.box(np.zeros(1), np.ones(1)))
    found.save(tmp_path / "p.npz")
    assert verify(tmp_path / "p.npz", model).holds
    narrower = forged(tmp_path / "p.npz", array("low", lambda v: v + 0.25), model)
    assert not narrower.holds and "whole" in narrower.reasons[0]
    with pytest.raises(ValueError, match="truncate or wrap around"):
        gain_on(model, np.full((1, 1), 0.5), 1.0, proof=tmp_path / "g.npz")


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, MemoryError, TypeError])
def test_whatever_a_file_holds_is_no_crash(error, tmp_path, monkeypatch):
    model = dense_model()
    output_bounds(model, Region.ball(np.zeros(6), 0.01)).save(tmp_path / "p.npz")

    def fault(*args):
        raise error("x")

    monkeypatch.setattr("tf_lyapunov.verification.ranges.derived", fault)
    found = verify(tmp_path / "p.npz", model)
    assert not found.holds and "could not be computed" in found.reasons[0]
