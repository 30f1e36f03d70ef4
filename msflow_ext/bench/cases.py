"""Comparisons of the flows, the whole pipeline and a training step with alternatives that users would run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from msflow_ext.bench.harness import Case, Provider
from msflow_ext.bench.modes import autocast, compiled, freezing
from msflow_ext.bench.reference import ReferenceMSFlow, predict
from msflow_ext.choices import Memory, Precision
from msflow_ext.models.base import FlowHead
from msflow_ext.models.msflow import MSFlow
from msflow_ext.models.msflow_head import MSFlowHead
from msflow_ext.training.recipe import Recipe

#: Name of the reference implementation: on FrEIA's blocks, or in plain PyTorch if FrEIA is not installed.
REFERENCE = "reference" if importlib.util.find_spec("FrEIA") else "eager"
FP32, BF16 = 1e-4, 5e-2  # tolerances of a whole network; see Provider.tolerance
CHANNELS, BLOCKS = (256, 512, 1024), (2, 5, 8)  # of wide_resnet50_2, and as in the paper


def flows(
    size: int = 512,
    batch: int = 1,
    *,
    channels: Sequence[int] = CHANNELS,
    blocks: Sequence[int] = BLOCKS,
) -> Case:
    """Return the case that computes latent tensors and log-determinant from pooled features of images."""
    maps = _map_sizes(size, len(channels))
    head = (tuple(channels), tuple(blocks))

    def theirs(permutation: str, layout: torch.memory_format) -> Callable[..., Any]:
        flows = _reference_flows(*head, maps, permutation)
        if layout is torch.channels_last:
            flows = copy.deepcopy(flows).to(memory_format=layout)  # type: ignore[call-overload]
        return lambda features: flows([f.contiguous(memory_format=layout) for f in features])

    return Case(
        name=f"flows {size} px b{batch}",
        inputs=lambda: [_features(channels, maps, batch)],
        providers={**_theirs(theirs), **_ours(lambda: _head(*head))},
        expected="eager fp32",
        memory=True,
    )


def pipeline(
    size: int = 512,
    batch: int = 1,
    *,
    backbone: str = "wide_resnet50_2",
    blocks: Sequence[int] = BLOCKS,
) -> Case:
    """Return the case from images to scores and maps, with random weights and a backbone that pads by reflection."""
    key = (backbone, size, tuple(blocks))

    def theirs(permutation: str, layout: torch.memory_format) -> Callable[..., Any]:
        return _reference_pipeline(_model(*key), permutation, layout)

    return Case(
        name=f"pipeline {backbone} {size} px b{batch}",
        inputs=lambda: [torch.rand(batch, 3, size, size)],
        providers={**_theirs(theirs), **_ours(lambda: _model(*key))},
        expected="eager fp32",
        memory=True,
    )


def training_step(
    size: int = 512,
    batch: int = 8,
    *,
    channels: Sequence[int] = CHANNELS,
    blocks: Sequence[int] = BLOCKS,
) -> Case:
    """Return the case of loss, gradients, clipping and Adam on pooled features, which compares loss and gradient norm."""
    maps = _map_sizes(size, len(channels))
    head = (tuple(channels), tuple(blocks))

    def theirs(permutation: str, *, bf16: bool = False, slow: bool = False, **options: Any):
        def make() -> Callable[..., Any]:
            new = ReferenceMSFlow(_new_head(*head), maps, permutation)
            return _their_step(new, bf16=bf16, compile=slow, **options)

        return Provider(make, BF16 if bf16 else FP32, slow, bf16)

    def ours(*, bf16: bool = False, memory: Memory = "lean") -> Provider:
        def make() -> Callable[..., Any]:
            new = _new_head(*head)
            new.memory = memory
            return our_step(new, "bfloat16" if bf16 else "float32")

        return Provider(make, BF16 if bf16 else FP32, bf16=bf16)

    permutation = "dense" if REFERENCE == "reference" else "index"
    return Case(
        name=f"training step {'-'.join(map(str, channels))} {size} px b{batch}",
        inputs=lambda: [_features(channels, maps, batch)],
        providers={
            f"{REFERENCE} fp32": theirs(permutation),
            f"{REFERENCE} bf16": theirs(permutation, bf16=True),
            "eager bf16 tuned": theirs("index", bf16=True, tuned=True),
            "compile fp32": theirs("index", slow=True),
            "compile bf16": theirs("index", bf16=True, slow=True),
            "ours fp32": ours(),
            "ours reversible fp32": ours(memory="reversible"),
            "ours bf16": ours(bf16=True),
        },
        expected=f"{REFERENCE} fp32",
        hot=True,
        grad=True,
        calls=3,
        rounds=3,
        memory=True,
    )


def our_step(
    head: FlowHead, precision: Precision, recipe: Recipe | None = None
) -> Callable[[Sequence[Tensor]], tuple[float, float]]:
    """Return a training step as in :func:`msflow_ext.training.train`."""
    from msflow_ext.training import make_optimizer, train_epoch

    recipe = recipe or Recipe()
    adam = make_optimizer(head, recipe.weight_decay)
    adam.param_groups[0]["lr"] = recipe.lr

    def run(features: Sequence[Tensor]) -> tuple[float, float]:
        (step,) = train_epoch(head, adam, [list(features)], clip=recipe.clip, precision=precision)
        return step

    return run


def _theirs(make: Callable[[str, torch.memory_format], Callable[..., Any]]) -> dict[str, Provider]:
    """Return the reference implementation with both permutations, in the PyTorch modes that users choose."""

    def provider(
        permutation: str, *modes: Callable[..., Any], last: bool = False, **options: Any
    ) -> Provider:
        def build() -> Callable[..., Any]:
            run = make(permutation, torch.channels_last if last else torch.contiguous_format)
            for mode in modes:
                run = mode(run)
            return run

        bf16 = autocast in modes
        return Provider(build, BF16 if bf16 else FP32, bf16=bf16, **options)

    reference = {
        "reference fp32": provider("dense"),
        "reference bf16": provider("dense", autocast),
    }
    return {
        "eager fp32": provider("index"),
        "eager bf16": provider("index", autocast),
        "eager bf16 channels_last": provider("index", autocast, last=True),
        **(reference if REFERENCE == "reference" else {}),
        "compile fp32": provider("index", compiled, slow=True),
        "compile bf16": provider("index", autocast, compiled, slow=True),
        "compile+freezing fp32": provider("index", freezing, slow=True),
        "compile+freezing bf16": provider("index", autocast, freezing, slow=True),
    }


def _ours(module: Callable[[], Any]) -> dict[str, Provider]:
    return {
        "ours eager fp32": Provider(module, FP32),
        "ours optimized fp32": Provider(lambda: module().optimize(), FP32),
        "ours optimized bf16": Provider(lambda: module().optimize(torch.bfloat16), BF16),
    }


def _map_sizes(size: int, scales: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes of pooled features, with strides 8, 16, 32 and so on."""
    return tuple((size // 2 ** (3 + i),) * 2 for i in range(scales))


def _features(channels: Sequence[int], maps: Sequence[tuple[int, int]], batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, *hw, generator=generator)
        for c, hw in zip(channels, maps, strict=True)
    ]


def _new_head(channels: Sequence[int], blocks: Sequence[int]) -> MSFlowHead:
    return MSFlowHead(channels, blocks=blocks, seed=0)


@lru_cache(maxsize=1)
def _head(channels: Sequence[int], blocks: Sequence[int]) -> MSFlowHead:
    return _new_head(channels, blocks).eval().requires_grad_(False)


@lru_cache(maxsize=2)
def _reference_flows(
    channels: Sequence[int],
    blocks: Sequence[int],
    maps: Sequence[tuple[int, int]],
    permutation: str,
) -> ReferenceMSFlow:
    reference = ReferenceMSFlow(_head(channels, blocks), maps, permutation)
    return reference.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _model(backbone: str, size: int, blocks: Sequence[int]) -> MSFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MSFlow(
            backbone,
            image_size=size,
            pretrained=False,
            blocks=blocks,
            padding_mode="reflect",
            standardize=False,
            score="paper",
            seed=0,
        )
    return model.eval().requires_grad_(False)


def _reference_pipeline(
    model: MSFlow, permutation: str, layout: torch.memory_format
) -> Callable[[Tensor], Any]:
    """Return the pipeline of timm's backbone, pooling, and the reference flows and scores."""
    size = model.image_size
    maps = [f.shape[2:] for f in model.features(torch.zeros(1, 3, size, size))]
    flows = ReferenceMSFlow(model.head, maps, permutation).eval().requires_grad_(False)
    if layout is torch.channels_last:
        flows = flows.to(memory_format=layout)  # type: ignore[call-overload]
        model = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]

    def run(images: Tensor) -> Any:
        features = model.features(images.contiguous(memory_format=layout))
        return predict(flows.log_likelihood(features), size)

    return run


def _their_step(
    flows: ReferenceMSFlow, *, bf16: bool, compile: bool = False, tuned: bool = False
) -> Callable[[Sequence[Tensor]], tuple[float, float]]:
    """Return a step of the reference implementation; ``tuned`` adds channels_last and PyTorch's fused Adam."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    flows = flows.train().to(memory_format=layout)  # type: ignore[call-overload]
    parameters = [p for p in flows.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=tuned)
    loss_of = compiled(flows.loss) if compile else flows.loss

    def run(features: Sequence[Tensor]) -> tuple[float, float]:
        features = [f.contiguous(memory_format=layout) for f in features]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(features)
        loss.backward()
        norm = clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return run
