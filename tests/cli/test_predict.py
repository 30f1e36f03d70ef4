"""The command predict writes a row for every image, and removes the files of an earlier prediction."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli
from msflow_ext.inference import output
from msflow_ext.runs import score_table
from msflow_ext.runs.score_table import HEADER, Row, read_scores, write_scores
from msflow_ext.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
Predict = Callable[..., int]


@pytest.fixture(scope="module")
def predict(untrained_run) -> Predict:
    """Return ``predict(out, *words)``, which runs the command with a small model that has thresholds."""
    run = untrained_run(
        recipe={"false_alarms": 0.4},
        calibration={"scores": [-2.0, -1.0, 1e9], "peaks": [0.0, 1.0, 2.0]},
        colours=[0.0, 0.1],
    )

    def command(out: Path, *words: object) -> int:
        fixed = ["predict", "--run", run, "--device", "cpu", "--out", out]
        return cli.main([*map(str, fixed), *map(str, words)])

    return command


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder with the images ``a.png`` and ``c.png``, and damaged ones before, between and after."""
    folder = tmp_path / "photos"
    for name in ("a.png", "c.png"):
        picture(folder / name)
    for name in (" first.png", "b.png", "z.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 80), np.uint8)
    Image.fromarray(noise).save(path, "PNG")


def pictures(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.glob("ma*/*")}


# ---- broken images ----


@pytest.mark.family("broken images")
@pytest.mark.parametrize("more", [[], ["--batch-size", "1"], ["--tile"]])
def test_each_broken_image_is_logged_and_has_a_row_and_the_status_is_1(
    predict, photos, tmp_path, capsys, more
):
    out = tmp_path / "out"
    assert predict(out, photos, *more) == 1
    rows = read_scores(out / "scores.csv")
    assert [row.name for row in rows] == [" first.png", "a.png", "b.png", "c.png", "z.png"]
    assert [row.score is None for row in rows] == [True, False, True, False, True]
    said = capsys.readouterr()
    assert said.out == f"5 images: {out / 'scores.csv'}\n"
    assert "3 of 5 have no score, see column error" in said.err
    for row in rows:
        wrong = f"{photos / row.name} is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP"
        assert row.error == ("" if row.name in ("a.png", "c.png") else wrong)
        assert (f"{row.name} is skipped: {wrong}" in said.err) == bool(row.error)
    assert {name for name in pictures(out) if "maps" in name} == {"maps/a.png", "maps/c.png"}


@pytest.mark.family("broken images")
def test_only_broken_images_give_a_table_and_no_pictures(predict, photos, tmp_path):
    for name in ("a.png", "c.png"):
        (photos / name).write_bytes(b"")
    assert predict(tmp_path / "out", photos) == 1
    rows = read_scores(tmp_path / "out/scores.csv")
    assert [bool(row.error) for row in rows] == [True] * 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]


@pytest.mark.family("broken images")
def test_on_error_stop_keeps_the_rows_before_the_broken_image(predict, photos, tmp_path, capsys):
    (photos / " first.png").unlink()
    assert predict(tmp_path / "out", photos, "--on-error", "stop") == 2
    assert "b.png is not an image" in capsys.readouterr().err.splitlines()[-1]
    assert [row.name for row in read_scores(tmp_path / "out/scores.csv")] == ["a.png"]


# ---- names and columns ----


@pytest.mark.family("score tables")
def test_images_of_two_folders_are_named_with_their_folders(predict, tmp_path):
    for name in ("left/0.png", "right/0.png", "right/1.png"):
        picture(tmp_path / name)
    left, right = tmp_path / "left", tmp_path / "right"
    assert predict(tmp_path / "out", left, right, "--score-only") == 0
    names = [row.name for row in read_scores(tmp_path / "out/scores.csv")]
    assert names == [f"{left}/0.png", f"{right}/0.png", f"{right}/1.png"]


@pytest.mark.family("score tables")
def test_a_repeated_or_missing_image_is_refused_before_one_is_scored(
    predict, photos, tmp_path, capsys
):
    for more, sentence in (
        (photos / "a.png", "a.png is given twice"),
        (photos / "gone.png", "gone.png is not a file"),
    ):
        assert predict(tmp_path / "out", photos, more) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.family("score tables")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_odd_file_names_are_kept_in_the_table(predict, tmp_path):
    names = ["=1+1.png", "line\r.png", 'new\n"line".png', "'@a.png", os.fsdecode(b"\xff.png")]
    for name in names:
        picture(tmp_path / "in" / name)
    assert predict(tmp_path / "out", tmp_path / "in") == 0
    assert sorted(row.name for row in read_scores(tmp_path / "out/scores.csv")) == sorted(names)
    content = (tmp_path / "out/scores.csv").read_bytes()
    assert not [
        line for line in content.splitlines() if line[:1] in b"=+-@\t" or line[1:2] in b"=+-@"
    ]
    assert len(pictures(tmp_path / "out")) == 2 * len(names)


@pytest.mark.family("score tables")
def test_predict_and_train_write_the_same_columns(run, data, tmp_path):
    words = ["predict", "--run", run, data / "plate/test", "--device", "cpu", "--out", tmp_path]
    assert cli.main([*map(str, words), "--score-only", "--threshold=-1e9"]) == 0
    lines = [(folder / "scores.csv").read_text().splitlines() for folder in (run, tmp_path)]
    assert [first for first, *_ in lines] == [",".join(HEADER)] * 2
    trained, predicted = (read_scores(folder / "scores.csv") for folder in (run, tmp_path))
    assert [row.name for row in trained] == [row.name for row in predicted]
    assert {row.verdict for row in predicted} == {1}
    assert {(row.verdict, row.p_value_at_most) for row in trained} == {(None, None)}
    assert {row.truth for row in trained} == {0, 1}
    assert {(row.truth, row.defect) for row in predicted} == {(None, "")}


# ---- a folder that holds an earlier prediction ----


@pytest.mark.family("score tables")
def test_a_second_prediction_replaces_table_and_pictures_of_the_first(predict, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(out, photos / "a.png", photos / "c.png") == 0
    first = pictures(out)
    (out / "evaluation.json").write_text("{}")
    assert len(first) == 4
    picture(tmp_path / "new.png")
    assert predict(out, tmp_path / "new.png") == 0
    assert len(pictures(out)) == 2 and not pictures(out) & first
    assert len(read_scores(out / "scores.csv")) == 1
    assert not (out / "evaluation.json").exists()
    assert predict(out, photos / "a.png", "--score-only") == 0
    assert [path.name for path in out.iterdir()] == ["scores.csv"]


@pytest.mark.family("score tables")
def test_files_of_a_killed_prediction_are_in_its_table_and_replaced(
    predict, photos, tmp_path, monkeypatch
):
    out, seen = tmp_path / "out", []

    class Killed(BaseException):
        """An error that no handler in the package catches."""

    def killed(path: Path, rows: list[Row]) -> None:
        seen.append(rows)
        write_scores(path, rows)
        if len(seen) == 2:  # at the end, which a killed process does not reach
            write_scores(path, seen[0])
            raise Killed

    monkeypatch.setattr(score_table, "write_scores", killed)
    with pytest.raises(Killed):
        predict(out, photos / "a.png", photos / "c.png")
    monkeypatch.undo()
    assert {row.error for row in read_scores(out / "scores.csv")} == {output.NOT_SCORED}
    assert len(pictures(out)) == 4
    picture(tmp_path / "new.png")
    assert predict(out, tmp_path / "new.png") == 0
    assert len(pictures(out)) == 2


@pytest.mark.family("score tables")
@pytest.mark.parametrize("name", ["maps/mine.png", "masks/mine.png", "maps/notes.txt"])
def test_a_picture_of_no_earlier_row_is_refused_and_nothing_is_removed(
    predict, photos, tmp_path, capsys, name
):
    out = tmp_path / "out"
    assert predict(out, photos / "a.png") == 0
    (out / name).write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert predict(out, photos / "c.png") == 2
    assert f"{out / name} has no row in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert predict(tmp_path / "other", photos / "c.png") == 0


@pytest.mark.family("score tables")
def test_an_earlier_heat_map_that_is_to_be_scored_is_not_removed(predict, tmp_path, capsys):
    out = tmp_path / "out"
    picture(out / "maps/a.png")
    write_scores(out / "scores.csv", [Row("a.png", score=1.0)])
    assert predict(out, out / "maps/a.png") == 2
    sentence = f"--out must not write into {out / 'maps'}, from which images are read"
    assert sentence in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.png").symlink_to(out / "maps/a.png")
    assert predict(out, tmp_path / "in") == 2
    assert "is an image to score" in capsys.readouterr().err
    assert (out / "maps/a.png").exists()


@pytest.mark.family("score tables")
def test_a_csv_file_that_is_not_a_table_of_scores_is_not_replaced(
    predict, photos, tmp_path, capsys
):
    (tmp_path / "scores.csv").write_text("player,points\nann,3\n")
    assert predict(tmp_path, photos / "a.png") == 2
    assert "scores.csv is damaged: it has no column name" in capsys.readouterr().err
    assert (tmp_path / "scores.csv").read_text() == "player,points\nann,3\n"


@pytest.mark.family("score tables")
def test_an_evaluation_removes_pictures_of_an_earlier_prediction(predict, run, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(out, photos / "a.png") == 0
    words = ["evaluate", "--run", str(run), "--device", "cpu", "--out", str(out)]
    assert cli.main(words) == 0
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "scores.csv"}
    assert cli.main(words) == 0


# ---- thresholds ----


@pytest.mark.family("thresholds")
def test_the_image_that_sets_the_threshold_is_good_in_batches_of_any_size(
    data, tmp_path, train_command
):
    held_out = ("--hold-out", "0.5", "--false-alarms", "0.4")
    assert cli.main(train_command(data, tmp_path / "run", *held_out)) == 0
    _, held = Recipe(hold_out=0.5, false_alarms=0.4).split(4)
    for size in (1, 2, 3, 4):
        words = ["predict", "--run", tmp_path / "run", data / "plate/train/good", "--device", "cpu"]
        more = ["--batch-size", size, "--out", tmp_path / "out"]
        assert cli.main([*map(str, words), *map(str, more)]) == 0
        rows = {row.name: row for row in read_scores(tmp_path / "out/scores.csv")}
        for name in (f"{i}.png" for i in held):
            assert (rows[name].verdict, rows[name].error) == (0, "")
            with Image.open(tmp_path / "out/masks" / name) as mask:
                assert not np.asarray(mask).any()
