"""Every command writes its results, and every failure is one sentence and exit status 2."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from msflow_ext import cli
from msflow_ext.evaluation.calibration import exceeds
from msflow_ext.runs.score_table import read_scores

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


def test_train_writes_the_run_folder_and_prints_its_table(data, tmp_path, capsys, train_command):
    assert cli.main(train_command(data, tmp_path / "run")) == 0
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


def test_metrics_include_the_baseline(run):
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


def test_evaluate_repeats_the_result_of_the_run_and_accepts_other_data(run, data, tmp_path, capsys):
    out = tmp_path / "evaluated"
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    expected = json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-3)
    assert len((out / "scores.csv").read_text().splitlines()) == 1 + 4

    good, bad = data / "plate/train/good", data / "plate/test/square"
    other = ["--layout", "folder", "--normal", str(good), "--abnormal", str(bad)]
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", *other]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("folder good")
    assert row.split()[-2:] == ["-", "-"]  # no masks, no pixel metrics


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_evaluate_tests_the_optimized_model_that_predict_and_serve_use(
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


def test_a_run_with_padding_is_evaluated_with_padding(data, tmp_path, train_command):
    run, out = tmp_path / "run", tmp_path / "evaluated"
    assert cli.main(train_command(data, run, "--fit", "pad")) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["fit"] == "pad"
    assert cli.main(["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    expected = json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-3)


def test_a_run_with_images_held_out_labels_images(data, tmp_path, capsys, fails, train_command):
    run = tmp_path / "run"
    command = train_command(data, run, "--hold-out", "0.5", "--false-alarms", "0.4")
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    threshold = json.loads((run / "metrics.json").read_text())["decisions"]["threshold"]
    predict = ["predict", "--run", str(run), str(data / "plate/test"), "--device", "cpu"]
    assert cli.main([*predict, "--out", str(tmp_path / "out")]) == 0
    rows = read_scores(tmp_path / "out/scores.csv")
    for row in rows:
        assert row.score is not None and row.p_value_at_most is not None
        assert (row.verdict == 1) == exceeds(row.score, threshold) == (row.p_value_at_most <= 0.4)
    trained = read_scores(run / "scores.csv")
    assert [row[:3] for row in trained] == [
        *((f"good/{i}.png", "good", 0) for i in range(2)),
        *((f"square/{i}.png", "square", 1) for i in range(2)),
    ]
    assert [(r.name, r.verdict, r.p_value_at_most) for r in trained] == [
        (r.name, r.verdict, r.p_value_at_most) for r in rows
    ]
    assert {path.name for path in (tmp_path / "out/masks").iterdir()} == {
        path.name for path in (tmp_path / "out/maps").iterdir()
    }
    with Image.open(tmp_path / "out/masks/square-0.png") as mask:
        assert (mask.mode, mask.size) == ("1", (64, 64))
    assert "needs 9 held-out" in fails(*predict, "--out", "x", "--false-alarms", "0.1")

    evaluate = ["evaluate", "--run", str(run), "--device", "cpu", "--out", str(tmp_path / "e")]
    assert cli.main([*evaluate, "--tune-thresholds"]) == 0
    printed += capsys.readouterr().out
    assert printed.count(f"over the threshold {threshold:.6g}: ") == 2  # of train and evaluate
    assert printed.count(" of 2 good images (") == printed.count(" of 2 defective images (") == 2
    assert "by 2 good images that were used neither for training nor for testing" in printed
    assert "No p-value is below 1/3, about 0.33" in printed
    assert printed.count("test-tuned") == 2
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    expected = json.loads((run / "metrics.json").read_text())["decisions"]["on_test"]
    assert found["decisions"] == expected
    assert expected["counts"]["detected"][1] == 2
    assert found["test_tuned"]["image"]["f1"] == pytest.approx(found["image_f1_max"])


def test_tiles_are_scored_without_the_thresholds_of_the_run(
    data, tmp_path, capsys, fails, train_command
):
    run, image = tmp_path / "run", tmp_path / "large.png"
    assert cli.main(train_command(data, run, "--hold-out", "0.5", "--false-alarms", "0.4")) == 0
    pixels = np.random.default_rng(0).integers(90, 110, (70, 150), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    predict = ["predict", "--run", str(run), str(image), "--device", "cpu", "--tile"]
    assert cli.main([*predict, "--out", str(tmp_path / "out")]) == 0
    assert "thresholds hold for whole images" in capsys.readouterr().err
    (row,) = read_scores(tmp_path / "out/scores.csv")
    assert (row.verdict, row.p_value_at_most) == (None, None)
    (picture,) = (tmp_path / "out/maps").iterdir()
    with Image.open(picture) as panels:
        assert panels.size == (2 * 150 + 2, 70)
    assert not (tmp_path / "out/masks").exists()
    own = [*predict, "--threshold=-1e9", "--overlap", "0.5", "--precision", "float32"]
    assert cli.main([*own, "--out", str(tmp_path / "own")]) == 0
    assert [row.verdict for row in read_scores(tmp_path / "own/scores.csv")] == [1]
    for flags, sentence in (
        (["--overlap", "1"], "overlap must be at least 0 and below 1, got 1.0"),
        (["--false-alarms", "0.5"], "--false-alarms must not be given with --tile, got 0.5"),
        (["--precision", "int8"], "int8"),
    ):
        assert sentence in fails(*predict, *flags, "--out", str(tmp_path / "wrong"))


def test_a_command_never_writes_over_a_run(run, data, fails, train_command):
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "--resume continues it" in fails(*train_command(data, run))
    image = str(data / "plate/test/good/0.png")
    for command in (["predict", image], ["evaluate"]):
        arguments = [*command, "--run", str(run), "--out", str(run), "--device", "cpu"]
        assert f"{run} holds a run" in fails(*arguments)
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
def test_a_mistake_is_one_sentence_that_names_it(arguments, sentence, data, run, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "DATA": data, "RUN": run, "EMPTY": tmp_path / "empty"}
    assert sentence in fails(*(str(places.get(each, each)) for each in arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image-size", "0"], "image_size must be from 1 to 16384 pixels, got 0"),
        (["--epochs", "0"], "epochs must be 1 or more, got 0"),
        (["--backbone", "resnet1"], "resnet1"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_value_that_the_model_or_recipe_refuses_is_named(
    flags, sentence, data, tmp_path, fails, train_command
):
    assert sentence in fails(*train_command(data, tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_run_are_named(run, data, tmp_path, fails, train_command):
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    evaluate = ["evaluate", "--run", str(damaged), "--device", "cpu"]
    assert f"{damaged / 'config.yaml'} does not exist" in fails(*evaluate)
    for text in ("a: b: c", "- 1\n- 2"):
        (damaged / "config.yaml").write_text(text)
        assert str(damaged / "config.yaml") in fails(*evaluate)
    (damaged / "metrics.json").write_text("{")
    resume = train_command(data, damaged, "--resume")
    assert f"{damaged / 'metrics.json'} is damaged" in fails(*resume)


def test_a_training_that_diverges_names_the_step_and_keeps_its_last_good_state(
    data, tmp_path, fails, train_command
):
    command = train_command(data, tmp_path / "run", "--epochs", "4", "--lr", "1e30")
    sentence = fails(*command)
    assert "training stopped in epoch 1: score or map of image good/0 is not finite" in sentence
    assert "nothing was saved yet" in sentence
    sentence = fails(*command, "--eval-every", "4")
    assert "training stopped in epoch 2: the loss is nan in step 1 (images train/good/" in sentence
    assert "model.safetensors keeps the last good state" in sentence
