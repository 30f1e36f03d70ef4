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

# Called as :func:`~msflow_ext.ops.affine_coupling`; the last of its results is ``log_det``, or None.
Coupling = Callable[..., tuple[Any, ...]]


class OptimizedHead(Optimized):
    """A copy of a head for inference: it takes and returns what the original does, without gradients.

    Args:
        head: the original, left untouched; its later changes do not show.
        dtype: of the arithmetic in convolutions and of the state between them; the weights' by default.
    """

    # Of the original's class:
    _check_features: Callable[[Sequence[Tensor]], None]
    flows: Any

    def __init__(self, head: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__(head, next(head.parameters()).dtype if dtype is None else dtype)
        self.packed()

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> FlowOutput:
        """Latent tensors, in the dtype and memory format of the features, and ``log_det``."""
        self._check(features)
        z, log_det = self.run(features, ops.affine_coupling, latent)
        assert log_det is not None
        like = zip(z, features, strict=True)
        return FlowOutput([relaid(t, f.dtype, _is_last(f)) for t, f in like], log_det)

    @torch.no_grad()
    def log_likelihood(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Log-likelihood maps ``[(N, H_i, W_i)]``, float32 or wider, without a ``log_det`` on the way."""
        self._check(features)
        return self.run(features, partial(ops.affine_coupling, log_det=False), likelihood)[0]

    @abstractmethod
    def run(
        self, features: Sequence[Tensor], couple: Coupling, end: Coupling
    ) -> tuple[list[Tensor], Tensor | None]:
        """What ``end`` makes of the last coupling of each scale, as it comes, and ``log_det``; ``couple`` does the rest."""

    def _check(self, features: Sequence[Tensor]) -> None:
        self._check_features(features)
        if features[0].is_cpu:  # an activation on the way may turn NaN into 0
            refuse_non_finite(torch.stack([f.detach().sum().double() for f in features]), features)


def latent(x1: Tensor, x2: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The result of :func:`~msflow_ext.ops.affine_coupling` in one piece, and its ``log_det``."""
    split = x1.size(1) + x2.size(1)
    z, _, log_det = ops.affine_coupling(x1, x2, *args, split=split, **options)
    return z, log_det


def likelihood(*args: Any, **options: Any) -> tuple[Tensor, None]:
    """:func:`~msflow_ext.ops.coupling_log_likelihood`, and no ``log_det``."""
    return ops.coupling_log_likelihood(*args, **options), None


def total(log_dets: Iterable[Tensor | None]) -> Tensor | None:
    """Their sum, of those that there are."""
    found = [log_det for log_det in log_dets if log_det is not None]
    return sum(found[1:], found[0]) if found else None


class OptimizedFlow:
    """The steps of one scale with all that an image does not change.

    Args:
        flow: the original.
        subnets: one ``x1 -> a`` per step.
        dtype: of the state between the steps.
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
            _FrozenStep(step, subnet, dtype)  # type: ignore[arg-type]
            for step, subnet in zip(flow.steps, subnets, strict=True)
        ]
        if then is not None:
            self.steps[-1].perm = self.steps[-1].perm[then]

    def __call__(self, x: Tensor, couple: Coupling, end: Coupling) -> tuple[Any, ...]:
        """The results of the last step, which ``end`` couples, and ``log_det``; ``couple`` does the other steps."""
        x1 = relaid(x[:, : self.conditioning], self.dtype, True)
        x2 = relaid(x[:, self.conditioning :], self.dtype, True)
        log_dets = []
        for step in self.steps[:-1]:
            x1, x2, log_det = step(x1, x2, couple)
            log_dets.append(log_det)
        *results, log_det = self.steps[-1](x1, x2, end)
        return *results, total([*log_dets, log_det])


class _FrozenStep:
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
    """``x (N, C, H, W)`` in this dtype and memory format.

    Where the format changes, a sample is a matrix to transpose: that of numbers of one dtype is a fast path of
    PyTorch, three times as fast as its copy of four dimensions, and the narrower numbers are the faster ones.
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
    """Inside, :func:`each_scale` works on scales of this CUDA device at the same time, on streams of their own.

    Other threads go on as they did.
    """
    before = _streams.set([torch.cuda.Stream(device) for _ in range(_SIDE_STREAMS)])
    try:
        yield
    finally:
        _streams.reset(before)


_SIDE_STREAMS = 4


def each_scale(run: Callable[..., Any], *scales: Sequence[Any]) -> list[Any]:
    """``run`` of every scale's arguments, in their order.

    Memory stays safe without the allocator's knowledge: side streams begin after everything that the current stream
    was given, which waits for them at the end.
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
