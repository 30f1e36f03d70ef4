"""Magnetic tiles are read with the masks beside them, and split by seed."""

import hashlib
import json

import numpy as np
import pytest

from msflow_ext.data import DataSet, Images, Item, dataset, list_categories, open_dataset
from msflow_ext.data.datasets import mtd


@pytest.fixture
def root(tmp_path, save):
    for i in range(10):
        save(tmp_path / f"MT_Free/Imgs/exp1_num_{i}.jpg", 100, (9, 5 + i))
        save(tmp_path / f"MT_Free/Imgs/exp1_num_{i}.png", 0, (9, 5 + i))
    for kind in mtd.KINDS:
        for i in range(2):
            save(tmp_path / f"MT_{kind}/Imgs/exp2_num_{i}.jpg", 90, (6, 7))
            save(tmp_path / f"MT_{kind}/Imgs/exp2_num_{i}.png", 255, (6, 7))
    (tmp_path / "README.md").write_text("tiles")
    return tmp_path


def test_four_fifths_of_the_free_tiles_train_and_the_others_are_tested_with_all_defects(root):
    data = open_dataset(root, "mtd")
    good = [item.name for item in data.test if item.label == 0]
    assert (data.name, data.category, len(data.train), len(good)) == ("mtd", "tiles", 8, 2)
    names = {item.name.removeprefix("train/") for item in data.train} | set(good)
    assert names == {f"good/exp1_num_{i}" for i in range(10)}
    kinds = [item.defect for item in data.test if item.label == 1]
    assert kinds == [kind.lower() for kind in mtd.KINDS for _ in range(2)]
    assert {(item.label, item.defect) for item in data.train} == {(0, "good")}
    assert {item.defect for item in data.test if item.label == 0} == {"good"}
    assert all(str(item.image).endswith(".jpg") for item in data.train + data.test)


def test_a_defect_has_the_mask_of_its_name(root):
    images = Images(open_dataset(root, "mtd").test, 4)
    for i, item in enumerate(images.items):
        mask = images.mask(i)
        assert mask is not None
        assert mask.all() == (item.label == 1)


def test_the_seed_decides_the_split_and_the_split_is_named_by_a_hash(root):
    splits = [open_dataset(root, "mtd", split_seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].split == splits[1].split != splits[2].split
    assert len(splits[0].split) == 12


def test_the_hash_of_a_split_is_the_same_in_every_version():
    train, test = (Item(name, 0, "good", np.zeros((1, 1), np.uint8)) for name in ("a", "b"))
    assert DataSet("set", "part", (train,), (test,)).split == "8e44fa025598"


def test_the_recorded_splits_are_those_of_the_seeds_0_to_4():
    text = mtd.SPLITS.read_text()
    recorded = json.loads(text)
    assert (recorded["tiles"], len(recorded["tested"])) == (952, 5)
    digest = hashlib.sha256(json.dumps(recorded["tested"]).encode()).hexdigest()
    assert digest == "1eca43b29d19aab2bf983d2608bc959904cd5cbf75bbcbd859cd7695ce398d15"
    for seed in range(5):
        train, tested = mtd.split(952, seed)
        assert (train, tested) == dataset.hold_out(952, np.random.default_rng(seed))
        assert (len(train), len(tested)) == (761, 191)
    assert mtd.split(952, 5) == dataset.hold_out(952, np.random.default_rng(5))


def test_the_recorded_splits_need_no_random_numbers(monkeypatch):
    monkeypatch.setattr(mtd, "hold_out", lambda *_: pytest.fail("drawn anew"))
    assert mtd.split(952, 4)[1] == json.loads(mtd.SPLITS.read_text())["tested"][4]


def test_there_are_no_categories(root):
    assert list_categories(root, "mtd") == []
    with pytest.raises(ValueError, match="mtd has no categories, got category 'crack'"):
        open_dataset(root, "mtd", "crack")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("MT_Crack/Imgs/exp2_num_1.png", r"exp2_num_1\.jpg has no mask: .*MT_Crack"),
        ("MT_Fray/Imgs/exp2_num_0.jpg", r"mask .*MT_Fray.*exp2_num_0\.png has no image"),
    ],
)
def test_a_tile_without_mask_and_a_mask_without_tile_are_named(root, lost, sentence):
    (root / lost).unlink()
    with pytest.raises(ValueError, match=sentence):
        open_dataset(root, "mtd")


def test_a_folder_without_tiles_names_the_first_and_counts_the_rest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MT_Free.Imgs is not a folder \(5 more: "):
        open_dataset(tmp_path, "mtd")
