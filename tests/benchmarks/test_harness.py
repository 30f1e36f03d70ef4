"""The harness of the benchmarks: who is wrong is not timed, and the summaries tell the worst."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msflow_ext import FastFlow
from msflow_ext.bench import (
    TINY,
    Case,
    Provider,
    difference,
    harness,
    machine,
    measure,
    ratio,
    table,
)
from msflow_ext.bench.cases import flows
from msflow_ext.runs.table import Line

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a module of the folder ``benchmarks``, which is not part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def doubling(wrong: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(
        name="double",
        rows=[],
        inputs=lambda: [torch.arange(100.0)],
        providers={"right": Provider(lambda: lambda x: 2 * x), "wrong": Provider(lambda: wrong)},
        wanted=lambda x: 2 * x.double(),
        rounds=2,
        **options,
    )


def one_element_off(x: Tensor) -> Tensor:
    return torch.where(x == 50, 2 * x + 1, 2 * x)


@pytest.mark.parametrize(
    "wrong",
    [one_element_off, lambda x: torch.where(x == 50, math.nan, 2 * x), lambda x: 2 * x[:-1]],
    ids=["one-element", "nan", "shape"],
)
def test_a_provider_with_wrong_results_is_refused_and_not_timed(
    wrong: Callable[[Tensor], Tensor],
) -> None:
    row = measure(doubling(wrong), seconds=0)
    assert "deviate" in row["providers"]["wrong"]["refused"]
    assert "ms" not in row["providers"]["wrong"]
    assert len(row["providers"]["right"]["ms"]) == 2
    assert any("not timed" in line for line in table(row, "right"))


def test_a_provider_that_drifts_is_refused_when_more_calls_are_compared() -> None:
    state = [0.0]

    def drifting(x: Tensor) -> Tensor:
        state[0] += 1
        return 2 * x * state[0]

    row = measure(doubling(drifting, calls=2), seconds=0)
    assert "refused" in row["providers"]["wrong"]


def test_a_provider_that_fails_does_not_keep_the_others_from_being_timed() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    found = measure(doubling(failing), seconds=0)["providers"]
    assert found["wrong"] == {"refused": "RuntimeError: no compiler"}
    assert found["right"]["ms"]


def test_bfloat16_is_not_timed_where_the_processor_has_no_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able in (True, False):
        monkeypatch.setattr(harness, "has_bfloat16", lambda able=able: able)
        found = measure(flows(**TINY), seconds=0)["providers"]
        assert ("ms" in found["eager bf16"]) == able
        assert "ms" in found["eager fp32"] and "ms" in found["ours optimized bf16"]
    assert found["eager bf16"] == {"refused": "this processor has no instructions for bfloat16"}


def test_a_copy_of_as_many_bytes_is_timed_beside() -> None:
    row = measure(doubling(lambda x: x + x, bytes=800), seconds=0)
    assert set(row["providers"]) == {"right", "wrong", "copy"}
    assert all(len(found["ms"]) == 2 for found in row["providers"].values())


def test_inputs_rotate_past_the_cache_unless_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1000)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for hot, addresses in seen.items():

        def watched(x: Tensor, addresses: set[int] = addresses) -> Tensor:
            addresses.add(x.data_ptr())
            return 2 * x

        measure(doubling(watched, hot=hot), seconds=0)
    assert len(seen[True]) == 1
    assert len(seen[False]) * 400 > 2 * 1000


def test_all_flows_agree_with_eager_pytorch_and_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "has_bfloat16", lambda: True)
    row = measure(flows(**TINY), seconds=0)
    for name, found in row["providers"].items():
        assert found["error"] <= (0.05 if "bf16" in name else 1e-4), name
        assert found["ms"], name


def test_saved_activations_leave_out_parameters_and_inputs() -> None:
    layer = torch.nn.Linear(10, 10)
    case = Case(
        name="square of a layer",
        rows=[],
        inputs=lambda: [torch.ones(2, 10)],
        providers={"torch": Provider(lambda: lambda x: layer(x).square().sum())},
        wanted="torch",
        grad=True,
        memory=True,
    )
    found = measure(case, seconds=0)["providers"]["torch"]
    assert found["saved_mb"] == pytest.approx(
        (2 * 10 + 1) * 4 / 1e6
    )  # what is squared, and the sum


def test_difference_is_in_units_of_the_largest_magnitude() -> None:
    assert difference([torch.tensor([1.0, 4.0]), 2.0], [torch.tensor([2.0, 4.0]), 2.0]) == 0.25


def test_ratio_is_taken_within_each_round() -> None:
    assert ratio([10.0, 100.0, 1000.0], [5.0, 50.0, 500.0]) == 2


def test_kernels_agree_with_float64_in_the_suite(load: Load) -> None:
    load("harness")
    for module in ("bench_norm", "bench_score", "bench_metrics"):
        case = load(module).cases(quick=True)[-1]
        found = measure(case, seconds=0)["providers"]
        assert "ms" in found["ours"], (case.name, found)


def test_a_target_is_judged_by_its_worst_case_and_the_best_of_ours(load: Load) -> None:
    targets = load("targets")
    target = targets.Target(0, "", "run *", "base", "ours*", 3, 5)
    providers = {"base": {"ms": [12.0]}, "ours a": {"ms": [2.0]}, "ours b": {"ms": [4.0]}}
    slower = {**providers, "ours a": {"ms": [3.0]}}
    rows = [{"case": "run 1", "providers": providers}, {"case": "run 2", "providers": slower}]
    assert targets.measured(target, rows) == 4
    assert targets.measured(target, rows[:1]) == 6
    assert targets.measured(target, [{"case": "other", "providers": providers}]) is None
    found = {value: targets.verdict(target, [value, 9.0]) for value in (2.0, 4.0, 6.0, None)}
    assert found == {2.0: "no", 4.0: "yes", 6.0: "moonshot", None: "moonshot"}


def test_less_saved_memory_is_better(load: Load) -> None:
    targets = load("targets")
    target = targets.Target(0, "", "*", "base", "ours", 0.5, 0.4, saved=True)
    rows = [
        {"case": "a", "providers": {"base": {"saved_mb": 10.0}, "ours": {"saved_mb": saved}}}
        for saved in (3.0, 4.5)
    ]
    assert targets.measured(target, rows) == 0.45
    assert [targets.verdict(target, [v]) for v in (0.3, 0.45, 0.6)] == ["moonshot", "yes", "no"]


def test_a_repeated_row_takes_the_place_of_the_older_one(load: Load, tmp_path: Path) -> None:
    results, file = load("results"), tmp_path / "machine.json"
    facts = {"commit": "c", "date": "2026-01-01"}
    for case, threads, value in (("a", 1, 1), ("a", 2, 2), ("a", 1, 3)):
        results.add(file, facts, {"case": case, "threads": threads, "value": value})
    found = [(row["threads"], row["value"]) for row in results.read(file)["rows"]]
    assert found == [(1, 3), (2, 2)]


def test_the_table_of_models_holds_parameters_operations_times_and_memory(load: Load) -> None:
    models = load("bench_models")
    image, step = models.cases(quick=True)[-2:]
    rows = [{"rows": [], **measure(case, seconds=0)} for case in (image, step)]
    model = image.providers["ours eager fp32"].make()
    facts = rows[0]["facts"]
    assert facts["trained"] == sum(p.numel() for p in model.head.parameters())
    assert facts["frozen"] == sum(p.numel() for p in model.backbone.parameters())
    with FlopCounterMode(display=False) as counter:
        model.features(models.blank(model))
    steps = [9 * (32 * 5 + 5 * 64), 32 * 5 + 5 * 64]  # 3x3, then 1x1; 5 hidden of 32 channels
    assert facts["flops"] == counter.get_total_flops() + 2 * 16 * sum(steps)
    lines = list(models.table({"rows": rows}))
    assert [line.count("|") for line in lines] == [0, 8, 8, 8]
    assert f"; {rows[0]['threads']} thread" in lines[1]
    assert lines[3].startswith("| FastFlow test_vit 64 px | ")
    assert list(models.table({"rows": rows[1:]})) == []


def test_the_readme_has_the_newest_speeds_of_each_kind_of_processor(load: Load) -> None:
    report = load("report")
    case = report.HEADLINES[0][1]

    def measured(flags: list[str], date: str, ms: float, case: str = case) -> dict[str, Any]:
        providers = {"official fp32": {"ms": [100.0]}, "ours": {"ms": [ms]}}
        facts = {"cpu": "C", "cores": 2, "memory_gib": 8, "versions": {"torch": "2"}}
        return {
            "machine": {**facts, "flags": flags, "date": date},
            "rows": [{"case": case, "threads": 1, "providers": providers}],
        }

    narrow, wide = ["avx2"], ["avx2", "avx512f"]
    documents = [
        measured(wide, "1", 50),
        measured(wide, "2", 20),
        measured(narrow, "3", 40),
        measured(wide, "4", 1, "norm"),
    ]
    assert report.speeds(documents) == [documents[1], documents[2]]
    text = "\n".join(report.headlines(documents))
    assert [text.count(f" {ratio}x ") for ratio in ("2.0", "5.0", "2.5")] == [0, 2, 2]
    assert text.index("avx512f") < text.index("5.0x") < text.index("2.5x")


def test_a_report_stands_between_the_markers_and_nowhere_else(load: Load, tmp_path: Path) -> None:
    report, page = load("report"), tmp_path / "README.md"
    begin, end = "<!-- speed:begin -->", "<!-- speed:end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.update(page, "speed", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="must hold <!-- accuracy:begin --> and"):
        report.update(page, "accuracy", "new")


def test_the_accuracy_of_the_packaged_sets_is_one_table(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, asked = load("accuracy"), []

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
    page, results = tmp_path / "README.md", tmp_path / "results"
    page.write_text("<!-- accuracy:begin -->\n<!-- accuracy:end -->\n")
    monkeypatch.setattr(accuracy.report, "README", page)
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
    with pytest.raises(SystemExit, match="no results"):
        load("results").newest()


def test_bulk_scoring_is_measured_and_tabled(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    file = tmp_path / "bulk.json"
    tiny = ["--images", "4", "--side", "64", "--shard-size", "2", "--workers", "--file", str(file)]
    assert load("bulk").main(tiny) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["workers"] == 0 and row["images_per_s"] > 0
    assert f"| {row['images_per_s']:.1f} | 1.00 |" in file.with_suffix(".md").read_text()


def test_a_service_under_many_clients_makes_no_error(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = load("serving")
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


def test_every_way_to_run_a_detector_gives_its_results_and_a_line_of_the_table(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(harness, "has_bfloat16", lambda: True)
    latency = load("latency")
    model = FastFlow("test_resnet", image_size=32, steps=1, pretrained=False, seed=1).eval()
    graphs = latency.Graphs(model, tmp_path)
    rows = [measure(latency.case(graphs, batch), seconds=0) for batch in (1, 2)]
    for row in rows:
        for name, found in row["providers"].items():
            assert name.endswith(("bf16", "as it comes")) or found["error"] <= 1e-4, name
    rows[1]["providers"]["ONNX Runtime fp32"]["ms"] = [4.0]
    del rows[0]["providers"]["eager bf16"]["ms"]
    rows[0]["providers"]["eager bf16"]["error"] = 0.07
    rows[1]["providers"]["eager bf16"] = {"refused": "no such package"}
    empty, *lines = latency.markdown({"rows": [*rows, {**rows[0], "case": "flows b1"}]})
    assert empty == ""  # or a table before would go on
    threads = f"{rows[0]['threads']} thread"
    assert lines[0].startswith(f"| FastFlow test_resnet 32 px, {threads}")
    assert lines[0].endswith(" | batch 1: ms | images/s | batch 2: ms | images/s |")
    (line,) = (each for each in lines if each.startswith("| ONNX Runtime fp32 |"))
    assert line.endswith(" | 4.0 | 500.0 |")
    assert "| eager bf16 | off by 7% | - | - | - |" in lines
    assert len({each.count("|") for each in lines}) == 1
