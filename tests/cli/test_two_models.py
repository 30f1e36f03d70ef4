"""MSFlow and FastFlow work with the same commands."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from msflow_ext import FastFlow, MSFlow, cli, load
from msflow_ext.cli import parser
from msflow_ext.training.recipe import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set in the layout of MVTec AD: ``transistor``, gray noise with white squares as defects."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def write(name: str, pixels: np.ndarray) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)

    for name in (*(f"train/good/{i}" for i in range(3)), "test/good/0", "test/square/0"):
        pixels = rng.integers(90, 110, (64, 64), dtype=np.uint8)
        if "square" in name:
            pixels[8:32, 16:40] = 255
        write(f"transistor/{name}.png", pixels)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:32, 16:40] = 255
    write("transistor/ground_truth/square/0_mask.png", mask)
    return root


def chosen(data: Path, model: str, *more: str) -> list[str]:
    what = ["--data", str(data), "--layout", "mvtec", "--category", "transistor"]
    return ["train", *what, "--model", model, *more]


@pytest.fixture(scope="module")
def fastflow_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of FastFlow; tests must not write to it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    head = ["--steps", "2", "--hidden-ratio", "0.5", "--conv3x3-only", "true", "--epochs", "1"]
    maps = ["--out-indices", "1", "2"]
    assert cli.main(chosen(data, "fastflow", *SMALL, *head, *maps, "--out", str(run))) == 0
    return run


def test_fastflow_is_trained_tested_and_applied_by_the_same_commands(
    fastflow_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, metrics = fastflow_run, json.loads((fastflow_run / "metrics.json").read_text())
    assert (run / "report.html").exists()
    common = ["--run", str(run), "--device", "cpu"]
    assert cli.main(["evaluate", *common, "--out", str(tmp_path / "tested")]) == 0
    assert "FastFlow" in capsys.readouterr().out
    found = json.loads((tmp_path / "tested" / "evaluation.json").read_text())
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-3)
    image = str(data / "transistor/test/square/0.png")
    assert cli.main(["predict", *common, image, "--out", str(tmp_path / "found")]) == 0
    (line,) = (tmp_path / "found" / "scores.csv").read_text().splitlines()[1:]
    model = load(run, "cpu").model
    assert isinstance(model, FastFlow)
    assert float(line.split(",")[3]) == pytest.approx(load(run, "cpu").predict(image)[0].score)


def test_given_options_reach_the_head_and_the_paper_sets_the_others(fastflow_run: Path) -> None:
    metrics = json.loads((fastflow_run / "metrics.json").read_text())
    asked = {"steps": 2, "hidden_ratio": 0.5, "conv3x3_only": True, "out_indices": [1, 2]}
    assert metrics["model"].items() >= {"name": "FastFlow", "clamp": 2.0, **asked}.items()
    paper = {"epochs": 1, "batch_size": 32, "lr": 1e-3, "clip": None, "weight_decay": 1e-5}
    assert metrics["recipe"].items() >= {**paper, "warmup": 0.0, "milestones": []}.items()
    settings = yaml.safe_load((fastflow_run / "config.yaml").read_text())
    assert settings.items() >= {"model": "fastflow", **asked, "epochs": 1, "lr": None}.items()


@pytest.mark.parametrize(
    ("model", "asked"), [("msflow", {"blocks": [1, 1]}), ("fastflow", {"steps": 2})]
)
def test_given_options_replace_those_of_the_preset_robust(
    model: str, asked: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    flags = ["--preset", "robust", "--epochs", "1"]
    for name, value in asked.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert cli.main(chosen(data, model, *SMALL, *flags, "--out", str(tmp_path / "run"))) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    robust = PRESETS["robust"][model]
    expected = {**robust.model, **asked}
    assert metrics["model"].items() >= expected.items()
    expected = {
        "epochs": 1,
        "lr": robust.recipe.lr,
        "batch_size": 8,
        "schedule": "cosine",
        "clip": 2,
    }
    assert metrics["recipe"].items() >= expected.items()


def test_the_papers_presets_leave_the_models_as_they_are() -> None:
    assert not any(preset.model for preset in PRESETS["paper"].values())


def test_only_msflow_trains_on_transistors_at_256_pixels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}

    for model, kind in (("msflow", MSFlow), ("fastflow", FastFlow)):
        own: Any = kind.__init__

        @wraps(own)
        def refuse(self: object, model: str = model, **options: object) -> None:
            sizes[model] = options.get("image_size")
            raise ValueError("seen")

        monkeypatch.setattr(kind, "__init__", refuse)
        assert cli.main(chosen(data, model, "--out", str(tmp_path / model))) == 2
    assert sizes == {"msflow": 256, "fastflow": None}


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        ("msflow", ["--steps", "4"], "--steps must not be given with --model msflow"),
        (
            "fastflow",
            ["--blocks", "1", "2"],
            "--blocks must not be given with --model fastflow",
        ),
        (
            "fastflow",
            ["--score", "best"],
            "score must be one of paper, log, nll, map, got 'best'",
        ),
        ("fastflow", ["--steps", "0"], "steps must be at least 1, got 0"),
        ("fastflow", ["--hidden-ratio", "0.01"], "hidden_ratio must leave at least 1 of a subnet"),
        (
            "fastflow",
            ["--out-indices", "3", "1"],
            "out_indices must be increasing numbers from 0 up",
        ),
        ("padim", [], "padim"),
    ],
)
def test_a_wrong_option_of_a_model_is_one_sentence(
    model: str,
    flags: list[str],
    sentence: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert cli.main([*chosen(data, model, *SMALL, *flags), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_demo_trains_the_model_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[str] = []

    def record(options: Any) -> dict[str, Any]:
        models.append(options.model)
        about = {"data": {"name": "", "category": ""}, "model": {"name": ""}, "baseline": None}
        return {**about, "image_auroc": None, "pixel_auroc": None, "aupro": None}

    monkeypatch.setattr(cli.train, "_train", record)
    for flags in ([], ["--model", "fastflow"]):
        assert cli.main(["demo", "--out", str(tmp_path), *flags]) == 0
    assert models == ["msflow"] * 2 + ["fastflow"] * 2
    parsed = parser().parse(["train", "--out", "x"])
    assert (parsed.model, parsed.epochs, parsed.lr) == ("msflow", None, None)
