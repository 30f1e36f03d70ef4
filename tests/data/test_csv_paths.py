"""No path in a CSV file leaves the folder of the data, and an invalid line is named."""

import pytest
from PIL import Image

from msflow_ext import cli
from msflow_ext.data import open_dataset

SPLIT = ["path,label,mask,split", "good 0.png,good,,train", "good 1.png,normal,,Train"]


@pytest.fixture
def root(tmp_path, save):
    for name in ("good 0.png", "good 1.png", "good 2.png", "bad0.bmp", "bad1.bmp", "mark.png"):
        save(tmp_path / "data" / name)
    return tmp_path / "data"


def opened(root, *lines):
    (root / "index.csv").write_text("\n".join(lines) + "\n")
    return open_dataset(root, "folder", csv="index.csv")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.png", "../data/good 1.png", "..\\secret.png", "C:\\a.png"],
)
def test_a_path_that_is_absolute_or_has_two_dots_is_refused(root, path):
    with pytest.raises(ValueError, match=r"line 2: path must be relative to .* and without \.\."):
        opened(root, "path,label", f"{path},good")
    with pytest.raises(ValueError, match=r"line 2: path must be relative to"):
        opened(root, "path,label,mask", f"bad0.bmp,scratch,{path}")


def test_only_links_that_leave_the_folder_are_refused(root, save):
    outside = save(root.parent / "secret/a.png")
    (root / "file.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    for path in ("file.png", "folder/a.png"):
        with pytest.raises(ValueError, match=r"line 2: path must stay in .*, a link to"):
            opened(root, "path,label", f"{path},good")
    (root / "inner.png").symlink_to(root / "good 1.png")
    assert len(opened(root, "path,label", "inner.png,good").train) == 1
    (root / "loop.png").symlink_to(root / "loop.png")
    with pytest.raises((FileNotFoundError, ValueError), match=r"line 2: .*loop\.png"):
        opened(root, "path,label", "loop.png,good")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("good 2.png,,,test", "line 4: label must not be empty"),
        ("good 2.png,good,,val", "line 4: split must be train or test, got 'val'"),
        ("good 2.png,good,,", "line 4: split must be train or test, as in other rows, got ''"),
        ("good 2.png,good,,test,more", "line 4: more cells than the header"),
        ("bad0.bmp,scratch,,train", r"line 4: a training image must be good, got .*bad0\.bmp"),
        (
            "good 0.png,good,,test",
            r"good 0\.png and .*good 0\.png are both called good 0",
        ),
        ("gone.png,good,,test", r"line 4: .*gone\.png is not a file"),
        ("bad0.bmp,scratch,gone.png,test", r"line 4: .*gone\.png is not a file"),
        (",good,,test", "line 4: path must not be empty"),
    ],
)
def test_an_invalid_line_is_refused_by_number(root, line, sentence):
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        opened(root, *SPLIT, line)


def test_two_files_of_one_name_are_refused(root, save):
    save(root / "good 1.jpg")
    with pytest.raises(ValueError, match=r"good 1\.png and .*good 1\.jpg are both called good 1"):
        opened(root, *SPLIT, "good 1.jpg,good,,train")


def test_a_defect_without_mask_is_refused_where_others_have_one(root):
    rows = "bad0.bmp,scratch,mark.png,test", "bad1.bmp,scratch,,test"
    with pytest.raises(
        ValueError, match=r"line 5: .*bad1\.bmp must have a mask, as other defects do"
    ):
        opened(root, *SPLIT, *rows)
    assert opened(root, *SPLIT, rows[1]).test[0].mask is None


def test_a_file_that_is_not_such_a_table_is_refused(root):
    with pytest.raises(ValueError, match=r"must have a column 'path', got the header 'path;label'"):
        opened(root, "path;label", "good 0.png;good")
    with pytest.raises(
        ValueError, match=r"index\.csv must have a column 'path', got the header ''"
    ):
        opened(root, "")
    Image.new("L", (40, 40), 200).save(root / "index.csv", format="png")
    with pytest.raises(ValueError, match=r"index\.csv cannot be read: "):
        open_dataset(root, "folder", csv="index.csv")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv is not a file"):
        open_dataset(root, "folder", csv="gone.csv")


def test_all_bad_lines_are_reported_at_once(root, capsys):
    lines = [
        "path,label",
        "/etc/passwd,good",
        "a/../b.png,good",
        "gone.png,good",
        "good 0.png,good",
    ]
    (root / "index.csv").write_text("\n".join(lines))
    arguments = ["data", "check", str(root), "--layout", "folder", "--csv", "index.csv"]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().out.splitlines()
    table, rule = (
        f"fault: {root / 'index.csv'}, line",
        f"path must be relative to {root} and without ..",
    )
    assert [line for line in printed if line.startswith("fault: ")] == [
        f"{table} 2: {rule}, got '/etc/passwd'",
        f"{table} 3: {rule}, got 'a/../b.png'",
        f"{table} 4: {root / 'gone.png'} is not a file",
    ]
