"""The invertible parts of MSFlow: the conditional flow of one scale and the fusion flow across scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.flows import AffineCoupling, Flow, in_turn, recomputed, reversible
from msflow_ext.models.conv.training import TrainedConv2d, laid_out
from msflow_ext.ops import accumulation_dtype

#: Beyond this the fusion flow's results are cut off.
LIMIT = 1e6


class ConditionalFlow(Flow):
    """The parallel flow of one scale: coupling steps conditioned on the position in the map."""

    def __init__(
        self, channels: int, blocks: int, cond_channels: int, *, clamp: float, clamp_form: str
    ) -> None:
        super().__init__(
            [
                AffineCoupling(
                    channels,
                    ConditionedSubnet(channels, cond_channels),
                    clamp=clamp,
                    clamp_form=clamp_form,
                )
                for _ in range(blocks)
            ]
        )
        self.cond_channels = cond_channels
        self._encodings: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, x: Tensor, *cond: Tensor, **end: Any) -> tuple[Tensor, Tensor, Tensor]:
        run = partial(super().forward, **end)
        first = self.steps[0].subnet.conv_x  # type: ignore[union-attr]
        return laid_out(lambda x: run(x, self._encoding(x)), x, first)  # type: ignore[arg-type]

    def inverse(self, y: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(y, self._encoding(y))

    def _encoding(self, x: Tensor) -> Tensor:
        """The condition for the size of ``x``, computed once per size, dtype and device."""
        height, width = x.shape[2:]
        if torch.compiler.is_compiling():
            return positional_encoding(self.cond_channels, height, width).to(x.device, x.dtype)
        key = (height, width, x.dtype, x.device)
        if key not in self._encodings:
            with torch.inference_mode(False):  # what is kept must also serve training
                encoding = positional_encoding(self.cond_channels, height, width)
                self._encodings[key] = encoding.to(x.device, x.dtype)
        return self._encodings[key]


# The condition's share of a convolution is kept for the backward pass, not computed again, where so many images have it
# in common: the less memory it is beside theirs.
_SHARING = 4


class ConditionedSubnet(nn.Module):
    """Conv3x3 - LayerNorm over channels - ReLU - Conv3x3 of the passive half and the condition.

    The first convolution of ``cat(x1, cond)`` is the sum of two: ``conv_x`` of ``x1``, and ``conv_cond`` of the
    condition, which is the same for every image and therefore computed once per step, not once per image.
    """

    def __init__(self, channels: int, cond_channels: int) -> None:
        super().__init__()
        active = channels // 2
        passive = channels - active
        hidden = passive + cond_channels
        whole = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv_x = TrainedConv2d(passive, hidden, 3, padding=1, bias=False)
        self.conv_cond = nn.Conv2d(cond_channels, hidden, 3, padding=1)
        with torch.no_grad():
            assert whole.bias is not None and self.conv_cond.bias is not None
            self.conv_x.weight.copy_(whole.weight[:, :passive])
            self.conv_cond.weight.copy_(whole.weight[:, passive:])
            self.conv_cond.bias.copy_(whole.bias)
        self.norm = ChannelNorm(hidden)
        self.conv_out = TrainedConv2d(hidden, 2 * active, 3, padding=1)

    def forward(self, x1: Tensor, cond: Tensor) -> Tensor:
        h = self.conv_x(x1)
        wide = accumulation_dtype(h.dtype)

        def share() -> Tensor:
            return self.conv_cond(cond).to(wide)

        kept = share() if torch.compiler.is_compiling() or len(x1) >= _SHARING else None

        def normed() -> Tensor:
            return recomputed(partial(self.norm, h), share) if kept is None else self.norm(h, kept)

        return recomputed(self.conv_out, normed)


class ChannelNorm(nn.Module):
    """LayerNorm over channels at each position, then ReLU: :func:`msflow_ext.ops.channel_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, bias_map: Tensor | None = None) -> Tensor:
        wide = accumulation_dtype(x.dtype)
        return ops.channel_norm(x, self.weight.to(wide), self.bias.to(wide), bias_map)


class FusionFlow(nn.Module):
    """A permutation per scale, then one two-sided coupling whose subnets see all scales.

    Attributes:
        memory: as in :class:`~msflow_ext.flows.Flow`.
    """

    memory = "lean"

    def __init__(self, channels: Sequence[int], *, clamp: float) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.clamp = clamp
        for i, c in enumerate(channels):
            self.register_buffer(f"perm{i}", torch.randperm(c))
        halves = [c // 2 for c in channels]
        self.subnet_1 = CrossScaleSubnet(halves)
        self.subnet_2 = CrossScaleSubnet(halves)

    def perms(self) -> list[Tensor]:
        """The permutation of each scale; the step before the fusion flow applies it."""
        return [getattr(self, f"perm{i}") for i in range(len(self.channels))]

    def couple(self, halves: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        """Latent tensors and ``log_det`` from the halves of the permuted scales."""
        run = reversible if self.memory == "reversible" else in_turn
        steps = [_CoupleFirst(self), _CoupleSecond(self)]
        *z, log_det = run(steps, [t for pair in halves for t in pair])
        return z, log_det

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Inputs of the fusion flow, un-permuted, and the inverse's ``log_det``."""
        total = []
        halves = [t.tensor_split(2, 1) for t in z]
        x2 = []
        for (_, y2), a in zip(halves, self.subnet_1([y1 for y1, _ in halves]), strict=True):
            x, log_det = self._uncouple(y2, a)
            x2.append(x)
            total.append(log_det)
        x = []
        for (y1, _), right, a, perm in zip(
            halves, x2, self.subnet_2(x2), self.perms(), strict=True
        ):
            left, log_det = self._uncouple(y1, a)
            x.append(torch.cat((left, right), 1).index_select(1, torch.argsort(perm)))
            total.append(log_det)
        return x, sum(total[1:], total[0])

    def _couple(self, x1: Tensor, x2: Tensor, a: Tensor, **options: Any):
        return ops.affine_coupling(x1, x2, a, clamp=self.clamp, clamp_form="atan", **options)

    def _uncouple(self, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling_inverse(y[:, :0], y, a, clamp=self.clamp, clamp_form="atan")


class _CoupleFirst:
    """Step of the fusion flow: the first half of every scale, by the second halves of all. See :func:`reversible`.

    Its state is first and second half of each scale in turn.
    """

    def __init__(self, fusion: FusionFlow) -> None:
        self.fusion = fusion

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        return self._couple(state, self.fusion.subnet_2(state[1::2]))

    def retrace(self, *results: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        x2 = [t.detach().requires_grad_() for t in results[1::2]]
        asked = self.fusion.subnet_2(x2)
        inputs = []
        for y, right, a in zip(results[::2], x2, asked, strict=True):
            left, _ = self.fusion._uncouple(y, a.detach())
            inputs += [left.requires_grad_(), right]
        return inputs, self._couple(inputs, asked)

    def parameters(self) -> list[Tensor]:
        return [p for p in self.fusion.subnet_2.parameters() if p.requires_grad]

    def _couple(self, state: Sequence[Tensor], asked: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results, total = [], []
        for left, right, a in zip(state[::2], state[1::2], asked, strict=True):
            _, y, log_det = self.fusion._couple(left[:, :0], left, a, split=0)
            results += [y, right]
            total.append(log_det)
        return *results, sum(total[1:], total[0])


class _CoupleSecond:
    """Step of the fusion flow: the second half of every scale, by the first halves of all; its results are whole."""

    def __init__(self, fusion: FusionFlow) -> None:
        self.fusion = fusion

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        return self._couple(state, self.fusion.subnet_1(state[::2]))

    def retrace(self, *results: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        if any(bool((z.abs() >= LIMIT).any()) for z in results):
            raise RuntimeError(
                f"memory='reversible': latent values beyond {LIMIT:.0e} are cut off and cannot be inverted; "
                "use memory='lean'"
            )
        halves = [z.tensor_split(2, 1) for z in results]
        y1 = [y.detach().requires_grad_() for y, _ in halves]
        asked = self.fusion.subnet_1(y1)
        inputs = []
        for left, (_, y2), a in zip(y1, halves, asked, strict=True):
            right, _ = self.fusion._uncouple(y2, a.detach())
            inputs += [left, right.requires_grad_()]
        return inputs, self._couple(inputs, asked)

    def parameters(self) -> list[Tensor]:
        return [p for p in self.fusion.subnet_1.parameters() if p.requires_grad]

    def _couple(self, state: Sequence[Tensor], asked: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z, total = [], []
        for left, right, a in zip(state[::2], state[1::2], asked, strict=True):
            split = 2 * left.size(1)
            whole, _, log_det = self.fusion._couple(left, right, a, split=split, limit=LIMIT)
            z.append(whole)
            total.append(log_det)
        return *z, sum(total[1:], total[0])


class CrossScaleSubnet(nn.Module):
    """Scales and shifts of every scale from all scales: pool, mix by convolutions, upsample, add, convolve."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)
        total = sum(channels)
        self.conv1 = TrainedConv2d(total, total // 4, 3, padding=1)
        self.norm = ChannelNorm(total // 4)
        self.conv2 = TrainedConv2d(total // 4, total, 3, padding=1)
        self.conv_out = nn.ModuleList(TrainedConv2d(c, 2 * c, 3, padding=1) for c in channels)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        size = min(((t.size(2), t.size(3)) for t in x), key=math.prod)
        mixed = ops.pool_and_concatenate(x, size)
        mixed = F.relu(self.conv2(self.norm(self.conv1(mixed))))
        return [
            recomputed(conv, partial(ops.upsample_and_add, t, m))
            for t, m, conv in zip(x, mixed.split(self.channels, 1), self.conv_out, strict=True)
        ]


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    r"""Sines and cosines of column, then row index, ``(1, channels, height, width)`` float32.

    With :math:`d = \mathrm{channels} / 2` and :math:`\omega_k = 10^{-4k/d}` for even k: channels k and k + 1 hold
    :math:`\sin(w\,\omega_k)` and :math:`\cos(w\,\omega_k)`, channels d + k and d + k + 1 the same of the row h.
    """
    d = channels // 2
    omega = torch.exp(
        torch.arange(0, d, 2, dtype=torch.float32) * -(torch.log(torch.tensor(1e4)) / d)
    )

    def waves(length: int) -> Tensor:
        angle = omega[:, None] * torch.arange(length, dtype=torch.float32)
        return torch.stack((torch.sin(angle), torch.cos(angle)), 1).flatten(0, 1)

    columns = waves(width)[:, None, :].expand(d, height, width)
    rows = waves(height)[:, :, None].expand(d, height, width)
    return torch.cat((columns, rows))[None]
