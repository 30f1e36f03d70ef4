"""The variants of the ablations, which differ from a paper or a preset in single settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext import FastFlow, MSFlow
from msflow_ext.models.msflow_head import FusionFlow
from msflow_ext.training.recipe import PRESETS, Recipe

PAPER, FASTFLOW = PRESETS["paper"]["msflow"].recipe, PRESETS["paper"]["fastflow"].recipe
ROBUST, FASTFLOW_ROBUST = (PRESETS["robust"][model] for model in ("msflow", "fastflow"))

#: Subnets of FastFlow with as many hidden as input channels, as for wide backbones.
AS_WIDE: dict[str, Any] = {"hidden_ratio": 1.0}


@dataclass(frozen=True)
class Variant:
    """A model and its training.

    Attributes:
        model: class of the model.
        arguments: arguments of the model.
        recipe: recipe of the training.
        change: changes the model before training.
        epochs: number of epochs, by default that of the data set.
    """

    model: Callable[..., Any] = MSFlow
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = PAPER
    change: Callable[[Any], None] | None = None
    epochs: int | None = None


#: Settings of the robust preset before whitening was added; most variants are relative to this one.
PLAIN: dict[str, Any] = {"lr": 2e-3, "noise": 0.0}


def robust(arguments: Mapping[str, Any] | None = None, **changes: Any) -> Variant:
    """Return MSFlow's robust preset without whitening, with these arguments and changes of the recipe."""
    whole = {**ROBUST.model, "whiten": False, **(arguments or {})}
    return Variant(arguments=whole, recipe=replace(ROBUST.recipe, **{**PLAIN, **changes}))


def variants() -> dict[str, Variant]:
    """Return the variants by name. A name is the key of rows of results, so it must not be reused."""
    return {
        "MSFlow paper": Variant(),
        "no fusion flow": Variant(change=without_fusion),
        "no condition": Variant(change=without_condition),
        "blocks 5 5 5": Variant(arguments={"blocks": (5, 5, 5)}),
        "blocks 8 5 2": Variant(arguments={"blocks": (8, 5, 2)}),
        "reflect padding": Variant(change=reflect),
        "stride 32": Variant(arguments={"blocks": (2, 5, 8, 8)}),
        "MSFlow robust": robust(),
        "MSFlow robust, whitened across scales": Variant(
            arguments=ROBUST.model, recipe=ROBUST.recipe
        ),
        "robust, batch 16": robust(batch_size=16),
        "batch 16, stride 32": robust({"blocks": (1, 1, 2, 2)}, batch_size=16),
        "batch 16, noise 0.3": robust(batch_size=16, noise=0.3),
        "batch 16, stride 32, noise 0.3": robust(
            {"blocks": (1, 1, 2, 2)}, batch_size=16, noise=0.3
        ),
        "batch 16, weight decay 1e-4": robust(batch_size=16, weight_decay=1e-4),
        "batch 16, clamp 1": robust({"clamp": 1.0}, batch_size=16),
        "batch 16, learnable base": replace(robust(batch_size=16), change=with_learnable_base),
        "FastFlow paper": Variant(FastFlow, AS_WIDE, FASTFLOW),
        "FastFlow paper, 8 epochs": Variant(FastFlow, AS_WIDE, FASTFLOW, epochs=8),
        "FastFlow paper, 100 epochs": Variant(FastFlow, AS_WIDE, FASTFLOW, epochs=100),
        "FastFlow paper, subnets twice as wide": Variant(FastFlow, recipe=FASTFLOW),
        "FastFlow standardised, batch 8, 12 epochs": Variant(
            FastFlow, {"standardize": True, **AS_WIDE}, replace(FASTFLOW, batch_size=8), epochs=12
        ),
        "FastFlow, 2 steps, standardised, cosine": Variant(
            FastFlow,
            {"steps": 2, "standardize": True, **AS_WIDE},
            replace(ROBUST.recipe, batch_size=16, **PLAIN),
        ),
        "FastFlow, whitened across scales, no LayerNorm": Variant(
            FastFlow, {**FASTFLOW_ROBUST.model, **AS_WIDE}, FASTFLOW_ROBUST.recipe
        ),
        "FastFlow robust": Variant(FastFlow, FASTFLOW_ROBUST.model, FASTFLOW_ROBUST.recipe),
    }


def without_fusion(model: Any) -> None:
    """Remove the fusion flow, so that the results of the flows are the latent tensors."""

    class Apart(FusionFlow):
        def couple(self, halves: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
            z = [torch.cat(pair, 1) for pair in halves]
            return z, z[0].new_zeros(len(z[0]))

    model.head.fusion = Apart(model.head.channels, clamp=model.head.clamp).requires_grad_(False)


def without_condition(model: Any) -> None:
    """Remove the positional encoding from the subnets."""
    for flow in model.head.flows:
        for step in flow.steps:
            step.subnet.conv_cond.weight.requires_grad_(False).zero_()


def reflect(model: Any) -> None:
    """Make the backbone's convolutions pad by reflection, also those with uneven padding (TF-SAME)."""

    def mirrored(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
        borders: list[int] = []
        each = (x.shape[2:], layer.kernel_size, layer.stride, layer.padding)
        for side, kernel, stride, padding in reversed(list(zip(*each, strict=True))):
            both = 2 * int(padding) or max((-(-side // stride) - 1) * stride + kernel - side, 0)
            borders += [both // 2, both - both // 2]
        x = F.pad(x, borders, mode="reflect")
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)

    for layer in model.backbone.network.modules():
        if isinstance(layer, torch.nn.Conv2d) and max(layer.kernel_size) > 1:
            layer.forward = partial(mirrored, layer)  # type: ignore[method-assign]


def with_learnable_base(model: Any) -> None:
    """Add a mean and a scale for each latent channel at each position, trained with the flow."""
    head = model.head
    grids = [model.pooled_size(*grid) for grid in model.backbone.grids(model.image_size)]
    shapes = [(c, *grid) for c, grid in zip(head.channels, grids, strict=True)]
    head.base_mean, head.base_scale = (
        torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)
        for _ in range(2)
    )
    plain = head.forward

    def forward(features: Any) -> Any:
        out = plain(features)
        parts = zip(out.z, head.base_mean, head.base_scale, strict=True)
        z = [(t - mean) * scale.exp() for t, mean, scale in parts]
        return type(out)(z, out.log_det + sum(scale.sum() for scale in head.base_scale))

    head.forward = forward
