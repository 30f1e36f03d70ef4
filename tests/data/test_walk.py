"""All folders are walked by the same rules, and files passed over are reported with a reason."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from msflow_ext.data import check_dataset, open_dataset
from msflow_ext.data.sources import images_of
from msflow_ext.data.walk import APART, OURS, summary, walk
from msflow_ext.files import LOCK

pytestmark = pytest.mark.family("folders")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    return folder


def test_images_of_every_suffix_in_any_case_are_found_in_the_order_of_their_folders(tmp_path):
    names = ["a/2.JFIF", "a/b/1.jpe", "a-1.TIF", "a.PNG", "b.webp"]
    found = walk(touch(tmp_path, *names, "b.gif", "notes.txt"))
    assert list(found.files) == names == [f.relative_to(tmp_path).as_posix() for f in found.paths]
    assert found.passed_over == {"b.gif": "", "notes.txt": ""}
    assert found.folders == ["a", "a/b"]


def test_hidden_files_and_folders_are_passed_over_and_reported(tmp_path):
    found = walk(touch(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.c.png", LOCK))
    assert list(found.files) == ["a.png"]
    assert list(found.passed_over) == ["._a.png", ".ipynb_checkpoints/", "b/.c.png"]


def test_links_are_followed_and_every_walk_ends(tmp_path):
    touch(tmp_path, "box/real/a.png", "elsewhere/b.png", "elsewhere/deep/c.png")
    box = tmp_path / "box"
    for name, target in (
        ("0", box / "real"),  # sorts before the folder that it links to
        ("line", tmp_path / "elsewhere"),
        ("again", tmp_path / "elsewhere/deep"),
        ("real/loop", box),
        ("gone", tmp_path / "nowhere"),
        ("gone.png", tmp_path / "nowhere.png"),
        ("file.png", tmp_path / "elsewhere/b.png"),
    ):
        (box / name).symlink_to(target)
    (box / "circle.png").symlink_to("circle.png")
    found = walk(box)
    assert list(found.files) == ["again/c.png", "file.png", "line/b.png", "real/a.png"]
    assert found.passed_over.pop("circle.png")
    assert found.passed_over == {
        "0/": "the same folder as real",
        "real/loop/": "the same folder as .",
        "line/deep/": "the same folder as again",
        "gone": "a broken link",
        "gone.png": "a broken link",
    }


def test_folders_that_link_to_one_another_do_not_take_forever(tmp_path):
    for i in range(14):
        touch(tmp_path, f"{i}/{i}.png")
        for j in range(14):
            (tmp_path / f"{i}/to {j}").symlink_to(tmp_path / f"{j}")
    assert len(walk(tmp_path).files) == 14


def test_a_sub_folder_without_read_permission_is_named_first(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", *(f"{i}.txt" for i in range(9)), "locked/b.png")
    scan = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = walk(tmp_path)
    assert list(found.files) == ["a.png"]
    logged = "10 passed over: locked/ (Permission denied), 0.txt, 1.txt, 2.txt, 3.txt and 5 more"
    assert summary(found.passed_over) == logged
    with pytest.raises(PermissionError):
        walk(tmp_path / "locked")


@pytest.mark.parametrize("beside", ["scores.csv", "model.safetensors"])
def test_pictures_that_msflow_wrote_are_passed_over(tmp_path, beside):
    touch(tmp_path, "a.png", "old/maps/a.png.png", "old/masks/a.png.png", "old/b.png")
    touch(tmp_path, "mine/maps/c.png")
    assert "old/maps/a.png.png" in walk(tmp_path).files
    touch(tmp_path, f"old/{beside}")
    found = walk(tmp_path)
    assert list(found.files) == ["a.png", "mine/maps/c.png", "old/b.png"]
    assert found.passed_over["old/maps/"] == found.passed_over["old/masks/"] == OURS
    assert list(walk(tmp_path / "old/maps").files) == ["a.png.png"]


def test_folders_that_the_caller_excludes_are_passed_over_by_any_name(tmp_path):
    touch(tmp_path, "a.png", "out/b.png")
    (tmp_path / "link").symlink_to("out")
    found = walk(tmp_path, apart=[tmp_path / "link", tmp_path / "absent"])
    assert list(found.files) == ["a.png"]
    assert found.passed_over == {"out/": APART, "link/": APART}


def test_names_of_any_bytes_are_found_and_reported_on_one_line(tmp_path):
    names = [b"Gu\xdf.png", b"a\n\r\tb.png", b"=1+2.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"1")
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/." + name)).write_bytes(b"1")
    found = walk(tmp_path)
    assert sorted(os.fsencode(name) for name in found.files) == sorted(names)
    logged = summary(found.passed_over)
    assert logged.isprintable() and logged.isascii()
    assert r".Gu\udcdf.png" in logged and r".a\n\r\tb.png" in logged


def test_files_passed_over_are_one_line_in_the_log(tmp_path, monkeypatch):
    logged: list[str] = []
    log = logging.getLogger("msflow_ext.data.walk")
    monkeypatch.setattr(log, "warning", lambda text, *names: logged.append(text % names))
    touch(tmp_path, "a.png", "._a.png", "b.gif")
    assert [name for name, _ in images_of(tmp_path)] == ["a.png"]
    assert logged == [f"{tmp_path}: 2 passed over: ._a.png, b.gif"]


def test_a_folder_of_written_pictures_is_accepted_beside_others(tmp_path):
    touch(tmp_path, "in/a.png", "out/scores.csv", "out/maps/b.png")
    (tmp_path / "empty").mkdir()
    found = images_of([tmp_path / "in", tmp_path / "out"])
    assert [name for name, _ in found] == [(tmp_path / "in/a.png").as_posix()]
    for source in (tmp_path / "out", [tmp_path / "empty"]):
        with pytest.raises(ValueError, match="holds no images"):
            list(images_of(source))


def test_a_pattern_is_refused_unless_a_file_has_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*\.png is not a file; patterns are not exp"):
        list(images_of(str(tmp_path / "*.png")))
    touch(tmp_path, "[1].png")
    assert len(list(images_of(str(tmp_path / "[1].png")))) == 1


def test_layout_folder_searches_sub_folders_and_pairs_masks_in_sub_folders_of_their_names(
    tmp_path, save
):
    for name in ("normal/a.png", "normal/2026-01/a.jfif", "abnormal/x/1.png", "abnormal/2.png"):
        save(tmp_path / name) if name.endswith("png") else touch(tmp_path, name)
    for name in ("masks/x/1_mask.png", "masks/2/0.png", "masks/2/1.png", "normal/b.gif"):
        save(tmp_path / name, 255)
    data = open_dataset(tmp_path, "folder", strict=False)
    assert data.faults == ()
    normal = {
        item.name.removeprefix("train/") for item in (*data.train, *data.test) if not item.label
    }
    assert normal == {"good/a", "good/2026-01/a"}
    assert [(item.name, item.mask) for item in data.test if item.label] == [
        ("abnormal/2", tmp_path / "masks/2"),
        ("abnormal/x/1", tmp_path / "masks/x/1_mask.png"),
    ]
    assert "1 passed over: normal/b.gif" in check_dataset(data).warnings
    save(tmp_path / "masks/y/1.png", 255)
    (fault,) = open_dataset(tmp_path, "folder", strict=False).faults
    assert str(fault) == f"mask {tmp_path / 'masks/y'} has no image of the same name"


def test_a_folder_in_another_is_read_without_it_and_the_same_folder_twice_is_refused(
    tmp_path, save
):
    for name in ("a", "b", "bad/c", "bad/masks/c"):
        save(tmp_path / f"{name}.png")
    folders: dict[str, Any] = {"normal": ".", "abnormal": "bad", "masks": "bad/masks"}
    data = open_dataset(tmp_path, "folder", **folders)
    assert sorted(Path(str(i.image)).name for i in (*data.train, *data.test)) == [
        "a.png",
        "b.png",
        "c.png",
    ]
    (tmp_path / "link").symlink_to("bad")
    same: list[dict[str, Any]] = [
        {"normal": "bad", "abnormal": "link"},
        {**folders, "masks": "./bad"},
    ]
    for twice in same:
        with pytest.raises(ValueError, match="must be different folders"):
            open_dataset(tmp_path, "folder", **twice)


def test_every_layout_passes_hidden_files_over_and_a_strict_one_logs_what_is_not_read(
    tmp_path, save, monkeypatch
):
    logged: list[str] = []
    log = logging.getLogger("msflow_ext.data")
    monkeypatch.setattr(log, "warning", lambda text, *names: logged.append(text % names))
    for name in (
        "train/good/0.png",
        "test/good/0.png",
        "test/bad/0.png",
        "ground_truth/bad/0/0.png",
    ):
        save(tmp_path / "cup" / name)
    touch(tmp_path / "cup", "train/good/._0.png", "ground_truth/bad/0/._0.png", "test/bad/0.gif")
    data = open_dataset(tmp_path, "mvtec", "cup")
    assert logged == [
        "mvtec cup: 3 passed over: ground_truth/bad/0/._0.png, test/bad/0.gif, train/good/._0.png"
    ]
    assert check_dataset(data).faults == ()
