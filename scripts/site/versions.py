"""Versions of the site side by side: `python scripts/site/versions.py FOLDER VERSION`.

The layout of mike, which the theme's switcher reads, without a branch of its own: a folder for
every minor version (site/0.2), `versions.json` with the newest first, and a page that leads to it.
A server keeps the folders of earlier versions; this adds or replaces one.
"""

import json
import pathlib
import re
import sys

_REDIRECT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>tf_lyapunov</title>
<meta http-equiv="refresh" content="0; url={newest}/index.html">
<a href="{newest}/index.html">tf_lyapunov {newest}</a>
</html>
"""


def minor(version):
    """The folder of a version: "0.2" of "0.2.1"."""
    return ".".join(version.split(".")[:2])


def record(folder, version):
    """Adds a version that was built to the list, and makes the newest the start."""
    path = pathlib.Path(folder, "versions.json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    listed = {entry["version"]: entry["title"] for entry in known}
    listed[minor(version)] = version
    ordered = sorted(listed, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True)
    entries = [
        {"version": v, "title": listed[v], "aliases": ["latest"] if v == ordered[0] else []}
        for v in ordered
    ]
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    start = _REDIRECT.format(newest=ordered[0])
    path.with_name("index.html").write_text(start, encoding="utf-8")


if __name__ == "__main__":
    record(*sys.argv[1:])
