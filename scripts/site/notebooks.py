"""Tutorials: sources `docs/tutorials/NAME.py`, executed notebooks beside them, pages of the site.

    python scripts/site/notebooks.py [NAME ...]     executes (all) and writes the notebooks

The sources are in the percent format of jupytext: a `# %%` before every cell.
"""

import base64
import json
import pathlib
import re
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "tutorials"
# Cells with this tag are for Colab, where the library is not installed.
INSTALLS = "skip-execution"
_BADGE = re.compile(r"^\[!\[Run in Colab\]\([^)]*\)\]\((?P<where>[^)]*)\)$", re.M)


def read_source(path):
    """A notebook without outputs of a source."""
    import jupytext

    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def parts(notebook):
    """`(kind, text)` of every cell, to compare a notebook with its source."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def execute(path):
    """The notebook of a source with what its cells print and draw."""
    import nbclient

    notebook = read_source(path)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", skip_cells_with_tag=INSTALLS
    )
    client.execute(cwd=str(ROOT))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _tidy(outputs):
    """What a cell printed in one piece, without stderr, where TensorFlow speaks of the machine."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.get("name") == kept[-1].get("name") == "stdout":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def write(name):
    """Execute one and write it beside its source."""
    import nbformat

    source = FOLDER / f"{name}.py"
    text = nbformat.writes(execute(source))
    temporary = source.with_suffix(".ipynb.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(source.with_suffix(".ipynb"))


def pages(folder):
    """`(place, content)` of the pages of all notebooks and of their pictures."""
    for path in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        yield from page(path.stem, notebook)


def page(name, notebook):
    """`(place, content)` of a notebook's page and pictures."""
    lines, pictures = [], []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [_BADGE.sub(_button(name), text), ""]
            continue
        lines += ["```python", text, "```", ""]
        for output in cell["outputs"]:
            data = output.get("data", {})
            if output["output_type"] == "stream":
                lines += _printed("".join(output["text"]))
            elif "image/png" in data:
                place = f"{name}_{len(pictures)}.png"
                pictures.append((f"tutorials/{place}", base64.b64decode(data["image/png"])))
                alternative = (
                    "".join(data.get("text/plain", "Figure")).strip("<>").split(" size")[0]
                )
                lines += [f"![{alternative}]({place}){{ .figure }}", ""]
            elif "text/plain" in data:
                lines += _printed("".join(data["text/plain"]))
    yield f"tutorials/{name}.md", "\n".join(lines)
    yield from pictures


def _button(name):
    # A button: the badge's picture would come from another host.
    colab = r"[Run in Colab](\g<where>){ .md-button }"
    return f"{colab} [Download]({name}.ipynb){{ .md-button download }}"


def _printed(text):
    """What a cell printed, in a frame of its own."""
    return [
        '<div class="printed" markdown>',
        "",
        "```text",
        text.rstrip("\n"),
        "```",
        "",
        "</div>",
        "",
    ]


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [p.stem for p in sorted(FOLDER.glob("*.py"))]:
        began = time.monotonic()
        write(chosen)
        print(f"{chosen}: {time.monotonic() - began:.0f} s")
