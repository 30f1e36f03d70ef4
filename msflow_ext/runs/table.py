"""Table of many runs: results per category, standard deviation over seeds, and published results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from msflow_ext.files import write_text
from msflow_ext.metrics import RESULTS
from msflow_ext.runs.csv_cells import csv_line
from msflow_ext.text_table import text_table

BEST = "best epoch on the test set"  # shown beside the last epoch; it is not a result
MEAN = "mean"


@dataclass(frozen=True)
class Run:
    """One training of a series.

    Attributes:
        category: category of the data set, ``""`` if it has no categories.
        split_seed: seed of the split into training and test images.
        seed: seed of the training.
        folder: the run folder.
        metrics: content of its ``metrics.json``; None if it failed.
        failure: why it failed, in one sentence.
    """

    category: str
    split_seed: int
    seed: int
    folder: str
    metrics: Mapping[str, Any] | None
    failure: str = ""


@dataclass(frozen=True)
class Line:
    """One number of the table.

    Attributes:
        data: name of the data set.
        category: category of the runs, or ``mean`` for the mean over categories.
        metric: a key of :data:`msflow_ext.metrics.RESULTS`.
        source: origin of the number: a model's last epoch, its best epoch, a baseline or a publication.
        value: mean over the runs, a fraction.
        spread: standard deviation over the runs; None for fewer than two.
        runs: number of runs; 0 for a published number.
    """

    data: str
    category: str
    metric: str
    source: str
    value: float
    spread: float | None
    runs: int

    @property
    def percent(self) -> str:
        """Return ``98.41`` or, for several runs, ``98.41 ± 0.12``."""
        spread = "" if self.spread is None else f" ± {100 * self.spread:.2f}"
        return f"{100 * self.value:.2f}{spread}"


def lines(runs: Sequence[Run]) -> list[Line]:
    """Return the table of the runs that did not fail, which have one data set and model."""
    done = [run for run in runs if run.metrics]
    return [line for metric in RESULTS for line in _lines_of(metric, done)]


def published(data: str, model: str, backbone: str) -> list[dict[str, Any]]:
    """Return published results on a data set with this backbone or, if there are none, with the paper's."""
    known = [each for each in _records(data) if each["model"] == model]
    chosen = backbone if backbone in {each["backbone"] for each in known} else None
    return [each for each in known if each["backbone"] == (chosen or known[0]["backbone"])]


def write(folder: Path, runs: Sequence[Run]) -> list[Line]:
    """Write ``table.csv``, ``table.json`` and ``table.md`` to a folder, and return the lines."""
    found = lines(runs)
    table = [Line.__dataclass_fields__, *(asdict(line).values() for line in found)]
    write_text(folder / "table.csv", "".join(map(csv_line, table)))
    document = {"runs": list(map(brief, runs)), "lines": [asdict(line) for line in found]}
    write_text(folder / "table.json", json.dumps(document, indent=1, allow_nan=False))
    write_text(folder / "table.md", "\n".join(markdown(found, runs)) + "\n")
    return found


def brief(run: Run) -> dict[str, Any]:
    """Return a run as plain values, without losses and evaluations."""
    left_out = ("losses", "evaluations")
    found = {name: value for name, value in (run.metrics or {}).items() if name not in left_out}
    return {**asdict(run), "metrics": found or None}


def markdown(found: Sequence[Line], runs: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of a Markdown table per metric, in percent: a row per category, a column per source."""
    for metric, title in RESULTS.items():
        chosen = [line for line in found if line.metric == metric]
        if not chosen:
            continue
        sources = list(dict.fromkeys(line.source for line in chosen))
        cells = {(line.category, line.source): line.percent for line in chosen}
        rows = [("", *sources), ("---", *("---:" for _ in sources))]
        for category in dict.fromkeys(line.category for line in chosen):
            values = (cells.get((category, source), "-") for source in sources)
            rows.append((category or chosen[0].data, *values))
        yield from (f"## {title[:1].upper()}{title[1:]}, percent", "")
        yield from (f"| {line} |" for line in text_table(rows, between=" | "))
        yield ""
    most = max((line.runs for line in found if line.category != MEAN), default=0)
    if most > 1:
        yield f"Mean ± standard deviation of {most} runs."
    yield "Results are those of the last epoch. A best epoch is chosen on the test set and is not a result."
    sources = {line.source for line in found if not line.runs}
    if sources:
        metrics = next(run.metrics for run in runs if run.metrics)
        yield ""
        yield from (f"* {_titled(each)}: {each['source']}." for each in _published(metrics))
    failed = [run for run in runs if run.failure]
    if failed:
        yield from ("", "Failed:", "")
        yield from (f"* {run.folder}: {run.failure}" for run in failed)


def _lines_of(metric: str, done: Sequence[Run]) -> Iterator[Line]:
    ours: dict[str, dict[str, dict[tuple[int, int], float]]] = {}  # source, category, seeds
    for run in done:
        for source, value in _values(run.metrics or {}, metric):
            column = ours.setdefault(source, {})
            column.setdefault(run.category, {})[run.split_seed, run.seed] = value
    for source, column in ours.items():
        data = (done[0].metrics or {})["data"]["name"]
        for category, values in column.items():
            yield Line(data, category, metric, source, *_spread(values.values()))
        if len(column) > 1:
            yield Line(data, MEAN, metric, source, *_mean(list(column.values())))
    if done:
        yield from _published_lines(metric, done[0].metrics or {}, {run.category for run in done})


def _published_lines(metric: str, metrics: Mapping[str, Any], ours: set[str]) -> Iterator[Line]:
    """Yield the published results of our categories, and their mean if it is over the same categories."""
    data = metrics["data"]["name"]
    everything = {name for record in _records(data) for name in record["values"]}
    shown = everything if everything == {*ours, MEAN} else ours
    for record in _published(metrics):
        for category, values in record["values"].items():
            if category in shown and metric in values:
                yield Line(data, category, metric, _titled(record), values[metric], None, 0)


def _values(metrics: Mapping[str, Any], metric: str) -> Iterator[tuple[str, float]]:
    """Yield the values of a metric in one run, by source."""
    name, baseline = metrics["model"]["name"], metrics["baseline"]
    sources = {name: metrics, f"{name}, {BEST}": metrics["best"]}
    sources |= {baseline["name"]: baseline} if baseline else {}
    for source, known in sources.items():
        if known.get(metric) is not None:
            yield source, known[metric]


def _mean(columns: Sequence[Mapping[tuple[int, int], float]]) -> tuple[float, float | None, int]:
    """Return the mean over categories and, if all have the same seeds, its standard deviation over seeds."""
    if all(column.keys() == columns[0].keys() for column in columns):
        return _spread([fmean(column[key] for column in columns) for key in columns[0]])
    return fmean(fmean(column.values()) for column in columns), None, min(map(len, columns))


def _spread(values: Iterable[float]) -> tuple[float, float | None, int]:
    values = list(values)
    return fmean(values), stdev(values) if len(values) > 1 else None, len(values)


def _published(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    model = metrics["model"]
    return published(metrics["data"]["name"], model["name"], model["backbone"])


def _records(data: str) -> list[dict[str, Any]]:
    records = json.loads(files("msflow_ext.runs").joinpath("published.json").read_text("utf-8"))
    return [each for each in records if each["data"] == data]


def _titled(record: Mapping[str, Any]) -> str:
    return f"{record['title']} ({record['backbone']})"
