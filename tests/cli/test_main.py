"""The command line handles errors and interrupts, and runs the commands that need no data."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from msflow_ext import cli, testing

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


def test_debug_raises_the_error_with_its_traceback(capsys, monkeypatch):
    wrong = ["predict", "--run", "nowhere", "x.png", "--out", "out"]
    with pytest.raises(FileNotFoundError):
        cli.main([*wrong, "--debug"])
    monkeypatch.setenv("MSFLOW_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(wrong)


def test_an_interrupt_is_one_sentence(monkeypatch, fails):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", interrupted)
    assert "interrupted" in fails("info")


def test_info_prints_json_and_check_fails_if_a_kernel_is_wrong(capsys, monkeypatch):
    assert cli.main(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]
    rows = [("coupling forward", 1e-9, 1e-6), ("norm backward", float("nan"), 1e-6)]
    monkeypatch.setattr(testing, "check", lambda: rows)
    assert cli.main(["info", "--check"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG norm backward" in printed
    assert "1 of 2 kernel runs agree" in printed
    monkeypatch.setattr(testing, "check", lambda: rows[:1])
    assert cli.main(["info", "--check"]) == 0


def test_demo_trains_a_model_and_a_baseline_on_cells_and_brick(tmp_path, capsys, monkeypatch):
    asked = []

    def record(options):
        asked.append(options)
        found = {"image_auroc": 0.5, "pixel_auroc": None, "aupro": None}
        data = {"name": options.data, "category": options.category}
        baseline = {"name": "Gaussian", **found}
        return {**found, "data": data, "model": {"name": "MSFlow"}, "baseline": baseline}

    monkeypatch.setattr(cli.train, "_train", record)
    assert cli.main(["demo", "--out", str(tmp_path), "--threads", "1", "--resume"]) == 0
    cells, brick = asked
    assert (cells.data, cells.category, cells.epochs) == ("elpv", "mono", 24)
    assert (brick.data, brick.category, brick.epochs) == ("textures", "brick", 40)
    for options in asked:
        assert (options.backbone, options.image_size) == ("efficientnet_lite0", 192)
        assert options.baseline
        assert options.resume
        assert options.threads == 1
    assert cells.out != brick.out
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_the_module_runs_as_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "msflow_ext",
        "predict",
        "--run",
        str(tmp_path),
        "x",
        "--out",
        "y",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    path = tmp_path / "model.safetensors"
    assert ended.stderr == f"msflow: error: {path}: no such checkpoint\n"


def test_bench_prints_a_comparison_of_each_case(capsys):
    assert cli.main(["bench", "--tiny", "--seconds", "0", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for case in ("flows", "pipeline resnet18", "training step"):
        assert f"{case} " in printed
    assert re.search(r"ours optimized fp32 +[0-9.]+ ms .*x\n", printed)
