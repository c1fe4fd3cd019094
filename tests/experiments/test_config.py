"""Experiment files: what is refused, how it is said, and that nothing is lost on the way."""

import pathlib

import pytest

from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments.reading import load_config, parse_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
BASE = "dataset: {name: digits}\nmodel:\n  name: mlp\n"


def message(extra, overrides=()):
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE + extra, "f.yaml", overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "line", "parts"),
    [
        ("trainin: {epochs: 3}", 4, ["`trainin` is not a known key", "`training`"]),
        ("training:\n  epocs: 3", 5, ["`training.epocs`", "`epochs`", "training.epocs=3"]),
        ("training:\n  loss: {name: cross_entropy, temprature: 2}", 5, ["`temperature`"]),
        ("  width: [3]", 4, ["`model.width`", "`widths`"]),
        ("attacks:\n- {name: pgd}\n- {name: fgm, nrom: l2}", 6, ["`attacks.1.nrom`", "`norm`"]),
        ("layers:\n  indices:\n  - {delta: 1, mu: 2}", 6, ["`layers.indices.0.mu`", "`nu`"]),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one(extra, line, parts):
    text = message(extra)
    assert f"f.yaml, line {line}:" in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("training: {epochs: 3.5}", ["line 4", "training.epochs=3.5"]),
        ("training: {epochs: true}", ["training.epochs=True"]),
        ("training: {epochs: 0}", ["training.epochs=0", "greater than or equal to 1"]),
        ("training: {weight_decay: true}", ["must be a number, not true or false"]),
        ("training: {optimizer: {learning_rate: fast}}", ["learning_rate='fast'"]),
        ("training: {optimizer: {learning_rate: -1}}", ["learning_rate=-1"]),
        ("training: {optimizer: {name: adam, momentum: 0.9}}", ["belongs to sgd"]),
        ("training: {loss: {name: crossentropy}}", ["Did you mean `cross_entropy`"]),
        ("training: {loss: {temperature: 2}}", ["`training.loss.name` is missing"]),
        ("training: [1]", ["must be a mapping"]),
        ("training: {optimizer: {momentum: 1.0}}", ["momentum=1.0"]),
        ("claim: {delta: 1}", ["both `delta` and `nu`"]),
        ("claim: {gain: 2, nu: 1}", ["either `delta` and `nu`, or `gain`"]),
        ("claim: {gain: .inf}", ["must be finite"]),
        ("claim: {gain: 0}", ["claim.gain=0"]),
        ("claim: {gain: 2}\nlayers: {budgets: [1, 1]}", ["leave out `claim`"]),
        ("layers: {budgets: [1], weights: [1]}", ["`budgets` are final"]),
        ("rule: soundly", ["Did you mean `sound`"]),
        ("radii: [0.2, 0.1]", ["must increase"]),
        ("radii: []", ["radii=[]"]),
        ("radii: [.nan]", ["`radii.0`"]),
        ("seed: -1", ["seed=-1"]),
        ("name: ../etc", ["name='../etc'"]),
        ("attacks: [{name: pgd, bounds: [1, 0]}]", ["low < high"]),
        ("  widths: [3, -1]", ["`model.widths.1`", "-1"]),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_received(extra, parts):
    text = message(extra)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "extra", ["seed: 1\nseed: 2", "x: *nothing", "a: [", "1: 2", "x: !!python/object:os.x {}"]
)
def test_text_that_is_not_a_plain_mapping_is_refused(extra):
    assert "not valid YAML" in message(extra)


@pytest.mark.parametrize("text", ["", "3", "- 1"])
def test_a_file_without_a_mapping_is_refused(text):
    with pytest.raises(ConfigError, match="mapping"):
        parse_config(text)


def test_several_errors_are_reported_together():
    text = message("rule: soundly\ntraining: {epocs: 3}")
    assert "rule" in text and "epocs" in text


def test_missing_sections_are_named():
    with pytest.raises(ConfigError, match=r"`dataset` is missing"):
        parse_config("model: {name: mlp}")


def test_overrides_replace_fields_and_are_validated_like_the_file():
    text = BASE + "  widths: [1, 2]\nattacks: [{name: pgd}]"
    config = parse_config(
        text,
        overrides=["training.epochs=3", "attacks.0.steps=7", "model.widths.1=5", "claim.gain=2"],
    )
    assert config.training.epochs == 3 and config.attacks[0].steps == 7
    assert config.model.widths == [1, 5] and config.claim.gain == 2.0
    for override in ("training.epocs=3", "novalue", "model.widths.9=1", "seed=[", "=3"):
        assert message("", overrides=[override])


def test_yaml_1_1_numbers_written_as_text_are_read():
    config = parse_config(BASE + "training: {optimizer: {learning_rate: 1e-3}}")
    assert config.training.optimizer.learning_rate == 1e-3


def test_a_written_configuration_reads_back_equal():
    config = parse_config(BASE + "claim: {delta: 0.4, nu: -2}\nradii: [0.1, 0.30000000000000004]")
    assert parse_config(config.to_yaml()) == config


def test_an_unreadable_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="a directory"):
        load_config(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(binary)


def test_what_decides_the_weights_is_told_from_what_does_not():
    def identity(extra):
        return parse_config(BASE + extra).training_identity()

    assert identity("") == identity("radii: [7]\ntitle: other\ntraining: {epochs: 99}")
    assert identity("") != identity("seed: 1")
    cosine = "training: {optimizer: {schedule: {name: cosine}}, epochs: %d}"
    assert identity(cosine % 3) != identity(cosine % 4)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_configuration_is_valid(path):
    config = load_config(path)
    assert config.title and config.name == path.stem
    assert parse_config(config.to_yaml()) == config


def test_configurations_are_shipped():
    assert len(SHIPPED) >= 10
