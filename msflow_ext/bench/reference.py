"""The reference implementation of MSFlow: FrEIA's blocks, cat and split, and permutations in eager PyTorch.

It is written from the description of the published system, and only serves for comparison. Its weights come from an
``MSFlowHead``, so that both can be checked to give the same results before they are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.compat.checkpoints.msflow import to_reference_state_dict
from msflow_ext.models.msflow import Prediction
from msflow_ext.models.positional_encoding import positional_encoding

if TYPE_CHECKING:
    from msflow_ext.models.msflow_head import MSFlowHead


class ReferenceMSFlow(nn.Module):
    """Parallel flows on FrEIA's ``AllInOneBlock`` and the two-sided fusion coupling in plain PyTorch.

    Args:
        head: the head whose weights are copied.
        sizes: ``(H_i, W_i)`` of each scale.
        permutation: ``"dense"`` for the block of FrEIA 0.2, which permutes by a convolution with a 0/1 matrix;
            ``"index"`` for the same block in plain PyTorch with an index, as in FrEIA's master, which is faster.

    Raises:
        ValueError: if ``head`` has another clamp form than FrEIA 0.2.
        ModuleNotFoundError: if ``permutation`` is ``"dense"`` and FrEIA is not installed.
    """

    def __init__(
        self, head: MSFlowHead, sizes: Sequence[Sequence[int]], permutation: str = "dense"
    ) -> None:
        super().__init__()
        if head.clamp_form != "0.2":
            raise ValueError(f"head must have clamp_form '0.2', got {head.clamp_form!r}")
        self.flows = nn.ModuleList()
        self.conditions = []
        chain = _freia_flow if permutation == "dense" else IndexFlow
        scales = zip(head.channels, head.blocks, head.cond_channels, sizes, strict=True)
        for c, blocks, d, (h, w) in scales:
            self.flows.append(chain(c, blocks, d, h, w, head.clamp))
            self.conditions.append(positional_encoding(d, h, w))
        self.fusion = Fusion(head.channels, head.clamp)
        state = to_reference_state_dict(head, index_permutations=permutation == "index")
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        self.fusion.perms = [getattr(head.fusion, f"perm{i}") for i in range(len(head.channels))]
        for i, flow in enumerate(self.flows):
            flow.load_state_dict(_below(f"parallel_flows.{i}.", state))
        last = f"fusion_flow.module_list.{len(head.channels)}."
        self.fusion.load_state_dict(_below(last, state))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        u, log_dets = [], []
        for x, flow, condition in zip(features, self.flows, self.conditions, strict=True):
            batch = condition.repeat(x.size(0), 1, 1, 1)
            y, log_det = flow(x, [batch])
            u.append(y)
            log_dets.append(log_det)
        z, log_det = self.fusion(u)
        return z, sum(log_dets) + log_det

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        z, log_det = self(features)
        return (sum(0.5 * (t**2).sum((1, 2, 3)) for t in z) - log_det).mean()

    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [-0.5 * (z**2).mean(1) for z in self(features)[0]]


def predict(log_likelihood: Sequence[Tensor], size: int, top_k: float = 0.03) -> Prediction:
    """Return scores and maps of side ``size`` from likelihood maps ``(N, H_i, W_i)``, step by step as published."""

    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]

    log_likelihood = [m.float() for m in log_likelihood]
    highest = [m.amax((1, 2), keepdim=True) for m in log_likelihood]
    p = sum(upsampled(torch.exp(m - h)) for m, h in zip(log_likelihood, highest, strict=True))
    log_q = sum(upsampled(m) for m in log_likelihood)
    assert isinstance(p, Tensor) and isinstance(log_q, Tensor)
    q = torch.exp(log_q - log_q.amax((1, 2), keepdim=True))
    anomaly_map = p.amax((1, 2), keepdim=True) - p
    image_map = q.amax((1, 2), keepdim=True) - q
    score = image_map.flatten(1).topk(int(top_k * size * size)).values.mean(1)
    return Prediction(score, anomaly_map, image_map, list(log_likelihood))


class IndexFlow(nn.Module):
    """A chain of :class:`IndexBlock`."""

    def __init__(self, channels: int, blocks: int, cond: int, h: int, w: int, clamp: float) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(IndexBlock(channels, cond, clamp) for _ in range(blocks))

    def forward(self, x: Tensor, c: list[Tensor]) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.size(0), dtype=torch.float32)
        for block in self.module_list:
            x, log_det = block(x, *c)
            total = total + log_det
        return x, total


class IndexBlock(nn.Module):
    """FrEIA's ``AllInOneBlock`` for MSFlow in plain PyTorch, with its permutation as an index."""

    w_perm: Tensor

    def __init__(self, channels: int, cond: int, clamp: float) -> None:
        super().__init__()
        self.halves = [channels - channels // 2, channels // 2]
        self.clamp = clamp
        self.global_scale = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.global_offset = nn.Parameter(torch.empty(1, channels, 1, 1))
        for name in ("w_perm", "w_perm_inv"):
            self.register_buffer(name, torch.empty(channels, dtype=torch.int64))
        self.subnet = Subnet(self.halves[0] + cond, 2 * self.halves[1])

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.split(self.halves, 1)
        a = self.subnet(torch.cat((x1, c), 1))
        a *= 0.1
        a_s, a_t = a.chunk(2, 1)
        s = self.clamp * torch.tanh(a_s)
        scale = 0.1 * F.softplus(self.global_scale, beta=0.5)
        x = torch.cat((x1, x2 * torch.exp(s) + a_t), 1) * scale + self.global_offset
        positions = x.size(2) * x.size(3)
        return x[:, self.w_perm], s.sum((1, 2, 3)) + positions * torch.log(scale).sum()


class Subnet(nn.Module):
    """Subnet of a block: convolution, LayerNorm over channels, ReLU, convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=1)
        self.ln = nn.LayerNorm(channels_in)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv2(F.relu(h))


class Fusion(nn.Module):
    """The coupling across scales, with its permutations as indices."""

    clamp: Tensor

    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        halves = [c // 2 for c in channels]
        self.perms: list[Tensor] = []
        self.subnet_1, self.subnet_2 = CrossScale(halves), CrossScale(halves)
        # A tensor, because freezing in inductor (torch 2.15) confuses numbers that scale different convolutions.
        # With this number and the 0.1 of the blocks, its results would be wrong.
        self.register_buffer("clamp", torch.tensor(clamp), persistent=False)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        halves = [t[:, p].split(t.size(1) // 2, 1) for t, p in zip(x, self.perms, strict=True)]
        y1, first = self._couple([h[0] for h in halves], self.subnet_2([h[1] for h in halves]))
        y2, second = self._couple([h[1] for h in halves], self.subnet_1(y1))
        z = [torch.cat(pair, 1).clamp(-1e6, 1e6) for pair in zip(y1, y2, strict=True)]
        return z, first + second

    def _couple(self, x: list[Tensor], a: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Any]:
        y, log_det = [], 0.0
        for t, (s, shift) in zip(x, a, strict=True):
            s = self.clamp * 0.636 * torch.atan(s / self.clamp)
            y.append(t * torch.exp(s) + shift)
            log_det = log_det + s.sum((1, 2, 3))
        return y, log_det


class CrossScale(nn.Module):
    """Subnet that computes scale and shift of every scale from all scales."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels = channels
        self.cross_convs = CrossConvs(sum(channels))
        self.conv_s = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.conv_t = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)

    def forward(self, x: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        size = (x[-1].size(2), x[-1].size(3))
        mixed = self.cross_convs(torch.cat([F.adaptive_avg_pool2d(t, size) for t in x], 1))
        out = []
        parts = mixed.split(self.channels, 1)
        for t, m, s, shift in zip(x, parts, self.conv_s, self.conv_t, strict=True):
            t = t + F.interpolate(m, t.shape[2:], mode="bilinear", align_corners=True)
            out.append((s(t), shift(t)))
        return out


class CrossConvs(nn.Module):
    """The part of a cross-scale subnet that mixes all scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 3, padding=1)
        self.norm = nn.LayerNorm(channels // 4)
        self.conv2 = nn.Conv2d(channels // 4, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.conv2(F.relu(h)))


def _freia_flow(channels: int, blocks: int, cond: int, h: int, w: int, clamp: float) -> nn.Module:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    flow = Ff.SequenceINN(channels, h, w)
    for _ in range(blocks):
        flow.append(
            Fm.AllInOneBlock,
            cond=0,
            cond_shape=(cond, h, w),
            subnet_constructor=Subnet,
            affine_clamping=clamp,
            global_affine_type="SOFTPLUS",
        )
    return flow


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
