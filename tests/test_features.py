"""Tests of the features: their cache has the precision of the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msflow_ext import MSFlow
from msflow_ext.choices import Cache
from msflow_ext.data import DataSet, Item
from msflow_ext.features import Features
from msflow_ext.training import Recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_training_in_bfloat16_caches_features_in_half_the_bytes(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    items = [Item(f"{i}", 0, "good", rng.integers(0, 255, (64, 64), np.uint8)) for i in range(5)]
    close, closed = Features.close, list[int]()

    def close_and_record(features: Features) -> None:
        closed.append(features.nbytes)
        close(features)

    monkeypatch.setattr(Features, "close", close_and_record)
    sizes = []
    for precision in ("float32", "bfloat16"):
        model = MSFlow(
            "test_resnet", image_size=64, pretrained=False, blocks=(1, 1), cond_channels=8
        )
        data = DataSet("noise", "gray", tuple(items[:3]), tuple(items[3:]))
        recipe = Recipe(epochs=1, batch_size=2, precision=precision, cache=cache)
        train(model, data, tmp_path / precision, recipe, device="cpu")
        sizes.append(sorted(closed))
        closed.clear()
    whole, half = sizes
    assert [2 * size for size in half] == whole
    assert sum(whole) > 0
