"""MSFlow computed as its authors compute it: FrEIA 0.2's blocks, dense permutations, cat and split, eager PyTorch.

Written from the description of the published system; only for comparison. Weights come from one of our heads, so that
both sides can be checked to give the same numbers before anything is timed.
"""

from __future__ import annotations

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import MSFlowHead
from msflow_ext.compat.msflow import to_official_state_dict
from msflow_ext.models.msflow_flows import positional_encoding


class OfficialMSFlow(nn.Module):
    """Parallel flows on FrEIA's ``AllInOneBlock`` and the two-sided fusion coupling in plain PyTorch."""

    def __init__(self, head: MSFlowHead, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.clamp = head.clamp
        self.flows = nn.ModuleList()
        self.conditions = []
        scales = zip(head.channels, head.blocks, head.cond_channels, sizes, strict=True)
        for c, blocks, d, (h, w) in scales:
            flow = Ff.SequenceINN(c, h, w)
            for _ in range(blocks):
                flow.append(
                    Fm.AllInOneBlock,
                    cond=0,
                    cond_shape=(d, h, w),
                    subnet_constructor=Subnet,
                    affine_clamping=head.clamp,
                    global_affine_type="SOFTPLUS",
                )
            self.flows.append(flow)
            self.conditions.append(positional_encoding(d, h, w))
        self.fusion = Fusion(head.channels, head.clamp)
        state = {k: v.float() for k, v in to_official_state_dict(head).items()}
        self.fusion.perms = [getattr(head.fusion, f"perm{i}") for i in range(len(head.channels))]
        for i, flow in enumerate(self.flows):
            prefix = f"parallel_flows.{i}."
            flow.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        prefix = f"fusion_flow.module_list.{len(head.channels)}."
        self.fusion.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        u, log_dets = [], []
        for x, flow, condition in zip(features, self.flows, self.conditions, strict=True):
            batch = condition.repeat(x.size(0), 1, 1, 1)
            y, log_det = flow(x, [batch])
            u.append(y)
            log_dets.append(log_det)
        z, log_det = self.fusion(u)
        return z, sum(log_dets) + log_det

    def loss(self, features: list[Tensor]) -> Tensor:
        z, log_det = self(features)
        return (sum(0.5 * (t**2).sum((1, 2, 3)) for t in z) - log_det).mean()

    def log_likelihood(self, features: list[Tensor]) -> list[Tensor]:
        return [-0.5 * (z**2).mean(1) for z in self(features)[0]]


class Subnet(nn.Module):
    """Conv - LayerNorm over channels - ReLU - Conv, as FrEIA's blocks call it."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=1)
        self.ln = nn.LayerNorm(channels_in)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv2(F.relu(h))


class Fusion(nn.Module):
    def __init__(self, channels: tuple[int, ...], clamp: float) -> None:
        super().__init__()
        halves = [c // 2 for c in channels]
        self.perms: list[Tensor] = []
        self.subnet_1, self.subnet_2 = CrossScale(halves), CrossScale(halves)
        self.clamp = clamp

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        halves = [t[:, p].split(t.size(1) // 2, 1) for t, p in zip(x, self.perms, strict=True)]
        y1, first = self._couple([h[0] for h in halves], self.subnet_2([h[1] for h in halves]))
        y2, second = self._couple([h[1] for h in halves], self.subnet_1(y1))
        z = [torch.cat(pair, 1).clamp(-1e6, 1e6) for pair in zip(y1, y2, strict=True)]
        return z, first + second

    def _couple(self, x: list[Tensor], a: list[tuple[Tensor, Tensor]]):
        y, log_det = [], 0.0
        for t, (s, shift) in zip(x, a, strict=True):
            s = self.clamp * 0.636 * torch.atan(s / self.clamp)
            y.append(t * torch.exp(s) + shift)
            log_det = log_det + s.sum((1, 2, 3))
        return y, log_det


class CrossScale(nn.Module):
    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels = channels
        self.cross_convs = CrossConvs(sum(channels))
        self.conv_s = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.conv_t = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)

    def forward(self, x: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        size = x[-1].shape[2:]
        mixed = self.cross_convs(torch.cat([F.adaptive_avg_pool2d(t, size) for t in x], 1))
        out = []
        parts = mixed.split(self.channels, 1)
        for t, m, s, shift in zip(x, parts, self.conv_s, self.conv_t, strict=True):
            t = t + F.interpolate(m, t.shape[2:], mode="bilinear", align_corners=True)
            out.append((s(t), shift(t)))
        return out


class CrossConvs(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 3, padding=1)
        self.norm = nn.LayerNorm(channels // 4)
        self.conv2 = nn.Conv2d(channels // 4, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.conv2(F.relu(h)))
