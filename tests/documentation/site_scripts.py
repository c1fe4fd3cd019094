"""Modules of `scripts/site`, which is no package: its name is one of Python's own."""

import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load(name):
    """The module of that name, imported as mkdocs does: its neighbours are found."""
    folder = str(ROOT / "scripts" / "site")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
