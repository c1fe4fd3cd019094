"""What a configuration may hold is limited before anything is built from it."""

import os

import pytest
import yaml

from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments import yamlsize
from tf_lyapunov.experiments.reading import load_config, parse_config

GOOD = "dataset: {name: digits}\nmodel: {name: mlp}\n"


def growing(levels, width=10):
    """Every level holds `width` aliases of the one before."""
    lines = ["v0: &v0 [1, 1]"]
    for i in range(1, levels):
        lines.append(f"v{i}: &v{i} [{', '.join([f'*v{i - 1}'] * width)}]")
    return "\n".join(lines)


def test_aliases_count_as_what_they_stand_for():
    yamlsize.check_size(growing(4))
    with pytest.raises(ConfigError, match="aliases followed"):
        yamlsize.check_size(growing(5))
    with pytest.raises(ConfigError, match="aliases followed"):
        parse_config(growing(12))


def test_the_count_is_that_of_the_expanded_nodes():
    """Against the tree that PyYAML composes, whose shared nodes are counted each time."""

    def size(node):
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(size(k) + size(v) for k, v in node.value)
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(map(size, node.value))
        return 1

    text = growing(3, 7) + "\nlast: {a: *v2, b: [*v1, &c {d: 1}, *c]}"
    true = size(yaml.compose(text, Loader=yaml.SafeLoader))
    limit = yamlsize.MAX_NODES
    try:
        yamlsize.MAX_NODES = true
        yamlsize.check_size(text)
        yamlsize.MAX_NODES = true - 1
        with pytest.raises(ConfigError):
            yamlsize.check_size(text)
    finally:
        yamlsize.MAX_NODES = limit


@pytest.mark.parametrize(
    "text, word",
    [
        ("a: &a [*a]", "within what it stands for"),
        ("a: &a {b: [1, *a]}", "within what it stands for"),
        ("[" * 40 + "]" * 40, "nested at most 32"),
        ("{a: " * 40 + "1" + "}" * 40, "nested at most 32"),
        (f"a: '{'x' * 10_001}'", "at most 10000 characters"),
        ("x: [" + "1, " * 20_001 + "]", "at most 20000 values"),
        ("#" + "x" * 2**18, "at most 262144 bytes"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: *unknown", "not valid YAML"),
    ],
)
def test_a_text_beyond_a_limit_is_refused_by_name(text, word):
    with pytest.raises(ConfigError, match=word):
        parse_config(text)


def test_ordinary_aliases_are_read():
    text = "dataset: {name: digits}\nmodel: {name: mlp, widths: [&w 8, *w, *w]}\n"
    assert list(parse_config(text).model.widths) == [8, 8, 8]
    with pytest.raises(ConfigError, match="override must be YAML"):
        parse_config(GOOD, overrides=["training.epochs=" + "[" * 10_000])


@pytest.mark.skipif(os.name != "posix", reason="POSIX kinds of files")
def test_a_configuration_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="a pipe or device"):
        load_config(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="a pipe or device"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="a directory"):
        load_config(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * 300_000)
    with pytest.raises(ConfigError, match=r"Received: .*large\.yaml with 300000"):
        load_config(large)
