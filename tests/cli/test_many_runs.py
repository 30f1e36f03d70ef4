"""One command trains or evaluates several runs, and writes one table."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from msflow_ext import cli

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


def test_all_categories_train_into_their_folders_and_one_table(
    data, tmp_path, capsys, fails, train_command
):
    root, out = tmp_path / "data", tmp_path / "runs"
    for name in ("cup", "plate"):
        shutil.copytree(data / "plate", root / name)
    broken = root / "cup/train/good/0.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:60])
    command = train_command(root, out, "--category", "all", "--seeds", "0", "1")
    sentence = fails(*command)
    assert "2 of 4 runs failed" in sentence
    assert str(broken) in sentence
    table = json.loads((out / "table.json").read_text())
    assert [bool(run["failure"]) for run in table["runs"]] == [True, True, False, False]
    assert {line["category"] for line in table["lines"]} == {"plate"}

    finished = out / "plate/seed-1"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "--resume continues" in fails(*command)
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
    sentence = fails(*command, "--resume", "--epochs", "2")
    assert "its recipe has epochs 1, this one has epochs 2" in sentence


def test_all_runs_of_a_folder_are_evaluated_into_one_table(run, data, tmp_path, capsys, fails):
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
    expected = json.loads((run / "metrics.json").read_text())
    for line in table["lines"]:
        assert (line["source"], line["runs"]) == ("MSFlow", 1)
        assert line["value"] == pytest.approx(expected[line["metric"]], abs=1e-3)
    assert [line["category"] for line in table["lines"]] == ["cup", "plate", "mean"] * 3
    for name in ("cup", "plate"):
        assert json.loads((out / name / "evaluation.json").read_text())["image_auroc"] > 0

    sentence = fails(*command, "--out", str(out))  # on the data of each run
    assert "1 of 2 runs failed" in sentence
    assert "got 'cup'" in sentence
    assert "table.md" in str(sorted(out.iterdir()))
    refusal = f"--out must be a folder other than {runs} with --category all, got"
    assert f"{refusal} None" in fails(*command)
    assert f"{refusal} {runs}" in fails(*command, "--out", str(runs))
    shutil.copytree(runs / "cup", runs / "duplicate")
    assert "have the same category and seeds" in fails(*elsewhere)
    (runs / "duplicate" / "metrics.json").unlink()
    assert f"{runs / 'duplicate'} must be a finished run" in fails(*elsewhere)
    nothing = ["evaluate", "--run", str(root), "--category", "all", "--out", str(out)]
    assert f"{root} must contain finished runs" in fails(*nothing)


def test_chosen_categories_are_named_with_commas(data, tmp_path, fails, train_command):
    sentence = fails(*train_command(data, tmp_path / "out", "--category", "plate,cup"))
    assert "1 of 2 runs failed" in sentence
    assert "got 'cup'" in sentence
    assert (tmp_path / "out/plate/metrics.json").exists()
    assert (tmp_path / "out/table.md").exists()


@pytest.mark.parametrize("layout", ["mvtec", "visa", "btad", "mstc"])
def test_several_splits_of_a_data_set_with_a_fixed_split_are_refused(
    layout, data, tmp_path, fails, train_command
):
    several = ["--layout", layout, "--split-seeds", "0", "1"]
    sentence = fails(*train_command(data, tmp_path / "out", *several))
    assert f"--split-seeds must be one seed for layout {layout}" in sentence
    assert not (tmp_path / "out").exists()
