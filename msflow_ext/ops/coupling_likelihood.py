"""Log-likelihood map of a coupling's results in one pass, for the last coupling of a flow at inference."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._coupling_call import CouplingCall, check_forward
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype
from msflow_ext.ops.coupling import affine_coupling_reference, coupling_job
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
    r"""Compute the log-likelihood map of the results of a coupling, without storing the results.

    Equals :func:`~msflow_ext.ops.log_likelihood_map` of the results of :func:`~msflow_ext.ops.affine_coupling`, except
    that they are not rounded to the dtype of ``x2``. Gradients are those of the reference.

    Args:
        x1, x2, a, scale, offset, clamp, clamp_form, limit: As for :func:`~msflow_ext.ops.affine_coupling`, with at least
            one channel.
        perm: As for :func:`~msflow_ext.ops.affine_coupling`. It does not change the result.

    Returns:
        ``(N, *)`` in nats per channel, in the accumulation dtype: float64 for float64, otherwise float32.

    Raises:
        ValueError: A shape, a device or a value does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> import torch
        >>> from msflow_ext import ops
        >>> x1, x2, a = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
        >>> y1, y2, _ = ops.affine_coupling(x1, x2, a)
        >>> expected = ops.log_likelihood_map(torch.cat((y1, y2), 1))
        >>> torch.allclose(coupling_log_likelihood(x1, x2, a), expected, atol=1e-5)
        True
    """
    call = CouplingCall(x1, x2, a, scale, offset, perm, float(clamp), clamp_form, float(limit), 0)
    check_forward(call)
    if call.channels == 0:
        raise ValueError(
            "x1 and x2 must have at least one channel together for a likelihood, got none"
        )
    arguments = (*call[:5], *call[6:9])
    if not _backend.is_native(x1, x2, a, scale, offset):
        return coupling_log_likelihood_reference(*arguments)
    return _likelihood(*arguments)[0]


def coupling_log_likelihood_reference(*arguments: Any) -> Tensor:
    """Compute :func:`coupling_log_likelihood` in plain PyTorch, with the arguments of the registered op."""
    call = _call(*arguments)
    x1, x2, a = (t.to(accumulation_dtype(call.x2.dtype)) for t in call[:3])
    call = call._replace(x1=x1, x2=x2, a=a, split=call.channels)
    return log_likelihood_map_reference(affine_coupling_reference(*call)[0])


def _call(x1, x2, a, scale, offset, clamp, clamp_form, limit) -> CouplingCall:
    return CouplingCall(x1, x2, a, scale, offset, None, clamp, clamp_form, limit, 0)


def _allocate(x1, x2, *_):
    shape = (x2.size(0), *x2.shape[2:])
    return (x2.new_empty(shape, dtype=accumulation_dtype(x2.dtype)),)


def _run(results, *arguments):
    call = _call(*arguments)
    channels_last = _backend.is_channels_last(call.x2)
    _keep, v = _backend.views(channels_last, *call[:3])
    job, _dense = coupling_job(call, channels_last)
    _backend.run("coupling_likelihood", call.x2, job, *v, results[0].data_ptr())


_likelihood = NativeOp(
    "coupling_likelihood",
    "(Tensor x1, Tensor x2, Tensor a, Tensor? scale, Tensor? offset, float clamp, str clamp_form, float limit)"
    " -> Tensor",
    allocate=_allocate,
    run=_run,
    reference=lambda *args: (coupling_log_likelihood_reference(*args),),
    tensors=5,
)
