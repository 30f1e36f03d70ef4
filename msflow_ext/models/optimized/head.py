"""Optimized heads for inference: channels_last, packed convolutions, constants folded, optionally bfloat16."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.flows import AffineCoupling, Flow, FlowOutput
from msflow_ext.models.base import refuse_non_finite
from msflow_ext.models.optimized.packing import Optimized
from msflow_ext.ops._backend import is_channels_last

# Has the arguments of :func:`~msflow_ext.ops.affine_coupling`. Its last result is ``log_det``, or None.
Coupling = Callable[..., tuple[Any, ...]]


class OptimizedHead(Optimized):
    """Copy of a head for inference, with the same inputs and outputs but without gradients.

    Args:
        head: the original, which does not change. The copy does not follow its later changes.
        dtype: dtype of convolutions and of the state between them. Default: that of the weights.
    """

    # Attributes of the original:
    _check_features: Callable[[Sequence[Tensor]], None]
    flows: Any

    def __init__(self, head: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__(head, next(head.parameters()).dtype if dtype is None else dtype)
        self.packed()

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Return latent tensors, in the dtype and memory format of the features, and ``log_det``."""
        self._check(features)
        z, log_det = self.run(features, ops.affine_coupling, latent)
        assert log_det is not None
        like = zip(z, features, strict=True)
        return FlowOutput([relaid(t, f.dtype, _is_last(f)) for t, f in like], log_det)

    @torch.no_grad()
    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return log-likelihood maps ``[(N, H_i, W_i)]`` in float32 or wider; ``log_det`` is not computed."""
        self._check(features)
        return self.run(features, partial(ops.affine_coupling, log_det=False), likelihood)[0]

    @abstractmethod
    def run(
        self, features: Sequence[Tensor], couple: Coupling, end: Coupling
    ) -> tuple[list[Tensor], Tensor | None]:
        """Run all couplings, and return the results of the last one of each scale, and ``log_det``.

        Args:
            features: inputs of the head.
            couple: function of all couplings but the last ones.
            end: function of the last coupling of each scale.
        """

    def _check(self, features: Sequence[Tensor]) -> None:
        self._check_features(features)
        if features[0].is_cpu:  # checked here, because an activation may turn NaN into 0
            refuse_non_finite(torch.stack([f.detach().sum().double() for f in features]), features)


def latent(x1: Tensor, x2: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the joined halves of :func:`~msflow_ext.ops.affine_coupling`, and its ``log_det``."""
    split = x1.size(1) + x2.size(1)
    z, _, log_det = ops.affine_coupling(x1, x2, *args, split=split, **options)
    return z, log_det


def likelihood(*args: Any, **options: Any) -> tuple[Tensor, None]:
    """Return :func:`~msflow_ext.ops.coupling_log_likelihood`, and None for ``log_det``."""
    return ops.coupling_log_likelihood(*args, **options), None


def total(log_dets: Iterable[Tensor | None]) -> Tensor | None:
    """Return the sum of those that are not None, or None."""
    found = [log_det for log_det in log_dets if log_det is not None]
    return sum(found[1:], found[0]) if found else None


class OptimizedFlow:
    """Steps of one scale, with everything precomputed that does not depend on the image.

    Args:
        flow: the original.
        subnets: function ``x1 -> a`` of each step.
        dtype: dtype of the state between the steps.
        then: see :class:`~msflow_ext.flows.Flow`.
    """

    def __init__(
        self,
        flow: Flow,
        subnets: Sequence[Callable[[Tensor], Tensor]],
        dtype: torch.dtype,
        *,
        then: Tensor | None = None,
    ) -> None:
        self.dtype = dtype
        self.conditioning = flow.channels - flow.channels // 2
        self.steps = [
            _Step(step, subnet, dtype)  # type: ignore[arg-type]
            for step, subnet in zip(flow.steps, subnets, strict=True)
        ]
        if then is not None:
            self.steps[-1].perm = self.steps[-1].perm[then]

    def __call__(self, x: Tensor, couple: Coupling, end: Coupling) -> tuple[Any, ...]:
        """Return the results of the last step, computed by ``end``, and ``log_det``; ``couple`` computes the others."""
        x1 = relaid(x[:, : self.conditioning], self.dtype, True)
        x2 = relaid(x[:, self.conditioning :], self.dtype, True)
        log_dets = []
        for step in self.steps[:-1]:
            x1, x2, log_det = step(x1, x2, couple)
            log_dets.append(log_det)
        *results, log_det = self.steps[-1](x1, x2, end)
        return *results, total([*log_dets, log_det])


class _Step:
    def __init__(
        self, step: AffineCoupling, subnet: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        self.subnet = subnet
        scale, offset, perm = step.affine(dtype)
        self.affine, self.perm = (scale.clone(), offset.clone()), perm.clone()
        self.options = {"clamp": step.clamp, "clamp_form": step.clamp_form}

    def __call__(self, x1: Tensor, x2: Tensor, couple: Coupling) -> tuple[Any, ...]:
        return couple(x1, x2, self.subnet(x1), *self.affine, self.perm, **self.options)


def relaid(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return ``x (N, C, H, W)`` in this dtype and memory format.

    If the format changes, each sample is transposed as a matrix, in the narrower dtype. PyTorch has a fast path for
    that, three times as fast as its copy of four dimensions.
    """
    there = torch.channels_last if channels_last else torch.contiguous_format
    if x.device.type != "cpu" or x.numel() == 0 or is_channels_last(x) == channels_last:
        return x.to(dtype).contiguous(memory_format=there)
    _, c, h, w = x.shape
    x = x.to(min(x.dtype, dtype, key=lambda each: each.itemsize))
    y = torch.empty_like(x, memory_format=there)
    for source, target in zip(x, y, strict=True):
        if channels_last:
            target.permute(1, 2, 0).view(h * w, c).copy_(source.reshape(c, h * w).t())
        else:
            target.view(c, h * w).copy_(source.permute(1, 2, 0).reshape(h * w, c).t())
    return y.to(dtype)


_streams: ContextVar[Sequence[torch.cuda.Stream]] = ContextVar("streams", default=())


@contextmanager
def side_by_side(device: torch.device) -> Iterator[None]:
    """Let :func:`each_scale` compute the scales concurrently in this block, on CUDA streams; other threads do not change."""
    before = _streams.set([torch.cuda.Stream(device) for _ in range(_SIDE_STREAMS)])
    try:
        yield
    finally:
        _streams.reset(before)


_SIDE_STREAMS = 4


def each_scale(run: Callable[..., Any], *scales: Sequence[Any]) -> list[Any]:
    """Return ``run`` of each scale's arguments, in order.

    Side streams start after all work queued on the current stream, which waits for them at the end. So memory is safe
    without ``record_stream``.
    """
    arguments, streams = zip(*scales, strict=True), _streams.get()
    if not streams:
        return [run(*each) for each in arguments]
    current, results, ends = torch.cuda.current_stream(), [], []
    start = current.record_event()
    for stream, each in zip(cycle(streams), arguments, strict=False):
        stream.wait_event(start)
        with torch.cuda.stream(stream):
            results.append(run(*each))
        ends.append(stream.record_event())
    for end in ends:
        current.wait_event(end)
    return results


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
