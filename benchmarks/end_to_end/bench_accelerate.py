"""Inference and a training step of the flows of anomalib's models, before and after ``accelerate``."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import msflow_ext
from benchmarks.harness import run_in_pytest
from msflow_ext.bench import Case, Provider
from msflow_ext.bench.cases import BF16, FP32
from msflow_ext.bench.modes import autocast, compiled

STRIDES = (4, 8, 16)
RESNET18, WIDE_RESNET50_2, TOY = (64, 128, 256), (256, 512, 1024), (8, 16)
ANOMALIB = importlib.util.find_spec("anomalib") is not None


def test_accelerate(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    """Return the cases, or none if anomalib is not installed."""
    if not ANOMALIB:
        return []
    if quick:
        toys = (("FastFlow toy", fast_flow), ("U-Flow toy", u_flow))
        return [case for name, make in toys for case in both(name, partial(make, TOY, 32), 2)]
    chosen = []
    for backbone, channels in (("resnet18", RESNET18), ("wide_resnet50_2", WIDE_RESNET50_2)):
        for batch in (1, 8):
            chosen += both(f"FastFlow {backbone} 256 px", partial(fast_flow, channels, 256), batch)
    return chosen + both("U-Flow resnet18 256 px", partial(u_flow, RESNET18, 256), 8)


def both(name: str, make: Callable[[], tuple[Any, list[Tensor]]], batch: int) -> list[Case]:
    """Return the cases of the forward pass and the training step of the flows that ``make`` returns with features."""
    model = lru_cache(maxsize=1)(make)

    def provider(wrap: Callable[..., Any], *, fast: bool, train: bool, **options: Any) -> Provider:
        def build() -> Callable[..., Any]:
            flows = copy.deepcopy(model()[0]).train(train)
            if fast:
                msflow_ext.accelerate(flows)
            return step(flows, wrap) if train else wrap(flows)

        bf16 = wrap is autocast
        return Provider(build, BF16 if bf16 else FP32, bf16=bf16, **options)

    def case(train: bool) -> Case:
        return Case(
            name=f"{'training step' if train else 'flows'} {name} b{batch}",
            inputs=lambda: [[torch.randn(batch, *x.shape[1:]) for x in model()[1]]],
            providers={
                "eager fp32": provider(plain, fast=False, train=train),
                "eager bf16": provider(autocast, fast=False, train=train),
                "compile fp32": provider(compiled, fast=False, train=train, slow=True),
                "ours fp32": provider(plain, fast=True, train=train),
                "ours bf16": provider(autocast, fast=True, train=train),
                "ours compile fp32": provider(compiled, fast=True, train=train, slow=True),
            },
            expected="eager fp32",
            hot=train,
            grad=train,
            calls=3 if train else 1,
            memory=True,
        )

    return [case(train=False), case(train=True)]


def plain(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` unchanged."""
    return run


def step(flows: nn.Module, wrap: Callable[..., Any]) -> Callable[..., tuple[float, float]]:
    """Return a training step with anomalib's settings, which returns loss and gradient norm."""
    parameters = [p for p in flows.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-5)
    run = wrap(flows)

    def train(features: Sequence[Tensor]) -> tuple[float, float]:
        z, log_det = run(features)
        loss = sum(0.5 * t.square().sum((1, 2, 3)).mean() for t in z) - log_det.mean()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        adam.step()
        adam.zero_grad()
        return loss.item(), norm.item()

    return train


class Parallel(nn.Module):
    """One chain per scale."""

    def __init__(self, chains: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        z, log_dets = zip(*(f(x) for f, x in zip(self.chains, features, strict=True)), strict=True)
        return list(z), torch.stack(log_dets).sum(0)


def fast_flow(channels: Sequence[int], size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return the chains that anomalib's FastFlow builds with its defaults, and features for them."""
    create = peer("fastflow").create_fast_flow_block
    features = [
        torch.zeros(1, c, size // s, size // s) for c, s in zip(channels, STRIDES, strict=False)
    ]
    chains = [
        create(list(x.shape[1:]), conv3x3_only=False, hidden_ratio=1.0, flow_steps=8)
        for x in features
    ]
    return Parallel(chains), features


def u_flow(channels: Sequence[int], size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return the graph that anomalib's U-Flow builds with its defaults, and features for it."""
    model = peer("uflow").UflowModel
    strides = STRIDES[: len(channels)]
    like: Any = SimpleNamespace(
        feature_extractor=SimpleNamespace(channels=channels, scale_factors=strides),
        input_size=(size, size),
        affine_clamp=2.0,
        affine_subnet_channels_ratio=1.0,
        permute_soft=False,
    )
    like.build_flow_stage = partial(model.build_flow_stage, like)
    features = [
        torch.zeros(1, c, size // s, size // s) for c, s in zip(channels, strides, strict=True)
    ]
    return model.build_flow(like, 4), features


def peer(name: str) -> Any:
    """Return the module of anomalib that defines a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"anomalib.models.image.{name}.torch_model")
