"""What the command line prints: tables of results in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msflow_ext.metrics import RESULTS
from msflow_ext.runs import table

Row = tuple[str, str, Mapping[str, Any]]


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """A finished run, and its baseline if it has one, for the table of results."""
    title = f"{metrics['data']['name']} {metrics['data']['category']}"
    found = [(metrics["model"]["name"], metrics)]
    found += [(each["name"], each) for each in [metrics["baseline"]] if each]
    return [(title, name, each) for name, each in found]


def print_lines(lines: Sequence[table.Line]) -> None:
    """The table of a series on the terminal, without the best epochs."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if table.BEST not in line.source:
            rows.setdefault((line.category or line.data, line.source), {})[line.metric] = line
    width = max([20, *(len(source) for _, source in rows)]) + 2
    print(f"{'':16}{'':{width}}" + "".join(f"{name:>16}" for name in RESULTS.values()))
    order = list(dict.fromkeys(category for category, _ in rows))
    for (category, source), cells in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        texts = (table.percent(cells[key]) if key in cells else "-" for key in RESULTS)
        print(f"{category:16}{source:{width}}" + "".join(f"{text:>16}" for text in texts))


def print_table(rows: Sequence[Row]) -> None:
    """A line per title and method."""
    print(f"{'':20}{'':24}" + "".join(f"{name:>14}" for name in RESULTS.values()))
    for title, method, metrics in rows:
        values = [metrics[key] for key in RESULTS]
        cells = (f"{'-':>14}" if v is None else f"{100 * v:>12.1f} %" for v in values)
        print(f"{title:20}{method:24}" + "".join(cells))


def conclude(runs: Sequence[table.Run], out: Path, *, show: bool = True) -> None:
    """Print the table of the runs if it is to be shown; RuntimeError if one failed."""
    if show:
        print_lines(table.lines(runs))
        print(f"{out / 'table.md'}, table.csv and table.json hold all of it")
    failed = [run for run in runs if run.failure]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0].folder}: "
            f"{failed[0].failure}"
        )
