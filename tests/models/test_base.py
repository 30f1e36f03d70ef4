"""Models refuse images outside 0..1, but traced and exported graphs do not check them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from msflow_ext import FastFlow, MSFlow
from msflow_ext.models.base import AnomalyModel

pytestmark = pytest.mark.family("value ranges")

SIZE = 64
IMAGES = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
WRONG = {  # images, and their range in the error
    "0..255": (IMAGES * 255, r"[\d.e-]+\.\.255"),
    "normalized": ((IMAGES - MEAN) / STD, r"-2\.12\.\.2\.64"),
    "-1..1": (2 * IMAGES - 1, r"-1\.\.1"),
    "slightly above": (IMAGES * 1.01, r"[\d.e-]+\.\.1\.01"),
    "slightly below": (IMAGES - 0.01, r"-0\.0\d+\.\.0\.9\d+"),
    "infinite": (torch.where(IMAGES > 0.5, torch.inf, IMAGES), r"[\d.e-]+\.\.inf"),
    "NaN": (torch.where(IMAGES > 0.5, torch.nan, IMAGES), r"nan\.\.nan"),
}
KINDS: tuple[Any, ...] = (MSFlow, FastFlow)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> AnomalyModel:
    options: dict[str, Any] = (
        {"blocks": (1, 1, 1), "cond_channels": 8} if request.param is MSFlow else {"steps": 2}
    )
    small = request.param("test_efficientnet", image_size=SIZE, pretrained=False, seed=1, **options)
    return small.eval()


@pytest.mark.parametrize("case", WRONG)
def test_a_model_refuses_images_outside_0_to_1_and_says_their_range(
    model: AnomalyModel, case: str
) -> None:
    images, told = WRONG[case]
    for call in (model, model.loss, model.features, model.plain_features):
        with pytest.raises(ValueError, match=rf"^images must be RGB in 0\.\.1, got {told}$"):
            call(images)


def test_an_optimized_model_refuses_images_outside_0_to_1(model: AnomalyModel) -> None:
    fast = model.optimize()
    with pytest.raises(ValueError, match=r"images must be RGB in 0\.\.1, got -1\.\.1"):
        fast(WRONG["-1..1"][0])


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        torch.zeros_like(IMAGES),
        torch.ones_like(IMAGES),
        IMAGES * (1 + 1e-4) - 5e-5,
        IMAGES.to(memory_format=torch.channels_last),
        IMAGES.bfloat16().float(),
    ],
    ids=["0..1", "black", "white", "rounded", "channels_last", "bfloat16"],
)
def test_images_in_0_to_1_are_accepted(model: AnomalyModel, images: Tensor) -> None:
    assert model.loss(images).isfinite()
    assert model(images).score.isfinite().all()


class Scores(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).score


def test_graphs_of_a_model_do_not_check_values(model: AnomalyModel) -> None:
    plain = Scores(model)
    expected = plain(IMAGES)
    with torch.no_grad():
        traced: Any = make_fx(lambda images: model.plain_features(images))(IMAGES)
        program: Any = torch.export.export(plain, (IMAGES,), strict=False).module()
    for graph in (traced, program):
        assert "conv" in str(graph.graph)
        assert "aminmax" not in str(graph.graph)
    assert traced(WRONG["-1..1"][0])[0].shape[0] == 2
    torch.testing.assert_close(program(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert program(WRONG["-1..1"][0]).shape == (2,)  # the graph does not check


@pytest.mark.slow
def test_a_compiled_model_is_one_graph(model: AnomalyModel) -> None:
    features = torch.compile(model.plain_features, backend="eager", fullgraph=True)
    for found, expected in zip(features(IMAGES), model.plain_features(IMAGES), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [MSFlow, FastFlow])
@pytest.mark.parametrize("image_size", [(64, 64), 64.0, "64", [64]], ids=str)
def test_an_image_size_that_is_no_whole_number_is_refused_by_name(kind, image_size) -> None:
    with pytest.raises((TypeError, ValueError), match="image_size must be"):
        kind("test_efficientnet", image_size=image_size, pretrained=False)
