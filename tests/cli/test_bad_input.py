"""Wrong input ends a command with one sentence and exit status 2, and keeps earlier results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msflow_ext as mx
from msflow_ext import cli
from msflow_ext.files import LOCK, check_writable, locked, write_text
from msflow_ext.runs.checkpoint import save_checkpoint
from msflow_ext.runs.score_table import Row, read_scores

TRAIN = ["train", "--backbone", "efficientnet_lite0", "--image-size", "64", "--epochs", "1"]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(90, 110, (64, 64), np.uint8)).save(path)


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a data set in the layout of MVTec AD with the category ``cup`` and a list of its images."""
    root = tmp_path / "data"
    for name in ("train/good/0", "train/good/1", "train/good/2", "test/good/0", "test/scar/0"):
        picture(root / f"cup/{name}.png")
    picture(root / "cup/ground_truth/scar/0_mask.png")
    (root / "list.csv").write_text("path,label\ncup/train/good/0.png,good\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a folder with the checkpoint of an untrained model; tests must not write to it."""
    folder = tmp_path_factory.mktemp("run")
    _save(folder, spoil=False)
    return folder


def _save(folder: Path, *, spoil: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"image_size": 64, "pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8}
        model = mx.MSFlow("test_efficientnet", seed=1, **options)
    if spoil:
        with torch.no_grad():
            next(model.head.parameters()).fill_(torch.nan)
    header = {"model": "MSFlow", "config": model.config, "colours": [0.5, 2.0]}
    save_checkpoint(folder / "model.safetensors", header, model)


def fails(capsys, *arguments: object) -> str:
    """Run a command that must fail, and return its error."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("msflow: error: ")
    assert not any("Traceback" in line for line in before)
    return last


def lose(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def add(path: str) -> Callable[[Path], None]:
    return lambda root: picture(root / path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose("cup/ground_truth/scar/0_mask.png"), "scar/0.png has no mask"),
        (add("cup/ground_truth/scar/7_mask.png"), "scar/7_mask.png has no image of the same name"),
        (add("cup/train/good/0.jpg"), "holds both 0.jpg and 0.png"),
        (lambda root: (root / "cup/train/good/2.png").write_bytes(b"GIF89a"), "2.png is not"),
    ],
    ids=["no-mask", "mask-alone", "one-name", "no-image"],
)
def test_a_faulty_data_folder_is_refused_before_anything_is_written(
    data, tmp_path, capsys, damage, sentence
):
    damage(data)
    chosen = ["--data", data, "--layout", "mvtec", "--category", "cup", "--out", tmp_path / "out"]
    assert sentence in fails(capsys, *TRAIN, *chosen)
    assert not list((tmp_path / "out").glob("*"))
    capsys.readouterr()
    assert cli.main(["data", "check", str(data), "--layout", "mvtec", "--category", "cup"]) == 2
    assert sentence in capsys.readouterr().out


def test_data_check_accepts_a_flag_or_a_position_but_not_both(data, capsys):
    chosen = ["--layout", "mvtec", "--category", "cup"]
    capsys.readouterr()
    assert cli.main(["data", "check", "--data", str(data), *chosen]) == 0
    by_flag = capsys.readouterr().out
    assert "cup" in by_flag
    assert cli.main(["data", "check", str(data), *chosen]) == 0
    assert capsys.readouterr().out == by_flag
    sentence = fails(capsys, "data", "check", data, "--data", "elpv")
    assert f"--data must be given once, got {str(data)!r} and 'elpv'" in sentence


@pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "link.png", "C:\\secret.png"])
def test_a_path_of_a_csv_that_leaves_the_folder_is_refused(data, tmp_path, capsys, path):
    picture(tmp_path / "secret.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "list.csv").write_text(f"path,label\n{path},good\n")
    chosen = ["--data", data, "--layout", "folder", "--csv", "list.csv", "--out", tmp_path / "out"]
    sentence = fails(capsys, *TRAIN, *chosen)
    assert "list.csv, line 2: path must" in sentence
    assert f"got {path!r}" in sentence


def test_evaluating_a_single_class_is_refused(run, data, capsys):
    (data / "list.csv").write_text("path,label,split\ncup/test/scar/0.png,scar,test\n")
    listed = ["--data", data, "--layout", "folder", "--csv", "list.csv"]
    sentence = fails(capsys, "evaluate", "--run", run, *listed)
    assert "got 0 good, 1 defective and 0 without a label" in sentence
    good = ["--layout", "folder", "--normal", data / "cup/train/good"]
    assert "got 0 good, 0 defective" in fails(capsys, "evaluate", "--run", run, *good)


def test_an_image_whose_score_is_not_finite_is_named_and_has_no_score(tmp_path, data, capsys):
    (tmp_path / "spoilt").mkdir()
    _save(tmp_path / "spoilt", spoil=True)
    command = [
        "predict",
        "--run",
        tmp_path / "spoilt",
        data / "cup/test",
        "--out",
        tmp_path / "out",
    ]
    wrong = f"score or map of image {data / 'cup/test/good/0.png'} is not finite"
    assert wrong in fails(capsys, *command, "--on-error", "stop")
    assert not (tmp_path / "out/scores.csv").exists()
    assert cli.main([*map(str, command)]) == 1
    assert read_scores(tmp_path / "out/scores.csv")[0] == Row("good/0.png", error=wrong)


def _commands(run: Path, data: Path, out: Path) -> list[list[object]]:
    chosen = ["--data", data, "--layout", "mvtec", "--category", "cup", "--out", out]
    return [
        [*TRAIN, *chosen],
        ["evaluate", "--run", run, *chosen],
        ["predict", "--run", run, data / "cup/test", "--out", out],
    ]


def test_an_output_folder_below_a_file_is_refused_before_any_work(run, data, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for command in _commands(run, data, tmp_path / "file/out"):
        assert "file/out cannot be written: Not a directory" in fails(capsys, *command)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_output_folder_is_refused_before_any_work(run, data, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for command in _commands(run, data, closed / "out"):
        assert "closed/out cannot be written: Permission denied" in fails(capsys, *command)


def test_checking_that_a_folder_is_writable_leaves_no_files(tmp_path):
    check_writable(tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from msflow_ext import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize(
    ("command", "more", "file", "kept"),
    [
        (0, [], "model.safetensors", "config.yaml"),
        (0, ["--cache", "disk"], "features-training.cache", ""),
        (2, [], "maps/good-0.png", "scores.csv"),
    ],
    ids=["train", "cache", "predict"],
)
def test_a_full_disk_is_one_sentence_and_keeps_earlier_files(
    run, data, tmp_path, command, more, file, kept
):
    out = tmp_path / "out"
    arguments = [*map(str, _commands(run, data, out)[command]), *more]
    ended = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"msflow: error: {out / file} cannot be written: ")
    assert "too large" in last
    assert out.exists() == bool(kept)
    assert (out / kept).exists() or not kept
    assert not [*out.rglob("*.tmp"), *out.rglob("*.cache")]


HUGE = "99999999999999999999999"


@pytest.mark.family("early refusals")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", HUGE], f"seed must be a whole number from 0 to 2**64 - 1, got {HUGE}"),
        (["--seeds", "1", HUGE], f"seed must be a whole number from 0 to 2**64 - 1, got {HUGE}"),
        (["--split-seeds", "1", "-1", "--layout", "folder"], "--split-seeds must be 0 or more"),
        (["--batch-size", HUGE], "batch_size must be at most 2**31 - 1"),
        (["--epochs", HUGE], "epochs must be at most 2**31 - 1"),
        (["--threads", HUGE], "--threads must be at most 2**31 - 1"),
        (["--image-size", HUGE], "image_size must be from 1 to 16384 pixels"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused_with_one_sentence(
    data, tmp_path, capsys, flags, sentence
):
    chosen = ["--data", data, "--layout", "mvtec", "--category", "cup", "--out", tmp_path / "out"]
    if "folder" in flags:
        chosen = ["--data", data, "--out", tmp_path / "out"]
    assert sentence in fails(capsys, *TRAIN, *chosen, *flags)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="seed must be a whole number from -2"):
        mx.MSFlow("test_efficientnet", pretrained=False, seed=2**64)


@pytest.mark.family("writers")
def test_a_folder_that_another_process_writes_is_refused_before_any_work(
    run, data, tmp_path, capsys
):
    out = tmp_path / "out"
    watch = ["predict", "--run", run, data / "cup/test", "--out", out, "--watch"]
    archive = ["predict", "--run", run, data / "cup/test", "--out", out, "--engine", "local"]
    series = [*TRAIN, "--data", data, "--layout", "mvtec", "--category", "cup,cup2", "--out", out]
    with locked(out):
        for command in (*_commands(run, data, out), watch, archive, series):
            sentence = fails(capsys, *command)
            assert f"{out} is being written by another process: wait until it ends" in sentence
        assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_failed_write_keeps_the_files_that_exist(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match=r"b cannot be written: Is a directory"):
        write_text(tmp_path / "b", "new")
    with pytest.raises(OSError, match=r"a\.txt/b cannot be written: "):
        write_text(tmp_path / "a.txt/b", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]
