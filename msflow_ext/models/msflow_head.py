"""Head of MSFlow: a conditional flow per scale, and the fusion flow across scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.activations import in_turn, is_plain, recomputed, reversible
from msflow_ext.choices import ClampForm
from msflow_ext.flows import AffineCoupling, Flow, FlowOutput
from msflow_ext.models.base import FlowHead, refuse_non_finite, seeded
from msflow_ext.models.conv.training import TrainedConv2d, laid_out
from msflow_ext.models.positional_encoding import positional_encoding
from msflow_ext.ops import accumulation_dtype
from msflow_ext.ops._backend import hides_values

if TYPE_CHECKING:
    from msflow_ext.models.optimized.msflow import OptimizedMSFlowHead


class MSFlowHead(FlowHead):
    """Trainable part of MSFlow: parallel flows and fusion flow over pooled feature maps.

    Args:
        channels: channels of each scale; even numbers, for two or more scales.
        blocks: flow steps of each scale. The paper's 2, 5, 8 grow with depth.
        cond_channels: channels of the positional condition, a multiple of 4; one number, or one per scale.
        clamp: alpha of the soft clamp.
        clamp_form: soft clamp of the parallel flows, ``"0.2"`` (FrEIA 0.2, as the reference implementation) or
            ``"head"`` (FrEIA master). The fusion flow has a different one.
        seed: seed of permutations and initial weights; None uses torch's global generator.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Examples:
        >>> head = MSFlowHead((8, 16), blocks=(1, 2), cond_channels=8, seed=0)
        >>> features = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)]
        >>> head.loss(features).backward()
        >>> [tuple(each.shape) for each in head.log_likelihood(features)]
        [(2, 4, 4), (2, 2, 2)]
    """

    def __init__(
        self,
        channels: Sequence[int] = (256, 512, 1024),
        *,
        blocks: Sequence[int] = (2, 5, 8),
        cond_channels: int | Sequence[int] = 64,
        clamp: float = 1.9,
        clamp_form: ClampForm = "0.2",
        seed: int | None = None,
    ) -> None:
        super().__init__(channels, clamp=clamp, clamp_form=clamp_form)
        self.blocks = tuple(int(b) for b in blocks)
        conds = [cond_channels] if isinstance(cond_channels, int) else list(cond_channels)
        conds = conds * len(channels) if len(conds) == 1 else conds
        self.cond_channels = tuple(int(c) for c in conds)
        self._check_arguments()
        with seeded(seed):
            self.flows = nn.ModuleList(
                ConditionalFlow(c, n, d, clamp=self.clamp, clamp_form=clamp_form)
                for c, n, d in zip(self.channels, self.blocks, self.cond_channels, strict=True)
            )
            self.fusion = FusionFlow(self.channels, clamp=self.clamp)

    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Map pooled features ``[(N, C_i, H_i, W_i)]`` to the latent space."""
        self._check_features(features)
        halves, total = [], []
        for x, flow, perm in zip(features, self.flows, self.fusion.perms(), strict=True):
            x1, x2, log_det = flow(x, then=perm, split=x.size(1) // 2)
            halves.append((x1, x2))
            total.append(log_det)
        z, log_det = self.fusion.couple(halves)
        total = sum(total, log_det)
        refuse_non_finite(total, features)
        return FlowOutput(z, total)

    def inverse(self, z: Sequence[Tensor]) -> FlowOutput:
        """Map latent tensors back to pooled features; ``log_det`` is that of the inverse."""
        self._check_features(z, "z")
        x, total = self.fusion.inverse(z)
        features = []
        for u, flow in zip(x, self.flows, strict=True):
            y, log_det = flow.inverse(u)  # type: ignore[operator]
            features.append(y)
            total = total + log_det
        return FlowOutput(features, total)

    def optimize(self, dtype: torch.dtype | None = None) -> OptimizedMSFlowHead:
        """Return an optimized copy for inference: channels_last, with packed weights in ``dtype`` (None: unchanged)."""
        from msflow_ext.models.optimized.msflow import OptimizedMSFlowHead

        return OptimizedMSFlowHead(self, dtype)

    def _check_arguments(self) -> None:
        if len(self.channels) < 2:
            raise ValueError(f"channels must have two scales or more, got {self.channels}")
        for name in ("blocks", "cond_channels"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} must have one number per scale ({len(self.channels)}), got {getattr(self, name)}"
                )
        if any(c < 2 or c % 2 for c in self.channels):
            raise ValueError(
                f"channels must be even, because the fusion flow halves them, got {self.channels}"
            )
        if sum(self.channels) // 2 < 4:
            raise ValueError(f"channels must sum to 8 or more, got {self.channels}")
        if any(b < 1 for b in self.blocks):
            raise ValueError(f"blocks must be at least 1 on every scale, got {self.blocks}")
        if any(c < 4 or c % 4 for c in self.cond_channels):
            raise ValueError(f"cond_channels must be multiples of 4, got {self.cond_channels}")


class ConditionalFlow(Flow):
    """Parallel flow of one scale: coupling steps conditioned on the position in the map."""

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
        """Return the condition for the size of ``x``, computed once per size, dtype and device."""
        height, width = x.shape[2:]
        if hides_values(x):  # a tensor of a graph, or a fake one, must not be cached
            return positional_encoding(self.cond_channels, height, width).to(x.device, x.dtype)
        key = (height, width, x.dtype, x.device)
        if key not in self._encodings:
            with torch.inference_mode(False):  # training uses the cached tensor too
                encoding = positional_encoding(self.cond_channels, height, width)
                self._encodings[key] = encoding.to(x.device, x.dtype)
        return self._encodings[key]


# From this batch size on, the convolution of the condition is kept for the backward pass instead of recomputed. All
# images share it, so its memory is small beside theirs.
_SHARING = 4


class ConditionedSubnet(nn.Module):
    """Conv3x3 - LayerNorm over channels - ReLU - Conv3x3 of the conditioning half and the condition.

    The first convolution of ``cat(x1, cond)`` is the sum of ``conv_x`` of ``x1`` and ``conv_cond`` of the condition.
    The condition is the same for every image, so ``conv_cond`` is computed once per step, not once per image.
    """

    def __init__(self, channels: int, cond_channels: int) -> None:
        super().__init__()
        transformed = channels // 2
        conditioning = channels - transformed
        hidden = conditioning + cond_channels
        whole = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv_x = TrainedConv2d(conditioning, hidden, 3, padding=1, bias=False)
        self.conv_cond = nn.Conv2d(cond_channels, hidden, 3, padding=1)
        with torch.no_grad():
            assert whole.bias is not None and self.conv_cond.bias is not None
            self.conv_x.weight.copy_(whole.weight[:, :conditioning])
            self.conv_cond.weight.copy_(whole.weight[:, conditioning:])
            self.conv_cond.bias.copy_(whole.bias)
        self.norm = ChannelNorm(hidden)
        self.conv_out = TrainedConv2d(hidden, 2 * transformed, 3, padding=1)

    def forward(self, x1: Tensor, cond: Tensor) -> Tensor:
        h = self.conv_x(x1)
        bias_map = partial(_share, self.conv_cond)
        norm, conv = self.norm, self.conv_cond
        if not (type(norm) is ChannelNorm and is_plain(norm) and _is_plain_conv(conv)):
            return self.conv_out(norm(h, conv(cond).to(accumulation_dtype(h.dtype))))
        vectors, share = (norm.weight, norm.bias), (cond, conv.weight, conv.bias)
        if torch.compiler.is_compiling() or len(x1) >= _SHARING:
            return recomputed(self.conv_out, _normed, h, *vectors, bias_map(*share))

        def normed(h: Tensor, weight: Tensor, bias: Tensor, *share: Tensor) -> Tensor:
            return recomputed(partial(_normed, h, weight, bias), bias_map, *share)

        return recomputed(self.conv_out, normed, h, *vectors, *share)


def _share(conv: nn.Conv2d, cond: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the condition's share of the first convolution, in the accumulation dtype."""
    share = conv._conv_forward(cond, weight, bias)
    return share.to(accumulation_dtype(share.dtype))


def _normed(h: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor | None = None) -> Tensor:
    accumulation = accumulation_dtype(h.dtype)
    return ops.channel_norm(h, weight.to(accumulation), bias.to(accumulation), bias_map)


def _is_plain_conv(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and is_plain(conv)


class ChannelNorm(nn.Module):
    """LayerNorm over channels at each position, then ReLU: :func:`msflow_ext.ops.channel_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, bias_map: Tensor | None = None) -> Tensor:
        return _normed(x, self.weight, self.bias, bias_map)


class FusionFlow(nn.Module):
    """Permutation per scale, then a coupling of both halves, whose subnets read all scales.

    Attributes:
        memory: see :class:`~msflow_ext.flows.Flow`.
        limit: latent values are clamped to this magnitude.
    """

    memory = "lean"
    limit = 1e6

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
        """Return the permutation of each scale, which the step before the fusion flow applies."""
        return [getattr(self, f"perm{i}") for i in range(len(self.channels))]

    def couple(self, halves: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        """Return latent tensors and ``log_det`` for the halves of the permuted scales."""
        run = reversible if self.memory == "reversible" else in_turn
        steps = [_CoupleFirst(self), _CoupleSecond(self)]
        *z, log_det = run(steps, [t for pair in halves for t in pair])
        return z, log_det

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the inputs of the fusion flow before permutation, and the ``log_det`` of the inverse."""
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
    """Fusion step that transforms the first half of each scale, given all second halves; see :func:`reversible`.

    Its state alternates: first half, second half of each scale.
    """

    tensors = ()

    def __init__(self, fusion: FusionFlow) -> None:
        self.fusion, self.subnet = fusion, fusion.subnet_2

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        return self._couple(state, self.subnet(state[1::2]))

    def retrace(
        self, ask: Callable[..., Any], results: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        x2 = [t.detach().requires_grad_() for t in results[1::2]]
        asked = ask(x2)
        inputs = []
        for y, right, a in zip(results[::2], x2, asked, strict=True):
            left, _ = self.fusion._uncouple(y, a.detach())
            inputs += [left.requires_grad_(), right]
        return inputs, self._couple(inputs, asked)

    def _couple(self, state: Sequence[Tensor], asked: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results, total = [], []
        for left, right, a in zip(state[::2], state[1::2], asked, strict=True):
            _, y, log_det = self.fusion._couple(left[:, :0], left, a, split=0)
            results += [y, right]
            total.append(log_det)
        return *results, sum(total[1:], total[0])


class _CoupleSecond:
    """Fusion step that transforms the second half of each scale, given all first halves, and joins the halves."""

    tensors = ()

    def __init__(self, fusion: FusionFlow) -> None:
        self.fusion, self.subnet = fusion, fusion.subnet_1

    def __call__(self, *state: Tensor) -> tuple[Tensor, ...]:
        return self._couple(state, self.subnet(state[::2]))

    def retrace(
        self, ask: Callable[..., Any], results: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        if any(bool((z.abs() >= self.fusion.limit).any()) for z in results):
            raise RuntimeError(
                f"memory must be 'lean' if latent values exceed {self.fusion.limit:.0e}, got 'reversible': "
                "such values are clamped and cannot be inverted"
            )
        halves = [z.tensor_split(2, 1) for z in results]
        y1 = [y.detach().requires_grad_() for y, _ in halves]
        asked = ask(y1)
        inputs = []
        for left, (_, y2), a in zip(y1, halves, asked, strict=True):
            right, _ = self.fusion._uncouple(y2, a.detach())
            inputs += [left, right.requires_grad_()]
        return inputs, self._couple(inputs, asked)

    def _couple(self, state: Sequence[Tensor], asked: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z, total = [], []
        for left, right, a in zip(state[::2], state[1::2], asked, strict=True):
            split = 2 * left.size(1)
            whole, _, log_det = self.fusion._couple(
                left, right, a, split=split, limit=self.fusion.limit
            )
            z.append(whole)
            total.append(log_det)
        return *z, sum(total[1:], total[0])


class CrossScaleSubnet(nn.Module):
    """Subnet over all scales, which returns the coupling's input ``a`` per scale: pool, convolve, upsample, add, convolve."""

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
            recomputed(conv, ops.upsample_and_add, t, m)
            for t, m, conv in zip(x, mixed.split(self.channels, 1), self.conv_out, strict=True)
        ]
