"""Layout folder trains on normal images and tests on abnormal images, with optional masks."""

import pytest
from PIL import Image

from msflow_ext.data import Images, open_dataset


def fill(folder, count, value=100, stem="{:02}"):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("L", (6, 5), value).save(folder / (stem.format(i) + ".png"))


@pytest.fixture
def root(tmp_path):
    fill(tmp_path / "normal", 10)
    fill(tmp_path / "abnormal", 3)
    fill(tmp_path / "masks", 3, 255)
    return tmp_path


def test_without_abnormal_images_all_normal_images_are_trained_on(tmp_path):
    fill(tmp_path / "pictures", 3)
    data = open_dataset(None, "folder", normal=tmp_path / "pictures")
    assert [item.name for item in data.train] == [f"train/good/0{i}" for i in range(3)]
    assert data.test == ()
    assert (data.name, data.category) == ("folder", "pictures")


def test_subfolders_are_found_by_their_names(root):
    by_name = open_dataset(root, "folder")
    by_option = open_dataset(root, "folder", normal="normal", abnormal="abnormal", masks="masks")
    by_path = open_dataset(
        None,
        "folder",
        normal=root / "normal",
        abnormal=str(root / "abnormal"),
        masks=root / "masks",
    )
    assert by_name == by_option
    assert (by_name.name, by_name.category) == ("folder", root.name)
    assert (by_name.train, by_name.test) == (by_path.train, by_path.test)


def test_a_fifth_of_the_normal_images_is_held_out(root):
    data = open_dataset(root, "folder")
    good = [item for item in data.test if item.label == 0]
    assert (len(data.train), len(good)) == (8, 2)
    assert len({str(item.image) for item in (*data.train, *good)}) == 10
    assert len({item.name for item in (*data.train, *data.test)}) == 13
    assert {(item.label, item.defect) for item in data.train} == {(0, "good")}
    assert {item.defect for item in good} == {"good"}
    assert [(item.name, item.defect) for item in data.test if item.label == 1] == [
        (f"abnormal/0{i}", "abnormal") for i in range(3)
    ]


def test_the_seed_decides_what_is_held_out(root):
    splits = {open_dataset(root, "folder", split_seed=seed).train for seed in range(8)}
    assert len(splits) > 1
    assert open_dataset(root, "folder", split_seed=3) == open_dataset(root, "folder", split_seed=3)


def test_masks_belong_to_the_abnormal_images_of_their_names(root):
    images = Images(open_dataset(root, "folder").test, 4)
    masks = [images.mask(i) for i in range(len(images))]
    assert [mask is not None and mask.any() for mask in masks] == [False] * 2 + [True] * 3


def test_abnormal_images_without_masks_have_none(root):
    data = open_dataset(root, "folder", normal="normal", abnormal="abnormal")
    assert all(item.mask is None for item in data.test)


def test_a_missing_mask_is_named(root):
    (root / "masks/01.png").unlink()
    with pytest.raises(ValueError, match=r"abnormal.01\.png has no mask: .*masks holds neither"):
        open_dataset(root, "folder")


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "normal").mkdir()
    with pytest.raises(ValueError, match=r"normal holds no images"):
        open_dataset(tmp_path, "folder")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"normal is not a folder"):
        open_dataset(tmp_path, "folder")
    fill(tmp_path / "normal", 2)
    with pytest.raises(FileNotFoundError, match=r"broken is not a folder"):
        open_dataset(tmp_path, "folder", normal="normal", abnormal="broken")


def test_one_normal_image_cannot_be_split(tmp_path):
    fill(tmp_path / "normal", 1)
    fill(tmp_path / "abnormal", 1)
    with pytest.raises(ValueError, match=r"normal must hold 2 or more good images"):
        open_dataset(tmp_path, "folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abnormal": "abnormal"}, "needs normal"),
        (
            {"normal": "normal", "masks": "masks"},
            "masks .* need abnormal, the folder of the images",
        ),
        ({"category": "bottle"}, "has no categories, got category 'bottle'"),
    ],
)
def test_contradicting_options_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(root, "folder", **options)


def test_a_mask_without_its_image_is_named(root):
    (root / "abnormal/02.png").unlink()
    with pytest.raises(ValueError, match=r"mask .*masks.02\.png has no image of the same name"):
        open_dataset(root, "folder")
