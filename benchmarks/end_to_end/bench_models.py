"""Parameters, FLOPs, time and memory of an image and of a training step, by model and backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import run_in_pytest
from benchmarks.tables import MODEL_BATCH, MODEL_IMAGE, MODEL_STEP
from msflow_ext import FastFlow, MSFlow
from msflow_ext.bench import Case, Provider
from msflow_ext.bench.cases import BF16, FP32, our_step
from msflow_ext.choices import Precision
from msflow_ext.training.recipe import PRESETS

Pair = tuple[str, str, int | None, dict[str, Any]]
MODELS: dict[str, Callable[..., Any]] = {"msflow": MSFlow, "fastflow": FastFlow}

#: Model, backbone, side of the images in pixels (None for that of the preset), further arguments.
PAIRS: Sequence[Pair] = (
    ("msflow", "efficientnet_lite0", 192, {}),
    ("msflow", "resnet18", 256, {}),
    ("msflow", "wide_resnet50_2", None, {}),
    ("msflow", "deit_base_distilled_patch16_384", None, {}),
    ("fastflow", "efficientnet_lite0", 192, {}),
    ("fastflow", "resnet18", None, {}),
    ("fastflow", "wide_resnet50_2", None, {}),
    ("fastflow", "deit_base_distilled_patch16_384", None, {}),
    ("fastflow", "cait_m48_448", None, {}),
)
TOYS: Sequence[Pair] = (
    ("msflow", "test_resnet", 64, {"blocks": (1, 1, 1), "cond_channels": 8}),
    ("fastflow", "test_vit", 64, {"steps": 2}),
)


def test_models(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    return [make(pair) for pair in (TOYS if quick else PAIRS) for make in (image, step)]


def image(pair: Pair) -> Case:
    """Return the case from an image to score and map."""
    key = (*pair[:3], tuple(pair[3].items()))

    def inputs() -> list[Tensor]:
        size = build(*key).image_size
        return [torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))]

    return Case(
        name=f"{MODEL_IMAGE} {label(pair)}",
        inputs=inputs,
        providers={
            "ours eager fp32": Provider(lambda: build(*key), FP32),
            "ours optimized fp32": Provider(lambda: build(*key).optimize(), FP32),
            "ours optimized bf16": Provider(lambda: build(*key).optimize(torch.bfloat16), BF16),
        },
        expected="ours eager fp32",
        memory=True,
        facts=lambda: facts(build(*key)),
    )


def step(pair: Pair) -> Case:
    """Return the case of loss, gradients and Adam on the cached features of a batch."""
    key = (*pair[:3], tuple(pair[3].items()))
    recipe = PRESETS["paper"][pair[0]].recipe

    def inputs() -> list[Any]:
        model = build(*key)
        generator = torch.Generator().manual_seed(0)
        shapes = [f.shape[1:] for f in model.features(blank(model))]
        return [[torch.randn(MODEL_BATCH, *shape, generator=generator) for shape in shapes]]

    def run(precision: Precision) -> Callable[..., Any]:
        head = build.__wrapped__(*key).head.train().requires_grad_(True)
        return our_step(head, precision, recipe)

    return Case(
        name=f"{MODEL_STEP} {label(pair)}",
        inputs=inputs,
        providers={
            "ours fp32": Provider(lambda: run("float32"), FP32),
            "ours bf16": Provider(lambda: run("bfloat16"), BF16, bf16=True),
        },
        expected="ours fp32",
        hot=True,
        grad=True,
        rounds=3,
        memory=True,
    )


def facts(model: Any) -> dict[str, int]:
    """Return the numbers of trained and of frozen parameters, and of floating-point operations for an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(blank(model))
    trained, frozen = (sum(p.numel() for p in m.parameters()) for m in (model.head, model.backbone))
    return {"trained": trained, "frozen": frozen, "flops": counter.get_total_flops()}


def blank(model: Any) -> Tensor:
    return torch.zeros(1, 3, model.image_size, model.image_size)


def label(pair: Pair) -> str:
    model, backbone, size, _ = pair
    return f"{MODELS[model].__name__} {backbone}" + (f" {size} px" if size else "")


@lru_cache(maxsize=1)
def build(model: str, backbone: str, size: int | None, options: tuple[tuple[str, Any], ...]) -> Any:
    """Return a model whose backbone has random weights; one is in memory at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MODELS[model](backbone, image_size=size, pretrained=False, seed=0, **dict(options))
    return made.eval().requires_grad_(False)
