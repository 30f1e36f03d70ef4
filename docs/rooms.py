"""Write the table of rooms in docs/architecture.md from the imports: ``python docs/rooms.py``.

A room is a package or a module directly below ``msflow_ext/``. Nothing is imported: the files are read as text, and
imports inside functions and for type checkers count like those at the top of a file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "msflow_ext"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms:begin -->", "<!-- rooms:end -->"

Graph = Mapping[str, set[str]]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Full name and file of every module: ``msflow_ext.ops`` for ``msflow_ext/ops/__init__.py``."""
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    words = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return which modules of the package each one imports, itself excepted."""
    names = modules(package)
    names_and_kernels = {*names, f"{package.name}.ops._C"}
    return {
        name: {found for found in _imported(path, package, names_and_kernels) if found != name}
        for name, path in names.items()
    }


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Return which rooms each one imports: packages and modules directly below the package, ``__init__`` for itself."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        found.setdefault(room(name), set()).update(room(each) for each in imported)
    return {name: imported - {name} for name, imported in found.items()}


def room(module: str) -> str:
    """Return ``models`` for ``msflow_ext.models.conv.packed``; ``__init__`` for ``msflow_ext``."""
    return [*module.split("."), "__init__"][1]


def floors(graph: Graph) -> dict[str, int]:
    """1 for what imports nothing of the package, else one more than the highest floor that is imported.

    Raises:
        graphlib.CycleError: there is a circle of imports.
    """
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[each] for each in graph.get(name, ())), default=0)
    return found


def table() -> Iterator[str]:
    """Yield markdown: floor, room, what it holds, what it imports; the lowest floor first."""
    graph = rooms(imports())
    del graph["__init__"]  # resolves public names on first use, by name
    heights = floors(graph)
    yield "| floor | room | files | holds | imports |"
    yield "|---:|---|---:|---|---|"
    for name in sorted(graph, key=lambda each: (heights[each], each)):
        folder = PACKAGE / name
        files = len(list(folder.rglob("*.py"))) if folder.is_dir() else 1
        shown = f"`{name}/`" if folder.is_dir() else f"`{name}.py`"
        below = ", ".join(sorted(graph[name])) or "-"
        yield f"| {heights[name]} | {shown} | {files} | {_purpose(name)} | {below} |"


def page() -> str:
    """Return the page with the table as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n" + "\n".join(table()) + f"\n{END}{after}"


def _purpose(name: str) -> str:
    """Return the first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse(modules()[f"msflow_ext.{name}"].read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").removesuffix(".")


def _imported(path: Path, package: Path, names: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            origin = ".".join([*above, *filter(None, [node.module])])
            inside = [f"{origin}.{alias.name}" for alias in node.names]
            found = [each if each in names else origin for each in inside]
        else:
            continue
        yield from (each for each in found if each in names)


if __name__ == "__main__":
    expected = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text("utf-8") != expected and f"{PAGE} is out of date: run {__file__}")
    PAGE.write_text(expected, encoding="utf-8")
