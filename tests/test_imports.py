"""Files of the package import each other one way only, imports inside functions included."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "tf_lyapunov"


def named(path, root):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node, module, is_package):
    """Dotted names that an import statement may mean, the longest first."""
    if isinstance(node, ast.Import):
        return [[alias.name] for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        base = ".".join([*kept, base] if base else kept)
    return [[f"{base}.{alias.name}", base] for alias in node.names]


def import_graph(root):
    files = {named(path, root): path for path in sorted(root.rglob("*.py"))}
    graph = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        found = set()
        for node in statements:
            for choices in imported(node, module, path.name == "__init__.py"):
                found.update([name for name in choices if name in files][:1])
        graph[module] = found - {module}
    return graph


def circles(graph):
    """Sets of modules that reach each other."""
    reach = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for module in graph[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        reach[start] = seen
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(found, key=sorted)


def test_no_files_of_the_package_import_each_other_in_a_circle():
    assert circles(import_graph(PACKAGE)) == []


@pytest.mark.parametrize("lazy", [False, True])
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path, lazy):
    root = tmp_path / "package"
    (root / "inner").mkdir(parents=True)
    for folder in (root, root / "inner"):
        (folder / "__init__.py").write_text("")
    (root / "inner" / "one.py").write_text("from .. import two\n")
    (root / "three.py").write_text("from package.inner.one import two\n")
    back = "from package.inner import one\n"
    (root / "two.py").write_text(f"def late():\n    {back}" if lazy else back)
    assert circles(import_graph(root)) == [{"package.inner.one", "package.two"}]
