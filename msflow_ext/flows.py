"""Invertible layers on split halves: a coupling block and a chain of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.ops.coupling import accumulation_dtype


@dataclass(frozen=True)
class FlowOutput:
    """Result of a flow over several scales.

    Attributes:
        z: one ``(N, C_i, H_i, W_i)`` per scale (the features again for an inverse).
        log_det: ``(N,)`` in nats, summed over all scales; float64 for float64 and float32 else.
    """

    z: list[Tensor]
    log_det: Tensor


class AffineCoupling(nn.Module):
    r"""One flow step: couple the active half to the passive one, scale and shift all channels, permute them.

    It is FrEIA's ``AllInOneBlock`` with a softplus global affine and a fixed permutation, on halves instead of whole
    tensors, so that a chain of them neither splits nor concatenates.

    Args:
        channels: channels of both halves; ``channels - channels // 2`` are passive.
        subnet: module ``(x1, *cond) -> (N, 2 * (channels // 2), *)``.
        clamp, clamp_form: see :func:`msflow_ext.ops.affine_coupling`.
        generator: draws the permutation.
    """

    perm: Tensor

    def __init__(
        self,
        channels: int,
        subnet: nn.Module,
        *,
        clamp: float,
        clamp_form: str,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.passive = channels - channels // 2
        self.clamp = clamp
        self.clamp_form = clamp_form
        self.subnet = subnet
        self.global_scale = nn.Parameter(torch.full((channels,), inverse_softplus_scale(1.0)))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels, generator=generator))

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Positive global scale, offset and permutation, ``(channels,)`` each, for a stream of ``dtype``."""
        wide = accumulation_dtype(dtype)
        scale = 0.1 * F.softplus(self.global_scale.to(wide), beta=0.5)
        return scale, self.global_offset.to(wide), self.perm

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *cond: Tensor,
        then: Tensor | None = None,
        split: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y1, y2, log_det)``; ``then`` is a further permutation, ``split`` the channels of ``y1``."""
        scale, offset, perm = self.affine(x2.dtype)
        return ops.affine_coupling(
            x1,
            x2,
            self.subnet(x1, *cond),
            scale,
            offset,
            perm if then is None else perm[then],
            clamp=self.clamp,
            clamp_form=self.clamp_form,
            split=split,
        )

    def inverse(self, y1: Tensor, y2: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(x1, x2, log_det)`` of the inverse."""
        affine = self.affine(y1.dtype)
        x1 = ops.passive_half(y1, y2, self.passive, *affine)
        x2, log_det = ops.affine_coupling_inverse(
            y1,
            y2,
            self.subnet(x1, *cond),
            *affine,
            clamp=self.clamp,
            clamp_form=self.clamp_form,
        )
        return x1, x2, log_det


class Flow(nn.Module):
    """A chain of :class:`AffineCoupling` steps on one scale whose state stays in two halves throughout."""

    def __init__(self, steps: Sequence[AffineCoupling]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.channels = steps[0].channels

    def forward(
        self,
        x: Tensor,
        *cond: Tensor,
        then: Tensor | None = None,
        split: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x (N, C, *)`` to ``(y1, y2, log_det)``.

        ``then`` permutes the result's channels once more, ``split`` says how many of them ``y1`` has: all by default.
        """
        passive = self.channels - self.channels // 2
        x1, x2 = x[:, :passive], x[:, passive:]
        total: Tensor | float = 0.0
        last = len(self.steps) - 1
        for i, step in enumerate(self.steps):
            end = {"then": then, "split": self.channels if split is None else split}
            x1, x2, log_det = step(x1, x2, *cond, **(end if i == last else {}))
            total = total + log_det
        return x1, x2, total  # type: ignore[return-value]

    def inverse(self, y: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y (N, C, *)`` back to ``(x, log_det)`` of the inverse."""
        passive = self.channels - self.channels // 2
        x1, x2 = y[:, :passive], y[:, passive:]
        total: Tensor | float = 0.0
        for step in reversed(self.steps):
            x1, x2, log_det = step.inverse(x1, x2, *cond)  # type: ignore[operator]
            total = total + log_det
        return torch.cat((x1, x2), 1), total  # type: ignore[return-value]


def inverse_softplus_scale(scale: float) -> float:
    """The ``global_scale`` whose softplus scale is ``scale``: FrEIA's initial value for ``global_affine_init``."""
    v = 0.5 * 10 * scale
    return 2 * (v + math.log(-math.expm1(-v)))
