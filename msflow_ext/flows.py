"""Invertible layers on split halves: a coupling step, and a chain of steps."""

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
    r"""Step of a flow: an affine coupling of two halves, then a global affine and a permutation of all channels.

    It is FrEIA's ``AllInOneBlock`` with a softplus global affine and a fixed permutation. It works on halves instead of
    whole tensors, so that a chain of steps neither splits nor concatenates.

    Args:
        channels: Number of channels of both halves; ``channels - channels // 2`` are conditioning.
        subnet: Module that maps ``(x1, *cond)`` to ``(N, 2 * (channels // 2), *)``.
        clamp, clamp_form: As for :func:`msflow_ext.ops.affine_coupling`.
        generator: Generator of the permutation.

    Examples:
        >>> step = AffineCoupling(4, nn.Conv2d(2, 4, 3, padding=1), clamp=1.9, clamp_form="0.2")
        >>> x1, x2 = torch.randn(2, 4, 8, 8).chunk(2, 1)
        >>> y1, y2, log_det = step(x1, x2)
        >>> torch.allclose(step.inverse(y1, y2)[1], x2, atol=1e-4)
        True
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
        """Return the positive global scale, the offset and the permutation ``(channels,)`` for data of ``dtype``."""
        return *_affine(self.global_scale, self.global_offset, dtype), self.perm

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *cond: Tensor,
        x1_copy: Tensor | None = None,
        then: Tensor | None = None,
        split: int | None = None,
        copy: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return ``(y1, y2, log_det)``, or ``(y1, y2, y1_copy, log_det)`` if ``copy`` is True.

        Args:
            x1: Conditioning half, ``(N, C1, *)``.
            x2: Transformed half, ``(N, C2, *)``.
            cond: Conditions of the subnet.
            x1_copy: Copy of ``x1`` in the dtype of the subnet, from the previous step.
            then: Further permutation, after that of this step.
            split: Number of channels of ``y1``, by default ``C1``.
            copy: If True, also return ``y1`` in the dtype of the subnet's output.
        """
        affine = self._affine(x2.dtype, then)
        a = self.subnet(x1 if x1_copy is None else x1_copy, *cond)
        if not copy:
            return self._couple(x1, x2, a, affine, split)
        options: Any = {"split": split, "clamp": self.clamp, "clamp_form": self.clamp_form}
        y1, y2, log_det, y1_copy = ops.affine_coupling_with_copy(x1, x2, a, *affine, **options)
        return y1, y2, y1_copy, log_det

    def inverse(self, y1: Tensor, y2: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(x1, x2, log_det)`` of the inverse."""
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
        """Recompute the inputs of :meth:`forward` as leaves of a graph, and its results in that graph.

        Args:
            ask: Function that calls the subnet on ``x1``.
            y1, y2: Results of :meth:`forward`.
            affine: Scale, offset and permutation.
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
    """Chain of :class:`AffineCoupling` steps on one scale; the data stay in two halves throughout.

    Args:
        steps: Steps with equal numbers of channels.

    Attributes:
        memory: ``"lean"``, or ``"reversible"`` to save no activations: see :func:`msflow_ext.activations.reversible`.

    Examples:
        >>> subnets = (nn.Conv2d(2, 4, 3, padding=1) for _ in range(3))
        >>> flow = Flow([AffineCoupling(4, each, clamp=1.9, clamp_form="0.2") for each in subnets])
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y, _, log_det = flow(x)
        >>> torch.allclose(flow.inverse(y)[0], x, atol=1e-4)
        True
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

        Args:
            x: Data, ``(N, C, *)``.
            cond: Conditions of the subnets.
            then: Further permutation of the result's channels.
            split: Number of channels of ``y1``, by default all.
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
    """Step with its conditions and options: a :class:`~msflow_ext.activations.Step`."""

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
        self.options = {"then": then, "split": split, "copy": copy}

    @property
    def subnet(self) -> nn.Module:
        return self.step.subnet

    @property
    def tensors(self) -> list[Tensor]:
        step, then = self.step, self.options["then"]
        return [step.global_scale, step.global_offset, *self.cond, step.perm] + (
            [] if then is None else [then]
        )

    def __call__(self, x1: Tensor, x2: Tensor, x1_copy: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.step(x1, x2, *self.cond, x1_copy=x1_copy, **self.options)

    def retrace(
        self, ask: Callable[..., Any], results: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        y1, y2 = results
        scale, offset = _affine(*tensors[:2], dtype=y2.dtype)
        cond, (perm, *then) = tensors[2 : 2 + len(self.cond)], tensors[2 + len(self.cond) :]
        affine = (scale, offset, perm[then[0]] if then else perm)
        return self.step.retrace(lambda x1: ask(x1, *cond), y1, y2, affine)


def _affine(scale: Tensor, offset: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the positive scale and the offset of these parameters for data of ``dtype``."""
    accumulation = accumulation_dtype(dtype)
    return 0.1 * F.softplus(scale.to(accumulation), beta=0.5), offset.to(accumulation)


def inverse_softplus_scale(scale: float) -> float:
    """Return the ``global_scale`` whose softplus scale is ``scale``: FrEIA's initial value for ``global_affine_init``.

    Examples:
        >>> parameter = torch.tensor(inverse_softplus_scale(2.0))
        >>> round(float(0.1 * F.softplus(parameter, beta=0.5)), 4)
        2.0
    """
    v = 0.5 * 10 * scale
    return 2 * (v + math.log(-math.expm1(-v)))
