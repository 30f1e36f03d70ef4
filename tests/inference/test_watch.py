"""A watched folder: each image is scored once, when complete, and its row survives interruptions."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli
from msflow_ext.inference.watch import ScoreLog, arrivals, stopped_by_signals
from msflow_ext.runs.score_table import Row, read_scores, write_scores


class Script(Event):
    """An event that runs one step at each wait, and is set after the last step."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self.steps = iter(steps)

    def wait(self, timeout: float | None = None) -> bool:
        step = next(self.steps, self.set)
        step()
        return self.is_set()


def idle() -> None:
    pass


def names(folder: Path, *steps: Callable[[], object], known: Collection[str] = ()) -> list[str]:
    return [name for name, _ in arrivals(folder, known, Script(*steps))]


def test_an_image_is_yielded_once_after_two_equal_polls(tmp_path):
    path = tmp_path / "line 1" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"1")
    assert names(tmp_path) == []
    assert names(tmp_path, idle, idle, idle) == ["line 1/a.png"]
    assert list(arrivals(tmp_path, (), Script(idle))) == [("line 1/a.png", path)]


def test_an_image_that_is_being_written_is_yielded_when_complete(tmp_path):
    path, seen = tmp_path / "a.jpg", []

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"more")
        seen.append(path.stat().st_size)

    script = Script(path.touch, idle, grow, grow, grow, idle)
    assert [p.stat().st_size for _, p in arrivals(tmp_path, (), script)] == [12]
    assert seen == [4, 8, 12]


def test_an_image_moved_in_is_yielded_and_a_deleted_one_is_not(tmp_path):
    outside, folder = tmp_path / "a.part", tmp_path / "in"
    folder.mkdir()
    outside.write_bytes(b"1")
    (folder / "gone.png").write_bytes(b"1")

    def move() -> None:
        os.replace(outside, folder / "a.png")
        (folder / "gone.png").unlink()

    assert names(folder, move, idle) == ["a.png"]


def test_hidden_known_and_other_files_are_passed_over(tmp_path):
    for name in (".a.png", "a.png", "b.txt", "c.png.part", "known.png", "d.PNG", ".git/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    assert names(tmp_path, idle, idle, known={"a.png", "known.png"}) == ["d.PNG"]


def test_broken_links_do_not_hide_the_images_beside_them(tmp_path):
    expected = [f"{i:02}.png" for i in range(20)]
    for name in expected:
        (tmp_path / f"link {name}").symlink_to("nowhere.png")
        (tmp_path / name).write_bytes(b"1")
    assert names(tmp_path, idle, idle) == expected


def test_a_damaged_image_is_yielded_again_when_it_changes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    assert names(tmp_path, idle, idle, lambda: path.write_bytes(b"22"), idle, idle) == ["a.png"] * 2


@pytest.mark.family("folders")
def test_pictures_written_into_the_watched_folder_are_not_yielded(tmp_path):
    out = tmp_path / "out"
    for name in ("a.png", "out/maps/a.png.png", "out/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    found = arrivals(tmp_path, (), Script(idle, idle), apart=[out / "maps", out / "masks"])
    assert [name for name, _ in found] == ["a.png", "out/b.png"]


@pytest.mark.family("folders")
def test_a_file_that_is_passed_over_is_logged_once(tmp_path, monkeypatch):
    said: list[str] = []
    log = logging.getLogger("msflow_ext.data.walk")
    monkeypatch.setattr(log, "warning", lambda text, *names: said.append(text % names))
    (tmp_path / "notes.txt").touch()
    later = [
        (tmp_path / "upload.part").touch,
        lambda: (tmp_path / "gone.png").symlink_to("nowhere.png"),
    ]
    assert names(tmp_path, *later, idle, idle) == []
    assert said == [
        f"{tmp_path}: 1 passed over: notes.txt",
        f"{tmp_path}: 1 passed over: gone.png (a broken link)",
    ]


def test_a_watched_folder_that_is_deleted_is_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=f"{folder} cannot be watched"):
        names(folder, folder.rmdir, idle)


ODD = ("a,b.png", '"d"\n.png', "line\r.png", "=1+1.png", "\r\n=2.png", os.fsdecode(b"\xff.png"))


@pytest.mark.family("score tables")
def test_an_appended_table_equals_one_written_at_once_and_is_continued(tmp_path):
    table = [Row(name, score=-0.5 + i, verdict=i % 2) for i, name in enumerate(ODD)]
    table.append(Row("broken.png", error='"broken.png" is\nnot an image'))
    path = tmp_path / "out/new/log.csv"
    for row in table:
        ScoreLog(path).append(row)
    write_scores(tmp_path / "whole.csv", table)
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert read_scores(path) == table
    log = ScoreLog(path)
    assert list(log.names) == list(ODD)
    assert log.failed == {"broken.png": '"broken.png" is\nnot an image'}


@pytest.mark.family("score tables")
def test_an_incomplete_last_row_is_removed(tmp_path):
    path, names = tmp_path / "log.csv", ("a.png", '"\nb,\n".png')
    for name in names:
        ScoreLog(path).append(Row(name, score=0.25))
    whole = path.read_bytes()
    header, first, *_ = whole.splitlines(keepends=True)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        log = ScoreLog(path)
        kept = [name for name in names if name in log.names]
        assert kept == (["a.png"] if end >= len(header + first) else [])
        for name in names[len(kept) :]:
            log.append(Row(name, score=0.25))
        assert path.read_bytes() == whole


@pytest.mark.family("score tables")
def test_a_missing_quotation_mark_is_refused_and_deletes_no_rows(tmp_path):
    path = tmp_path / "log.csv"
    write_scores(path, [Row(f"{i}.png", score=0.5) for i in range(3000)])
    damaged = path.read_bytes().replace(b"\n7.png", b'\n"7.png')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"log\.csv is damaged: a quotation mark is missing after"):
        ScoreLog(path)
    assert path.read_bytes() == damaged


@pytest.mark.family("broken images")
def test_an_image_that_fails_again_has_one_row_until_it_is_scored(tmp_path):
    log = ScoreLog(tmp_path / "log.csv")
    for error in ("it is empty", "it is empty", "it is cut off"):
        log.append(Row("a.png", error=error))
    assert (log.names, log.failed) == ({}, {"a.png": "it is cut off"})
    assert [row.error for row in read_scores(log.path)] == ["it is empty", "it is cut off"]
    log.append(Row("a.png", score=1.0))
    again = ScoreLog(log.path)
    assert (list(again.names), again.failed) == (["a.png"], {})


def test_a_full_disk_leaves_only_complete_rows(tmp_path, monkeypatch):
    log = ScoreLog(tmp_path / "log.csv")
    log.append(Row("a.png", score=0.25))
    before, write = log.path.read_bytes(), os.write

    def half(file: int, content: bytes) -> int:
        if len(content) < 8:
            raise OSError(28, "No space left on device")
        return write(file, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=r"log\.csv cannot be written: No space left"):
        log.append(Row("b.png", score=0.5))
    assert log.path.read_bytes() == before
    assert list(log.names) == ["a.png"]


@pytest.mark.family("score tables")
@pytest.mark.parametrize(
    "text", ["name,defect,label,score,p_value\na.png,,1,0.5,0.1\n", "name,defect\n", "x\n"]
)
def test_a_table_of_an_older_version_or_another_program_is_refused(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    sentence = r"log\.csv must begin with name,defect,truth,.*, got .*\. Choose another --out"
    with pytest.raises(ValueError, match=sentence):
        ScoreLog(tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == text


@pytest.fixture
def interruptible():
    """Python's default handler of SIGINT, also where a shell in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_sets_the_event_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- the command ----


@pytest.fixture(scope="module")
def run(untrained_run) -> Path:
    """The checkpoint of an untrained model with thresholds."""
    return untrained_run(
        recipe={"false_alarms": 0.4},
        calibration={"scores": [-2.0, -1.0, 1e9], "peaks": [0.0, 1.0, 2.0]},
    )


def picture(path: Path, seed: int = 0) -> None:
    """Write an image to another name and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 80), np.uint8))
    image.save(part, "PNG")
    os.replace(part, path)


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def rows(out: Path) -> list[str]:
    path = out / "scores.csv"
    return [row.name for row in read_scores(path)] if path.exists() else []


def interrupt() -> None:
    time.sleep(0.6)  # after the next poll
    os.kill(os.getpid(), signal.SIGINT)


def command(run: Path, folder: Path, out: Path, *more: str) -> list[str]:
    chosen = ["predict", "--run", str(run), str(folder), "--watch", "--out", str(out)]
    return [*chosen, "--device", "cpu", *more]


def test_a_folder_is_watched_until_a_signal_and_continued_later(run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "a.png")
    started = subprocess.Popen(
        [sys.executable, "-m", "msflow_ext", *command(run, folder, out)],
        cwd=tmp_path,  # away from the sources, which would shadow the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_for(lambda: rows(out) == ["a.png"])
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        picture(folder / "sub/a.png", 1)
        assert wait_for(lambda: {*rows(out)} == {"a.png", "broken.png", "sub/a.png"})
        started.send_signal(signal.SIGTERM)
        said, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 1
    assert said == f"3 images: {out / 'scores.csv'}\n"
    wrong = f"{folder / 'broken.png'} is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP"
    assert [line for line in errors.splitlines() if "broken" in line] == [
        f"broken.png is skipped: {wrong}"
    ]
    assert [row.error for row in read_scores(out / "scores.csv") if row.error] == [wrong]

    before = (out / "scores.csv").read_bytes()
    picture(folder / "broken.png", 3)
    picture(folder / "sub-a.png", 2)  # its picture must not replace that of sub/a.png

    def stop() -> None:
        wait_for(lambda: len(rows(out)) == 5)
        interrupt()

    watcher = Thread(target=stop)
    watcher.start()
    assert cli.main(command(run, folder, out)) == 0
    watcher.join()
    assert capsys.readouterr().out == f"2 images: {out / 'scores.csv'}\n"
    assert (out / "scores.csv").read_bytes().startswith(before)
    assert {*rows(out)} == {"a.png", "broken.png", "sub/a.png", "sub-a.png"}
    for kind in ("maps", "masks"):
        pictures = {path.name for path in (out / kind).iterdir()}
        assert pictures == {"a.png", "broken.png", "sub-a.png", "sub-a-2.png"}
    at_once = ["predict", "--run", str(run), str(folder / "sub"), "--device", "cpu"]
    assert cli.main([*at_once, "--out", str(tmp_path / "once")]) == 0
    header, row = (tmp_path / "once/scores.csv").read_text().splitlines()
    watched = (out / "scores.csv").read_text().splitlines()
    assert header == watched[0]
    assert row in [line.replace("sub/", "") for line in watched[2:]]


@pytest.mark.family("score tables")
def test_watching_continues_in_a_folder_with_odd_names(run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    names = [*ODD, "a.png", "a.png.png"]
    for number, name in enumerate(names):
        picture(folder / name, number)
    for _ in range(2):
        watcher = Thread(target=lambda: (wait_for(lambda: len(rows(out)) == 8), interrupt()))
        watcher.start()
        assert cli.main(command(run, folder, out)) == 0
        watcher.join()
        assert sorted(rows(out)) == sorted(names)
        assert len(list((out / "maps").iterdir())) == len(names)
    assert capsys.readouterr().out.splitlines()[1] == f"0 images: {out / 'scores.csv'}"


@pytest.mark.family("broken images")
def test_watching_stops_at_a_broken_image_with_on_error_stop(run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert cli.main(command(run, folder, out, "--on-error", "stop")) == 2
    assert f"{folder / 'broken.png'} is not an image" in capsys.readouterr().err
    assert rows(out) == []


@pytest.mark.parametrize(
    ("paths", "out", "sentence"),
    [
        (["in", "in"], "out", "--watch must be given one folder, got"),
        (["nowhere"], "out", "nowhere is not a folder to watch"),
        (["in/maps"], "in", "--out must not write into"),
        (["in/maps/line 1"], "in", "from which images are read"),
    ],
)
def test_a_folder_that_cannot_be_watched_is_named(run, tmp_path, capsys, paths, out, sentence):
    (tmp_path / "in/maps/line 1").mkdir(parents=True)
    chosen = ["predict", "--run", str(run), "--watch", "--out", str(tmp_path / out)]
    assert cli.main([*chosen, *(str(tmp_path / path) for path in paths)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.family("folders")
def test_a_command_never_scores_its_own_pictures(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "in/results"
    picture(folder / "a.png")
    for target in (out, out, folder / "others", folder, folder):
        chosen = ["predict", "--run", str(run), str(folder), "--out", str(target)]
        assert cli.main([*chosen, "--device", "cpu"]) == 0
        assert rows(target) == ["a.png"]
        assert (target / "maps/a.png").is_file()
    by_shell = [str(folder / "a.png"), str(out), "--out", str(out), "--score-only"]
    assert cli.main(["predict", "--run", str(run), *by_shell, "--device", "cpu"]) == 0
    assert rows(out) == [str(folder / "a.png")]
