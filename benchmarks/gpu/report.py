"""Write what was found on a GPU between the markers of docs/benchmarks.md: the end of `python -m benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.report import SPEED, update

CORRECT = ("check", "tests", "memcheck", "racecheck", "synccheck", "initcheck")


class Comparison(NamedTuple):
    """The lowest value whose path matches a pattern."""

    what: str
    paths: str


COMPARISONS = (
    Comparison("coupling forward, copy of its bytes", "kernels/coupling forward */share"),
    Comparison("coupling inverse, copy of its bytes", "kernels/coupling inverse */share"),
    Comparison("coupling backward, copy of its bytes", "kernels/coupling backward */share"),
    Comparison("norm, copy of its bytes", "kernels/norm forward */share"),
    Comparison("norm, eager", "norm/*/eager/against_ours"),
    Comparison("norm, compile", "norm/*/compile/against_ours"),
    Comparison("aggregation b1 and b8, eager", "aggregation/*/eager/against_ours"),
    Comparison("training step b8 bf16, AMP eager", "training/eager bf16/against_ours"),
    Comparison("training step b8 bf16, AMP compile", "training/compile bf16/against_ours"),
    Comparison(
        "inference b1 bf16 as a graph, AMP eager", "inference/batch 1/eager bf16/against_ours"
    ),
    Comparison(
        "inference b1 bf16 as a graph, compile max-autotune",
        "inference/batch 1/compile max-autotune bf16/against_ours",
    ),
)


def write(document: Mapping[str, Any]) -> None:
    """Write the block of a document of results into docs/benchmarks.md."""
    update(SPEED, "gpu", "\n".join(block(document)))


def block(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the Markdown of the device, the checks, and the worst case of each comparison."""
    versions = document.get("build", {}).get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"On one {document['device']}, {document['date']} ({named or 'not built'}):"
    for step in CORRECT:
        found = document.get(step, {"not run": "yet"})
        said = "; ".join(f"{key} {value}" for key, value in found.items() if key != "seconds")
        yield f"* {step}: {' '.join(said.split())[:300]}"
    yield ""
    yield "| ours compared with | worst case |"
    yield "|---|---:|"
    values = dict(_values(document))
    for what, paths in COMPARISONS:
        found = [value for path, value in values.items() if fnmatchcase(path, paths)]
        yield f"| {what} | {_number(paths, min(found)) if found else 'not measured'} |"


def _number(paths: str, value: float) -> str:
    return f"{value:.0%}" if paths.endswith("share") else f"{value:.3g}x"


def _values(found: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{path}{key}/")
        elif isinstance(value, float | int):
            yield f"{path}{key}", value
