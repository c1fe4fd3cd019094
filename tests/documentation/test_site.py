"""What the site's own tools promise: links that lead somewhere, versions side by side."""

import json
import re

import pytest
from site_scripts import ROOT, load

check = load("check")
versions = load("versions")


def page(text):
    return f"<!doctype html><html><body>{text}</body></html>"


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "index.html").write_text(
        page('<a href="inner/a.html#there">a</a><a href="gone.html">b</a><a href="#top">c</a>')
    )
    (tmp_path / "inner" / "a.html").write_text(
        page('<h1 id="there">a</h1><a href="../index.html#not">d</a><img src="no.png" alt="e">')
    )
    found = " ".join(check.broken_links(tmp_path))
    for target in ("gone.html", "#top", "../index.html#not", "no.png"):
        assert f"link to {target}," in found
    assert "#there" not in found


def test_pictures_without_words_are_found(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(page('<img src="a.png"><img src="a.png" alt="words">'))
    assert check.broken_links(tmp_path) == ["index.html has a picture without words: a.png."]


def test_versions_are_kept_side_by_side_and_the_newest_is_first(tmp_path):
    for version in ("0.9.1", "0.10.0", "0.2.0", "0.9.2"):
        versions.record(tmp_path, version)
    found = json.loads((tmp_path / "versions.json").read_text())
    assert [entry["version"] for entry in found] == ["0.10", "0.9", "0.2"]
    assert [entry["title"] for entry in found] == ["0.10.0", "0.9.2", "0.2.0"]
    assert [bool(entry["aliases"]) for entry in found] == [True, False, False]
    assert "0.10/index.html" in (tmp_path / "index.html").read_text()


def test_formulas_are_written_into_the_page_without_scripts():
    pytest.importorskip("latex2mathml")
    hooks = load("hooks")
    content = (
        r'<p><span class="arithmatex">\(\|r\|_2 &lt; \rho\)</span></p>'
        r'<div class="arithmatex">\[L \le \sqrt{\rho}\]</div>'
    )
    found = hooks.on_page_content(content, None, None, None)
    assert found.count("<math") == 2 and 'display="block"' in found and "arithmatex" not in found


def test_no_page_of_ours_loads_anything_from_another_host():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "- offline" in settings
    assert not re.search(r"extra_javascript|cdn\.|unpkg|jsdelivr|googleapis", settings)
