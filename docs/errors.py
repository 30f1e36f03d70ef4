"""The table of errors in docs/errors.md, from the sources: a hook of MkDocs that fills the page when the site is built.

Nothing is imported: the files are read as text, and each ``raise`` and ``warnings.warn`` gives its text.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "msflow_ext"
MARKER = "<!-- errors -->"


class Text(NamedTuple):
    """What a user may read, with ``{name}`` or ``…`` for what depends on the case."""

    text: str
    kind: str
    room: str


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the table: the event that MkDocs calls for every page."""
    return markdown.replace(MARKER, "\n".join(table())) if MARKER in markdown else markdown


def table() -> Iterator[str]:
    """Yield the lines of the tables, a heading for each room of the package."""
    found = sorted(set(texts()), key=lambda each: (each.room, each.text.lower()))
    for room in sorted({each.room for each in found}):
        yield from (f"\n## {room}\n", "| Message | Raised as |", "| --- | --- |")
        rows = (each for each in found if each.room == room)
        yield from (f"| {html.escape(_in_cell(each.text))} | `{each.kind}` |" for each in rows)


def texts(package: Path = PACKAGE) -> Iterator[Text]:
    """Yield every text that the package raises or warns of."""
    for path in sorted(package.rglob("*.py")):
        module = ast.parse(path.read_text("utf-8"))
        room = path.relative_to(package).parts[0].removesuffix(".py").strip("_")
        for scope in _scopes(module):
            for call, kind in _calls(scope):
                for text in _strings(call.args, scope, module):
                    yield Text(" ".join(text.split()), kind, room)


def _scopes(module: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _calls(scope: ast.FunctionDef) -> Iterator[tuple[ast.Call, str]]:
    """Yield the calls that make an exception or warn, with the name of the exception or of the warning."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc, ast.unparse(node.exc.func).rpartition(".")[2]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            yield node, ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"


def _strings(parts: list[ast.expr], scope: ast.FunctionDef, module: ast.Module) -> Iterator[str]:
    """Yield the texts that one of the expressions can have; of several arguments the first that is a text."""
    for part in parts:
        found = [text for text in _values(part, scope, module) if " " in text.strip("…")]
        if found:
            yield from found
            return


def _values(node: ast.AST, scope: ast.FunctionDef, module: ast.Module) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(map(_piece, node.values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            for first in _values(left, scope, module):
                yield from (first + second for second in _values(right, scope, module))
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            yield from (text.replace("{}", "…") for text in _values(template, scope, module))
        case _:
            found = _sources(node, scope, module)
            values = (value for part, where in found for value in _values(part, where, module))
            yield from values if found else ["…"]


def _sources(
    node: ast.AST, scope: ast.FunctionDef, module: ast.Module
) -> list[tuple[ast.expr, ast.FunctionDef]]:
    """Return the expressions that may give the value of a name, a choice or a call, each with its function."""
    match node:
        case ast.IfExp(body=body, orelse=other):
            return [(body, scope), (other, scope)]
        case ast.Name(id=name):
            return [(value, scope) for body in (scope, module) for value in _assigned(name, body)]
        case ast.Call(func=ast.Name(id=name)):
            functions = [each for each in _scopes(module) if each.name == name]
            return [
                (node.value, function)
                for function in functions
                for node in ast.walk(function)
                if isinstance(node, ast.Return) and node.value is not None
            ]
    return []


def _assigned(name: str, body: ast.AST) -> Iterator[ast.expr]:
    """Yield the values that ``name`` is assigned in ``body``, without those that are made from itself."""
    for node in ast.walk(body):
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            used = {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
            if name not in used:
                yield node.value


def _piece(node: ast.expr) -> str:
    """Return a piece of an f-string: its text, or the name that it shows where that is one word."""
    match node:
        case ast.Constant(value=text):
            return str(text)
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return "{" + name + "}"
    return "…"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("`", "'")
