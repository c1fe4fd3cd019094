"""What mkdocs does with our pages beside reading them: see `mkdocs.yml`.

- `reference/` is made of the sources, tutorials of their executed notebooks;
- links out of `docs/` lead to the repository, and pictures from there are copied;
- formulas become MathML, which browsers show without scripts or fonts from elsewhere.
"""

import html
import os
import pathlib
import re

import commands
import notebooks
import reference
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages at the top of the repository, and where they are in the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.M | re.S)


def on_files(files, config):
    """Adds the pages that are made."""
    for place, text in (
        *reference.pages().items(),
        ("reference/command-line.md", commands.page()),
        *notebooks.pages(DOCS / "tutorials"),
        *((place, (ROOT / name).read_text(encoding="utf-8")) for name, place in OUTSIDE.items()),
    ):
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave `docs/`: pictures are copied, other files are shown in the repository."""
    source = page.file.src_uri
    at_top = {place: name for name, place in OUTSIDE.items()}
    here = ROOT if source in at_top else (DOCS / source).parent
    code = [found.span() for found in _FENCE.finditer(markdown)]

    def link(found):
        mark, text, target = found.groups()
        path, _, anchor = target.partition("#")
        inside = any(start <= found.start() < end for start, end in code)
        if inside or not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        goal = pathlib.Path(os.path.normpath(here / path))
        if goal.is_relative_to(DOCS) and source not in at_top:
            return found[0]
        if not goal.is_relative_to(ROOT) or not goal.exists():
            raise FileNotFoundError(f"{source} has a link to {target}, which is not there.")
        name = goal.relative_to(ROOT).as_posix()
        if name in OUTSIDE or goal.is_relative_to(DOCS):
            place = OUTSIDE.get(name) or goal.relative_to(DOCS).as_posix()
            return f"{mark}[{text}]({_relative(place, source)}{'#' + anchor if anchor else ''})"
        if mark:
            place = f"pictures/{name}"
            if place not in files.src_uris:
                files.append(File.generated(config, place, content=goal.read_bytes()))
            return f"![{text}]({_relative(place, source)})"
        return f"[{text}]({config.repo_url}/blob/main/{name}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, markdown)


def _relative(place, source):
    return os.path.relpath(place, os.path.dirname(source) or ".").replace(os.sep, "/")


def on_page_content(content, page, config, files):
    """Formulas as MathML."""

    def formula(found):
        text = html.unescape(found[2]).strip()
        block = text.startswith(r"\[")
        return convert(text[2:-2].strip(), display="block" if block else "inline")

    return _MATH.sub(formula, content)
