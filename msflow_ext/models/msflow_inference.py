"""The inference form of MSFlow's head: channels_last, prepacked convolutions, constants folded, optionally bfloat16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.flows import AffineCoupling, FlowOutput
from msflow_ext.models.msflow_flows import (
    LIMIT,
    ConditionalFlow,
    CrossScaleSubnet,
    positional_encoding,
)
from msflow_ext.models.packed import PackedConv2d
from msflow_ext.ops import accumulation_dtype


class OptimizedHead(nn.Module):
    """A snapshot of an :class:`~msflow_ext.MSFlowHead` for inference: it takes and returns what the original does.

    Everything that does not depend on the image is computed once: the condition's share of each first convolution, the
    global scales, the permutations with the fusion flow's folded into the step before it, and the layout in which the
    convolutions want their weights. Later changes of the original do not show.

    Args:
        head: the original, left untouched.
        dtype: of the arithmetic in convolutions and of the state between them; the original's by default.
    """

    def __init__(self, head: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = next(head.parameters()).dtype if dtype is None else dtype
        if self.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"optimize: dtype must be a floating dtype, got {dtype}")
        self._check = head._check_features
        with torch.no_grad():
            perms = head.fusion.perms()
            self._flows = [
                _FrozenFlow(flow, perm, self.dtype)
                for flow, perm in zip(head.flows, perms, strict=True)
            ]
            self._subnet_1 = _FrozenCrossScale(head.fusion.subnet_1, self.dtype)
            self._subnet_2 = _FrozenCrossScale(head.fusion.subnet_2, self.dtype)
        self._clamp = head.clamp

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Latent tensors, in the dtype and memory format of the features, and ``log_det``."""
        z, log_det = self._latent(features)
        z = [
            t.to(
                f.dtype,
                memory_format=torch.channels_last if _is_last(f) else torch.contiguous_format,
            )
            for t, f in zip(z, features, strict=True)
        ]
        return FlowOutput(z, log_det)

    @torch.no_grad()
    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Log-likelihood maps ``[(N, H_i, W_i)]``, float32 or wider."""
        return [ops.log_likelihood_map(z) for z in self._latent(features)[0]]

    def _latent(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        self._check(features)
        halves, log_dets = [], []
        for x, flow in zip(features, self._flows, strict=True):
            x1, x2, log_det = flow(x)
            halves.append((x1, x2))
            log_dets.append(log_det)
        z, y1 = [], []
        for (x1, _), a in zip(halves, self._subnet_2([x2 for _, x2 in halves]), strict=True):
            _, y, log_det = self._couple(x1[:, :0], x1, a, split=0)
            y1.append(y)
            log_dets.append(log_det)
        for y, (_, x2), a in zip(y1, halves, self._subnet_1(y1), strict=True):
            whole, _, log_det = self._couple(y, x2, a, split=2 * y.size(1), limit=LIMIT)
            z.append(whole)
            log_dets.append(log_det)
        return z, sum(log_dets[1:], log_dets[0])

    def _couple(self, x1: Tensor, x2: Tensor, a: Tensor, **options: Any):
        return ops.affine_coupling(x1, x2, a, clamp=self._clamp, clamp_form="atan", **options)


class _FrozenFlow:
    """The steps of one scale with all that an image does not change."""

    def __init__(self, flow: ConditionalFlow, perm: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.steps = [_FrozenStep(step, dtype) for step in flow.steps]  # type: ignore[arg-type]
        self.steps[-1].perm = self.steps[-1].perm[perm]
        self.passive = flow.channels - flow.channels // 2
        self.split = flow.channels // 2
        self.cond_channels = flow.cond_channels

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x1 = x[:, : self.passive].to(self.dtype).contiguous(memory_format=torch.channels_last)
        x2 = x[:, self.passive :].to(self.dtype).contiguous(memory_format=torch.channels_last)
        log_dets = []
        for step in self.steps:
            split = self.split if step is self.steps[-1] else self.passive
            x1, x2, log_det = step(x1, x2, split, self.cond_channels)
            log_dets.append(log_det)
        return x1, x2, sum(log_dets[1:], log_dets[0])


class _FrozenStep:
    def __init__(self, step: AffineCoupling, dtype: torch.dtype) -> None:
        subnet: Any = step.subnet
        self.conv_cond = subnet.conv_cond
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.conv_x = PackedConv2d(subnet.conv_x, dtype)
        self.norm = _vectors(subnet.norm, dtype)
        self.conv_out = PackedConv2d(subnet.conv_out, dtype)
        scale, offset, self.perm = step.affine(dtype)
        self.affine = (scale.clone(), offset.clone())
        self.options = {"clamp": step.clamp, "clamp_form": step.clamp_form}
        self.wide = accumulation_dtype(dtype)

    def __call__(self, x1: Tensor, x2: Tensor, split: int, cond_channels: int):
        bias_map = self._map(x1.size(2), x1.size(3), cond_channels)
        a = self.conv_out(ops.channel_norm(self.conv_x(x1), *self.norm, bias_map))
        return ops.affine_coupling(x1, x2, a, *self.affine, self.perm, split=split, **self.options)

    def _map(self, height: int, width: int, cond_channels: int) -> Tensor:
        """The condition's share of the first convolution, once per size."""
        if (height, width) not in self.maps:
            weight = self.conv_cond.weight
            encoding = positional_encoding(cond_channels, height, width).to(weight)
            bias_map = self.conv_cond(encoding).to(self.wide)
            self.maps[height, width] = bias_map.contiguous(memory_format=torch.channels_last)
        return self.maps[height, width]


class _FrozenCrossScale:
    def __init__(self, subnet: CrossScaleSubnet, dtype: torch.dtype) -> None:
        self.channels = subnet.channels
        self.conv1, self.conv2 = (
            PackedConv2d(subnet.conv1, dtype),
            PackedConv2d(subnet.conv2, dtype, relu=True),
        )
        self.norm = _vectors(subnet.norm, dtype)
        self.conv_out = [PackedConv2d(conv, dtype) for conv in subnet.conv_out]

    def __call__(self, x: Sequence[Tensor]) -> list[Tensor]:
        size = min(((t.size(2), t.size(3)) for t in x), key=math.prod)
        mixed = torch.cat([F.adaptive_avg_pool2d(t, size) for t in x], 1)
        mixed = self.conv2(ops.channel_norm(self.conv1(mixed), *self.norm))
        return [
            conv(t + F.interpolate(m, t.shape[2:], mode="bilinear", align_corners=True))
            for t, m, conv in zip(x, mixed.split(self.channels, 1), self.conv_out, strict=True)
        ]


def _vectors(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(dtype)
    return norm.weight.detach().to(wide).clone(), norm.bias.detach().to(wide).clone()


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
