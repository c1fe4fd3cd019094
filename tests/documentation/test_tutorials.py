"""Whoever opens a tutorial, here or in Colab, sees what it prints and can run it from the top."""

import json
import re
import runpy
import subprocess
import sys

import pytest
from site_scripts import ROOT, load

notebooks = load("notebooks")
FOLDER = ROOT / "docs" / "tutorials"
SOURCES = sorted(FOLDER.glob("*.py"))
# Those that take a few seconds; the others run with `-m slow`.
LIGHT = {"first_certificate", "control_engineers"}
# It divides the processor before anything else uses TensorFlow.
ALONE = {"several_gpus"}
COLAB = "https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials"


def by_name(path):
    return path.stem


def written(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_the_notebook_has_the_cells_of_its_source(source):
    pytest.importorskip("jupytext")
    assert notebooks.parts(written(source)) == notebooks.parts(notebooks.read_source(source))


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_a_tutorial_runs_in_colab_from_its_first_cells(source):
    title, install, *_ = written(source)["cells"]
    assert "".join(title["source"]).startswith("# ")
    assert f"({COLAB}/{source.stem}.ipynb)" in "".join(title["source"])
    assert "%pip install" in "".join(install["source"])
    assert install["metadata"]["tags"] == [notebooks.INSTALLS]


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_what_a_tutorial_printed_is_shown_and_names_no_machine(source):
    notebook = written(source)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in code) >= 2
    assert not any(o["output_type"] == "error" for cell in code for o in cell["outputs"])
    shown = json.dumps([cell["outputs"] for cell in code if cell["outputs"]])
    assert not re.search(r"/(?:tmp|home|root|work|usr)/", shown)
    page, *pictures = notebooks.page(source.stem, notebook)
    assert page[1].count("```python") == len(code)
    assert all(picture[1].startswith(b"\x89PNG") for picture in pictures)


def test_every_tutorial_is_in_the_menu_and_on_the_tutorials_page():
    menu, page = (ROOT / "mkdocs.yml").read_text(), (FOLDER / "index.md").read_text()
    for source in SOURCES:
        assert f"tutorials/{source.stem}.md" in menu
        assert f"({source.stem}.md)" in page


def marked(source):
    light = source.stem in LIGHT
    return pytest.param(source, id=source.stem, marks=() if light else pytest.mark.slow)


@pytest.mark.parametrize("source", [marked(path) for path in SOURCES])
def test_a_tutorial_runs_as_it_stands(source, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(ROOT)
    if source.stem in ALONE:
        subprocess.run([sys.executable, str(source)], check=True, timeout=300)
        return
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    runpy.run_path(str(source))
    plt.close("all")
