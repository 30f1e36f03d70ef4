"""The arrows of the house: which part may import which, in Python and in C++, and where an op lives."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import msflow_ext

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "msflow_ext"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What the parts below the engine may import of ours besides themselves.
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "data": set(),
    "hardware": set(),
    "files": set(),
    "errors": set(),
    "distributed": set(),
    "flows": {"ops"},
    "metrics": {"ops"},
    "testing": {"ops"},
    "features": {"data", "distributed", "hardware"},
    "models": {"ops", "flows", "hardware"},
    "evaluation": {"data", "features", "metrics"},
    "runs": {"files", "metrics", "data", "hardware", "models"},
    "reports": {"data", "evaluation", "files", "metrics", "runs"},
    "training": {
        "data",
        "distributed",
        "errors",
        "evaluation",
        "features",
        "files",
        "flows",
        "hardware",
        "metrics",
        "models",
        "reports",
        "runs",
    },
    "inference": {
        "data",
        "distributed",
        "errors",
        "evaluation",
        "files",
        "hardware",
        "models",
        "reports",
        "runs",
    },
    "serving": {"data", "inference", "reports"},
    "export": {"files", "inference", "models"},
    "compat": {
        "files",
        "flows",
        "inference",
        "metrics",
        "models",
        "ops",
        "runs",
        "testing",
        "training",
    },
    "bench": {"compat", "hardware", "models", "ops", "training"},
}


def part(path: Path) -> str:
    """The module or subpackage directly under the package: ``models`` for ``models/msflow.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Our parts that a file imports when it runs, at its top or inside functions."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for name in imported_names(ast.parse(path.read_text()), package):
        words = name.split(".")
        if words[0] == "msflow_ext" and len(words) > 1:
            found.add(msflow_ext._HOME.get(words[1], name).split(".")[1])
    return found - {"_C", "__version__"}


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Full names of everything imported, without what only type checkers see."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            words = (*above, *filter(None, [node.module]))
            names |= {".".join((*words, alias.name)) for alias in node.names}
        names |= imported_names(node, package)
    return names


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(name: str) -> None:
    files = [path for path in SOURCES if part(path) == name]
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(above)
        for path in files
        if (above := imported_parts(path) - MAY_IMPORT[name] - {name})
    }
    assert not wrong


def test_no_part_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.name != "__init__.py" or path.parent != PACKAGE:
            graph.setdefault(part(path), set()).update(imported_parts(path) - {part(path)})
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("ops") < order.index("flows") < order.index("models") < order.index("cli")


def test_only_the_entry_point_imports_the_command_line() -> None:
    assert {part(p) for p in SOURCES if "cli" in imported_parts(p)} <= {"__main__", "cli"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_opens_with_what_it_is(path: Path) -> None:
    sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    assert sentence.endswith("."), "a module opens with one sentence"


# ---- C++; an installed package has none ----

CSRC = ROOT / "csrc"
OPS = sorted(p.name for p in CSRC.glob("[!.]*") if p.is_dir() and p.name != "common")
CPP = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]


def test_the_ops_have_their_folders() -> None:
    assert not CSRC.is_dir() or {"coupling", "norm", "score"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_kernels_functions_and_tests(op: str) -> None:
    for place in (f"csrc/{op}/cpu.cpp", f"msflow_ext/ops/{op}.py", f"tests/ops/test_{op}.py"):
        assert (ROOT / place).is_file(), place


@pytest.mark.parametrize("path", CPP, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_kernel_includes_neither_torch_nor_another_op(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// "), "a file opens with what it is"
    included = re.findall(r'#include\s+["<]([^">]+)[">]', text)
    folder = path.relative_to(CSRC).parts[0]
    for header in included:
        assert not re.match(r"(torch|ATen|c10)/", header), header
        if path.name != "bindings.cpp":
            assert not header.startswith(("pybind11/", "Python.h")), header
            if "/" in header and path.parent != CSRC:  # what stands there knows every op
                assert header.split("/")[0] in ("common", folder), header
