"""Print tables of results in percent on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msflow_ext.metrics import RESULTS
from msflow_ext.runs import table
from msflow_ext.text_table import text_table

Row = tuple[str, str, Mapping[str, Any]]


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a finished run, and of its baseline if it has one, for the table of results."""
    title = f"{metrics['data']['name']} {metrics['data']['category']}"
    found = [(metrics["model"]["name"], metrics)]
    found += [(each["name"], each) for each in [metrics["baseline"]] if each]
    return [(title, name, each) for name, each in found]


def print_lines(lines: Sequence[table.Line]) -> None:
    """Print the table of a series, without the best epochs."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if table.BEST not in line.source:
            rows.setdefault((line.category or line.data, line.source), {})[line.metric] = line
    order = list(dict.fromkeys(category for category, _ in rows))
    by_category = sorted(rows.items(), key=lambda row: order.index(row[0][0]))
    _print_percent(
        (*titles, *(cells[key].percent if key in cells else "-" for key in RESULTS))
        for titles, cells in by_category
    )


def print_decisions(metrics: Mapping[str, Any]) -> None:
    """Print how many test images exceed the threshold of a finished run, if it has one."""
    from msflow_ext.evaluation.calibration import counted, explained

    found = metrics.get("decisions")
    if found and "counts" in found["on_test"]:  # older versions did not write counts
        print(f"over the threshold {found['threshold']:.6g}: {counted(found['on_test'])}")
        print(explained(found))


def print_table(rows: Sequence[Row]) -> None:
    """Print the results of each row in percent."""
    _print_percent(
        (*titles, *("-" if (v := metrics[key]) is None else f"{100 * v:.1f}" for key in RESULTS))
        for *titles, metrics in rows
    )


def _print_percent(rows: Iterable[Sequence[str]]) -> None:
    """Print two titles and the results in percent in each row, below a header."""
    header = ("percent", "", *RESULTS.values())
    print("\n".join(text_table([header, *rows], left=2)))


def conclude(runs: Sequence[table.Run], out: Path, *, show: bool = True) -> None:
    """Print the table of the runs if ``show``.

    Raises:
        RuntimeError: if a run failed.
    """
    if show:
        print_lines(table.lines(runs))
        print(f"{out / 'table.md'}, table.csv and table.json hold the whole table")
    failed = [run for run in runs if run.failure]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed; the first is {failed[0].folder}: "
            f"{failed[0].failure}"
        )
