"""Every fifth frame of each video is read, with the label and mask of that frame."""

import re

import numpy as np
import pytest

from msflow_ext.data import Images, list_categories, open_dataset

FRAMES = 12
LABELS = np.array([0] * 5 + [1] * 7, np.uint8)
PIXELS = np.zeros((FRAMES, 6, 8), np.uint8)
PIXELS[5:, 2:4, 3:6] = 1


@pytest.fixture
def root(tmp_path, save):
    """Write scene 01 with two training videos and a test video, and scene 02 with a training video."""
    for name in ("01_001", "01_002", "02_001"):
        for i in range(FRAMES):
            save(tmp_path / f"training/frames/{name}/{i:03}.jpg", 100 + i, (8, 6))
    for i in range(FRAMES):
        save(tmp_path / f"testing/frames/01_0014/{i:03}.jpg", 100 + i, (8, 6))
    for folder, array in (("test_frame_mask", LABELS), ("test_pixel_mask", PIXELS)):
        (tmp_path / "testing" / folder).mkdir()
        np.save(tmp_path / "testing" / folder / "01_0014.npy", array)
    return tmp_path


def test_every_fifth_frame_of_each_video_of_the_scene_is_read(root):
    data = open_dataset(root, "mstc", "01")
    assert (data.name, data.category) == ("mstc", "01")
    numbers = [f"{i:04}" for i in (0, 5, 10)]
    names = [f"train/{video}/{i}" for video in ("01_001", "01_002") for i in numbers]
    assert [(item.name, item.label, item.defect) for item in data.train] == [
        (name, 0, "good") for name in names
    ]
    found = [(item.name, item.label, item.defect) for item in data.test]
    assert found == [
        ("01_0014/0000", 0, "good"),
        ("01_0014/0005", 1, "abnormal"),
        ("01_0014/0010", 1, "abnormal"),
    ]
    assert [str(item.image)[-7:] for item in data.test] == ["000.jpg", "005.jpg", "010.jpg"]


def test_a_frame_has_the_mask_of_its_number_and_the_masks_stay_on_disk(root):
    data = open_dataset(root, "mstc", "01")
    assert all(isinstance(item.mask, np.memmap) for item in data.test)
    images = Images(data.test, 24)
    masks = [np.asarray(images.mask(i)) for i in range(3)]
    assert [mask.any() for mask in masks] == [False, True, True]
    assert masks[1].mean() == pytest.approx(6 / 48)


def test_all_tested_videos_of_the_scene_are_read(root, save):
    for i in range(FRAMES):
        save(root / f"testing/frames/01_0015/{i:03}.jpg", 100 + i, (8, 6))
    for folder, array in (("test_frame_mask", LABELS), ("test_pixel_mask", PIXELS)):
        np.save(root / "testing" / folder / "01_0015.npy", array)
    names = [item.name for item in open_dataset(root, "mstc", "01").test]
    assert names == [f"01_00{video}/{i:04}" for video in (14, 15) for i in (0, 5, 10)]


def test_frame_1000_comes_after_frame_999(tmp_path, save):
    for i in (0, 1, 998, 999, 1000, 1001):
        save(tmp_path / f"training/frames/01_001/{i:03}.png", 10 + i % 90)
    (item, last) = open_dataset(tmp_path, "mstc", "01").train
    assert (str(item.image)[-7:], str(last.image)[-8:]) == ("000.png", "1001.png")


def test_without_pixel_masks_there_are_labels_only(root):
    (root / "testing/test_pixel_mask/01_0014.npy").unlink()
    (root / "testing/test_pixel_mask").rmdir()
    data = open_dataset(root, "mstc", "01")
    assert [item.label for item in data.test] == [0, 1, 1]
    assert all(item.mask is None for item in data.test)


def test_the_scenes_are_the_categories(root):
    assert list_categories(root, "mstc") == ["01", "02"]
    assert open_dataset(root, "mstc", "02").test == ()
    with pytest.raises(ValueError, match=r"must be one of 01, 02, got '03'"):
        open_dataset(root, "mstc", "03")


@pytest.mark.parametrize(
    ("folder", "array", "sentence"),
    [
        ("test_frame_mask", LABELS[:-1], r"must be \(frames,\) .* 12 frames, got \(11,\) of uint8"),
        ("test_pixel_mask", PIXELS[0], r"must be \(frames, H, W\) .*, got \(6, 8\) of uint8"),
        ("test_frame_mask", LABELS / 2, r"bool or integer .*, got \(12,\) of float64"),
        ("test_frame_mask", b"not numbers", r"01_0014\.npy cannot be read: "),
        ("test_frame_mask", None, r"01_0014\.npy is not a file"),
    ],
)
def test_masks_that_do_not_fit_their_video_are_named(root, folder, array, sentence):
    path = root / "testing" / folder / "01_0014.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        open_dataset(root, "mstc", "01")


def test_masks_of_a_missing_video_are_named(root):
    for folder in ("test_frame_mask", "test_pixel_mask"):
        np.save(root / "testing" / folder / "01_0099.npy", LABELS)
    dataset = open_dataset(root, "mstc", "01", strict=False)
    names = [rf"mask .*{part}_mask.01_0099\.npy has no video" for part in ("frame", "pixel")]
    assert all(map(re.search, names, map(str, dataset.faults)))
    assert len(dataset.faults) == 2


def test_a_scene_with_only_test_videos_has_no_training_images(root):
    (root / "testing/frames/01_0014").rename(root / "testing/frames/03_0014")
    assert list_categories(root, "mstc") == ["01", "02", "03"]
    dataset = open_dataset(root, "mstc", "03", strict=False)
    assert dataset.train == ()


def test_a_mask_of_another_size_than_its_frame_is_named_by_its_file(root):
    np.save(root / "testing/test_pixel_mask/01_0014.npy", PIXELS[:, :, :4])
    images = Images(open_dataset(root, "mstc", "01").test, 8)
    with pytest.raises(
        ValueError,
        match=r"mask .*01_0014\.npy must have the size of its image .*, 8x6 pixels, got 4x6",
    ):
        images.mask(1)


def test_a_folder_of_another_layout_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training is not a folder"):
        open_dataset(tmp_path, "mstc", "01")
    (tmp_path / "training").mkdir()
    with pytest.raises(ValueError, match=r"training holds neither frames/VIDEO nor videos"):
        open_dataset(tmp_path, "mstc", "01")


def test_a_pickle_is_not_executed(root):
    path = root / "testing/test_frame_mask/01_0014.npy"
    np.save(path, np.array([{"a": 1}] * FRAMES, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"01_0014\.npy cannot be read: "):
        open_dataset(root, "mstc", "01")
