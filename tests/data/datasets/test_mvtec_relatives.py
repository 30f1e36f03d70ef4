"""The layouts of MVTec LOCO AD and MVTec AD 2 are read as layout mvtec."""

import numpy as np

from msflow_ext.data import Images, open_dataset


def test_the_masks_of_loco_are_folders(tmp_path, save):
    for i in range(2):
        save(tmp_path / f"pushpins/train/good/00{i}.png")
        save(tmp_path / f"pushpins/validation/good/00{i}.png")
        save(tmp_path / f"pushpins/test/logical_anomalies/00{i}.png")
    truth = tmp_path / "pushpins/ground_truth/logical_anomalies"
    save(truth / "000/000.png", 0)
    save(truth / "000/001.png", 255)
    save(truth / "001/000.png", 0)
    images = Images(open_dataset(tmp_path, "mvtec", "pushpins").test, 4)
    assert [item.name for item in images.items] == [
        "logical_anomalies/000",
        "logical_anomalies/001",
    ]
    assert [bool(np.any(images.mask(i))) for i in range(2)] == [True, False]


def test_the_public_test_of_mvtec_ad_2_holds_its_ground_truth(tmp_path, save):
    for name in ("train/good/000_regular", "validation/good/001_regular", "test_private/002_mixed"):
        save(tmp_path / f"can/{name}.png")
    save(tmp_path / "can/test_public/good/003_regular.png")
    save(tmp_path / "can/test_public/bad/004_shift_1.png")
    mask = save(tmp_path / "can/test_public/ground_truth/bad/004_shift_1_mask.png", 255)
    data = open_dataset(tmp_path, "mvtec", "can")
    assert [item.name for item in data.train] == ["train/good/000_regular"]
    assert [(i.name, i.mask) for i in data.test] == [
        ("bad/004_shift_1", mask),
        ("good/003_regular", None),
    ]
    save(tmp_path / "can/test/good/005.png")
    assert [item.name for item in open_dataset(tmp_path, "mvtec", "can").test] == ["good/005"]
