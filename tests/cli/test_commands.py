"""Every command does what it says, and every failure is one sentence and exit status 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from msflow_ext import cli, testing

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A category ``plate`` in the layout of MVTec AD: gray noise, white squares as defects."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def write(path: Path, pixels: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for i in range(4):
        write(root / f"plate/train/good/{i}.png", rng.integers(90, 110, (64, 64), dtype=np.uint8))
    for i in range(2):
        write(root / f"plate/test/good/{i}.png", rng.integers(90, 110, (64, 64), dtype=np.uint8))
        image, mask = rng.integers(90, 110, (64, 64), dtype=np.uint8), np.zeros((64, 64), bool)
        mask[8:32, 16:40] = True
        image[mask] = 255
        write(root / f"plate/test/square/{i}.png", image)
        write(root / f"plate/ground_truth/square/{i}_mask.png", mask)
    return root


def _train(data: Path, out: Path, *more: str) -> list[str]:
    chosen = ["--data", str(data), "--layout", "mvtec", "--category", "plate", "--epochs", "1"]
    return ["train", *chosen, *SMALL, "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run; tests must not write to it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(_train(data, out, "--baseline")) == 0
    return out


def _fails(capsys, *arguments: str) -> str:
    """The sentence on stderr of a command that must fail."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("msflow: error: ")
    assert not any("Traceback" in line for line in before)
    return last


def test_train_writes_the_run_folder_and_prints_its_table(data, tmp_path, capsys):
    assert cli.main(_train(data, tmp_path / "run")) == 0
    printed = capsys.readouterr()
    assert "image AUROC  pixel AUROC  AUPRO" in printed.out
    assert "mvtec plate" in printed.out
    assert "PaDiM" not in printed.out
    assert "features of 4 + 4 images" in printed.err
    names = {
        "config.yaml",
        "curves.json",
        "maps",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "scores.csv",
    }
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


def test_the_baseline_stands_beside_the_model(run):
    baseline = json.loads((run / "metrics.json").read_text())["baseline"]
    assert baseline["name"] == "PaDiM-style Gaussian"
    assert all(0 <= baseline[name] <= 1 for name in ("image_auroc", "pixel_auroc", "aupro"))


def test_the_configuration_of_a_run_repeats_it(run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["image_size"] == 64
    again = [
        "train",
        "--config",
        str(run / "config.yaml"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "again"),
    ]
    assert cli.main(again) == 0
    first, second = (
        json.loads((r / "metrics.json").read_text()) for r in (run, tmp_path / "again")
    )
    assert second["losses"] == first["losses"]
    assert second["image_auroc"] == first["image_auroc"]


def test_evaluate_repeats_the_result_of_the_run_and_takes_other_data(run, data, tmp_path, capsys):
    out = tmp_path / "evaluated"
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    wanted = json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx({name: wanted[name] for name in found}, abs=1e-3)
    assert len((out / "scores.csv").read_text().splitlines()) == 1 + 4

    good, bad = data / "plate/train/good", data / "plate/test/square"
    other = ["--layout", "folder", "--normal", str(good), "--abnormal", str(bad)]
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", *other]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("folder good")
    assert row.split()[-2:] == ["-", "-"]  # no masks, no pixel metrics


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_evaluate_tests_the_prepacked_form_that_predict_and_serve_take(
    run, tmp_path, precision, error
):
    out = tmp_path / "evaluated"
    command = ["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]
    assert cli.main([*command, "--precision", precision]) == 0

    def scores(folder):
        rows = (folder / "scores.csv").read_text().splitlines()[1:]
        return [float(row.split(",")[3]) for row in rows]

    assert scores(out) == pytest.approx(scores(run), rel=error)
    if precision == "bfloat16":
        assert scores(out) != scores(run)


def test_a_run_with_padding_is_evaluated_with_padding(data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "evaluated"
    assert cli.main(_train(data, run, "--fit", "pad")) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["fit"] == "pad"
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    wanted = json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx({name: wanted[name] for name in found}, abs=1e-3)


def test_a_run_with_images_held_out_labels_images(data, tmp_path, capsys):
    run = tmp_path / "run"
    command = _train(data, run, "--hold-out", "0.5", "--false-alarms", "0.4")
    assert cli.main(command) == 0
    threshold = json.loads((run / "metrics.json").read_text())["decisions"]["threshold"]
    predict = ["predict", "--run", str(run), str(data / "plate/test"), "--device", "cpu"]
    assert cli.main([*predict, "--out", str(tmp_path / "out")]) == 0
    header, *rows = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert header == "name,defect,label,score,p_value"
    for label, score, p_value in (row.split(",")[2:] for row in rows):
        assert (label == "1") == (float(score) > threshold) == (float(p_value) <= 0.4)
    assert {path.name for path in (tmp_path / "out/masks").iterdir()} == {
        path.name for path in (tmp_path / "out/maps").iterdir()
    }
    with Image.open(tmp_path / "out/masks/square-0.png.png") as mask:
        assert (mask.mode, mask.size) == ("1", (64, 64))
    assert "needs 9 held-out" in _fails(capsys, *predict, "--out", "x", "--false-alarms", "0.1")

    evaluate = ["evaluate", "--run", str(run), "--device", "cpu", "--out", str(tmp_path / "e")]
    assert cli.main([*evaluate, "--tune-thresholds"]) == 0
    printed = capsys.readouterr().out
    assert f"over the threshold {threshold:.6g}: " in printed
    assert printed.count("test-tuned") == 2
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["decisions"].keys() == {"false_alarms", "detected"}
    assert found["test_tuned"]["image"]["f1"] == pytest.approx(found["image_f1_max"])


def test_a_threshold_of_ones_own_labels_images(run, data, tmp_path):
    predict = ["predict", "--run", str(run), str(data / "plate/test"), "--device", "cpu"]
    command = [*predict, "--score-only", "--threshold=-1e9", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    header, *rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert header == "name,defect,label,score"
    assert {row.split(",")[2] for row in rows} == {"1"}


def test_predict_writes_scores_and_maps_of_files_and_folders(run, data, tmp_path):
    paths = [str(data / "plate/test"), str(data / "plate/train/good/0.png")]
    command = ["predict", "--run", str(run), *paths, "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "all")]) == 0
    header, *rows = (tmp_path / "all" / "scores.csv").read_text().splitlines()
    assert header == "name,defect,label,score"
    assert [row.split(",")[0] for row in rows] == [
        "good/0.png",
        "good/1.png",
        "square/0.png",
        "square/1.png",
        paths[1],
    ]
    assert len(list((tmp_path / "all" / "maps").iterdir())) == 5
    assert cli.main([*command, "--score-only", "--out", str(tmp_path / "scores")]) == 0
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["scores.csv"]
    assert (tmp_path / "scores/scores.csv").read_text() == (tmp_path / "all/scores.csv").read_text()


def test_tiles_are_scored_without_the_thresholds_of_the_run(data, tmp_path, capsys):
    run, image = tmp_path / "run", tmp_path / "large.png"
    assert cli.main(_train(data, run, "--hold-out", "0.5", "--false-alarms", "0.4")) == 0
    pixels = np.random.default_rng(0).integers(90, 110, (70, 150), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    predict = ["predict", "--run", str(run), str(image), "--device", "cpu", "--tile"]
    assert cli.main([*predict, "--out", str(tmp_path / "out")]) == 0
    assert "thresholds are of whole images" in capsys.readouterr().err
    header, row = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert header == "name,defect,label,score"
    assert row.split(",")[2] == ""
    (picture,) = (tmp_path / "out/maps").iterdir()
    with Image.open(picture) as panels:
        assert panels.size == (2 * 150 + 2, 70)
    assert not (tmp_path / "out/masks").exists()
    own = [*predict, "--threshold=-1e9", "--overlap", "0.5", "--precision", "float32"]
    assert cli.main([*own, "--out", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own/scores.csv").read_text().splitlines()[1].split(",")[2] == "1"
    for flags, sentence in (
        (["--overlap", "1"], "overlap must be at least 0 and below 1, got 1.0"),
        (["--false-alarms", "0.5"], "--false-alarms is of whole images"),
        (["--precision", "int8"], "int8"),
    ):
        assert sentence in _fails(capsys, *predict, *flags, "--out", str(tmp_path / "wrong"))


def test_predict_keeps_what_it_had_when_it_meets_a_broken_image(run, data, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((data / "plate/test/good/0.png").read_bytes()[:100])
    paths = [str(data / "plate/test/good"), str(broken)]
    command = ["predict", "--run", str(run), *paths, "--device", "cpu"]
    assert str(broken) in _fails(capsys, *command, "--out", str(tmp_path / "out"))
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + 2


def test_a_command_never_writes_over_a_run(run, data, capsys):
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "--resume continues it" in _fails(capsys, *_train(data, run))
    image = str(data / "plate/test/good/0.png")
    for command in (["predict", image], ["evaluate"]):
        arguments = [*command, "--run", str(run), "--out", str(run), "--device", "cpu"]
        assert f"{run} holds a run" in _fails(capsys, *arguments)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--out", "OUT"], "layout of data 'None' must be"),
        (
            ["train", "--data", "nowhere", "--layout", "mvtec", "--out", "OUT"],
            "nowhere is not a folder",
        ),
        (
            ["train", "--data", "DATA", "--layout", "mvtec", "--category", "cup", "--out", "OUT"],
            "cup",
        ),
        (
            ["train", "--data", "textures", "--category", "silk", "--out", "OUT"],
            "brick, grass, gravel, got 'silk'",
        ),
        (["train", "--data", "textures"], "error: required but not given: --out"),
        (["train", "--epochs", "many", "--out", "OUT"], "many"),
        (["train", "--colour", "red", "--out", "OUT"], "--colour"),
        (["train", "--config", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml"),
        (["predict", "--run", "nowhere", "x.png", "--out", "OUT"], "nowhere: no such checkpoint"),
        (
            ["predict", "--run", "DATA", "x.png", "--out", "OUT"],
            "model.safetensors: no such checkpoint",
        ),
        (["predict", "--run", "RUN", "x.png", "--out", "OUT"], "x.png is not a file"),
        (["predict", "--run", "RUN", "EMPTY", "--out", "OUT"], "holds no images"),
        (["predict", "--run", "RUN", "--out", "OUT"], "error: required but not given: PATH"),
        (
            ["evaluate", "--run", "RUN", "--data", "elpv", "--category", "tri"],
            "mono, poly, both, got 'tri'",
        ),
        (["evaluate", "--run", "RUN", "--device", "abacus"], "device 'abacus' is not available"),
        (["dance"], "dance"),
        ([], "required but not given: COMMAND"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(arguments, sentence, data, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "DATA": data, "RUN": run, "EMPTY": tmp_path / "empty"}
    assert sentence in _fails(capsys, *(str(places.get(each, each)) for each in arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image-size", "0"], "image_size must be at least 1 pixel, got 0"),
        (["--epochs", "0"], "epochs must be 1 or more, got 0"),
        (["--backbone", "resnet1"], "resnet1"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_value_that_the_model_or_recipe_refuses_is_named(flags, sentence, data, tmp_path, capsys):
    assert sentence in _fails(capsys, *_train(data, tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_run_are_named(run, data, tmp_path, capsys):
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    evaluate = ["evaluate", "--run", str(damaged), "--device", "cpu"]
    assert f"{damaged / 'config.yaml'} is not there" in _fails(capsys, *evaluate)
    for text in ("a: b: c", "- 1\n- 2"):
        (damaged / "config.yaml").write_text(text)
        assert str(damaged / "config.yaml") in _fails(capsys, *evaluate)
    (damaged / "metrics.json").write_text("{")
    resume = _train(data, damaged, "--resume")
    assert f"{damaged / 'metrics.json'} is damaged" in _fails(capsys, *resume)


def test_a_training_that_diverges_says_where_and_keeps_its_last_good_state(data, tmp_path, capsys):
    command = _train(data, tmp_path / "run", "--epochs", "4", "--lr", "1e30")
    sentence = _fails(capsys, *command)
    assert "training stopped in epoch 1: score or map of image good/0 is not finite" in sentence
    assert "nothing was saved yet" in sentence
    sentence = _fails(capsys, *command, "--eval-every", "4")
    assert "training stopped in epoch 2: the loss is nan in step 1 (images train/good/" in sentence
    assert "model.safetensors keeps the last good state" in sentence


def test_all_categories_train_into_their_folders_and_one_table(data, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "runs"
    for name in ("cup", "plate"):
        shutil.copytree(data / "plate", root / name)
    broken = root / "cup/train/good/0.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:60])
    command = _train(root, out, "--category", "all", "--seeds", "0", "1")
    sentence = _fails(capsys, *command)
    assert "2 of 4 runs failed" in sentence
    assert str(broken) in sentence
    table = json.loads((out / "table.json").read_text())
    assert [bool(run["failure"]) for run in table["runs"]] == [True, True, False, False]
    assert {line["category"] for line in table["lines"]} == {"plate"}

    finished = out / "plate/seed-1"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "--resume continues" in _fails(capsys, *command)
    broken.write_bytes(kept)
    capsys.readouterr()
    assert cli.main([*command, "--resume"]) == 0
    printed = capsys.readouterr()
    assert "mean" in printed.out
    assert f"{finished} is finished already" in printed.err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    table = json.loads((out / "table.json").read_text())
    assert not any(run["failure"] for run in table["runs"])
    assert [run["seed"] for run in table["runs"]] == [0, 1, 0, 1]
    settings = yaml.safe_load((out / "cup/seed-1/config.yaml").read_text())
    assert (settings["category"], settings["seed"]) == ("cup", 1)
    sentence = _fails(capsys, *command, "--resume", "--epochs", "2")
    assert "its recipe has epochs 1, this one epochs 2" in sentence


def test_all_runs_of_a_folder_are_evaluated_into_one_table(run, data, tmp_path, capsys):
    runs, root, out = tmp_path / "runs", tmp_path / "data", tmp_path / "out"
    for name in ("cup", "plate"):
        shutil.copytree(run, runs / name)
        settings = {**yaml.safe_load((run / "config.yaml").read_text()), "category": name}
        (runs / name / "config.yaml").write_text(yaml.safe_dump(settings))
        shutil.copytree(data / "plate", root / name)
    command = ["evaluate", "--run", str(runs), "--category", "all", "--device", "cpu"]
    elsewhere = [*command, "--data", str(root), "--layout", "mvtec", "--out", str(out)]
    assert cli.main(elsewhere) == 0
    assert "mean" in capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    wanted = json.loads((run / "metrics.json").read_text())
    for line in table["lines"]:
        assert (line["source"], line["runs"]) == ("MSFlow", 1)
        assert line["value"] == pytest.approx(wanted[line["metric"]], abs=1e-3)
    assert [line["category"] for line in table["lines"]] == ["cup", "plate", "mean"] * 3
    for name in ("cup", "plate"):
        assert json.loads((out / name / "evaluation.json").read_text())["image_auroc"] > 0

    sentence = _fails(capsys, *command, "--out", str(out))  # the data that it was trained on
    assert "1 of 2 runs failed" in sentence
    assert "got 'cup'" in sentence
    assert "table.md" in str(sorted(out.iterdir()))
    assert "wants --out, another folder" in _fails(capsys, *command)
    assert "wants --out, another folder" in _fails(capsys, *command, "--out", str(runs))
    shutil.copytree(runs / "cup", runs / "twin")
    assert "are of one category and seeds" in _fails(capsys, *elsewhere)
    (runs / "twin" / "metrics.json").unlink()
    assert f"{runs / 'twin'} is not a finished run" in _fails(capsys, *elsewhere)
    nothing = ["evaluate", "--run", str(root), "--category", "all", "--out", str(out)]
    assert f"{root} has no runs below it" in _fails(capsys, *nothing)


def test_chosen_categories_are_named_with_commas(data, tmp_path, capsys):
    sentence = _fails(capsys, *_train(data, tmp_path / "out", "--category", "plate,cup"))
    assert "1 of 2 runs failed" in sentence
    assert "got 'cup'" in sentence
    assert (tmp_path / "out/plate/metrics.json").exists()
    assert (tmp_path / "out/table.md").exists()


@pytest.mark.parametrize("layout", ["mvtec", "visa", "btad", "mstc"])
def test_several_splits_of_a_set_that_has_one_are_refused(layout, data, tmp_path, capsys):
    several = ["--layout", layout, "--split-seeds", "0", "1"]
    sentence = _fails(capsys, *_train(data, tmp_path / "out", *several))
    assert f"--split-seeds: layout {layout} says itself what is tested" in sentence
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_arose(capsys, monkeypatch):
    wrong = ["predict", "--run", "nowhere", "x.png", "--out", "out"]
    with pytest.raises(FileNotFoundError):
        cli.main([*wrong, "--debug"])
    monkeypatch.setenv("MSFLOW_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(wrong)


def test_an_interrupt_is_one_sentence(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", interrupted)
    assert "interrupted" in _fails(capsys, "info")


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


def test_demo_trains_cells_and_brick_beside_the_baseline(tmp_path, capsys, monkeypatch):
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


def test_bench_compares_with_the_alternatives_on_this_machine(capsys):
    assert cli.main(["bench", "--tiny", "--seconds", "0", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for case in ("flows", "pipeline resnet18", "training step"):
        assert f"{case} " in printed
    assert re.search(r"ours optimized fp32 +[0-9.]+ ms .*x\n", printed)
