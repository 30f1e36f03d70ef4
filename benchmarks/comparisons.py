"""The numbered comparisons of msflow_ext with alternatives, each in its worst case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from msflow_ext.bench import ratio


@dataclass(frozen=True)
class Comparison:
    """Ratio of the time of ``base`` to that of ``ours``, in the worst of the matching cases.

    Attributes:
        number: number of the comparison, shared by those that belong together.
        what: title of its line.
        cases: pattern of the cases' names.
        base: provider to compare with.
        ours: pattern of the providers of msflow_ext, of which the fastest counts.
        saved: compare the memory saved for the backward pass instead, as the ratio of ours to ``base``; less is better.
    """

    number: int
    what: str
    cases: str
    base: str
    ours: str
    saved: bool = False


STEP = "training step 256-512-1024 512 px"
# fmt: off
COMPARISONS = (
    Comparison(1, "flows b1 bf16", "flows 512 px b1", "compile+freezing bf16", "ours optimized bf16"),
    Comparison(2, "flows b1 fp32", "flows 512 px b1", "reference fp32", "ours optimized fp32"),
    Comparison(2, "flows b1 fp32", "flows 512 px b1", "compile+freezing fp32", "ours optimized fp32"),
    Comparison(3, "flows b1 and b4 bf16", "flows 512 px b[14]", "reference fp32", "ours optimized bf16"),
    Comparison(4, "pipeline b1, fastest", "pipeline wide_resnet50_2 512 px b1", "reference fp32", "ours*"),
    Comparison(5, "training step b8 bf16", f"{STEP} b8", "reference bf16", "ours bf16"),
    Comparison(5, "training step b8, fastest", f"{STEP} b8", "reference fp32", "ours*"),
    Comparison(6, "training run, fastest", "training run *", "reference fp32", "ours*"),
    Comparison(7, "coupling forward", "coupling forward * b1", "copy", "ours"),
    Comparison(7, "coupling inverse", "coupling inverse * b1", "copy", "ours"),
    Comparison(7, "coupling backward", "coupling backward * b1", "copy", "ours"),
    Comparison(8, "norm", "norm * b1", "eager", "ours"),
    Comparison(8, "norm", "norm * b1", "compile", "ours"),
    Comparison(9, "aggregation b1 and b8", "aggregation 512 px *", "reference", "ours"),
    Comparison(10, "pixel AUROC", "pixel AUROC 83 images 512 px", "sklearn", "ours"),
    Comparison(10, "AUPRO", "AUPRO 83 images 512 px", "800 thresholds", "ours"),
    Comparison(11, "saved activations fp32", f"{STEP} b1", "reference fp32", "ours fp32", saved=True),
    Comparison(11, "saved activations fp32, reversible", f"{STEP} b1", "reference fp32", "ours reversible fp32", saved=True),
    Comparison(13, "accelerated FastFlow fp32, flows", "flows FastFlow *", "eager fp32", "ours fp32"),
    Comparison(13, "accelerated FastFlow fp32, training step", "training step FastFlow *", "eager fp32", "ours fp32"),
    Comparison(13, "accelerated U-Flow fp32, flows", "flows U-Flow *", "eager fp32", "ours fp32"),
    Comparison(13, "accelerated U-Flow fp32, training step", "training step U-Flow *", "eager fp32", "ours fp32"),
)
# fmt: on


def table(document: dict[str, Any]) -> Iterator[str]:
    """Yield the Markdown table of each comparison with its ratio for each number of threads."""
    if document["machine"].get("toy"):
        yield from ("**Toy sizes: these numbers mean nothing.**", "")
    counts = sorted({row["threads"] for row in document["rows"]})
    threads = " | ".join(f"{count} thread{'s' * (count > 1)}" for count in counts)
    yield f"| no. | what | compared with | {threads} |"
    yield "|---:|---|---|" + "---:|" * len(counts)
    for each in COMPARISONS:
        values = (
            measured(each, [row for row in document["rows"] if row["threads"] == count])
            for count in counts
        )
        cells = " | ".join(_number(value, each) for value in values)
        yield f"| {each.number} | {each.what} | {each.base} | {cells} |"


def legend() -> Iterator[str]:
    """Yield the Markdown table that explains the comparisons in the README of the benchmarks."""
    yield "| no. | what | cases | provider of ours | compared with |"
    yield "|---:|---|---|---|---|"
    for each in COMPARISONS:
        cells = (each.what, f"`{each.cases}`", f"`{each.ours}`", f"`{each.base}`")
        yield f"| {each.number} | {' | '.join(cells)} |"


def measured(comparison: Comparison, rows: list[dict[str, Any]]) -> float | None:
    """Return the ratio in the worst case, or None if no matching case has results of both sides."""
    found = []
    for row in rows:
        if fnmatchcase(row["case"], comparison.cases):
            ratios = list(_ratios(comparison, row["providers"]))
            if ratios:
                found.append(min(ratios) if comparison.saved else max(ratios))
    if not found:
        return None
    return max(found) if comparison.saved else min(found)


def _ratios(comparison: Comparison, providers: dict[str, Any]) -> Iterator[float]:
    base = providers.get(comparison.base, {})
    for name, found in providers.items():
        if fnmatchcase(name, comparison.ours):
            if comparison.saved and "saved_mb" in base and "saved_mb" in found:
                yield found["saved_mb"] / base["saved_mb"]
            elif not comparison.saved and "ms" in base and "ms" in found:
                yield ratio(base["ms"], found["ms"])


def _number(value: float | None, comparison: Comparison) -> str:
    if value is None:
        return "-"
    if comparison.saved or comparison.base == "copy":
        return f"{value:.0%}"
    return f"{value:.3g}x"
