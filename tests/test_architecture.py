"""Import rules: which room may import which, in Python and C++, and where the parts of an op are."""

from __future__ import annotations

import ast
import importlib.util
import re
from graphlib import CycleError
from pathlib import Path
from typing import Any

import pytest

import msflow_ext

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "msflow_ext"
SOURCES = sorted(PACKAGE.rglob("*.py"))
BENCHMARK_SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
CONTENTS = {"data", "files", "hardware", "metrics", "models", "runs"}  # most upper rooms need these

#: The rooms that a room may import. A missing room fails a test, and so does a rule that allows too much.
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "choices": set(),
    "data": {"choices", "files", "text_table"},
    "distributed": {"errors"},
    "errors": set(),
    "files": set(),
    "hardware": set(),
    "text_table": set(),
    "version": set(),
    "activations": {"ops"},
    "flows": {"activations", "ops"},
    "metrics": {"ops"},
    "testing": {"hardware", "ops"},
    "features": {"choices", "data", "distributed", "hardware"},
    "models": {"activations", "choices", "flows", "hardware", "ops"},
    "evaluation": {"data", "features", "metrics"},
    "runs": {"data", "files", "metrics", "text_table"},
    "reports": {"data", "evaluation", "files", "metrics", "runs", "text_table"},
    "training": CONTENTS
    | {"choices", "distributed", "errors", "evaluation", "features", "reports"},
    "inference": (CONTENTS - {"metrics"})
    | {"choices", "distributed", "errors", "evaluation", "reports"},
    "serving": {"choices", "data", "inference", "reports", "version"},
    "export": {"choices", "files", "inference", "models", "version"},
    "compat": {
        "activations",
        "choices",
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
    "bench": {"choices", "compat", "hardware", "models", "ops", "training"},
    "cli": {"bench", "choices", "compat", "data", "distributed", "errors", "evaluation", "export"}
    | {"features", "files", "inference", "metrics", "models", "reports", "runs", "serving"}
    | {"testing", "text_table", "training", "version"},
    "__main__": {"cli"},
}


def _rooms() -> Any:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = _rooms()
MODULES: dict[str, set[str]] = rooms.imports()
ROOMS: dict[str, set[str]] = rooms.rooms(MODULES)


def test_every_room_has_an_import_rule() -> None:
    assert ROOMS.keys() - {"__init__"} == MAY_IMPORT.keys()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_exactly_what_its_rule_allows(name: str) -> None:
    assert ROOMS[name] == MAY_IMPORT[name]


def test_there_are_no_import_cycles() -> None:
    heights = rooms.floors(MODULES)
    assert heights["msflow_ext.ops._C"] == 1 < heights["msflow_ext.cli"]


def test_the_lookup_of_public_names_imports_modules_that_exist() -> None:
    homes = set(msflow_ext._HOME.values()) | {f"msflow_ext.{name}" for name in msflow_ext._MODULES}
    assert homes <= MODULES.keys()


SNIPPETS = {
    "import msflow_ext": {"__init__"},
    "from msflow_ext import MSFlow": {"__init__"},
    "from msflow_ext import ops": {"ops"},
    "from msflow_ext.ops import affine_coupling": {"ops"},
    "import msflow_ext.ops.norm as n": {"ops"},
    "def f():\n    from .ops import norm": {"ops"},
    "if TYPE_CHECKING:\n    from msflow_ext.ops.norm import x": {"ops"},
    "from . import ops": {"ops"},
    "import torch": set(),
}


@pytest.mark.parametrize(("text", "expected"), SNIPPETS.items(), ids=SNIPPETS)
def test_every_form_of_import_is_found(text: str, expected: set[str], tmp_path: Path) -> None:
    package = tmp_path / "msflow_ext"
    (package / "ops").mkdir(parents=True)
    for file in ("__init__.py", "ops/__init__.py", "ops/norm.py"):
        (package / file).touch()
    (package / "mine.py").write_text(text)
    assert rooms.rooms(rooms.imports(package))["mine"] == expected


def test_an_import_cycle_is_refused() -> None:
    with pytest.raises(CycleError):
        rooms.floors({"a": {"b"}, "b": {"a"}})


def test_the_table_of_rooms_is_up_to_date() -> None:
    assert rooms.PAGE.read_text(encoding="utf-8") == rooms.page(), "run python docs/rooms.py"


@pytest.mark.parametrize(
    "path", [*SOURCES, *BENCHMARK_SOURCES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_module_begins_with_a_one_sentence_docstring(path: Path) -> None:
    sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    assert sentence.endswith("."), "the docstring of a module must begin with one sentence"


@pytest.mark.parametrize(
    "path",
    [
        *(*SOURCES, *BENCHMARK_SOURCES, *(ROOT / "tests").rglob("*.py")),
        *(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"),
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert path.read_text().count("\n") <= 400


# ---- benchmarks ----

BENCHMARKS = ROOT / "benchmarks"
BENCHMARK_ROOMS: dict[str, set[str]] = {  # each with the rooms that it may import
    "campaigns": set(),
    "end_to_end": set(),
    "gpu": {"kernels"},
    "kernels": set(),
}


def test_nothing_in_the_package_imports_the_benchmarks() -> None:
    known = rooms.imports(BENCHMARKS).keys()
    assert not {path for path in SOURCES if set(rooms._imported(path, PACKAGE, known))}


def test_the_benchmarks_have_no_import_cycles_and_follow_their_rules() -> None:
    modules = rooms.imports(BENCHMARKS)
    rooms.floors(modules)
    graph = rooms.rooms(modules)
    packages = {path.parent.name for path in BENCHMARKS.glob("*/__init__.py")}
    assert packages == BENCHMARK_ROOMS.keys() < graph.keys()
    for name, imported in graph.items():
        assert imported & BENCHMARK_ROOMS.keys() == BENCHMARK_ROOMS.get(name, set()), name


# ---- C++, which an installed package does not have ----

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
    assert text.startswith("// "), "a file must begin with a comment that says what it is"
    included = re.findall(r'#include\s+["<]([^">]+)[">]', text)
    folder = path.relative_to(CSRC).parts[0]
    for header in included:
        assert not re.match(r"(torch|ATen|c10)/", header), header
        if path.name != "bindings.cpp":
            assert not header.startswith(("pybind11/", "Python.h")), header
            if "/" in header and path.parent != CSRC:  # files there include every op
                assert header.split("/")[0] in ("common", folder), header


@pytest.mark.skipif(not CSRC.is_dir(), reason="an installed package has no csrc")
def test_the_page_of_the_kernels_names_every_file() -> None:
    page = (CSRC / "README.md").read_text()
    found = {path.name for path in CPP} - {f"{op}.h" for op in OPS}  # these are NAME.h there
    named = set(re.findall(r"[\w.]+\.(?:h|cpp|cuh|cu)\b", page))
    assert named == found | {"NAME.h"}
