"""An archive in Parquet has one row per image, even if the work was interrupted."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

import msflow_ext as mx
from msflow_ext import cli
from msflow_ext.distributed.executors import TaskLost
from msflow_ext.inference.archive import Archive, manifest, prepare
from msflow_ext.inference.archive.job import _row
from msflow_ext.inference.archive.parquet import Store, schema
from msflow_ext.inference.result import Result
from msflow_ext.inference.settings import Scoring
from msflow_ext.reports.heat_maps import heat_map

pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 21
DAMAGED = "010.png"


@pytest.fixture(scope="module")
def run(untrained_run) -> Path:
    """The checkpoint of an untrained model with thresholds."""
    return untrained_run(
        recipe={"false_alarms": 0.4},
        calibration={"scores": [0.078, 0.08, 0.083], "peaks": [0.05, 0.06, 0.07]},
        colours=[0.0, 0.1],
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of noise, one of them damaged; tests must not write to it."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        image = np.random.default_rng(i).integers(0, 255, (48, 80), np.uint8)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    (folder / DAMAGED).write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def prepared(run: Path, photos: Any, out: Path | str, **options: Any) -> Archive:
    scoring = Scoring(batch_size=2)
    return prepare(run, photos, out, scoring, shard_size=4, device="cpu", **options)


@pytest.fixture(scope="module")
def whole(run, photos, tmp_path_factory) -> Path:
    """The files of an uninterrupted job; tests must not write to them."""
    out = tmp_path_factory.mktemp("whole")
    prepared(run, photos, out).score()
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out).to_pylist()


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_image_has_a_row_with_its_result(run, photos, whole):
    table = parquet.read_table(whole)
    assert table.schema.remove_metadata() == schema()
    found = table.to_pylist()
    assert [row["path"] for row in found] == [str(p) for p in sorted(photos.iterdir())]
    first = list(mx.load(run, "cpu").stream([row["path"] for row in found[:2]], batch_size=2))
    for row, result in zip(found, first, strict=False):
        assert (row["score"], row["label"]) == (result.score, result.label)
        assert row["p_value"] == result.p_value
        assert row["map_max"] == result.map.max()
        assert row["map_mean"] == pytest.approx(result.map.mean())
        assert result.mask is not None and row["map_area"] == result.mask.mean()
        y, x = (int(row[f"map_max_{axis}"] * 64) for axis in "yx")
        assert result.map[y, x] == result.map.max()
        assert row["error"] is None
    assert {row["label"] for row in found} == {0, 1, None}


def test_a_damaged_image_has_a_row_with_its_error_and_its_batch_is_scored(whole):
    wrong = [row for row in rows(whole) if row["error"] is not None]
    (row,) = wrong
    assert row["path"].endswith(DAMAGED)
    assert (
        row["error"] == f"{row['path']} is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP"
    )
    assert {row[name] for name in schema().names[1:-1]} == {None}
    assert sum(row["score"] is not None for row in rows(whole)) == COUNT - 1


def test_damaged_images_leave_the_other_rows_of_a_shard_unchanged(run, photos, tmp_path):
    names = [str(photos / f"{i:03}.png") for i in range(7)]
    for place in (0, 3, 6):
        names[place] = str(tmp_path / f"broken {place}.png")
        Path(names[place]).write_bytes(b"\x89PNG\r\n\x1a\n")
    scoring = Scoring(batch_size=2)
    prepare(run, names, tmp_path / "out", scoring, shard_size=7, device="cpu").score()
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == names
    assert [row["score"] is None for row in found] == [i in (0, 3, 6) for i in range(7)]


def test_a_row_has_the_area_above_the_threshold_and_the_position_of_the_maximum():
    values = np.array([[0.0, 1.0], [2.0, 3.0], [2.0, 0.0]], np.float32)
    result = Result("a.png", 5.0, None, None, values, None, np.zeros((3, 2, 3), np.uint8), (3, 2))
    job: Any = SimpleNamespace(maps=None)
    areas = []
    for threshold in (1.0, None):
        detector: Any = SimpleNamespace(pixel_threshold=threshold)
        row = _row("a.png", result, job, detector)
        areas.append(row["map_area"])
        assert (row["map_max"], row["map_mean"]) == (3.0, pytest.approx(8 / 6))
        assert (row["map_max_x"], row["map_max_y"]) == (0.75, 0.5)
    assert areas == [0.5, None]


def test_maps_are_stored_as_numbers_or_as_pictures(run, photos, whole, tmp_path):
    prepared(run, photos, tmp_path / "a", maps="array").score()
    prepared(run, photos, tmp_path / "b", maps="png").score()
    plain, arrays, pictures = rows(whole), rows(tmp_path / "a"), rows(tmp_path / "b")
    result = mx.load(run, "cpu").predict([arrays[0]["path"], arrays[1]["path"]])[0]
    shape = arrays[0]["map_height"], arrays[0]["map_width"]
    assert np.array_equal(np.float32(arrays[0]["map"]).reshape(shape), result.map)
    with Image.open(io.BytesIO(pictures[0]["map_png"])) as picture:
        shown = heat_map(result.image, result.map, low=0.0, high=0.1, mask=result.mask)
        assert np.array_equal(np.asarray(picture), np.asarray(shown))
    assert result.mask is not None and 0 < result.mask.mean() < 1
    for kind, names in ((arrays, ("map", "map_height", "map_width")), (pictures, ("map_png",))):
        assert [{k: v for k, v in row.items() if k not in names} for row in kind] == plain


def test_an_archive_of_an_earlier_version_is_resumed(run, photos, tmp_path):
    """The digest and the owner of a shard are compared with those in its file."""
    described = {"images": "a", "model": "b", "settings": {"tile": False, "batch_size": 2}}
    reordered = {"settings": {"batch_size": 2, "tile": False}, "model": "b", "images": "a"}
    recorded = "b0b7dda2c8cb7d9e93bdcdad20118e284bc630eece625fa537e022a19936408d"
    assert manifest.digest(described) == manifest.digest(reordered) == recorded
    out = tmp_path / "new/folders"
    one_by_one = Scoring(batch_size=1)
    prepare(run, photos / "000.png", out, one_by_one, shard_size=1, device="cpu").score()
    kept = json.loads((out / "_manifest.json").read_text())
    assert kept["settings"] == {**asdict(one_by_one), "maps": None, "shard_size": 1}
    names = ("images", "model", "settings")
    digest = manifest.digest({name: kept[name] for name in names})
    assert Store(str(out)).owner_of("part-00000.parquet") == ({"manifest": digest, "shard": 0}, 1)
    (listed,) = parquet.read_table(out / "_images.parquet").to_pylist()
    size = (photos / "000.png").stat().st_size
    assert listed == {"path": str(photos / "000.png"), "bytes": size}


def test_finished_shards_are_kept_and_missing_ones_are_written(run, photos, whole, tmp_path):
    prepared(run, photos, tmp_path).score()
    assert written(tmp_path) == written(whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    archive = prepared(run, photos, tmp_path)
    assert len(archive.finished) == 6
    assert [path for path, _ in archive.score()] == [str(photos / DAMAGED)]
    (tmp_path / "part-00003.parquet").unlink()
    for name in (".part-00003.parquet.0123", "._manifest.json.0123"):
        (tmp_path / name).write_bytes(b"cut off")
        assert name not in Store(str(tmp_path)).names()
    archive = prepared(run, photos, tmp_path)
    assert {shard.number for shard in archive.shards} - archive.finished == {3}
    archive.score()
    assert written(tmp_path) == written(whole)
    changed = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert changed == ["part-00003.parquet"]


def test_a_lost_shard_is_named_and_the_others_are_written(run, photos, whole, tmp_path):
    def losing(work, tasks):
        for task in tasks:
            lost = TaskLost("its worker died 6 times") if task.number == 1 else None
            yield task, None if lost else work(task), lost

    sentence = r"1 of 6 shards .*part-00001\.parquet \(.*004\.png to .*007\.png\): its worker died"
    with pytest.raises(RuntimeError, match=sentence):
        prepared(run, photos, tmp_path).score(losing)
    assert "part-00001.parquet" not in written(tmp_path)
    prepared(run, photos, tmp_path).score()
    assert written(tmp_path) == written(whole)


def test_another_list_model_or_setting_is_refused_by_name(run, photos, whole, tmp_path):
    before = written(whole)
    other = tmp_path / "photos"
    other.mkdir()
    with pytest.raises(
        ValueError, match=r"--batch-size must be 2 as in .*_manifest\.json, got 3\. C"
    ):
        prepare(run, photos, whole, Scoring(batch_size=3), shard_size=4)
    with pytest.raises(ValueError, match=r"--maps must be None as in .*, got array"):
        prepared(run, photos, whole, maps="array")
    for path in photos.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    names = [str(path) for path in sorted(photos.iterdir())]
    with pytest.raises(
        ValueError, match=r"other images \(21\) than those given \(20\); .*020\.png"
    ):
        prepared(run, names[:-1], whole)
    with pytest.raises(ValueError, match=rf"other images .*the first difference is {other}"):
        prepared(run, other, whole)
    changed = tmp_path / "model.safetensors"
    changed.write_bytes((run / "model.safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match="belongs to another model than --run"):
        prepared(changed, photos, whole)
    assert written(whole) == before


def test_a_model_that_changes_during_the_job_is_refused(run, photos, tmp_path):
    own = tmp_path / "model.safetensors"
    own.write_bytes((run / "model.safetensors").read_bytes())
    archive = prepared(own, photos, tmp_path / "out")
    own.write_bytes(own.read_bytes() + b" ")
    with pytest.raises(ValueError, match="has changed since the scoring began"):
        archive.score()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"shorter"])
def test_a_damaged_shard_is_named(run, photos, whole, tmp_path, content):
    for name, kept in written(whole).items():
        (tmp_path / name).write_bytes(kept)
    (tmp_path / "part-00002.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00002\.parquet cannot be read: .*Remove it"):
        prepared(run, photos, tmp_path)
    (tmp_path / "part-00002.parquet").write_bytes((whole / "part-00001.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"part-00002\.parquet does not belong to _manifest\.json"):
        prepared(run, photos, tmp_path)
    parquet.write_table(pyarrow.table({"path": ["a"]}), tmp_path / "part-00002.parquet")
    with pytest.raises(ValueError, match=r"part-00002\.parquet does not belong to _manifest\.json"):
        prepared(run, photos, tmp_path)


def test_the_output_may_be_a_uri(run, photos, whole, tmp_path):
    prepared(run, photos, f"file://{tmp_path}/a b".replace(" ", "%20")).score()
    assert written(tmp_path / "a b") == written(whole)
    place = f"memory://{uuid4().hex}"  # by fsspec
    prepared(run, photos, place).score()
    store = Store(place)
    assert {name: store.read(name).to_pybytes() for name in store.names()} == written(whole)


# ---- the command ----


def command(run: Path, photos: Path | str, out: Path | str, *more: str) -> list[str]:
    chosen = ["--engine", "local", "--batch-size", "2", "--shard-size", "4", "--device", "cpu"]
    return ["predict", "--run", str(run), str(photos), *chosen, "--out", str(out), *more]


@pytest.mark.family("broken images")
def test_the_command_scores_all_images_and_exits_with_status_1_after_errors(
    run, photos, whole, tmp_path, capsys
):
    assert cli.main(command(run, photos, tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == f"21 images: {tmp_path}\n"
    assert "1 of 21 have no score, see column error" in printed.err
    path = photos / DAMAGED
    assert f"{path} is skipped: {path} is not an image" in printed.err
    assert written(tmp_path) == written(whole)
    assert cli.main(command(run, photos / "000.png", tmp_path / "one")) == 0


@pytest.mark.family("broken images")
def test_an_archive_stops_at_a_damaged_image_with_on_error_stop(
    run, photos, whole, tmp_path, capsys
):
    assert cli.main(command(run, photos, tmp_path, "--on-error", "stop")) == 2
    assert f"{photos / DAMAGED} is not an image" in capsys.readouterr().err.splitlines()[-1]
    assert {f"part-0000{i}.parquet" for i in range(2)} <= written(tmp_path).keys()
    assert "part-00002.parquet" not in written(tmp_path)
    assert cli.main(command(run, photos, tmp_path)) == 1
    assert written(tmp_path) == written(whole)


@pytest.mark.family("broken images")
def test_an_image_deleted_after_the_listing_has_a_row_with_its_error(run, photos, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        path.write_bytes((photos / "000.png").read_bytes())
    archive = prepared(run, paths, tmp_path / "out")
    paths[1].unlink()
    assert archive.score() == [(str(paths[1]), f"{paths[1]} is not a file")]
    assert [row["score"] is None for row in rows(tmp_path / "out")] == [False, True, False]


def test_wrong_arguments_are_reported_in_one_sentence(run, photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/a.parquet").touch()
    new, twice = tmp_path / "new", str(photos / "000.png")
    for arguments, sentence in (
        (command(run, tmp_path / "empty", new), "empty holds no images"),
        (command(run, tmp_path / "gone.png", new), "gone.png is not a file"),
        (command(tmp_path / "none", photos, new), "none cannot be read: no such checkpoint"),
        (command(run, photos, tmp_path / "file/out"), "file/out"),
        (command(run, photos, "nosuch://place"), "got nosuch://place: Protocol not known"),
        (command(run, photos, tmp_path / "foreign"), "a.parquet has no _manifest.json beside it"),
        (command(run, photos, run), "model.safetensors has no _manifest.json beside it"),
        (command(run, photos, new, "--watch"), "must be given without --watch and --score-only"),
        (
            command(run, photos, new, "--shard-size", "0"),
            "--shard-size must be a whole number of 1 or more",
        ),
        (
            command(run, photos, new, "--address", "x:1"),
            "--address must be given with --engine ray",
        ),
        (
            ["predict", "--run", str(run), "a", "--out", "b", "--maps", "png"],
            "--engine must be given with --maps",
        ),
        (
            [*command(run, photos, new)[:3], twice, *command(run, twice, new)[3:]],
            f"{twice} is given",
        ),
    ):
        assert cli.main(arguments) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="must be 1 or more, got 0, 8"):
        prepare(run, photos, new, Scoring(), shard_size=0)
    assert not new.exists()


def test_without_pyarrow_the_extra_is_named(run, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.main(command(run, photos, tmp_path)) == 2
    assert "pip install 'msflow-ext[parquet]'" in capsys.readouterr().err


def test_a_killed_job_is_resumed(run, photos, whole, tmp_path):
    out = tmp_path / "out"
    process = [sys.executable, "-m", "msflow_ext", *command(run, photos, out, "--threads", "1")]
    with subprocess.Popen(process, cwd=tmp_path, stderr=subprocess.DEVNULL) as started:
        end = time.monotonic() + 60
        while len(list(out.glob("part-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        started.send_signal(signal.SIGKILL)
    assert (out / "part-00000.parquet").exists()
    assert json.loads((out / "_manifest.json").read_text())["count"] == COUNT
    prepared(run, photos, out).score()
    assert written(out) == written(whole)
