"""A CSV file lists images in any folders below the folder of the data."""

from typing import Any

import pytest

from msflow_ext.data import Images, open_dataset


@pytest.fixture
def root(tmp_path, save):
    root = tmp_path / "data"
    for i in range(10):
        save(root / f"line/good {i}.png")
    for i in range(2):
        save(root / f"line/bad{i}.bmp")
        save(root / f"marks/bad{i}.png", 255)
    return root


def write(root, *lines, name="index.csv", encoding="utf-8"):
    (root / name).write_text("\n".join(lines) + "\n", encoding=encoding)


def opened(root, *lines, **options):
    write(root, *lines)
    return open_dataset(root, "folder", csv="index.csv", **options)


GOOD = [f"line/good {i}.png,good" for i in range(10)]
SPLIT = ["path,label,mask,split", "line/good 0.png,good,,train", "line/good 1.png,normal,,Train"]


def test_paths_labels_masks_and_splits_are_read(root):
    data = opened(
        root,
        *SPLIT,
        "line/good 2.png,0,,test",
        "line/good 3.png,OK,,test",
        "line/bad0.bmp,scratch,marks/bad0.png,test",
        "line/bad1.bmp,1,marks/bad1.png,test",
    )
    assert (data.name, data.category) == ("folder", "data")
    assert [item.name for item in data.train] == ["line/good 0", "line/good 1"]
    found = [(item.name, item.label, item.defect) for item in data.test]
    assert found == [
        ("line/good 2", 0, "good"),
        ("line/good 3", 0, "good"),
        ("line/bad0", 1, "scratch"),
        ("line/bad1", 1, "defective"),
    ]
    images = Images(data.test, 4)
    masks = [images.mask(i) for i in range(4)]
    assert [mask is not None and bool(mask.all()) for mask in masks] == [False, False, True, True]


def test_without_splits_a_seeded_fifth_of_the_good_images_is_tested_with_the_defects(root):
    lines = ["path,label", *GOOD, "line/bad0.bmp,scratch"]
    data = opened(root, *lines)
    assert (len(data.train), len(data.test)) == (8, 3)
    assert {item.label for item in data.train} == {0}
    assert opened(root, *lines) == data
    assert len({opened(root, *lines, split_seed=seed).split for seed in range(8)}) > 1


def test_without_defects_all_good_images_are_trained_on(root):
    data = opened(root, "label,path", "good,line/good 0.png", "good,line/good 1.png")
    assert [item.name for item in data.train] == ["line/good 0", "line/good 1"]
    assert data.test == ()


def test_quotes_empty_lines_and_a_byte_order_mark_are_accepted(root, save):
    save(root / "a, b.png")
    lines = "path, label", "", '"a, b.png" , good', "line/good 0.png,good", ""
    write(root, *lines, encoding="utf-8-sig")
    data = open_dataset(root, "folder", csv=root / "index.csv")
    assert [item.name for item in data.train] == ["a, b", "line/good 0"]


def test_missing_cells_at_the_end_of_a_line_are_empty(root):
    data = opened(root, "path,label,mask", "line/good 0.png,good", "line/good 1.png,good,")
    assert [(item.name, item.mask) for item in data.train] == [
        ("line/good 0", None),
        ("line/good 1", None),
    ]


def test_a_list_without_good_images_is_refused(root):
    with pytest.raises(ValueError, match="must list good images to train on, got none"):
        opened(root, "path,label", "line/bad0.bmp,scratch")
    with pytest.raises(ValueError, match="must list good images"):
        opened(root, "path,label")
    with pytest.raises(
        ValueError, match="must hold 2 or more good images, to train on and to test on"
    ):
        opened(root, "path,label", GOOD[0], "line/bad0.bmp,scratch")


def test_a_csv_excludes_other_folders_than_data(root):
    write(root, "path,label", *GOOD)
    with pytest.raises(ValueError, match="csv needs data, the folder of its paths"):
        open_dataset(None, "folder", csv=root / "index.csv")
    others: list[dict[str, Any]] = [{"normal": "a"}, {"abnormal": "a"}, {"masks": "a"}]
    for other in others:
        with pytest.raises(
            ValueError, match=r"csv needs data, .* without normal, abnormal or masks"
        ):
            open_dataset(root, "folder", csv="index.csv", **other)
    with pytest.raises(ValueError, match="csv can only be given with layout 'folder'"):
        open_dataset(root, "mvtec", csv="index.csv")
