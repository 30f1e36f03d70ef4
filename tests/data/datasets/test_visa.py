"""VisA gives the same items in the layout of its archive and in the rearranged one."""

import pytest

from msflow_ext.data import Images, list_categories, open_dataset

ROWS = [
    ("candle", "train", "normal", "candle/Data/Images/Normal/0002.JPG", ""),
    ("candle", "train", "normal", "candle/Data/Images/Normal/0000.JPG", ""),
    ("candle", "test", "normal", "candle/Data/Images/Normal/0001.JPG", ""),
    ("pcb1", "train", "normal", "pcb1/Data/Images/Normal/0000.JPG", ""),
    (
        "candle",
        "test",
        "anomaly",
        "candle/Data/Images/Anomaly/000.JPG",
        "candle/Data/Masks/Anomaly/000.png",
    ),
]


def write_index(root, rows):
    (root / "split_csv").mkdir(parents=True, exist_ok=True)
    lines = [",".join(row) for row in (("object", "split", "label", "image", "mask"), *rows)]
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def archive(tmp_path, save):
    root = tmp_path / "VisA"
    for *_, image, mask in ROWS:
        save(root / image)
        if mask:
            save(root / mask, 3)
    write_index(root, ROWS)
    return root


@pytest.fixture
def arranged(tmp_path, save):
    root = tmp_path / "VisA_pytorch" / "1cls" / "candle"
    for name in ("train/good/0000", "train/good/0002", "test/good/0001", "test/bad/000"):
        save(root / f"{name}.JPG")
    save(root / "ground_truth/bad/000.png", 3)
    return tmp_path / "VisA_pytorch"


def test_both_layouts_give_the_same_names_labels_and_masks(archive, arranged):
    first, second = (open_dataset(root, "visa", "candle") for root in (archive, arranged))
    for data in (first, second):
        assert (data.name, data.category) == ("visa", "candle")
        assert {i.name for i in data.train} == {"train/good/0000", "train/good/0002"}
        found = {(i.name, i.label, i.defect, i.mask is None) for i in data.test}
        assert found == {("good/0001", 0, "good", True), ("bad/000", 1, "bad", False)}
        bad = [i for i in data.test if i.label == 1]
        mask = Images(bad, 4).mask(0)
        assert mask is not None
        assert mask.all()
    assert open_dataset(arranged / "1cls", "visa", "candle") == second


def test_the_categories_are_those_of_the_index_or_of_the_tree(archive, arranged):
    assert list_categories(archive, "visa") == ["candle", "pcb1"]
    assert list_categories(arranged, "visa") == ["candle"]


@pytest.mark.parametrize("category", [None, "candles"])
def test_an_unknown_category_lists_those_that_exist(archive, category):
    with pytest.raises(ValueError, match=rf"must be one of candle, pcb1, got {category!r}"):
        open_dataset(archive, "visa", category)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            ("candle", "test", "normal", "../secret.png", ""),
            r"line 7: path must be relative to .*, got '../secret\.png'",
        ),
        (("candle", "test", "normal", "candle/9.JPG", ""), r"line 7: .*9\.JPG is not a file"),
        (
            ("candle", "test", "anomaly", ROWS[3][3], ""),
            r"line 7: .* must have a mask, as other defects do",
        ),
        (
            ("candle", "train", "anomaly", ROWS[3][3], ""),
            r"line 7: a training image must be good, got .*",
        ),
        (
            ("candle", "", "normal", ROWS[3][3], ""),
            r"line 7: split must be train or test, as in other rows, got ''",
        ),
        (ROWS[0], r"are both called train/good/0002"),
    ],
)
def test_an_invalid_row_is_refused_by_line(archive, row, sentence):
    write_index(archive, [*ROWS, row])
    with pytest.raises(
        ValueError if "not a file" not in sentence else FileNotFoundError, match=sentence
    ):
        open_dataset(archive, "visa", "candle")
