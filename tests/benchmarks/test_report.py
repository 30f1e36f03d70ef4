"""Tables of results have the ratio of the worst case, and the pages have the newest results."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from msflow_ext import FastFlow
from msflow_ext.bench import harness, measure

Load = Callable[[str], ModuleType]


def test_a_comparison_has_the_worst_case_of_the_fastest_provider(load: Load) -> None:
    comparisons = load("comparisons")
    comparison = comparisons.Comparison(0, "", "run *", "base", "ours*")
    providers = {"base": {"ms": [12.0]}, "ours a": {"ms": [2.0]}, "ours b": {"ms": [4.0]}}
    slower = {**providers, "ours a": {"ms": [3.0]}}
    rows = [{"case": "run 1", "providers": providers}, {"case": "run 2", "providers": slower}]
    assert comparisons.measured(comparison, rows) == 4
    assert comparisons.measured(comparison, rows[:1]) == 6
    assert comparisons.measured(comparison, [{"case": "x", "providers": providers}]) is None


def test_less_saved_memory_is_better(load: Load) -> None:
    comparisons = load("comparisons")
    comparison = comparisons.Comparison(0, "", "*", "base", "ours", saved=True)
    rows = [
        {"case": "a", "providers": {"base": {"saved_mb": 10.0}, "ours": {"saved_mb": saved}}}
        for saved in (3.0, 4.5)
    ]
    assert comparisons.measured(comparison, rows) == 0.45


def test_every_comparison_has_a_case_with_both_providers(load: Load) -> None:
    for package in ("FrEIA", "anomalib"):
        pytest.importorskip(package)
    cases = list(load("__main__").chosen([], quick=False))
    for each in load("comparisons").COMPARISONS:
        found = [case for case in cases if fnmatchcase(case.name, each.cases)]
        names = {name for case in found for name in (*case.providers, *["copy"] * bool(case.bytes))}
        assert each.base in names, each
        assert any(fnmatchcase(name, each.ours) for name in names), each


def test_the_pages_have_the_newest_results(load: Load) -> None:
    report, accuracy = load("report"), load("campaigns.accuracy")
    documents = load("results").times()
    if not documents:
        pytest.skip("the source distribution has no results")
    found = [*report.blocks(documents), *accuracy.blocks(accuracy.newest())]
    assert {name for _, name, _ in found} >= {"headline", "speed", "benchmarks", "presets"}
    for page, name, lines in found:
        begin, end = (marker.format(name) for marker in report.MARKERS)
        block = "\n".join((begin, *lines, end))
        said = "run python -m benchmarks --report, and campaigns.accuracy --report"
        assert block in page.read_text(encoding="utf-8"), f"{page.name}, {name}: {said}"


def test_other_documents_are_not_read_as_times(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = load("results")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    facts = {"cpu": "A CPU", "flags": ["avx2"], "cores": 2, "date": "2026-01-01T00:00"}
    for kind in results.KINDS:
        results.write(results.file_for(facts, kind), {"not": "times"})
    with pytest.raises(SystemExit, match="no results"):
        results.newest()
    results.write(results.file_for(facts), {"machine": facts, "rows": []})
    assert results.newest() == {"machine": facts, "rows": []}
    assert (tmp_path / "soak-a-cpu-avx2-2c-2026-01-01.json").exists()


def test_a_repeated_row_replaces_the_older_one(load: Load, tmp_path: Path) -> None:
    results, file = load("results"), tmp_path / "machine.json"
    facts = {"commit": "c", "date": "2026-01-01"}
    for case, threads, value in (("a", 1, 1), ("a", 2, 2), ("a", 1, 3)):
        results.add(file, facts, {"case": case, "threads": threads, "value": value})
    found = [(row["threads"], row["value"]) for row in results.read(file)["rows"]]
    assert found == [(1, 3), (2, 2)]


def test_the_table_of_models_has_parameters_operations_times_and_memory(load: Load) -> None:
    models = load("end_to_end.bench_models")
    image, step = models.cases(quick=True)[-2:]
    rows = [measure(case, seconds=0) for case in (image, step)]
    model = image.providers["ours eager fp32"].make()
    facts = rows[0]["facts"]
    assert facts["trained"] == sum(p.numel() for p in model.head.parameters())
    assert facts["frozen"] == sum(p.numel() for p in model.backbone.parameters())
    with FlopCounterMode(display=False) as counter:
        model.features(models.blank(model))
    steps = [9 * (32 * 5 + 5 * 64), 32 * 5 + 5 * 64]  # 3x3, then 1x1; 5 hidden of 32 channels
    assert facts["flops"] == counter.get_total_flops() + 2 * 16 * sum(steps)
    lines = list(load("tables").models({"rows": rows}))
    assert [line.count("|") for line in lines] == [0, 8, 8, 8]
    assert f"; {rows[0]['threads']} thread" in lines[1]
    assert lines[3].startswith("| FastFlow test_vit 64 px | ")
    assert list(load("tables").models({"rows": rows[1:]})) == []


def test_the_readme_has_the_newest_speeds_of_each_kind_of_processor(load: Load) -> None:
    report = load("report")
    case = report.HEADLINES[0][1]

    def measured(flags: list[str], date: str, ms: float, case: str = case) -> dict[str, Any]:
        providers = {"reference fp32": {"ms": [100.0]}, "ours": {"ms": [ms]}}
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


def test_the_first_sentence_of_the_readme_has_the_speedups(
    load: Load,
) -> None:
    report = load("report")
    times = {"reference fp32": 900.0, "compile bf16": 300.0, "ours fp32": 200.0, "ours bf16": 100.0}
    providers = {name: {"ms": [ms]} for name, ms in times.items()}
    row = {"case": report.CLAIM, "threads": 1, "providers": providers}
    facts = {"cpu": "C", "flags": ["avx2"], "date": "1"}
    (first, *rest) = report.claim([{"machine": facts, "rows": [row]}])
    assert "in 100 ms on one CPU core" in first
    assert [words.split()[0] for words in rest] == ["9.0", "3.0"]
    assert list(report.claim([])) == []


def test_the_page_of_settings_gets_its_table_if_it_exists(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = load("report")
    page = tmp_path / "choose-settings.md"
    monkeypatch.setattr(report, "SETTINGS", page)
    assert "settings" not in [name for _, name, _ in report.blocks([])]
    page.touch()
    assert (page, "settings") in [(path, name) for path, name, _ in report.blocks([])]


def test_the_table_of_settings_has_minutes_of_each_preset_and_gigabytes(load: Load) -> None:
    def row(case: str, ms: float, mb: float) -> dict[str, Any]:
        providers = {
            "ours fp32": {"ms": [2 * ms], "peak_mb": 9e9},
            "ours bf16": {"ms": [ms], "peak_mb": mb},
        }
        facts = {"trained": 10**8, "frozen": 10**8}
        return {"case": case, "threads": 2, "providers": providers, "facts": facts}

    rows = []
    for name in ("MSFlow efficientnet_lite0 192 px", "FastFlow deit_base_distilled_patch16_384"):
        rows += [row(f"model image {name}", 600.0, 200.0), row(f"model step {name}", 48.0, 1000.0)]
    rows.append({**rows[0], "threads": 1})
    _, title, _, *lines = load("tables").settings({"rows": rows})
    assert title.startswith(
        "| model, backbone, image; 2 threads | minutes of `paper` | minutes of `robust`, "
    )
    # A minute for the features, and 1250 steps of 48 ms for 100 epochs. FastFlow's paper has 500 epochs.
    # Adam needs 16 bytes per weight.
    assert lines == [
        "| MSFlow efficientnet_lite0 192 px | 2 | 2 | 3 | 600 | 1 |",
        "| FastFlow deit_base_distilled_patch16_384 384 px | 6 | 2 | 3 | 600 | 1 |",
    ]
    assert list(load("tables").settings({"rows": rows[:1]})) == []


def test_a_report_replaces_only_the_text_between_the_markers(load: Load, tmp_path: Path) -> None:
    report, page = load("report"), tmp_path / "README.md"
    begin, end = "<!-- speed:begin -->", "<!-- speed:end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.update(page, "speed", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="must hold <!-- accuracy:begin --> and"):
        report.update(page, "accuracy", "new")


def test_every_runtime_gives_the_results_of_the_detector_and_a_line_of_the_table(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(harness, "has_bfloat16", lambda: True)
    latency = load("end_to_end.latency")
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
    empty, *lines = load("tables").latency({"rows": [*rows, {**rows[0], "case": "flows b1"}]})
    assert empty == ""  # which separates it from a table before
    threads = f"{rows[0]['threads']} thread"
    assert lines[0].startswith(f"| FastFlow test_resnet 32 px, {threads}")
    assert lines[0].endswith(" | batch 1: ms | images/s | batch 2: ms | images/s |")
    (line,) = (each for each in lines if each.startswith("| ONNX Runtime fp32 |"))
    assert line.endswith(" | 4.0 | 500.0 |")
    assert "| eager bf16 | off by 7% | - | - | - |" in lines
    assert len({each.count("|") for each in lines}) == 1
