"""Write the table of fault families in tests/RELIABILITY.md from the tests: ``python docs/families.py``.

A test of a fault says which family of faults it stands for: ``@pytest.mark.family("masks")``, or ``pytestmark`` for a
whole file. Nothing is imported: the tests are read as text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "RELIABILITY.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"

#: What holds in each family.
FAMILIES = {
    "gradients": "A backward pass uses the values of its forward pass, or raises an error",
    "transforms": "torch.func, tracing and fake tensors give the results of the reference",
    "optimized models": "An optimized model shares nothing with its original; an image has the same score in every batch",
    "memory errors": "Missing memory is a MemoryError, and no kernel sees an incomplete object",
    "image files": "A file decodes as OpenCV and tifffile read it, or is refused by name",
    "value ranges": "Tensors outside the range that a model was trained on are refused",
    "masks": "A mask keeps its meaning at every size",
    "folders": "Every command finds the same images in a folder, and says what it skips",
    "broken images": "One broken image does not end a prediction",
    "score tables": "A column has one meaning in every table, and file names are kept as they are",
    "thresholds": "A score equal to the threshold is not above it, in any batch",
    "run files": "Files of a run have the usual permissions and are found from any folder",
    "writers": "Two processes do not write to one folder",
    "full disks": "A full disk gives one sentence, and no incomplete file stays",
    "early refusals": "Settings that cannot work are refused before the first epoch",
    "crafted files": "A crafted file ends in a ValueError and uses no memory",
    "exports": "An export holds everything that its deployment needs",
    "anomalib adapter": "Without masks, anomalib's score and map have the same unit",
    "foreign checkpoints": "Checkpoints of every released form load",
    "builds": "A build without kernels says why, or fails where kernels are required",
    "pages": "Pages keep an image's aspect ratio and show only what the run holds",
    "service": "The service keeps its limits against slow, many and unknown clients",
}


def tests() -> dict[str, list[tuple[str, Path]]]:
    """Return name and file of the tests of each family, in the order of :data:`FAMILIES`.

    Raises:
        ValueError: a test names a family that is not in the table.
    """
    found: dict[str, list[tuple[str, Path]]] = {family: [] for family in FAMILIES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for family, name in _marked(ast.parse(path.read_text("utf-8"))):
            if family not in found:
                raise ValueError(f"{path}: {name} has an unknown family {family!r}")
            found[family].append((name, path.relative_to(ROOT / "tests")))
    return found


def table() -> Iterator[str]:
    """Yield markdown: a family and what holds in it, then a row for each of its tests, whose names are sentences."""
    yield "| Family | Tested | In |"
    yield "| --- | --- | --- |"
    for family, found in tests().items():
        title = f"**{family}**: {FAMILIES[family]}"
        for name, path in found:
            sentence = name.removeprefix("test_").replace("_", " ")
            yield f"| {title} | {sentence} | `{path.as_posix()}` |"
            title = ""


def page() -> str:
    """Return the page with the table as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n" + "\n".join(table()) + f"\n{END}{after}"


def _marked(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Family and name of every test function that is marked, or whose class or file is."""
    yield from _of_body(module.body, _families_of_file(module))


def _of_body(body: list[ast.stmt], outer: list[str]) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _of_body(node.body, [*outer, *_named(node.decorator_list)])
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            families = [*outer, *_named(node.decorator_list)]
            yield from ((family, node.name) for family in families)


def _families_of_file(module: ast.Module) -> list[str]:
    assigned = (node for node in module.body if isinstance(node, ast.Assign))
    marks = (node for node in assigned if ast.unparse(node.targets[0]) == "pytestmark")
    return [family for node in marks for family in _named([node.value])]


def _named(marks: list[ast.expr]) -> list[str]:
    """Return the families that decorators or values of ``pytestmark`` name."""
    calls = (node for mark in marks for node in ast.walk(mark) if isinstance(node, ast.Call))
    return [
        str(ast.literal_eval(call.args[0]))
        for call in calls
        if ast.unparse(call.func) == "pytest.mark.family"
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
