"""Pages of the reference: every public name, found in the sources without importing the library.

Public is what `tf_lyapunov` has at its top (`__all__`, `_MODULES`, `_FUNCTIONS`) and what those
modules have in theirs: their `__all__`, else every class and function that they define.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Modules at the top in their order, each a page. Some are folders of modules without names of their
# own; of these the page has all that are listed.
FOLDERS = {
    "tf_lyapunov.theory": (
        "sectors", "balls", "designs", "budgets", "lyapunov", "dissipativity", "cascade", "supply",
        "spectra", "localized", "potential", "orthogonal", "perturbation", "growth", "norms",
        "singular_values",
    ),
    "tf_lyapunov.experiments": ("shipped", "reading", "config", "execution", "opening", "runner"),
}  # fmt: skip
# Reached through the command line or by errors alone, and useful to programs all the same.
BESIDE = ("tf_lyapunov.errors",)
TOP = "tf_lyapunov"
# What nobody makes by hand, and the name whose example shows it.
MADE_BY = {
    "Attack": "tf_lyapunov.attacks.PGD",
    "AttackResult": "tf_lyapunov.attacks.PGD",
    "BoundCost": "tf_lyapunov.planning.bound_cost",
    "Cluster": "tf_lyapunov.planning.parse_devices",
    "DynamicsCertificate": "tf_lyapunov.dynamics.certify_dynamics",
    "Device": "tf_lyapunov.planning.parse_devices",
    "EnsembleResult": "tf_lyapunov.attacks.Ensemble",
    "LayerCost": "tf_lyapunov.planning.layer_costs",
    "MeasuredGain": "tf_lyapunov.evaluation.measured_gain",
    "MinimalAttack": "tf_lyapunov.attacks.DDN",
    "PassiveLoop": "tf_lyapunov.control.passive_feedback",
    "Plan": "tf_lyapunov.planning.plan",
    "PlantIndices": "tf_lyapunov.control.linear_indices",
    "PropertyVerification": "tf_lyapunov.verification.verify",
    "RangeVerification": "tf_lyapunov.verification.verify",
    "Reading": "tf_lyapunov.callbacks.LyapunovMonitor",
    "StageGain": "tf_lyapunov.dynamics.certify_dynamics",
    "RegionOfAttraction": "tf_lyapunov.control.region_of_attraction",
    "SuiteResult": "tf_lyapunov.evaluation.evaluate_suite",
    "TrainingModel": "tf_lyapunov.training.AdversarialModel",
    "Verification": "tf_lyapunov.verification.verify",
}


def source_of(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _literal(tree, name):
    """The literal that a module assigns to a name, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return None


def _parsed(module):
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def names_of(module):
    """Public names that a module has, in the order of its `__all__` or of the file."""
    tree = _parsed(module)
    exported = _literal(tree, "__all__")
    if exported is not None:
        return list(exported)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def top():
    """`(functions, modules)`: dotted places by public names of `tf_lyapunov`."""
    tree = _parsed(TOP)
    lazy = {name: f"{TOP}.{place}" for name, place in _literal(tree, "_MODULES").items()}
    functions = {n: p.replace(":", ".") for n, p in _literal(tree, "_FUNCTIONS").items()}
    for name in _literal(tree, "__all__"):
        if source_of(f"{TOP}.{name}").exists() and not name[0].isupper():
            lazy[name] = f"{TOP}.{name}"
        else:
            functions[name] = f"{TOP}.{name}"
    # `tf_lyapunov.evaluation` is both a name of its own and where functions of the top are.
    return functions, lazy


def summary(module, name=None):
    """First paragraph of a docstring on one line."""
    tree = _parsed(module)
    nodes = [tree] if name is None else [n for n in tree.body if getattr(n, "name", 0) == name]
    text = ast.get_docstring(nodes[0]) if nodes else None
    return " ".join((text or "").split("\n\n")[0].split())


def pages():
    """Markdown of every page by its place in the site."""
    functions, modules = top()
    found = {"reference/tf_lyapunov.md": _page(TOP, sorted(functions.items(), key=_alphabet))}
    for name, module in sorted(modules.items()):
        if module in FOLDERS:
            found[f"reference/{name}.md"] = _folder(module)
        else:
            entries = [(n, f"{module}.{n}") for n in names_of(module)]
            found[f"reference/{name}.md"] = _page(module, entries, shown=f"{TOP}.{name}")
    for module in BESIDE:
        entries = [(n, f"{module}.{n}") for n in names_of(module)]
        found[f"reference/{module.rpartition('.')[2]}.md"] = _page(module, entries)
    found["reference/index.md"] = _index(functions, modules)
    return found


def _alphabet(entry):
    return entry[0].lower()


def _page(module, entries, shown=None):
    intro = ast.get_docstring(_parsed(module)) or ""
    # What stands behind the first paragraph of the package is code.
    intro = intro.split("\n\n")[0] if module == TOP else intro
    lines = [f"# `{shown or module}`", "", intro, ""]
    lines += ["<div class='names' markdown>", ""]
    lines += [f"[`{name}`][{place}]" for name, place in entries]
    lines += ["", "</div>", ""]
    for _, place in entries:
        lines += [f"::: {place}", "", *_made_by(place)]
    return "\n".join(lines)


def _made_by(place):
    maker = MADE_BY.get(place.rpartition(".")[2])
    return (
        [f"*An example stands with [`{maker.rpartition('.')[2]}`][{maker}].*", ""] if maker else []
    )


def _folder(module):
    lines = [f"# `{module}`", "", ast.get_docstring(_parsed(module)) or "", ""]
    for part in FOLDERS[module]:
        place = f"{module}.{part}"
        lines += [f"## `{place}`", "", ast.get_docstring(_parsed(place)) or "", ""]
        for name in names_of(place):
            lines += [f"::: {place}.{name}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


def _index(functions, modules):
    lines = [
        "# Reference",
        "",
        "Every public name with its signature, equation, errors and an example; the examples run "
        "as doctests in every test run. `import tf_lyapunov as tfl` gives:",
        "",
        "| name | what it is |",
        "|---|---|",
    ]
    for name, place in sorted(functions.items(), key=_alphabet):
        lines.append(f"| [`tfl.{name}`][{place}] | {_about(name, place)} |")
    for name, module in sorted(modules.items()):
        lines.append(f"| [`tfl.{name}`]({name}.md) | {_escaped(summary(module))} |")
    lines += [
        "",
        "Also: [the command line](command-line.md), [errors](errors.md) that a program may catch.",
    ]
    return "\n".join(lines)


def _about(name, place):
    """Summary of a name that its module may have from another one."""
    module = place.rpartition(".")[0]
    if module == TOP:
        imported = {
            alias.name: node.module
            for node in _parsed(f"{TOP}.library").body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        module = imported[name]
    for _ in range(4):
        text = summary(module, place.rpartition(".")[2])
        if text:
            return _escaped(text)
        for node in _parsed(module).body:
            if isinstance(node, ast.ImportFrom) and name in [a.name for a in node.names]:
                package = (
                    module
                    if source_of(module).name == "__init__.py"
                    else module[: module.rfind(".")]
                )
                module = f"{package}.{node.module}" if node.level else node.module
    return ""


def _escaped(text):
    return text.replace("|", "\\|")
