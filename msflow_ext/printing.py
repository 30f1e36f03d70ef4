"""What the command line prints: tables of results in percent, and errors in one sentence."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

from msflow_ext import table
from msflow_ext.evaluation import RESULTS

#: What ends a command, or one run of a series, with one sentence.
FAILURES = (
    ArgumentError,
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)
POSITIONAL = ("paths", "runs", "source")
REQUIRED = re.compile(  # as jsonargparse 4.53 says it, and as 4.46 did
    r"arguments are required: (.+)$|^Option '(.+)' is required but not provided"
)
Row = tuple[str, str, Mapping[str, Any]]


def sentence(error: Exception) -> str:
    """An error on one line, with flags and files as the user knows them."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, ArgumentError) and (missing := REQUIRED.search(text)):
        names = (name.split(".")[-1] for name in (missing[1] or missing[2]).split(", "))
        flags = (n if n in POSITIONAL else f"--{n.replace('_', '-')}" for n in names)
        text = f"required but not given: {', '.join(flags)}"
    return " ".join(text.split()) or type(error).__name__


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
