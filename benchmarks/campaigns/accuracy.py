"""Train on the packaged data sets, and tabulate the accuracy: `python -m benchmarks.campaigns.accuracy`.

The tables are written into docs/accuracy.md, and the table of presets into the README too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import report, results
from benchmarks.campaigns import ablate
from msflow_ext import cli
from msflow_ext.bench import machine
from msflow_ext.metrics import RESULTS
from msflow_ext.runs.table import BEST, MEAN, Line

#: Flags of the series of trainings on each data set.
SERIES = (
    ("elpv", "--category", "all", "--split-seeds", "0", "1", "2", "--epochs", "24"),
    ("textures", "--category", "all", "--split-seeds", "0", "1", "2", "--epochs", "40"),
)
MODEL = ("--backbone", "efficientnet_lite0", "--image-size", "192", "--baseline")

#: Lines of the table of presets: title, variant of the ablations, score of its images, and score of its pixels.
METHODS = (
    (
        "MSFlow, `--preset robust`",
        "MSFlow robust, whitened across scales",
        "smoothed score 1%",
        "smoothed",
    ),
    ("FastFlow, `--preset robust`", "FastFlow robust", "smoothed score", "smoothed"),
    ("MSFlow, `--preset paper`", "MSFlow paper", "log 3%", "additive"),
    ("PaDiM-style Gaussian", "Gaussian", "paper", "paper"),
)
#: Columns of the table of presets: title, data, and index of the number.
COLUMNS = (
    ("solar cells, mono: image AUROC", "mono", 0),
    ("solar cells, poly: image AUROC", "poly", 0),
    ("brick: image AUROC", "brick", 0),
    ("brick: pixel AUROC", "brick", 1),
    ("brick: AUPRO", "brick", 2),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options, more = parser().parse_known_args(arguments)
    if options.report:
        _write_blocks(newest())
        return 0
    facts = machine.facts()
    document: dict[str, Any] = {"machine": facts, "commands": [], "runs": [], "lines": []}
    worst = 0
    for data, *chosen in SERIES:
        out = options.out / data
        command = ["train", "--data", data, *chosen, *MODEL, *more, "--out", str(out)]
        worst = max(worst, cli.main([*command, "--resume"]))
        if not (out / "table.json").exists():  # no training began
            continue
        found = json.loads((out / "table.json").read_text())
        document["commands"].append(" ".join(["msflow", *command[:-1], f"runs/accuracy/{data}"]))
        for run in found["runs"]:  # results must not name folders of a machine
            folder = os.path.relpath(run["folder"], options.out)
            document["runs"].append(run | {"folder": Path(folder).as_posix()})
        document["lines"] += found["lines"]
    if worst == 0:
        write(document)
    return worst


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.campaigns.accuracy",
        description=__doc__,
        epilog="Further flags are passed to msflow train: --threads 2, --model fastflow, --seeds 0 1, ... "
        "Finished runs in --out are not trained again.",
    )
    text = "Folder of the run folders."
    found.add_argument("--out", type=Path, default=Path("runs/accuracy"), help=text)
    text = "Write the tables of the newest results into the pages, and train nothing."
    found.add_argument("--report", action="store_true", help=text)
    return found


def write(document: dict[str, Any]) -> None:
    """Write the results, and the tables into the pages."""
    print(results.write(results.file_for(document["machine"], "accuracy"), document))
    _write_blocks(document)


def newest() -> dict[str, Any]:
    """Return the accuracy that was measured last.

    Raises:
        ValueError: if there is none.
    """
    found = map(results.read, results.FOLDER.glob("accuracy-*.json"))
    return max(found, key=lambda document: document["machine"]["date"])


def _write_blocks(document: dict[str, Any]) -> None:
    for page, name, lines in blocks(document):
        report.update(page, name, "\n".join(lines))
        print(page)


def blocks(document: dict[str, Any]) -> Iterator[tuple[Path, str, Iterable[str]]]:
    """Yield page, marker and lines of each block that is generated from accuracies."""
    yield report.ACCURACY, "accuracy", markdown(document)
    for page in (report.ACCURACY, report.README):
        yield page, "presets", presets(ablate.rows(ablate.FILE))


def presets(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of presets from the rows of the ablations: mean and standard deviation in percent."""
    yield f"| percent | {' | '.join(title for title, *_ in COLUMNS)} |"
    yield "|---|" + "---:|" * len(COLUMNS)
    for title, variant, *ways in METHODS:
        mine = [row for row in rows if row["variant"] == variant]
        cells = (_percent(mine, data, ways[i > 0], i) for _, data, i in COLUMNS)
        yield f"| {title} | {' | '.join(cells)} |"


def _percent(rows: Sequence[dict[str, Any]], data: str, way: str, i: int) -> str:
    """Return mean and standard deviation of a number over the rows of a data set, or a dash without rows."""
    values = [row["scores"][way][i] for row in rows if row["data"] == data]
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}" if values else "-"


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the packaged data sets, with a line per category and method, after the last epoch."""
    lines = [Line(**each) for each in document["lines"]]
    lines = [each for each in lines if BEST not in each.source and each.category != MEAN]
    trained = [run["metrics"] for run in document["runs"]]
    epochs = {each["data"]["name"]: each["epochs"] for each in trained}
    model, runs = trained[0]["model"], max(each.runs for each in lines)
    yield f"{model['backbone']} at {model['image_size']} px, last epoch, mean ± standard deviation of"
    yield f"{runs} runs; `python -m benchmarks.campaigns.accuracy` repeats it."
    yield ""
    yield f"| percent | | {' | '.join(RESULTS.values())} |"
    yield "|---|---|" + "---:|" * len(RESULTS)
    cells = {(each.data, each.category, each.source, each.metric): each.percent for each in lines}
    places = list(dict.fromkeys((each.data, each.category) for each in lines))
    rows = dict.fromkeys((each.data, each.category, each.source) for each in lines)
    for data, category, source in sorted(rows, key=lambda row: places.index(row[:2])):
        values = (cells.get((data, category, source, metric), "-") for metric in RESULTS)
        yield f"| {data} {category}, {epochs[data]} epochs | {source} | {' | '.join(values)} |"


if __name__ == "__main__":
    sys.exit(main())
