"""Whitening by Gaussians equals its definition in numpy, by itself and in a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext import FastFlow, MSFlow, load
from msflow_ext.choices import Cache
from msflow_ext.data import DataSet, Images, Item
from msflow_ext.features import Features
from msflow_ext.models import gaussians
from msflow_ext.models.gaussians import Whitening
from msflow_ext.training.loop import train
from msflow_ext.training.recipe import Recipe

SIZES = [(13, 5), (1, 1)]
SMALL = {"backbone": "test_resnet", "image_size": 64, "pretrained": False, "seed": 0}


def features(images: int, seed: int = 0, sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    """Return correlated maps of two scales, with a different mean at each position."""
    rng = torch.Generator().manual_seed(seed)
    where = torch.Generator().manual_seed(9)
    return [
        torch.randn(images, c, *size, generator=rng, dtype=torch.float64).cumsum(1)
        + 5 * torch.randn(c, *size, generator=where, dtype=torch.float64)
        for c, size in zip((4, 5), sizes, strict=True)
    ]


def noise() -> DataSet:
    rng = np.random.default_rng(0)
    items = [Item(f"{i}", i % 2, "", rng.integers(0, 255, (64, 64), np.uint8)) for i in range(8)]
    return DataSet("noise", "gray", tuple(items[:4]), tuple(items[4:]))


def by_cells(maps: Tensor, side: int) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
    """Return the positions of each cell, and its covariance about the means of the positions."""
    height, width = maps.shape[2:]
    for top, left in product(range(0, height, side), range(0, width, side)):
        rows, columns = range(top, min(top + side, height)), range(left, min(left + side, width))
        where = list(product(rows, columns))
        yield where, np.mean([np.cov(maps[:, :, i, j].numpy().T) for i, j in where], 0)


@pytest.mark.parametrize(("cells", "side"), [(2**20, 1), (21, 2), (0, 13)])
@pytest.mark.parametrize("batch", [1, 7, 20])
def test_whitening_equals_its_definition_in_numpy(
    batch: int, cells: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(13, 5), (3, 2)]
    monkeypatch.setattr(gaussians, "LIMIT", cells * 9**2)
    seen, unseen = features(20, sizes=sizes), features(3, seed=1, sizes=sizes)
    whitening = Whitening((4, 5), sizes).double()
    whitening.fit(zip(*(x.split(batch) for x in seen), strict=True))
    assert whitening.sides[0] == side
    for i, got in enumerate(whitening(unseen)):
        c = seen[i].shape[1]
        x, y = (
            torch.cat(
                [m[i], *(F.interpolate(u, m[i].shape[2:], mode="bilinear") for u in m[i + 1 :])], 1
            )
            for m in (seen, unseen)
        )
        width, each = x.shape[1], list(by_cells(x, whitening.sides[i]))
        usual = sum(len(where) * own for where, own in each) / x[0, 0].numel() + 0.1 * np.eye(width)
        for where, own in each:
            n = 20 * len(where)
            shrunk = (n * own + width * usual) / (n + width)
            slope = np.linalg.solve(shrunk[c:, c:], shrunk[c:, :c]).T
            root = np.real(scipy.linalg.sqrtm(shrunk[:c, :c] - slope @ shrunk[c:, :c]))
            for p, q in where:
                deviation = (y[:, :, p, q] - x[:, :, p, q].mean(0)).numpy().T
                expected = np.linalg.solve(root, deviation[:c] - slope @ deviation[c:])
                np.testing.assert_allclose(got[:, :, p, q].T, expected, 1e-9, 1e-9)


@pytest.mark.parametrize(
    ("channels", "finest", "megabytes"),
    [((24, 40, 112), 24, 15), ((256, 512, 1024), 64, 150)],
    ids=["efficientnet_lite0 at 192 px", "wide_resnet50_2 at 512 px"],
)
def test_whitening_needs_as_much_memory_as_documented(
    channels: tuple[int, ...], finest: int, megabytes: int
) -> None:
    whitening = Whitening(channels, [(finest // k, finest // k) for k in (1, 2, 4)])
    assert sum(b.nbytes for b in whitening.buffers()) / 1e6 == pytest.approx(megabytes, rel=0.15)


def test_unfitted_or_reset_whitening_is_the_identity_and_one_image_is_too_few() -> None:
    whitening, x = Whitening((4, 5), SIZES).double(), features(2)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whitening(x), x, strict=True))
        for too_few in ([], [features(1)]):
            with pytest.raises(ValueError, match="must hold at least two images"):
                whitening.fit(too_few)
        whitening.fit([x])
        assert not any(torch.allclose(a, b) for a, b in zip(whitening(x), x, strict=True))
        whitening.reset()


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"maps must have \(C, H, W\) = \[\(4, 13, 5\), .* got \[\(4, 5, 13\), "
    ):
        Whitening((4, 5), SIZES)([features(2)[0].mT, features(2)[1]])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "off"])
@pytest.mark.parametrize("kind", [MSFlow, FastFlow])
def test_new_images_are_whitened_by_the_training_images_of_the_last_training(
    kind: type, cache: Cache, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # the weights of the backbone
    options = {**SMALL, "standardize": True, "whiten": True}
    model, recipe = kind(**options), Recipe(epochs=1, batch_size=3, cache=cache)
    for run in ("first", "again"):  # the first training must not count
        train(model, noise(), tmp_path / run, recipe, device="cpu")
    images = Images(noise().train, 64)
    standardized = plain_features(model, images)[torch.arange(4)]
    expected = whitened_by(standardized, standardized)
    again = load(tmp_path / "again", "cpu").model
    got = again.features(torch.stack([images[i] for i in range(4)]))
    for a, b, c in zip(got, expected, standardized, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(b, c, atol=0.1)
    one = images[0][None]
    torch.testing.assert_close(again(one).score, model.optimize()(one).score, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_training_images_are_whitened_by_the_others(cache: Cache) -> None:
    torch.manual_seed(0)
    model = MSFlow(**SMALL, standardize=True, whiten=True)
    images = Images([*noise().train, *noise().test[:3]], 64)
    features = Features(model, images, cache=cache)
    features.standardize(batch_size=3)
    standardized = plain_features(model, images)[torch.arange(7)]
    number = torch.arange(7)
    got = features[torch.tensor([6, 0, 5, 3])]
    for row, i in enumerate((6, 0, 5, 3)):
        others = [x[number % 5 != i % 5] for x in standardized]
        expected = whitened_by(others, [x[i : i + 1] for x in standardized])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-3, atol=1e-3)
    new = model.features(images[0][None])
    for a, b in zip(new, whitened_by(standardized, [x[:1] for x in standardized]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_whitening_refuses_two_training_images() -> None:
    model = MSFlow(**SMALL, standardize=True, whiten=True)
    with pytest.raises(ValueError, match="whiten must have at least 3 training images, got 2"):
        Features(model, Images(noise().train[:2], 64)).standardize()


def plain_features(model: Any, images: Images) -> Features:
    """Return the standardized features of the same backbone, not whitened."""
    plain = type(model)(**{**SMALL, "standardize": True})
    plain.backbone = model.backbone
    features = Features(plain, images)
    features.standardize()
    return features


def whitened_by(seen: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
    whitening = Whitening([x.size(1) for x in seen], [(x.size(2), x.size(3)) for x in seen])
    whitening.fit([seen])
    return whitening(maps)


def test_whitening_needs_standardized_features() -> None:
    with pytest.raises(ValueError, match="standardize must be True if whiten is True, got False"):
        MSFlow(**SMALL, standardize=False, whiten=True)
