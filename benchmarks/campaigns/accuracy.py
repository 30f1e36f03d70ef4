"""Train on the data sets that packages ship and tabulate the accuracy: `python -m benchmarks.campaigns.accuracy`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, results
from msflow_ext import cli
from msflow_ext.bench import machine
from msflow_ext.metrics import RESULTS
from msflow_ext.runs.table import BEST, MEAN, Line

#: A series of trainings for each data set.
SERIES = (
    ("elpv", "--category", "all", "--split-seeds", "0", "1", "2", "--epochs", "24"),
    ("textures", "--category", "all", "--split-seeds", "0", "1", "2", "--epochs", "40"),
)
MODEL = ("--backbone", "efficientnet_lite0", "--image-size", "192", "--baseline")


def main(arguments: Sequence[str] | None = None) -> int:
    options, more = parser().parse_known_args(arguments)
    facts = machine.facts()
    document: dict[str, Any] = {"machine": facts, "commands": [], "runs": [], "lines": []}
    worst = 0
    for data, *chosen in SERIES:
        out = options.out / data
        command = ["train", "--data", data, *chosen, *MODEL, *more, "--out", str(out)]
        worst = max(worst, cli.main([*command, "--resume"]))
        if not (out / "table.json").exists():  # it did not even begin
            continue
        found = json.loads((out / "table.json").read_text())
        document["commands"].append(" ".join(["msflow", *command[:-1], f"runs/accuracy/{data}"]))
        for run in found["runs"]:  # a result names no folder of one machine
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
        epilog="Further flags are those of msflow train: --threads 2, --model fastflow, --seeds 0 1, ... "
        "What is finished in --out is not trained again.",
    )
    found.add_argument(
        "--out", type=Path, default=Path("runs/accuracy"), help="for the run folders"
    )
    return found


def write(document: dict[str, Any]) -> None:
    """Write the results, and their table into the README."""
    print(results.write(results.file_for(document["machine"], "accuracy"), document))
    report.update(report.README, "accuracy", "\n".join(markdown(document)))
    print(report.README)


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """The README's table: a line per category and method, the last epoch in percent."""
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
