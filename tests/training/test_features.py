"""Features are cached where the recipe says, and training does not depend on the place."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from msflow_ext.data import DataSet, Images, Item
from msflow_ext.features import Features
from msflow_ext.training import loop
from msflow_ext.training.loop import Recipe, train, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


def test_training_with_features_on_disk_is_bit_identical_and_leaves_no_file(
    tmp_path, squares, finished_run, build_model, same_weights
):
    run = tmp_path / "run"
    train(build_model(), squares, run, Recipe(epochs=2, batch_size=4, cache="disk"), device="cpu")
    assert same_weights(run, finished_run)
    assert not list(run.glob("*.cache"))


def test_features_that_do_not_fit_in_memory_are_cached_on_disk(
    tmp_path, monkeypatch, caplog, squares, finished_run, build_model, same_weights
):
    from msflow_ext import features

    run, seen, recipe = tmp_path / "run", [], Recipe(epochs=2, batch_size=4)
    trained = train_epoch

    def record(*args, **kwargs):
        seen.extend(path.name for path in run.glob("*.cache"))
        return trained(*args, **kwargs)

    images = Features(
        build_model(), Images(squares.train, SIZE)
    ).nbytes  # test images need the same
    caplog.set_level("INFO", logger="msflow_ext")
    monkeypatch.setattr(loop, "train_epoch", record)
    for free, place in ((2 * images, "memory"), (2 * images - 2, "disk")):
        monkeypatch.setattr(features, "free_memory", lambda free=free: free)
        train(build_model(), squares, run, recipe, device="cpu", overwrite=True)
        assert same_weights(run, finished_run)
        assert f"(cache: {place})" in caplog.text
        assert (len(seen) > 0) == (place == "disk")
    assert set(seen) == {"features-training.cache", "features-test.cache"}
    assert not list(run.glob("*.cache"))


def test_training_without_a_cache_gives_the_same_losses(
    tmp_path, squares, finished_run, build_model
):
    recipe = Recipe(epochs=2, batch_size=4, cache="off")
    metrics = train(build_model(), squares, tmp_path / "run", recipe, device="cpu")
    expected = json.loads((finished_run / "metrics.json").read_text())["losses"]
    assert metrics["losses"] == pytest.approx(expected, rel=1e-4)


def test_standardized_features_have_mean_0_and_deviation_1_also_in_the_model(squares, build_model):
    model, images = build_model(), Images(squares.train, 64)
    features = Features(model, images)
    features.standardize()
    everything = torch.arange(len(images))
    for maps, anew in zip(
        features[everything], Features(model, images, cache="off")[everything], strict=True
    ):
        torch.testing.assert_close(maps, anew, rtol=1e-3, atol=1e-3)
        spread = maps.transpose(0, 1).flatten(1)
        torch.testing.assert_close(spread.mean(1), torch.zeros(len(spread)), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            spread.std(1, correction=0), torch.ones(len(spread)), atol=1e-3, rtol=0
        )


def test_features_that_are_not_finite_name_their_image(squares, build_model):
    model = build_model()
    model.backbone.mean.fill_(math.nan)
    with pytest.raises(ValueError, match="features of image train/good/0 must be finite, got NaN"):
        Features(model, Images(squares.train, 64))


def test_a_cache_that_does_not_fit_on_the_disk_is_refused(
    tmp_path, monkeypatch, squares, build_model
):
    from msflow_ext import features

    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    file = tmp_path / "features"
    with pytest.raises(
        OSError, match=r"features cannot be written: it needs [\d,]+ bytes, the disk has 100 free"
    ):
        Features(build_model(), Images(squares.train, 64), cache="disk", file=file)
    assert not file.exists()


def test_a_mask_of_the_wrong_size_is_refused_before_training(tmp_path, squares, build_model):
    bad = Item("square/9", 1, "square", np.zeros((64, 64), np.uint8), np.ones((32, 32), bool))
    data = DataSet("squares", "white", squares.train, (*squares.test, bad))
    with pytest.raises(ValueError, match=r"64x64 pixels, got 32x32"):
        train(build_model(), data, tmp_path / "run", Recipe(epochs=1), device="cpu")
    assert not (tmp_path / "run" / "model.safetensors").exists()
