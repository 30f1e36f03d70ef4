"""The page of errors lists every text that the package raises."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def errors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("errors_page", DOCS / "errors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('raise ValueError(f"{path} holds {len(x)} of {run.name}")', "{path} holds … of {name}"),
        ('raise ValueError("one " + f"and {n}")', "one and {n}"),
        ('raise ValueError("the good one" if x else "the bad one")', "the bad one"),
        ('text = "holds {} of {}"\n    raise ValueError(text.format(1, 2))', "holds … of …"),
        ('raise HTTPException(400, "no image here")', "no image here"),
        ('warnings.warn("this is slower")', "this is slower"),
        ("raise ValueError(worded(x))", "said by a function"),
    ],
)
def test_texts_are_found_however_they_are_built(
    errors: ModuleType, tmp_path: Path, body: str, text: str
) -> None:
    helper = 'def worded(x):\n    return "said by a function"\n'
    (tmp_path / "room.py").write_text(f"{helper}def f(x):\n    {body}\n", "utf-8")
    assert text in [each.text for each in errors.texts(tmp_path)]


def test_every_raise_of_the_package_has_its_text(errors: ModuleType) -> None:
    """Only a few pass on the text of another error."""
    silent = [
        f"{path.name}: {ast.unparse(call)}"
        for path in errors.PACKAGE.rglob("*.py")
        for module in [ast.parse(path.read_text("utf-8"))]
        for scope in errors._scopes(module)
        for call, _ in errors._calls(scope)
        if not list(errors._strings(call.args, scope, module)) and "error" not in ast.unparse(call)
    ]
    assert len(silent) <= 1, silent


def test_the_page_is_filled(errors: ModuleType) -> None:
    page = errors.on_page_markdown((DOCS / "errors.md").read_text("utf-8"))
    assert errors.MARKER not in page
    assert "## data" in page and "## ops" in page
    assert page.count("\n| ") > 400
