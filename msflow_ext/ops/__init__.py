"""Fused operations on tensors; each file is one op: function, inverse, reference, autograd, compile registration."""

from __future__ import annotations

from msflow_ext.ops._backend import backend
from msflow_ext.ops._shapes import accumulation_dtype
from msflow_ext.ops.coupling import (
    affine_coupling,
    affine_coupling_inverse,
    affine_coupling_with_copy,
    conditioning_half,
)
from msflow_ext.ops.coupling_likelihood import coupling_log_likelihood
from msflow_ext.ops.norm import channel_norm
from msflow_ext.ops.resample import pool_and_concatenate, upsample_and_add
from msflow_ext.ops.score import (
    Aggregate,
    MeanAggregate,
    aggregate,
    half_square_norm,
    log_likelihood_map,
    mean_aggregate,
)
from msflow_ext.ops.winograd import winograd_conv2d, winograd_weight, winograd_weight_grad

__all__ = [
    "Aggregate",
    "MeanAggregate",
    "accumulation_dtype",
    "affine_coupling",
    "affine_coupling_inverse",
    "affine_coupling_with_copy",
    "aggregate",
    "backend",
    "channel_norm",
    "conditioning_half",
    "coupling_log_likelihood",
    "half_square_norm",
    "log_likelihood_map",
    "mean_aggregate",
    "pool_and_concatenate",
    "upsample_and_add",
    "winograd_conv2d",
    "winograd_weight",
    "winograd_weight_grad",
]
