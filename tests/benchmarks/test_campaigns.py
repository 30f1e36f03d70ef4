"""The long measurements write their results and tables: accuracy, bulk scoring and serving at toy sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from msflow_ext.bench import machine
from msflow_ext.runs.table import Line

Load = Callable[[str], ModuleType]


def test_accuracy_writes_one_table_of_the_packaged_data_sets(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, asked = load("campaigns.accuracy"), []

    def train(arguments: list[str]) -> int:
        given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        asked.append(arguments)
        lines = [
            Line(given["--data"], category, "image_auroc", source, value, 0.004, 3)
            for category in ("a", "mean")
            for source, value in (("MSFlow", 0.95), ("MSFlow, best epoch on the test set", 0.97))
        ]
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        model = {"backbone": "resnet18", "image_size": 192}
        metrics = {"epochs": 4, "data": {"name": given["--data"]}, "model": model}
        document = {
            "runs": [{"folder": str(out / "a"), "metrics": metrics}],
            "lines": [asdict(each) for each in lines],
        }
        (out / "table.json").write_text(json.dumps(document))
        return 0

    monkeypatch.setattr(accuracy.cli, "main", train)
    page, readme, results = (tmp_path / name for name in ("accuracy.md", "README.md", "results"))
    presets = "<!-- presets:begin -->\n<!-- presets:end -->\n"
    page.write_text(f"<!-- accuracy:begin -->\n<!-- accuracy:end -->\n{presets}")
    readme.write_text(presets)
    monkeypatch.setattr(accuracy.report, "ACCURACY", page)
    monkeypatch.setattr(accuracy.report, "README", readme)
    monkeypatch.setattr(accuracy.results, "FOLDER", results)
    assert accuracy.main(["--out", str(tmp_path / "runs")]) == 0
    assert [arguments[2] for arguments in asked] == ["elpv", "textures"]
    assert all("--resume" in arguments for arguments in asked)
    (file,) = results.glob("accuracy-*.json")
    assert {line["data"] for line in json.loads(file.read_text())["lines"]} == {"elpv", "textures"}
    text = page.read_text()
    assert "| elpv a, 4 epochs | MSFlow | 95.00 ± 0.40 | - | - |" in text
    assert "resnet18 at 192 px" in text
    assert "97.00" not in text
    assert (
        "\n".join(accuracy.presets(accuracy.ablate.rows(accuracy.ablate.FILE)))
        in readme.read_text()
    )
    with pytest.raises(SystemExit, match="no results"):
        load("results").newest()


def test_the_table_of_presets_has_mean_and_deviation_of_several_seeds(load: Load) -> None:
    accuracy = load("campaigns.accuracy")
    title, variant, score, pixels = accuracy.METHODS[0]
    rows = [
        {"variant": variant, "data": data, "scores": {score: [auroc], pixels: [0.5, 0.9, 0.8]}}
        for data, auroc in (
            ("mono", 0.9),
            ("mono", 1.0),
            ("brick", 1.0),
            ("brick", 1.0),
            ("poly", 1.0),
        )
    ]
    _, _, first, *others = accuracy.presets(rows)
    assert first == f"| {title} | 95.0 ± 7.1 | 100.0 | 100.0 ± 0.0 | 90.0 ± 0.0 | 80.0 ± 0.0 |"
    assert len(others) == len(accuracy.METHODS) - 1
    assert others[0].endswith(" | - | - | - | - | - |")


def test_bulk_scoring_is_measured_and_tabulated(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    file = tmp_path / "bulk.json"
    tiny = ["--images", "4", "--side", "64", "--shard-size", "2", "--workers", "--file", str(file)]
    assert load("campaigns.bulk").main(tiny) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["workers"] == 0 and row["images_per_s"] > 0
    assert f"| {row['images_per_s']:.1f} | 1.00 |" in file.with_suffix(".md").read_text()


def test_a_service_answers_several_clients_without_errors(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = load("campaigns.serving")
    page, results = tmp_path / "RELIABILITY.md", tmp_path / "results"
    page.write_text(serving.PAGE.read_text())
    monkeypatch.setattr(serving, "PAGE", page)
    monkeypatch.setattr(serving.results, "FOLDER", results)
    assert serving.main(["--seconds", "1", "--clients", "3", "--side", "64"]) == 0
    (file,) = results.glob("serving-*.json")
    row = json.loads(file.read_text())["serving"]
    assert row["errors"] == {} and row["images"] > 1
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert row["growth_mb"] is None or row["growth_mb"] < 200
    assert f"| {row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms |" in page.read_text()
    assert " | none | " in page.read_text()
    failed = {"machine": machine.facts(), "serving": {**row, "errors": {"503": 2, "ReadError": 1}}}
    assert " | 2 503, 1 ReadError | " in list(serving.markdown(failed))[-1]
