"""`msflow data check` reports the contents of a tree and all of its faults."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli
from msflow_ext.data import check_dataset, open_dataset

RNG = np.random.default_rng(0)


def save(path, size=(12, 10), mode="L"):
    """Save a picture of noise, so that no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, size[::-1], dtype=np.uint8)).convert(mode).save(path)
    return path


def save_mask(path, size=(12, 10), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(value, (2, 2, 5, 8))
    mask.save(path)


@pytest.fixture
def root(tmp_path):
    """Write two valid categories in the layout of MVTec AD."""
    for category in ("bottle", "cable"):
        for i in range(4):
            save(tmp_path / f"{category}/train/good/{i:03}.png")
        save(tmp_path / f"{category}/test/good/000.png", (20, 10), "RGB")
        for i in range(3):
            save(tmp_path / f"{category}/test/crack/{i:03}.png")
            save_mask(tmp_path / f"{category}/ground_truth/crack/{i:03}_mask.png")
    return tmp_path


def checked(*arguments, **options):
    return check_dataset(open_dataset(*arguments, strict=False, **options))


def test_a_valid_data_set_gives_counts_sizes_and_modes_without_faults(root):
    report = checked(root, "mvtec", "bottle")
    assert report.counts == {"train": {"good": 4}, "test": {"crack": 3, "good": 1}}
    assert report.sizes == {(12, 10): 7, (20, 10): 1}
    assert report.modes == {"L": 7, "RGB": 1}
    assert report.faults == report.warnings == ()
    assert str(report).splitlines() == [
        f"mvtec bottle, split {open_dataset(root, 'mvtec', 'bottle').split}",
        "images  good  crack",
        "train      4      0",
        "test       1      3",
        "sizes  12x10 (7), 20x10 (1)",
        "modes  L (7), RGB (1)",
        "faults: 0, warnings: 0",
    ]


def damage(bottle, bomb):
    """Plant one fault of every kind; return the expected faults and warnings."""
    train, test, truth = bottle / "train/good", bottle / "test", bottle / "ground_truth"
    save(train / "000.bmp")
    (train / "001.png").write_bytes(b"")
    (train / "004.png").write_bytes(bomb)
    (train / "005.png").write_text("no picture")
    whole = save(train / "006.png").read_bytes()
    (train / "006.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(train / "002.png", train / "007.png")
    Image.open(train / "003.png").save(test / "good/001.tif")
    (truth / "crack/000_mask.png").unlink()
    save_mask(truth / "crack/009_mask.png")
    save_mask(truth / "crack/001_mask.png", (10, 12))
    save_mask(truth / "crack/002_mask.png", value=0)
    save(test / "crack/003.png")
    (truth / "crack/003_mask.png").write_bytes(b"GIF89a")
    save(test / "stain/000.png")
    (test / "empty").mkdir()
    (truth / "empty").mkdir()
    save_mask(truth / "hole/000_mask.png")
    save(train / "more/000.png")
    save(bottle / "train/crack/000.png")
    save(train / "008.gif")
    (train / "009.png").symlink_to("gone.png")
    save(train / ".trash/000.png")
    return [
        r"train.good holds both 000\.bmp and 000\.png",
        r"train.good.001\.png is empty$",
        r"train.good.004\.png cannot be decoded: .*decompression bomb",
        r"train.good.005\.png is not an image",
        r"train.good.006\.png cannot be decoded: ",
        r"crack.000\.png has no mask: ",
        r"mask .*crack.009_mask\.png has no image of the same name",
        r"mask .*001_mask\.png must have the size of its image .*001\.png, 12x10 pixels, got 10x12$",
        r"crack.003_mask\.png is not an image",
        r"ground_truth.stain is not a folder",
        r"test.empty holds no images",
        r"masks .*hole have no images: .*test.hole is not a folder",
    ], [
        r"2 images with the same pixels in train: train/good/002, train/good/007",
        r"2 images with the same pixels in train and test: train/good/003, good/001",
        r"the mask of the defective image crack/002 is empty",
        r"2 of 5 defects have no mask \(crack/000, stain/000\), so no pixel metrics will be computed",
        r"8 passed over: train/good/009\.png \(a broken link\), "
        r"ground_truth/crack/009_mask\.png, ground_truth/hole/000_mask\.png, train/crack/000\.png, "
        r"train/good/\.trash/ and 3 more",
    ]


def test_exactly_the_planted_faults_are_found(root, bomb):
    faults, warnings = damage(root / "bottle", bomb)
    report = checked(root, "mvtec", "bottle")
    for expected, found in ((faults, report.faults), (warnings, report.warnings)):
        for sentence in expected:
            assert sum(bool(re.search(sentence, each)) for each in found) == 1, sentence
        assert len(found) == len(expected), found
    assert not any("\n" in each for each in report.faults + report.warnings)


def test_the_command_prints_every_category_and_fails_if_one_has_faults(root, bomb, capsys):
    arguments = ["data", "check", str(root), "--layout", "mvtec"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert [f"mvtec {name}, split" in printed for name in ("bottle", "cable")] == [True, True]
    faults, warnings = damage(root / "bottle", bomb)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().out
    assert printed.count("fault: ") == len(faults)
    assert printed.count("warning: ") == len(warnings)
    assert cli.main([*arguments, "--category", "cable"]) == 0
    assert "bottle" not in capsys.readouterr().out
    for several in ("all", "bottle,cable"):
        assert cli.main([*arguments, "--category", several]) == 2
        assert capsys.readouterr().out == printed


def test_a_category_without_training_images_is_a_fault(root, capsys):
    shutil.rmtree(root / "cable/train")
    assert cli.main(["data", "check", str(root), "--layout", "mvtec"]) == 2
    assert f"fault: {root / 'cable/train/good'} is not a folder" in capsys.readouterr().out


def test_only_faults_fail_the_command(root, capsys):
    shutil.rmtree(root / "cable/test/crack")
    shutil.rmtree(root / "cable/ground_truth")
    assert cli.main(["data", "check", str(root / "cable"), "--layout", "mvtec"]) == 0
    assert "all test images are good, so no metrics will be computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--layout", "mvtec"], "data nowhere is not a folder"),
        (["ROOT"], "layout of data"),
        (["ROOT", "--layout", "mvtec", "--category", "cup"], "must be one of bottle, cable"),
        (["--layout", "btad"], "data must be a folder, got None"),
        (["ROOT", "--layout", "folder", "--csv", "a.csv"], "a.csv is not a file"),
    ],
)
def test_a_data_set_that_cannot_be_opened_is_one_line_of_error(root, capsys, arguments, sentence):
    found = cli.main(["data", "check", *(str(root) if a == "ROOT" else a for a in arguments)])
    assert found == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msflow: error: ")
    assert sentence in line


@pytest.mark.family("masks")
def test_the_command_warns_of_regions_smaller_than_a_pixel(root, capsys):
    arguments = ["data", "check", str(root / "bottle"), "--layout", "mvtec"]
    assert cli.main(arguments) == 0
    assert "smaller than a pixel" not in capsys.readouterr().out
    assert cli.main([*arguments, "--image-size", "1"]) == 0
    assert (
        "3 masks have regions that are smaller than a pixel at size 1: " in capsys.readouterr().out
    )
