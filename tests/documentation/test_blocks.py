"""A newcomer who copies the README or a page, block by block, in order, meets no error.

A block that cannot run here says why in a comment before it, `<!-- not run: … -->`.
"""

import pathlib
import re
import shlex

import pytest
from setups import IMPORTS, SETUPS

from tf_lyapunov.cli import DONE, main

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
BLOCK = re.compile(
    r"(<!-- not run: (?P<why>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
# Pages whose code takes longer than a few seconds.
SLOW = {"localized.md", "brackets.md", "scale.md", "howto/applications.md"}


def key(page):
    """The page's name in `SETUPS`: its place in docs/."""
    return page.name if page.parent == ROOT else page.relative_to(ROOT / "docs").as_posix()


def blocks(page, kind):
    """`(number of the first line, text)` of the blocks of a kind that run, in order."""
    source = page.read_text()
    for found in BLOCK.finditer(source):
        if found["kind"] == kind and not found["why"]:
            yield source[: found.start("text")].count("\n"), found["text"]


def commands(page):
    """Words of every command of ours on a page that runs."""
    for _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tf-lyapunov"]:
                yield words[1:]


def pages(kind):
    for page in PAGES:
        if any(commands(page) if kind == "bash" else blocks(page, kind)):
            yield pytest.param(
                page, id=key(page), marks=pytest.mark.slow if key(page) in SLOW else ()
            )


@pytest.mark.parametrize("page", pages("python"))
def test_python_on_a_page_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = {"__name__": "page"}
    exec(IMPORTS, held)
    for i, (line, text) in enumerate(blocks(page, "python")):
        exec(SETUPS.get((key(page), i), ""), held)
        # Line numbers of the page in what fails.
        exec(compile("\n" * line + text, str(page), "exec"), held)


@pytest.mark.parametrize("page", pages("bash"))
def test_commands_on_a_page_run_as_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "scripts", "matlab_compat"):
        (tmp_path / name).symlink_to(ROOT / name)
    for words in commands(page):
        assert main(words) == DONE, capsys.readouterr().err


def test_what_does_not_run_says_why():
    found = [b for page in PAGES for b in BLOCK.finditer(page.read_text()) if b["why"]]
    assert found and all(len(b["why"].split()) > 2 for b in found)
    assert all(
        b["kind"] in ("python", "bash", "")
        for page in PAGES
        for b in BLOCK.finditer(page.read_text())
    )
