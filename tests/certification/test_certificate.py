"""Certificates as objects: shares, text, files."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.certification import Certificate, certify, lipschitz_upper_bound


@pytest.fixture(name="proof")
def proof_fixture():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation="relu", name="hidden"), layers.Dense(3)]
    )
    x = np.random.default_rng(0).normal(size=(20, 4))
    return certify(model, x, np.arange(20) % 3)


def test_certified_accuracy_counts_radii_at_least_as_large(proof):
    radii = np.array([0.0, 0.01, 0.1, 1e9])
    expected = [np.mean((proof.radius >= r) & (proof.radius > 0)) for r in radii]
    assert proof.certified_accuracy(radii).tolist() == expected
    assert proof.certified_accuracy(float(proof.radius.max())) == 1 / 20
    assert 0 < proof.certified_accuracy(0.0) <= proof.accuracy < 1
    assert isinstance(proof.certified_accuracy(0.1), float)
    for wrong in (-0.1, np.nan, [0.1, -1.0]):
        with pytest.raises(ValueError, match="radius"):
            proof.certified_accuracy(wrong)


def test_a_certificate_survives_a_file_unchanged(proof, tmp_path):
    path = tmp_path / "certificate.json"
    proof.save(path)
    copy = Certificate.load(path)
    for field in dataclasses.fields(Certificate):
        mine, other = getattr(proof, field.name), getattr(copy, field.name)
        assert np.array_equal(mine, other) if isinstance(mine, np.ndarray) else mine == other
    assert [p.name for p in tmp_path.iterdir()] == ["certificate.json"]


def test_infinite_radii_survive_strict_json():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, kernel_initializer="zeros")])
    model.layers[0].bias.assign([1.0, 0.0])
    proof = certify(model, np.ones((1, 2)))
    assert proof.radius[0] == np.inf
    json.loads(proof.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert Certificate.from_json(proof.to_json()).radius[0] == np.inf
    assert "inf" in proof.explain()


def test_half_a_file_is_refused(proof, tmp_path):
    text = proof.to_json()
    path = tmp_path / "certificate.json"
    for broken in (text[: len(text) // 2], "{}", "[]", '{"format": "other"}', ""):
        path.write_text(broken)
        with pytest.raises(ValueError, match="certificate"):
            Certificate.load(path)


def test_a_failed_save_leaves_the_old_file(proof, tmp_path, monkeypatch):
    path = tmp_path / "certificate.json"
    path.write_text("old")
    monkeypatch.setattr(Certificate, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proof.save(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_explanation_names_every_layer_and_assumption(proof):
    text = str(proof)
    for contribution in proof.contributions:
        assert contribution.name in text
    for sentence in proof.assumptions:
        assert sentence in text
    assert "PROVED" in text and "hidden/relu" in text
    assert f"{proof.gain_upper_bound:.6g}" in text


def test_a_certificate_cannot_be_edited_or_inconsistent(proof):
    with pytest.raises(dataclasses.FrozenInstanceError):
        proof.verdict = "PROVED"
    with pytest.raises(ValueError, match="read-only"):
        proof.radius[0] = 1.0
    with pytest.raises(ValueError, match="one radius"):
        dataclasses.replace(proof, labels=proof.labels[:3])
    with pytest.raises(ValueError, match="≥ 0"):
        dataclasses.replace(proof, radius=-proof.radius - 1)
    with pytest.raises(ValueError, match="verdict"):
        dataclasses.replace(proof, verdict="MAYBE")


def test_nothing_proved_is_a_verdict_with_a_reason():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, kernel_initializer="zeros")])
    proof = certify(model, np.ones((3, 2)), [1, 1, 1])
    assert proof.verdict == "NOT_PROVED"
    assert proof.certified_accuracy(0.0) == 0.0
    assert "none of them" in proof.explain()


def test_a_gain_bound_explains_itself():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Softmax()])
    logits, whole = lipschitz_upper_bound(model), lipschitz_upper_bound(model, outputs="model")
    assert whole.gain_upper_bound == pytest.approx(logits.gain_upper_bound / 2, rel=1e-12)
    assert len(logits.contributions) == 1 and len(whole.contributions) == 2
    assert "softmax" in str(whole) and "l2" in str(whole)
    assert json.loads(whole.to_json())["gain_upper_bound"] == whole.gain_upper_bound
    with pytest.raises(ValueError, match="outputs"):
        lipschitz_upper_bound(model, outputs="probabilities")
