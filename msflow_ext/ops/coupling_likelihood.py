"""The likelihood map of an affine coupling's results in one pass, for the last coupling of a flow at inference."""

from __future__ import annotations

import math

from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype
from msflow_ext.ops.coupling import affine_coupling_reference, check_operands, coupling_job
from msflow_ext.ops.score import log_likelihood_map_reference


def coupling_log_likelihood(
    x1: Tensor,
    x2: Tensor,
    a: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    clamp: float = 2.0,
    clamp_form: str = "0.2",
    limit: float = math.inf,
) -> Tensor:
    r""":func:`~msflow_ext.ops.log_likelihood_map` of the results of :func:`~msflow_ext.ops.affine_coupling`.

    The results themselves are neither written nor rounded to the dtype of ``x2``, and there is no ``log_det``; gradients
    are those of the reference.

    Args:
        x1, x2, a, scale, offset, clamp, clamp_form, limit: as for :func:`~msflow_ext.ops.affine_coupling`, with one
            channel or more.
        perm: likewise; in what order channels are summed, it has no say.

    Returns:
        ``(N, *)`` in nats, float64 for float64 and float32 else.

    Raises:
        ValueError: shapes, devices or values do not fit. TypeError: dtypes do not.
    """
    check_operands(x1, x2, a, scale, offset, perm, clamp, clamp_form, limit, 0)
    if x1.size(1) + x2.size(1) == 0:
        raise ValueError(
            "coupling: x1 and x2 must have one channel or more for a likelihood, got none"
        )
    arguments = (x1, x2, a, scale, offset, float(clamp), clamp_form, float(limit))
    if not _backend.is_native(x1, x2, a, scale, offset):
        return coupling_log_likelihood_reference(*arguments)
    return _likelihood(*arguments)[0]


def coupling_log_likelihood_reference(
    x1: Tensor,
    x2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    clamp: float,
    clamp_form: str,
    limit: float,
) -> Tensor:
    """:func:`coupling_log_likelihood` in plain PyTorch."""
    dtype = accumulation_dtype(x2.dtype)
    x1, x2, a = x1.to(dtype), x2.to(dtype), a.to(dtype)
    split = x1.size(1) + x2.size(1)
    z, _, _ = affine_coupling_reference(
        x1, x2, a, scale, offset, None, clamp, clamp_form, limit, split
    )
    return log_likelihood_map_reference(z)


def _allocate(x1, x2, *_):
    shape = (x2.size(0), *x2.shape[2:])
    return (x2.new_empty(shape, dtype=accumulation_dtype(x2.dtype)),)


def _run(results, x1, x2, a, scale, offset, clamp, clamp_form, limit):
    inter = _backend.is_interleaved(x2)
    _keep, v = _backend.views(inter, x1, x2, a)
    job, _dense = coupling_job(
        x1.size(1), x2, inter, scale, offset, None, clamp, clamp_form, limit, 0
    )
    _backend.run("coupling_likelihood", x2, job, *v, results[0].data_ptr())


_likelihood = NativeOp(
    "coupling_likelihood",
    "(Tensor x1, Tensor x2, Tensor a, Tensor? scale, Tensor? offset, float clamp, str clamp_form, float limit)"
    " -> Tensor",
    allocate=_allocate,
    run=_run,
    reference=lambda *args: (coupling_log_likelihood_reference(*args),),
    tensors=5,
)
