"""Anomaly map of standardized, softly limited scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from msflow_ext import FastFlow, MSFlow, ops
from msflow_ext.models.anomaly_map import ClampedMap

OPTIONS = {"image_size": 64, "pretrained": False, "blocks": (1, 1), "cond_channels": 8, "seed": 0}


def build(**options: object) -> MSFlow:
    model = MSFlow(
        "test_resnet",
        **{**OPTIONS, "anomaly_map": "clamped", **options},
    )  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.head.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_the_clamped_map_sums_standardized_scales_limited_to_eight() -> None:
    model = build()
    normal, odd = model.features(images(5, 0)), model.features(images(2, 1))
    odd[0][1, :, 3, 4] += 1000
    model.fit_map(zip(*(f.split(2) for f in normal), strict=True))
    got = model.predict_features(odd)
    expected = torch.zeros(2, 64, 64)
    usual, unusual = model.head.log_likelihood(normal), model.head.log_likelihood(odd)
    for a, b in zip(usual, unusual, strict=True):
        standard = (a.mean() - b) / a.std(correction=0)
        share = torch.where(standard < 0, standard, 8 * torch.sin(torch.atan(standard / 8)))
        expected += F.interpolate(share[:, None], (64, 64), mode="bilinear", align_corners=True)[
            :, 0
        ]
    torch.testing.assert_close(got.anomaly_map, expected, rtol=1e-4, atol=1e-3)
    assert got.anomaly_map.max() <= 16
    assert torch.equal(got.score, ops.aggregate(unusual, 64).log_score)
    assert unusual[0].min() < 100 * usual[0].min()


def test_the_clamped_map_keeps_the_order_of_large_values() -> None:
    clamped = ClampedMap(1)
    heights = -torch.tensor([9.0, 8.0, 40.0, 400.0, 4000.0, 8000.0])
    maps = [heights.reshape(-1, 1, 1).expand(-1, 4, 4)]
    values = clamped(maps, 4).amax((1, 2))
    assert values.argsort().tolist() == [1, 0, 2, 3, 4, 5]
    assert values.unique().numel() == 6
    assert values.max() < 8


@pytest.mark.parametrize("smoothing", [0.3, 4.0, 25.0])
def test_smoothing_equals_a_gaussian_filter_over_the_map(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grids = ((20, 13), (10, 7), (3, 3), (1, 2))
    maps = [20 * torch.randn(2, *grid, dtype=torch.float64, generator=generator) for grid in grids]
    plain, smooth = (ClampedMap(len(grids), each)(maps, 48) for each in (0.0, smoothing))
    expected = gaussian_filter(
        plain.numpy(), smoothing, axes=(1, 2), mode="nearest", radius=math.ceil(4 * smoothing)
    )
    torch.testing.assert_close(smooth, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert (smooth - plain).abs().max() > 0.1
    again = MSFlow(**build(smoothing=smoothing).config, pretrained=False)
    assert again.clamped is not None and again.clamped.smoothing == smoothing


@pytest.mark.parametrize("anomaly_map", ["paper", "clamped"])
def test_the_score_map_is_the_top_k_mean_of_the_anomaly_map(anomaly_map) -> None:
    options = {"anomaly_map": anomaly_map, "score": "map", "top_k": 0.01}
    fast: Any = {"image_size": 64, "pretrained": False, "steps": 1, "seed": 0}
    for model in (build(**options), FastFlow("test_resnet", **fast, **options)):
        model.fit_map([model.features(images(3, 0))])
        got = model(images(2, 1))
        top_k_mean = got.anomaly_map.flatten(1).sort(descending=True).values[:, : 64 * 64 // 100]
        torch.testing.assert_close(got.score, top_k_mean.mean(1))


def test_statistics_of_the_clamped_map_are_saved_with_the_weights() -> None:
    model = build()
    model.fit_map([model.features(images(3, 0))])
    again = MSFlow(**model.config, pretrained=False)
    again.load_state_dict(model.state_dict())
    one = images(1, 2)
    assert torch.equal(again(one).anomaly_map, model(one).anomaly_map)
    plain = build(anomaly_map="paper").state_dict()
    assert not any(name.startswith("clamped") for name in plain)


def test_fastflow_can_use_the_clamped_map() -> None:
    options = {"image_size": 64, "pretrained": False, "steps": 1, "seed": 0}
    model = FastFlow("test_resnet", anomaly_map="clamped", **options)  # type: ignore[arg-type]
    paper = FastFlow("test_resnet", **options)  # type: ignore[arg-type]
    paper.load_state_dict(model.state_dict(), strict=False)
    features = model.features(images(3, 0))
    model.fit_map([features])
    got, plain = model.predict_features(features), paper.predict_features(features)
    assert torch.equal(got.score, plain.score)
    assert torch.equal(got.image_map, plain.anomaly_map)
    assert model.clamped is not None
    assert torch.equal(got.anomaly_map, model.clamped(got.log_likelihood, 64))


def test_an_unknown_anomaly_map_is_refused() -> None:
    with pytest.raises(ValueError, match="anomaly_map must be one of paper, clamped, got 'sum'"):
        build(anomaly_map="sum")


def test_a_smoothing_out_of_range_or_without_a_clamped_map_is_refused() -> None:
    for wrong in (-1.0, math.nan, 64.0):
        with pytest.raises(
            ValueError, match=r"smoothing must be in \[0, image_size 64\) pixels, got"
        ):
            build(smoothing=wrong)
    with pytest.raises(
        ValueError, match=r"must be 0 unless anomaly_map is 'clamped', got 4\.0 and 'paper'"
    ):
        build(smoothing=4.0, anomaly_map="paper")
