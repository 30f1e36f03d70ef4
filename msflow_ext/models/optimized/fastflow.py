"""Optimized head of FastFlow, see :mod:`msflow_ext.models.optimized.head`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msflow_ext.models.conv.packed import PackedConv2d
from msflow_ext.models.optimized.head import (
    Coupling,
    OptimizedFlow,
    OptimizedHead,
    each_scale,
    total,
)


class OptimizedFastFlowHead(OptimizedHead):
    """Copy of a :class:`~msflow_ext.FastFlowHead` for inference, with the same inputs and outputs.

    Args:
        head: the original, which does not change.
        dtype: dtype of convolutions and of the state between them. Default: that of the weights, which the LayerNorms
            always use.
    """

    norms: Any

    def _pack(self) -> list[OptimizedFlow]:
        return [
            OptimizedFlow(
                flow, [_optimized(step.subnet, self.dtype) for step in flow.steps], self.dtype
            )
            for flow in self.flows
        ]

    def run(
        self, features: Sequence[Tensor], couple: Coupling, end: Coupling
    ) -> tuple[list[Tensor], Tensor | None]:
        if self.norms:
            pairs = zip(features, self.norms, strict=True)
            features = [norm(f.to(norm.weight.dtype)) for f, norm in pairs]
        results = each_scale(lambda flow, x: flow(x, couple, end), self.packed(), features)
        return [result for result, _ in results], total(log_det for _, log_det in results)


def _optimized(subnet: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Pack Conv - ReLU - Conv into two calls."""
    first, _, second = subnet
    hidden, out = PackedConv2d(first, dtype, activation="relu"), PackedConv2d(second, dtype)
    return lambda x1: out(hidden(x1))
