"""Whoever looks a public name up finds it: its signature, what it does, and an example."""

import importlib
import inspect
import re

import pytest
import yaml
from site_scripts import ROOT, load

import tf_lyapunov as tfl

reference = load("reference")
docstrings = load("docstrings")
PAGES = reference.pages()
ENTRIES = {
    entry: page for page, text in PAGES.items() for entry in re.findall(r"^::: (\S+)", text, re.M)
}


def held(entry):
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public():
    """Every public name as it is at run time, with what it is."""
    for name in {*tfl.__all__, *tfl._MODULES, *tfl._FUNCTIONS}:
        found = getattr(tfl, name)
        if not inspect.ismodule(found):
            yield f"tfl.{name}", found
            continue
        for inner in getattr(found, "__all__", ()):
            yield f"tfl.{name}.{inner}", getattr(found, inner)


def test_no_public_name_is_missing():
    documented = [held(entry) for entry in ENTRIES]
    missing = [name for name, found in public() if not any(found is d for d in documented)]
    assert missing == []


def test_every_module_of_the_top_has_a_page_that_the_menu_shows():
    _, modules = reference.top()
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"{page}\n" in menu, page
    assert {f"reference/{name}.md" for name in modules} <= set(PAGES)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_a_page_names_exists_and_says_what_it_is(page):
    for entry in [e for e, where in ENTRIES.items() if where == page]:
        found = held(entry)
        if callable(found):
            assert inspect.getdoc(found), entry
            assert found.__doc__, f"{entry} has only the docstring of its base"


def test_every_name_has_an_example_or_says_where_it_comes_from():
    bare = set()
    for name, found in public():
        if not callable(found) or (inspect.isclass(found) and issubclass(found, Exception)):
            continue
        if ">>>" not in (found.__doc__ or "") and name.split(".")[-1] not in reference.MADE_BY:
            bare.add(name)
    assert bare == set()


@pytest.mark.parametrize("name", sorted(reference.MADE_BY))
def test_results_and_base_classes_are_shown_with_what_makes_them(name):
    maker = reference.MADE_BY[name]
    assert maker in ENTRIES, maker
    assert ">>>" in held(maker).__doc__
    assert any(entry.endswith(f".{name}") for entry in ENTRIES)


def test_doctests_become_code_and_prose_stays():
    text = "Sum.\n\n    y = a + b\n\nExample:\n\n>>> 1 + 1\n2\n>>> 2\n2\n\nEnd."
    fenced = docstrings.fenced(text)
    assert "```pycon\n>>> 1 + 1\n2\n>>> 2\n2\n```" in fenced
    assert "\n    y = a + b\n" in fenced and fenced.endswith("\nEnd.")
    inside = docstrings.fenced("Args:\n    a: one.\n\n    >>> a\n    1\n")
    assert "    ```pycon\n    >>> a\n    1\n    ```" in inside


def test_every_command_is_on_the_page_of_the_command_line():
    import typer

    from tf_lyapunov.cli import app

    text = load("commands").page()
    for name in typer.main.get_command(app).commands:
        assert f"## `tf-lyapunov {name}" in text
    assert "`--require-proof`" in text and "[bold]" not in text


def test_every_page_of_the_documentation_is_in_the_menu():
    menu = yaml.safe_dump(
        yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"], allow_unicode=True
    )
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in menu
