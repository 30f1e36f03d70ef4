"""What the project set out to reach on the CPU, and how far the results go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from msflow_ext.bench import ratio

BASELINES = ("official fp32", "official", "eager fp32", "eager", "sklearn", "800 thresholds")


@dataclass(frozen=True)
class Target:
    """A ratio to reach: time of ``base`` over time of ``ours``, in the worst of the cases that match.

    ``ours`` may match several providers: the best of them counts. With ``saved``, it is the memory of ``ours`` over
    that of ``base``, and less is better.
    """

    row: int
    what: str
    cases: str
    base: str
    ours: str
    target: float
    moonshot: float | None
    saved: bool = False


STEP = "training step 256-512-1024 512 px"
# fmt: off
TARGETS = (
    Target(1, "flows b1 bf16, compile+freezing bf16", "flows 512 px b1", "compile+freezing bf16", "ours optimized bf16", 1.4, 1.7),
    Target(2, "flows b1 fp32, official fp32", "flows 512 px b1", "official fp32", "ours optimized fp32", 1.6, 2.5),
    Target(2, "flows b1 fp32, compile+freezing fp32", "flows 512 px b1", "compile+freezing fp32", "ours optimized fp32", 1.1, None),
    Target(3, "flows b1 and b4 bf16, official fp32", "flows 512 px b[14]", "official fp32", "ours optimized bf16", 9, 12),
    Target(4, "pipeline b1 best, official fp32", "pipeline wide_resnet50_2 512 px b1", "official fp32", "ours*", 5, 8),
    Target(5, "training step b8 bf16, official bf16", f"{STEP} b8", "official bf16", "ours bf16", 1.5, 2.5),
    Target(5, "training step b8 best, official fp32", f"{STEP} b8", "official fp32", "ours*", 3, 5),
    Target(6, "training run best, official fp32", "training run *", "official fp32", "ours*", 5, 10),
    Target(7, "coupling forward, copy of its bytes", "coupling forward * b1", "copy", "ours", 0.9, 1.0),
    Target(7, "coupling inverse, copy of its bytes", "coupling inverse * b1", "copy", "ours", 0.9, 1.0),
    Target(7, "coupling backward, copy of its bytes", "coupling backward * b1", "copy", "ours", 0.9, 1.0),
    Target(8, "norm, eager", "norm * b1", "eager", "ours", 2, 3),
    Target(8, "norm, compile", "norm * b1", "compile", "ours", 1.3, 2),
    Target(9, "aggregation b1 and b8, official", "aggregation 512 px *", "official", "ours", 4, 10),
    Target(10, "pixel AUROC, scikit-learn", "pixel AUROC 83 images 512 px", "sklearn", "ours", 5, 20),
    Target(10, "AUPRO, 800 thresholds", "AUPRO 83 images 512 px", "800 thresholds", "ours", 100, 500),
    Target(11, "saved activations fp32, official", f"{STEP} b1", "official fp32", "ours fp32", 0.5, 0.4, saved=True),
    Target(11, "the same, reversible", f"{STEP} b1", "official fp32", "ours reversible fp32", 0.15, 0.1, saved=True),
    Target(13, "accelerated FastFlow fp32, eager", "flows FastFlow *", "eager fp32", "ours fp32", 1.3, 2),
    Target(13, "the same, training step", "training step FastFlow *", "eager fp32", "ours fp32", 1.3, 2),
    Target(13, "accelerated U-Flow fp32, eager", "flows U-Flow *", "eager fp32", "ours fp32", 1.3, 2),
    Target(13, "the same, training step", "training step U-Flow *", "eager fp32", "ours fp32", 1.3, 2),
)
# fmt: on


def table(document: dict[str, Any]) -> Iterator[str]:
    """Markdown: each target, what was measured with each number of threads, and whether that meets it."""
    if document["machine"].get("toy"):
        yield from ("**Toy sizes: these numbers mean nothing.**", "")
    counts = sorted({row["threads"] for row in document["rows"]})
    threads = " | ".join(f"{count} thread{'s' * (count > 1)}" for count in counts)
    yield f"| row | ours against | {threads} | target | moonshot | met |"
    yield "|---|---|" + "---:|" * len(counts) + "---:|---:|---|"
    for t in TARGETS:
        found = [
            measured(t, [row for row in document["rows"] if row["threads"] == count])
            for count in counts
        ]
        cells = " | ".join(_number(value, t) for value in found)
        wanted = f"{_number(t.target, t)} | {_number(t.moonshot, t)}"
        yield f"| {t.row} | {t.what} | {cells} | {wanted} | {verdict(t, found)} |"


def measured(target: Target, rows: list[dict[str, Any]]) -> float | None:
    """In the worst case; None if no matching case was measured with both sides."""
    found = []
    for row in rows:
        if fnmatchcase(row["case"], target.cases):
            ratios = list(_ratios(target, row["providers"]))
            if ratios:
                found.append(min(ratios) if target.saved else max(ratios))
    if not found:
        return None
    return max(found) if target.saved else min(found)


def verdict(target: Target, found: list[float | None]) -> str:
    """Of the worst number of threads that was measured."""
    known = [value for value in found if value is not None]
    if not known:
        return "not measured"
    sign = -1 if target.saved else 1
    worst = min(sign * value for value in known)
    if target.moonshot is not None and worst >= sign * target.moonshot:
        return "moonshot"
    return "yes" if worst >= sign * target.target else "no"


def baseline(row: dict[str, Any]) -> str:
    """The provider that the others of a row are compared with: the authors' way where there is one."""
    timed = [name for name, found in row["providers"].items() if "ms" in found]
    return next((name for name in BASELINES if name in timed), timed[0] if timed else "")


def _ratios(target: Target, providers: dict[str, Any]) -> Iterator[float]:
    base = providers.get(target.base, {})
    for name, found in providers.items():
        if fnmatchcase(name, target.ours):
            if target.saved and "saved_mb" in base and "saved_mb" in found:
                yield found["saved_mb"] / base["saved_mb"]
            elif not target.saved and "ms" in base and "ms" in found:
                yield ratio(base["ms"], found["ms"])


def _number(value: float | None, target: Target) -> str:
    if value is None:
        return "-"
    if target.saved or target.base == "copy":
        return f"{value:.0%}"
    return f"{value:.3g}x"
