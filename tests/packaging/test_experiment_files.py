"""Whoever installed the library, and cloned nothing, finds its experiment files."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import tf_lyapunov
from tf_lyapunov.cli import BAD_INPUT, DONE, main
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments.reading import load_config
from tf_lyapunov.experiments.shipped import shipped_config, shipped_configs

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_experiment_file_of_the_checkout_is_shipped():
    there = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {f"{path.with_suffix('').as_posix()}" for path in there} == set(shipped_configs())


def test_the_package_data_name_every_experiment_file():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["tf_lyapunov"]
    named = {p for pattern in patterns for p in (ROOT / "tf_lyapunov").glob(pattern)}
    assert {p.resolve() for p in shipped_configs().values()} <= {p.resolve() for p in named}


def test_experiments_are_listed_shown_and_copied_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "list", "digits", "--json"]) == DONE
    (row,) = json.loads(capsys.readouterr().out)["configs"]
    assert row["name"] == "lyapunov/digits" and row["dataset"] == "digits" and row["title"]
    assert main(["configs", "show", "lyapunov/digits"]) == DONE
    shown = capsys.readouterr().out
    assert shown == (ROOT / "configs/lyapunov/digits.yaml").read_text()
    assert main(["configs", "copy", "lyapunov/digits", "mine.yaml"]) == DONE
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert load_config("mine.yaml").name == "mine"
    assert load_config("lyapunov/digits") == load_config(ROOT / "configs/lyapunov/digits.yaml")


def test_a_copy_replaces_nothing_unless_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text("mine")
    assert main(["configs", "copy", "lyapunov/digits"]) == BAD_INPUT
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "digits.yaml").read_text() == "mine"
    assert main(["configs", "copy", "lyapunov/digits", "--overwrite"]) == DONE
    assert "claim" in (tmp_path / "digits.yaml").read_text()
    assert main(["configs", "copy", "lyapunov/digits", "nowhere/mine.yaml"]) == BAD_INPUT


def test_a_name_mistyped_is_answered_with_the_nearest(capsys):
    with pytest.raises(ConfigError, match="Did you mean lyapunov/digits"):
        shipped_config("lyapunov/digit")
    assert main(["configs", "show", "../pyproject"]) == BAD_INPUT
    with pytest.raises(ConfigError, match="configs list"):
        load_config("lyapunov/digit")


def test_a_file_of_ones_own_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "lyapunov" / "digits"
    mine.parent.mkdir()
    mine.write_text("{title: mine, dataset: {name: digits}, model: {name: mlp}}")
    assert load_config("lyapunov/digits").title == "mine"


def test_names_are_listed_without_waiting_for_keras():
    code = (
        "import sys; sys.argv[0] = sys.orig_argv[0] = 'tf-lyapunov'\n"
        "from tf_lyapunov.cli import main\n"
        "main(['configs', 'list'])\n"
        "sys.exit('keras' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_the_version_is_one_wherever_it_is_written():
    version = tf_lyapunov.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_page_has_no_link_that_only_a_clone_can_follow():
    readme = (ROOT / "README.md").read_text()
    targets = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert targets and [t for t in targets if not t.startswith(("https://", "#"))] == []
    ours = "https://github.com/tf-lyapunov/tf_lyapunov/blob/main/"
    raw = "https://raw.githubusercontent.com/tf-lyapunov/tf_lyapunov/main/"
    for target in targets:
        for start in (ours, raw):
            if target.startswith(start):
                assert (ROOT / target.removeprefix(start).split("#")[0]).exists(), target


def test_the_packages_page_links_to_source_documentation_changes_and_issues():
    urls = PROJECT["project"]["urls"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(urls)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE"):
        assert (ROOT / name).stat().st_size > 0
