"""The ELPV cells are split as recorded."""

import json
import sys
from pathlib import Path

import pytest

from msflow_ext.data import Images, open_dataset

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/elpv_split_0.json").read_text())["split"]


def names(prefix, kind, part):
    """Return item names: recorded indices count from 0, files from 1."""
    return [f"{prefix}/cell{index + 1:04}" for index in GOLDEN[kind][part]]


@pytest.mark.parametrize("category", ["mono", "poly"])
def test_seed_0_gives_the_recorded_split(category):
    pytest.importorskip("elpv_dataset")
    data = open_dataset("elpv", category=category)
    good = [item.name for item in data.test if item.label == 0]
    defective = [item.name for item in data.test if item.label == 1]
    assert [item.name for item in data.train] == names("train/good", category, "train")
    assert good == names("good", category, "test_functional")
    assert defective == names("defective", category, "defective_1.0")
    assert {(item.label, item.defect) for item in data.train} == {(0, "good")}
    assert {(item.label, item.defect) for item in data.test} == {(0, "good"), (1, "defective")}
    assert (data.name, data.category) == ("elpv", category)


def test_both_joins_mono_and_poly():
    pytest.importorskip("elpv_dataset")
    both, mono, poly = (open_dataset("elpv", category=c) for c in ("both", "mono", "poly"))
    assert both.train == mono.train + poly.train
    assert both.test == mono.test + poly.test
    assert len({item.name for item in both.train + both.test}) == len(both.train + both.test)


def test_another_seed_changes_the_split_but_not_the_defective_cells():
    pytest.importorskip("elpv_dataset")
    zero, one = (open_dataset("elpv", category="mono", split_seed=seed) for seed in (0, 1))
    assert zero.train != one.train
    assert [i for i in zero.test if i.label == 1] == [i for i in one.test if i.label == 1]


def test_cells_decode_and_have_no_masks():
    pytest.importorskip("elpv_dataset")
    images = Images(open_dataset("elpv", category="mono").test, 32)
    defective = [item.label for item in images.items].index(1)
    assert images[defective].std() > 0.02
    assert images.mask(defective) is None


@pytest.mark.parametrize("category", [None, "amorphous"])
def test_an_unknown_category_lists_those_that_exist(category):
    with pytest.raises(ValueError, match=rf"one of mono, poly, both, got {category!r}"):
        open_dataset("elpv", category=category)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"elpv-dataset: pip install msflow-ext\[demo\]"):
        open_dataset("elpv", category="mono")
