"""What a GPU showed, between the README's markers: the end of `python -m benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.report import README, update

CORRECT = ("check", "tests", "memcheck", "racecheck", "synccheck", "initcheck")


class Target(NamedTuple):
    """What the worst of the values whose path matches has to reach."""

    what: str
    paths: str
    target: float


# fmt: off
TARGETS = (
    Target("coupling forward, copy of its bytes", "kernels/coupling forward */share", 0.85),
    Target("coupling inverse, copy of its bytes", "kernels/coupling inverse */share", 0.85),
    Target("coupling backward, copy of its bytes", "kernels/coupling backward */share", 0.85),
    Target("norm, copy of its bytes", "kernels/norm forward */share", 0.85),
    Target("norm, eager", "norm/*/eager/against_ours", 2),
    Target("norm, compile", "norm/*/compile/against_ours", 1.3),
    Target("aggregation b1 and b8, eager", "aggregation/*/eager/against_ours", 4),
    Target("training step b8 bf16, AMP eager", "training/eager bf16/against_ours", 2),
    Target("training step b8 bf16, AMP compile", "training/compile bf16/against_ours", 1.2),
    Target("inference b1 bf16 as a graph, AMP eager", "inference/batch 1/eager bf16/against_ours", 6),
    Target("inference b1 bf16 as a graph, compile max-autotune", "inference/batch 1/compile max-autotune bf16/against_ours", 1.3),
)
# fmt: on


def write(document: Mapping[str, Any]) -> None:
    """Put the block of a document of results into the README."""
    update(README, "gpu", "\n".join(block(document)))


def block(document: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: the device, what was checked, and each target beside the worst case that was measured."""
    versions = document.get("build", {}).get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"On one {document['device']}, {document['date']} ({named or 'not built'}):"
    for step in CORRECT:
        found = document.get(step, {"not run": "yet"})
        said = "; ".join(f"{key} {value}" for key, value in found.items() if key != "seconds")
        yield f"* {step}: {' '.join(said.split())[:300]}"
    yield ""
    yield "| ours against | worst case | target | met |"
    yield "|---|---:|---:|---|"
    values = dict(_values(document))
    for target in TARGETS:
        found = [value for path, value in values.items() if fnmatchcase(path, target.paths)]
        if found:
            met = "yes" if min(found) >= target.target else "no"
            cells = (_number(target, min(found)), _number(target, target.target), met)
        else:
            cells = ("not measured", _number(target, target.target), "-")
        yield f"| {target.what} | {' | '.join(cells)} |"


def _number(target: Target, value: float) -> str:
    return f"{value:.0%}" if target.paths.endswith("share") else f"{value:.3g}x"


def _values(found: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{path}{key}/")
        elif isinstance(value, float | int):
            yield f"{path}{key}", value
