"""Compare the speed of msflow_ext with alternatives on this machine; needs the extra ``bench``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msflow_ext.bench import machine
from msflow_ext.bench.harness import Case, Provider, measure, threads
from msflow_ext.bench.summary import baseline, difference, quantiles, ratio

__all__ = [
    "Case",
    "Provider",
    "baseline",
    "compare",
    "difference",
    "machine",
    "measure",
    "quantiles",
    "ratio",
    "table",
    "threads",
]

DEMO = {"channels": (24, 40, 112), "size": 192}  # the model that `msflow demo` trains
TINY = {"channels": (8, 16), "blocks": (1, 1), "size": 32}


def compare(
    thread_count: int | None = None, *, seconds: float = 20.0, tiny: bool = False
) -> Iterator[str]:
    """Compare flows, pipeline and training step with the alternatives, and yield lines to print.

    Every provider must give the same results before it is timed. The providers take turns round by round.

    Args:
        thread_count: number of threads of PyTorch and the kernels; unchanged by default.
        seconds: measuring time of each of the three comparisons.
        tiny: measure toy sizes, to try the command.
    """
    from msflow_ext.bench import cases

    if tiny:
        chosen = [
            cases.flows(**TINY),
            cases.pipeline(64, backbone="resnet18", blocks=(1, 1)),
            cases.training_step(**TINY, batch=2),
        ]
    else:
        chosen = [cases.flows(), cases.pipeline(), cases.training_step(**DEMO)]
    with threads(thread_count):
        facts = machine.facts()
        yield f"{facts['cpu']}, {facts['capability']}, threads: {thread_count or 'default'}"
        if cases.REFERENCE != "reference":
            yield "FrEIA is not installed (extra 'bench'): 'eager' replaces the reference implementation"
        for case in chosen:
            row = measure(case, seconds=seconds)
            yield ""
            yield from table(row)
            if (row["others"] or 0) > 0.1:
                yield f"other processes used {row['others']:.0%} of the machine: these times are unreliable"


def table(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row of results as text: milliseconds, and the speedup over the row's baseline."""
    yield f"{row['case']}, {row['threads']} thread(s)"
    base = row["providers"].get(baseline(row), {}).get("ms")
    for name, found in row["providers"].items():
        if "ms" not in found:
            yield f"  {name:28} not timed: {found.get('refused', 'it was not run')}"
            continue
        mid, low, high = quantiles(found["ms"])
        times = f"{ratio(base, found['ms']):6.2f}x" if base else ""
        yield f"  {name:28}{mid:10.2f} ms  ({low:.2f} - {high:.2f}){times}"
