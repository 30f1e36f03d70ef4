"""The table of a series shows results, best epochs and published numbers."""

from __future__ import annotations

import csv
import json
import math
import re
from statistics import fmean
from typing import Any

import pytest

from msflow_ext.metrics import RESULTS
from msflow_ext.runs import table
from msflow_ext.runs.csv_cells import csv_rows
from msflow_ext.runs.table import Line, Run


def run(category: str, value: float, seed: int = 0, data: str = "cups", **more: Any) -> Run:
    known = {"image_auroc": value, "pixel_auroc": None, "aupro": None}
    metrics = {
        **known,
        "best": {**known, "image_auroc": value + 0.1},
        "baseline": None,
        "data": {"name": data, "category": category},
        "model": {"name": "MSFlow", "backbone": "wide_resnet50_2"},
        **more,
    }
    return Run(category, 0, seed, f"runs/{category}/seed-{seed}", metrics)


FAILED = Run("tea", 0, 0, "runs/tea", None, "tea.png is empty")


def found(lines: list[Line], source: str = "MSFlow") -> dict[str, tuple[float, float | None, int]]:
    chosen = (each for each in lines if (each.metric, each.source) == ("image_auroc", source))
    return {each.category: (each.value, each.spread, each.runs) for each in chosen}


def test_lines_are_mean_and_deviation_over_seeds_also_for_the_mean_over_categories():
    runs = [run("a", 0.5, 0), run("a", 0.7, 1), run("b", 0.8, 0), run("b", 0.6, 1)]
    lines = found(table.lines(runs))
    assert lines["a"] == (pytest.approx(0.6), pytest.approx(math.sqrt(0.02)), 2)
    assert lines["mean"] == (pytest.approx(0.65), pytest.approx(0.0), 2)
    best = found(table.lines(runs), "MSFlow, best epoch on the test set")
    assert best["a"][0] == pytest.approx(0.7)


def test_one_run_has_no_spread_and_one_category_no_mean():
    assert found(table.lines([run("a", 0.5)])) == {"a": (0.5, None, 1)}


def test_the_mean_over_unequal_seeds_has_no_spread():
    runs = [run("a", 0.5, 0), run("a", 0.7, 1), run("b", 0.8, 0)]
    assert found(table.lines(runs))["mean"] == (pytest.approx(0.7), None, 1)


def test_a_baseline_has_its_own_lines():
    baseline = {"name": "Gaussian", "image_auroc": 0.4, "pixel_auroc": None, "aupro": None}
    assert found(table.lines([run("a", 0.5, baseline=baseline)]), "Gaussian") == {
        "a": (0.4, None, 1)
    }


def test_a_published_mean_is_shown_only_for_the_same_categories():
    source = "authors' log, last epoch (wide_resnet50_2)"
    categories = list(table.published("visa", "MSFlow", "wide_resnet50_2")[0]["values"])[:-1]
    some = table.lines([run(each, 0.9, data="visa") for each in categories[:2]])
    assert found(some, source) == {"candle": (0.9595, None, 0), "capsules": (0.9512, None, 0)}
    everything = table.lines([run(each, 0.9, data="visa") for each in categories])
    assert len(categories) == 12
    assert found(everything, source)["mean"] == (0.9531, None, 0)
    assert not found(table.lines([run("candle", 0.9)]), source)


def test_a_published_mean_without_categories_is_shown_only_for_all_categories():
    categories = list(table.published("mvtec", "MSFlow", "wide_resnet50_2")[0]["values"])[:-1]
    for chosen, shown in ((categories[:3], set()), (categories, {"mean"})):
        model = {"name": "FastFlow", "backbone": "resnet18"}
        pixel = {"pixel_auroc": 0.9, "best": {"pixel_auroc": 0.9}}
        lines = table.lines([run(each, 0.9, data="mvtec", model=model, **pixel) for each in chosen])
        assert {each.category for each in lines if not each.runs} == shown


def test_published_numbers_are_those_of_the_backbone():
    (paper, *_) = table.published("mvtec", "FastFlow", "resnet18")
    assert (paper["backbone"], paper["values"]) == ("resnet18", {"mean": {"pixel_auroc": 0.972}})
    assert {each["backbone"] for each in table.published("mvtec", "FastFlow", "vgg11")} == {
        "wide_resnet50_2"
    }
    assert table.published("cups", "MSFlow", "resnet18") == []


@pytest.mark.parametrize("data", ["mvtec", "visa"])
def test_published_means_equal_the_means_of_the_published_categories(data):
    for record in table.published(data, "MSFlow", "wide_resnet50_2"):
        *categories, mean = record["values"].values()
        for metric in categories[0]:
            assert metric in RESULTS
            assert fmean(each[metric] for each in categories) == pytest.approx(
                mean[metric], abs=4e-4
            )


def test_the_files_of_a_table_agree_and_list_failures(tmp_path):
    runs = [run("a", 0.5, 0), run("a", 0.75, 1), FAILED]
    lines = table.write(tmp_path, runs)
    with (tmp_path / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["category"], float(first["value"]), first["runs"]) == ("a", 0.625, "2")
    assert second["source"] == "MSFlow, best epoch on the test set"
    document = json.loads((tmp_path / "table.json").read_text())
    assert [each["value"] for each in document["lines"]] == [each.value for each in lines]
    assert document["runs"][2] == {
        "category": "tea",
        "split_seed": 0,
        "seed": 0,
        "folder": "runs/tea",
        "metrics": None,
        "failure": "tea.png is empty",
    }
    text = (tmp_path / "table.md").read_text()
    header, rule, row = (line for line in text.splitlines() if line.startswith("|"))
    assert header.split("|")[2:4] == ["        MSFlow ", " MSFlow, best epoch on the test set "]
    assert re.fullmatch(r"\| --- \| +---: \| +---: \|", rule)
    assert re.fullmatch(r"\| a   \| 62.50 ± 17.68 \| +72.50 ± 17.68 \|", row)
    assert "Mean ± standard deviation of 2 runs." in text
    assert "* runs/tea: tea.png is empty" in text


def test_a_table_of_failures_lists_them(tmp_path):
    assert table.write(tmp_path, [FAILED]) == []
    assert "tea.png is empty" in (tmp_path / "table.md").read_text()


@pytest.mark.family("score tables")
def test_unusual_categories_are_read_back_and_never_run_as_formulas(tmp_path):
    categories = ["=1+1", "a\rb", "a\nb", "\udcff"]
    table.write(tmp_path, [run(name, 0.5) for name in categories])
    content = (tmp_path / "table.csv").read_bytes().decode("utf-8", "surrogateescape")
    header, *rows = csv_rows(content)
    assert header == list(Line.__dataclass_fields__)
    found = [row[1] for row in rows if row[3] == "MSFlow"]
    assert found == [*categories, "mean"]
    assert '"\'=1+1"' in content
    assert (tmp_path / "table.md").exists()
