"""Invertible layers on split halves: a coupling block, and a chain of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.activations import in_turn, reversible
from msflow_ext.ops._shapes import accumulation_dtype


@dataclass(frozen=True, repr=False)
class FlowOutput:
    """Result of a flow over several scales.

    Attributes:
        z: one ``(N, C_i, H_i, W_i)`` per scale (the features again for an inverse).
        log_det: ``(N,)`` in nats, summed over all scales; float64 for float64 and float32 else.

    Examples:
        >>> import msflow_ext as mx
        >>> head = mx.FastFlowHead((8,), steps=2, seed=0)
        >>> x = torch.randn(2, 8, 4, 4)
        >>> out = head([x])
        >>> out
        FlowOutput(z=[(2, 8, 4, 4)], log_det=(2,))
        >>> torch.allclose(head.inverse(out.z).z[0], x, atol=1e-4)
        True
    """

    z: list[Tensor]
    log_det: Tensor

    def __repr__(self) -> str:
        scales = [tuple(each.shape) for each in self.z]
        return f"FlowOutput(z={scales}, log_det={tuple(self.log_det.shape)})"


class AffineCoupling(nn.Module):
    r"""One flow step: couple the transformed half to the conditioning one, scale and shift all channels, permute them.

    It is FrEIA's ``AllInOneBlock`` with a softplus global affine and a fixed permutation, on halves instead of whole
    tensors, so that a chain of them neither splits nor concatenates.

    Args:
        channels: channels of both halves; ``channels - channels // 2`` are conditioning.
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
        self.conditioning = channels - channels // 2
        self.clamp = clamp
        self.clamp_form = clamp_form
        self.subnet = subnet
        self.global_scale = nn.Parameter(torch.full((channels,), inverse_softplus_scale(1.0)))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels, generator=generator))

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Positive global scale, offset and permutation, ``(channels,)`` each, for a stream of ``dtype``."""
        return *_affine(self.global_scale, self.global_offset, dtype), self.perm

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *cond: Tensor,
        seen: Tensor | None = None,
        then: Tensor | None = None,
        split: int | None = None,
        copy: bool = False,
    ) -> tuple[Tensor, ...]:
        """``(y1, y2, log_det)``, or ``(y1, y2, copied, log_det)`` with ``copy``.

        Args:
            seen: ``x1`` as the subnet reads it, where that is another dtype: the ``copied`` of the step before.
            then: a further permutation.
            split: the channels of ``y1``.
            copy: whether ``y1`` is wanted once more, in the dtype of the subnet's answer.
        """
        affine = self._affine(x2.dtype, then)
        a = self.subnet(x1 if seen is None else seen, *cond)
        if not copy:
            return self._couple(x1, x2, a, affine, split)
        options: Any = {"split": split, "clamp": self.clamp, "clamp_form": self.clamp_form}
        y1, y2, log_det, copied = ops.affine_coupling_with_copy(x1, x2, a, *affine, **options)
        return y1, y2, copied, log_det

    def inverse(self, y1: Tensor, y2: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(x1, x2, log_det)`` of the inverse."""
        affine = self.affine(y1.dtype)
        x1 = ops.conditioning_half(y1, y2, self.conditioning, *affine)
        x2, log_det = ops.affine_coupling_inverse(
            y1,
            y2,
            self.subnet(x1, *cond),
            *affine,
            clamp=self.clamp,
            clamp_form=self.clamp_form,
        )
        return x1, x2, log_det

    def retrace(
        self,
        ask: Callable[[Tensor], Tensor],
        y1: Tensor,
        y2: Tensor,
        affine: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The inputs that :meth:`forward` had, as leaves of a graph, and its results in that graph.

        Args:
            ask: the subnet, of ``x1`` alone.
            affine: scale, offset and permutation.
        """
        known = [t.detach() for t in affine]
        x1 = ops.conditioning_half(y1, y2, self.conditioning, *known).detach().requires_grad_()
        a = ask(x1)
        options = {"clamp": self.clamp, "clamp_form": self.clamp_form}
        x2, _ = ops.affine_coupling_inverse(y1, y2, a.detach(), *known, **options)
        x2.requires_grad_()
        return [x1, x2], self._couple(x1, x2, a, affine, y1.size(1))

    def _affine(self, dtype: torch.dtype, then: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scale, offset, perm = self.affine(dtype)
        return scale, offset, perm if then is None else perm[then]

    def _couple(
        self,
        x1: Tensor,
        x2: Tensor,
        a: Tensor,
        affine: tuple[Tensor, Tensor, Tensor],
        split: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = {"clamp": self.clamp, "clamp_form": self.clamp_form}
        return ops.affine_coupling(x1, x2, a, *affine, split=split, **options)


class Flow(nn.Module):
    """A chain of :class:`AffineCoupling` steps on one scale whose state stays in two halves throughout.

    Attributes:
        memory: ``"lean"``, or ``"reversible"`` to save no activations: see :func:`msflow_ext.activations.reversible`.
    """

    memory = "lean"

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
        conditioning = self.channels - self.channels // 2
        reverses = self.memory == "reversible"
        run = reversible if reverses else in_turn
        copy = not reverses and torch.is_autocast_enabled(x.device.type)
        steps = [_Bound(step, cond, copy=copy) for step in self.steps]
        split = self.channels if split is None else split
        steps[-1] = _Bound(self.steps[-1], cond, then=then, split=split)
        y1, y2, log_det = run(steps, [x[:, :conditioning], x[:, conditioning:]])
        return y1, y2, log_det

    def inverse(self, y: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y (N, C, *)`` back to ``(x, log_det)`` of the inverse."""
        conditioning = self.channels - self.channels // 2
        x1, x2 = y[:, :conditioning], y[:, conditioning:]
        total: Tensor | float = 0.0
        for step in reversed(self.steps):
            x1, x2, log_det = step.inverse(x1, x2, *cond)  # type: ignore[operator]
            total = total + log_det
        return torch.cat((x1, x2), 1), total  # type: ignore[return-value]


class _Bound:
    """A step with its condition and the form of its results: a :class:`~msflow_ext.activations.Step`."""

    def __init__(
        self,
        step: Any,
        cond: Sequence[Tensor],
        *,
        then: Tensor | None = None,
        split: int | None = None,
        copy: bool = False,
    ) -> None:
        self.step, self.cond = step, cond
        self.form = {"then": then, "split": split, "copy": copy}

    @property
    def subnet(self) -> nn.Module:
        return self.step.subnet

    @property
    def tensors(self) -> list[Tensor]:
        step, then = self.step, self.form["then"]
        return [step.global_scale, step.global_offset, *self.cond, step.perm] + (
            [] if then is None else [then]
        )

    def __call__(self, x1: Tensor, x2: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.step(x1, x2, *self.cond, seen=seen, **self.form)

    def retrace(
        self, ask: Callable[..., Any], results: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        y1, y2 = results
        scale, offset = _affine(*tensors[:2], dtype=y2.dtype)
        cond, (perm, *then) = tensors[2 : 2 + len(self.cond)], tensors[2 + len(self.cond) :]
        affine = (scale, offset, perm[then[0]] if then else perm)
        return self.step.retrace(lambda x1: ask(x1, *cond), y1, y2, affine)


def _affine(scale: Tensor, offset: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positive scale, and offset, of the parameters for a stream of ``dtype``."""
    wide = accumulation_dtype(dtype)
    return 0.1 * F.softplus(scale.to(wide), beta=0.5), offset.to(wide)


def inverse_softplus_scale(scale: float) -> float:
    """The ``global_scale`` whose softplus scale is ``scale``: FrEIA's initial value for ``global_affine_init``."""
    v = 0.5 * 10 * scale
    return 2 * (v + math.log(-math.expm1(-v)))
