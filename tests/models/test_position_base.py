"""The Gaussians behind a flow against their definition in numpy, and in the models that take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from msflow_ext import FastFlow, MSFlow, load, ops
from msflow_ext.data import DataSet, Item
from msflow_ext.models.position_base import RIDGE, PositionBase
from msflow_ext.recipe import Recipe
from msflow_ext.training import train

SIZES = [(3, 2), (1, 1)]


def latents(images: int, seed: int = 0) -> list[Tensor]:
    """Correlated maps of two scales, each position about its own mean."""
    rng = torch.Generator().manual_seed(seed)
    where = torch.Generator().manual_seed(9)
    return [
        torch.randn(images, c, *size, generator=rng, dtype=torch.float64).cumsum(1)
        + 5 * torch.randn(c, *size, generator=where, dtype=torch.float64)
        for c, size in zip((4, 5), SIZES, strict=True)
    ]


@pytest.mark.parametrize("batch", [1, 7, 20])
def test_it_whitens_every_position_by_its_own_gaussian_for_any_batch_size(batch: int) -> None:
    train_z, test_z = latents(20), latents(3, seed=1)
    base = PositionBase((4, 5), SIZES).double()
    base.fit(zip(*(z.split(batch) for z in train_z), strict=True))
    for x, y, got in zip(train_z, test_z, base(test_z), strict=True):
        assert got.shape == y.shape
        for i, j in np.ndindex(*x.shape[2:]):
            seen = x[:, :, i, j].numpy()
            covariance = np.cov(seen.T) + RIDGE * np.eye(x.shape[1])
            wanted = np.linalg.solve(
                np.linalg.cholesky(covariance), (y[:, :, i, j].numpy() - seen.mean(0)).T
            )
            np.testing.assert_allclose(got[:, :, i, j].T, (1 + RIDGE) ** 0.5 * wanted, 1e-9, 1e-9)


def test_before_it_is_fitted_it_changes_nothing_and_one_image_is_too_few() -> None:
    base, z = PositionBase((4, 5), SIZES).double(), latents(2)
    assert all(torch.equal(a, b) for a, b in zip(base(z), z, strict=True))
    for too_few in ([], [latents(1)]):
        with pytest.raises(ValueError, match="must hold at least two images"):
            base.fit(too_few)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MSFlow, {"blocks": (1, 1), "cond_channels": 8, "score": "nll"}),
        (MSFlow, {"backbone": "test_vit", "blocks": (1, 1), "cond_channels": 8}),
        (FastFlow, {"steps": 1}),
    ],
    ids=["msflow", "msflow-transformer", "fastflow"],
)
def test_a_model_trains_tests_keeps_and_applies_it(
    kind: type, options: dict, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    items = [Item(f"{i}", i % 2, "", rng.integers(0, 255, (64, 64), np.uint8)) for i in range(8)]
    data = DataSet("noise", "gray", tuple(items[:4]), tuple(items[4:]))
    options = {"backbone": "test_resnet", "image_size": 64, **options}
    model = kind(**options, pretrained=False, position_base=True, seed=0)
    train(model, data, tmp_path, Recipe(epochs=1, batch_size=3), device="cpu")
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    got, z = model(images), model.base(model.head(features).z)
    wanted = [ops.log_likelihood_map(t) for t in z]
    plain = model.head.log_likelihood(features)
    for a, b, c in zip(got.log_likelihood, wanted, plain, strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(b, c, rtol=0.01)
    again = load(tmp_path, "cpu").model
    assert torch.equal(again(images).anomaly_map, got.anomaly_map)
    form = model.optimize()
    torch.testing.assert_close(form(images).score, got.score, rtol=1e-3, atol=1e-4)
