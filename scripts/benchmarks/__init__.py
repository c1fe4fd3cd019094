"""Topics of `scripts/benchmark.py`: every module here that has a `measure`.

A topic is one file with

    TITLE: str, the heading of its table;
    measure(quick) -> dict of what was measured, JSON-able, with finite floats;
    rows(section) -> list of dicts, the table (optional: by default `section["rows"]`).

Packages are imported inside functions. Topics run in the order of `ORDER`, then by name.
"""

import importlib
import pkgutil

ORDER = ("norms", "overhead", "clipping", "attacks", "certify", "imports")


def topics():
    """Dict from names to the topics' modules, in the order in which they run."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names = [n for n in ORDER if n in names] + [n for n in names if n not in ORDER]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "measure")}
