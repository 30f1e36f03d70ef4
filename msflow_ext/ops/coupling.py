"""The affine coupling of a flow's block with its permutation, global affine and log-determinant in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._coupling_call import (
    CLAMP_FORMS,
    CouplingCall,
    Vectors,
    check_forward,
    check_inverse,
    check_results,
    check_vectors,
)
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype, per_channel, positions


def affine_coupling(
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
    split: int | None = None,
    log_det: bool = True,
) -> tuple[Tensor, Tensor, Any]:
    r"""Scale and shift ``x2`` by a subnet's output ``a``, then scale, shift and permute all channels.

    .. math::
        s = \alpha \tanh(0.1\, a_s), \quad u = [x_1,\; x_2 e^{s} + 0.1\, a_t], \quad
        v = u \cdot \mathrm{scale} + \mathrm{offset}, \quad y_k = v_{\mathrm{perm}[k]}

    .. math:: \log|\det J| = \textstyle\sum s + P \sum_c \log \mathrm{scale}_c

    Args:
        x1: conditioning half, the input of the subnet, ``(N, C1, *)``; ``C1`` may be 0.
        x2: transformed half, ``(N, C2, *)``, float32, float64, bfloat16 or float16 (on the CPU: reference).
        a: ``(N, 2 * C2, *)``, first :math:`a_s`, then :math:`a_t`; it may have half precision if ``x2`` is float32.
        scale, offset: ``(C1 + C2,)`` in the accumulation dtype (float64 for float64, else float32).
        perm: ``(C1 + C2,)`` int64, a permutation. The CPU kernels check it, the reference does not. On CUDA, a channel
            whose index is out of range becomes NaN.
        clamp: :math:`\alpha > 0`.
        clamp_form: ``"0.2"`` as above; ``"head"``: :math:`\alpha \tanh(0.1 a_s / \alpha)`;
            ``"atan"``: :math:`0.636\, \alpha \arctan(a_s / \alpha)` and a shift by :math:`a_t` itself.
        limit: the results are clamped to ``[-limit, limit]``, ``limit > 0``; ``log_det`` ignores it.
        split: number of channels of the first result, ``C1`` by default.
        log_det: whether to return ``log_det``. False saves the launch of a kernel on a GPU; the results are the same
            bit for bit.

    Returns:
        ``y1 (N, split, *)``, ``y2 (N, C1 + C2 - split, *)`` in the memory format and dtype of ``x2``, and
        ``log_det (N,)`` in nats, float64 for float64 and float32 else, or None.

    Raises:
        ValueError: shapes, devices or values do not fit. TypeError: dtypes do not.

    Source: FrEIA 0.2 ``AllInOneBlock`` ("0.2"), FrEIA master ("head"), MSFlow's fusion flow ("atan").
    """
    call = _checked((x1, x2, a), (scale, offset, perm), clamp, clamp_form, limit, split)
    op = _coupling if log_det else _results_alone
    run = op if _backend.is_native(*call[:6]) else op.reference
    return run(*call) if log_det else (*run(*call), None)


def affine_coupling_with_copy(
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
    split: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`affine_coupling`, and a copy of its first result in the dtype of ``a``.

    The next subnet reads the copy if subnets work in half precision and the flow in float32. It is written in the same
    pass, and its gradient is added to the gradient of ``y1`` in the backward pass.

    Returns:
        ``y1``, ``y2`` and ``log_det`` of :func:`affine_coupling`, and ``copy (N, split, *)`` in the memory format of
        ``y1``. If ``a`` has the dtype of ``x2``, it is ``y1`` itself.
    """
    call = _checked((x1, x2, a), (scale, offset, perm), clamp, clamp_form, limit, split)
    if not _backend.is_native(*call[:6]):
        return affine_coupling_with_copy_reference(*call)
    if a.dtype is not x2.dtype:
        return _coupling_with_copy(*call)
    y1, y2, log_det = _coupling(*call)
    return y1, y2, log_det, y1


def affine_coupling_inverse(
    y1: Tensor,
    y2: Tensor,
    a: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    clamp: float = 2.0,
    clamp_form: str = "0.2",
) -> tuple[Tensor, Tensor]:
    """Return the transformed half and the log-determinant of the inverse of :func:`affine_coupling`.

    Compute the conditioning half with :func:`conditioning_half` first, because the subnet needs it to compute ``a``. Arguments
    are those of :func:`affine_coupling`; ``a (N, 2 * C2, *)`` defines the number of transformed channels.

    Returns:
        ``x2 (N, C2, *)`` and ``log_det (N,)`` of the inverse, minus that of the forward pass.
    """
    call = CouplingCall(y1, y2, a, scale, offset, perm, float(clamp), clamp_form)
    check_inverse(call)
    run = _inverse if _backend.is_native(*call[:6]) else affine_coupling_inverse_reference
    return run(*call[:8])


def conditioning_half(
    y1: Tensor,
    y2: Tensor,
    channels: int,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """Return the conditioning half ``x1 (N, channels, *)`` from the results of :func:`affine_coupling`."""
    check_results(y1, y2)
    vectors = (scale, offset, perm)
    whole = torch.cat((y1, y2), 1)
    if not 0 <= channels <= whole.size(1):
        raise ValueError(f"coupling: channels must be in 0..{whole.size(1)}, got {channels}")
    check_vectors(y2, whole.size(1), vectors)
    u = _undo_affine(whole.to(accumulation_dtype(y2.dtype)), vectors)
    return u[:, :channels].to(y2.dtype)


def affine_coupling_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`affine_coupling` in plain PyTorch, in the accumulation dtype until the last rounding.

    Args:
        arguments: the fields of a ``CouplingCall``.
    """
    call = CouplingCall(*arguments)
    x2, accumulation = call.x2, accumulation_dtype(call.x2.dtype)
    s, t = log_scale_and_shift(call.a.to(accumulation), call.clamp, call.clamp_form)
    v = torch.cat((call.x1.to(accumulation), x2.to(accumulation) * torch.exp(s) + t), 1)
    log_det = s.flatten(1).sum(1)
    if call.scale is not None:
        log_det = log_det + positions(x2) * torch.log(call.scale).sum()
        v = v * per_channel(call.scale, v)
    if call.offset is not None:
        v = v + per_channel(call.offset, v)
    if call.perm is not None:
        v = v.index_select(1, call.perm)
    if call.limit != math.inf:
        v = v.clamp(-call.limit, call.limit)
    v = v.to(x2.dtype)
    return v[:, : call.split], v[:, call.split :], log_det


def affine_coupling_with_copy_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`affine_coupling_with_copy` in plain PyTorch, with the arguments of the reference above."""
    y1, y2, log_det = affine_coupling_reference(*arguments)
    return y1, y2, log_det, y1.to(CouplingCall(*arguments).a.dtype)


def affine_coupling_inverse_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute :func:`affine_coupling_inverse` in plain PyTorch.

    Args:
        arguments: the first eight fields of a ``CouplingCall``.
    """
    call = CouplingCall(*arguments)
    y1, y2, accumulation = call.x1, call.x2, accumulation_dtype(call.x2.dtype)
    s, t = log_scale_and_shift(call.a.to(accumulation), call.clamp, call.clamp_form)
    u = _undo_affine(torch.cat((y1, y2), 1).to(accumulation), call.vectors)
    x2 = (u[:, u.size(1) - s.size(1) :] - t) * torch.exp(-s)
    log_det = -s.flatten(1).sum(1)
    if call.scale is not None:
        log_det = log_det - positions(y2) * torch.log(call.scale).sum()
    return x2.to(y2.dtype), log_det


def log_scale_and_shift(a: Tensor, clamp: float, clamp_form: str) -> tuple[Tensor, Tensor]:
    """Return ``s`` and ``t`` from a subnet's output ``a``, as the docstring of :func:`affine_coupling` defines them."""
    a_s, a_t = a.chunk(2, 1)
    if clamp_form == "0.2":
        return clamp * torch.tanh(0.1 * a_s), 0.1 * a_t
    if clamp_form == "head":
        return clamp * torch.tanh(0.1 * a_s / clamp), 0.1 * a_t
    return 0.636 * clamp * torch.atan(a_s / clamp), a_t


def _undo_affine(y: Tensor, vectors: Vectors) -> Tensor:
    scale, offset, perm = vectors
    if perm is not None:
        y = y.index_select(1, torch.argsort(perm))
    if offset is not None:
        y = y - per_channel(offset, y)
    return y if scale is None else y / per_channel(scale, y)


def _checked(
    inputs: tuple[Tensor, Tensor, Tensor],
    vectors: Vectors,
    clamp: float,
    clamp_form: str,
    limit: float,
    split: int | None,
) -> CouplingCall:
    """Return the arguments of a coupling as a tuple, after checking them."""
    if split is None and inputs[0].dim() > 1:
        split = inputs[0].size(1)
    call = CouplingCall(*inputs, *vectors, float(clamp), clamp_form, float(limit), split)
    check_forward(call)
    return call


def _allocate_results(x1, x2, *rest):
    channels, split = x1.size(1) + x2.size(1), rest[-1]
    channels_last = _is_channels_last(x1, x2)
    y1 = _backend.empty(x2, split, channels_last)
    return y1, _backend.empty(x2, channels - split, channels_last)


def _allocate(x1, x2, *rest):
    log_det = x2.new_empty(x2.size(0), dtype=accumulation_dtype(x2.dtype))
    return *_allocate_results(x1, x2, *rest), log_det


def _allocate_with_copy(x1, x2, a, *rest):
    copy = _backend.empty(a, rest[-1], _is_channels_last(x1, x2))
    return *_allocate(x1, x2, a, *rest), copy


def _run(results, *arguments):
    call = CouplingCall._make(arguments)
    y1, y2, log_det, copy = (*results, None, None)[:4]
    channels_last = _is_channels_last(call.x1, call.x2)
    _keep, v = _backend.views(channels_last, *call[:3], y1, y2, copy)
    job, _dense = coupling_job(call, channels_last)
    _launch("coupling_forward", job, call, *v, 0 if log_det is None else log_det.data_ptr())


def _allocate_grads(x1, x2, a, scale, offset, *_):
    channels_last = _is_channels_last(x1, x2)
    halves = (_backend.empty(t, t.size(1), channels_last) for t in (x1, x2, a))
    return *halves, *(None if t is None else t.new_empty(t.shape) for t in (scale, offset)), None


def _run_backward(upstream, grads, _extra, *arguments):
    call = CouplingCall._make(arguments)
    x2, channels_last = call.x2, _is_channels_last(call.x1, call.x2)
    y1, y2, log_det, copy = (*upstream, None, None)[:4]
    if log_det is None:
        log_det = x2.new_zeros(x2.size(0), dtype=accumulation_dtype(x2.dtype))
    _keep, v = _backend.views(channels_last, y1, y2, copy, *call[:3], *grads[:3])
    _keep2, (grad_log_det, *grad_vectors) = _backend.addresses(log_det, *grads[3:5])
    job, _dense = coupling_job(call, channels_last)
    _launch("coupling_backward", job, call, *v[:3], grad_log_det, *v[3:], *grad_vectors)


def _allocate_inverse(y1, y2, a, *_):
    x2 = _backend.empty(a, a.size(1) // 2, _is_channels_last(y1, y2), y2.dtype)
    return x2, y2.new_empty(y2.size(0), dtype=accumulation_dtype(y2.dtype))


def _run_inverse(results, y1, y2, *rest):
    x2, log_det = results
    channels_last = _is_channels_last(y1, y2)
    _keep, v = _backend.views(channels_last, y1, y2, rest[0], x2)
    call = CouplingCall(y1, x2, *rest, split=y1.size(1))
    job, _dense = coupling_job(call, channels_last, y1.size(1) + y2.size(1) - x2.size(1))
    _launch("coupling_inverse", job, call, *v, log_det.data_ptr())


# In channels_last, the CUDA kernels keep all channels of a position in shared memory, and 2 bytes for each that describe
# the permutation. Every GPU has this much.
_SHARED_BYTES = 24 * 1024


def _is_channels_last(first, second):
    if not _backend.is_channels_last(second):
        return False
    if not _backend.runs_cuda(second):
        return True
    channels = first.size(1) + second.size(1)
    return channels * (second.element_size() + 2) <= _SHARED_BYTES


def _launch(entry, job, call, *arguments):
    def scratch():
        types = _backend.DTYPES[call.x2.dtype], _backend.DTYPES[call.a.dtype]
        return _backend.C.coupling_scratch(job, *types, entry == "coupling_backward")

    _backend.run(entry, call.x2, job, *arguments, scratch=scratch)


def coupling_job(
    call: CouplingCall, channels_last: bool, conditioning: int | None = None
) -> tuple[Any, list[Tensor | None]]:
    """Return the kernels' options of a call, and the vectors that they point to.

    ``conditioning`` is the number of channels of the conditioning half, by default that of ``x1``.
    """
    x2 = call.x2
    dense, vectors = _backend.addresses(*call.vectors)
    form = CLAMP_FORMS.index(call.clamp_form)
    first = call.x1.size(1) if conditioning is None else conditioning
    sizes = (x2.size(0), first, x2.size(1), positions(x2), call.split)
    return _backend.C.Coupling(sizes, channels_last, form, call.clamp, call.limit, *vectors), dense


_VECTORS = "Tensor? scale, Tensor? offset, Tensor? perm, float clamp, str clamp_form"
_OPERANDS = f"(Tensor x1, Tensor x2, Tensor a, {_VECTORS}, float limit, int split)"
_coupling = NativeOp(
    "coupling",
    f"{_OPERANDS} -> (Tensor, Tensor, Tensor)",
    allocate=_allocate,
    run=_run,
    allocate_grads=_allocate_grads,
    run_backward=_run_backward,
    reference=affine_coupling_reference,
    tensors=6,
)
_results_alone = NativeOp(
    "coupling_results",
    f"{_OPERANDS} -> (Tensor, Tensor)",
    allocate=_allocate_results,
    run=_run,
    allocate_grads=_allocate_grads,
    run_backward=_run_backward,
    reference=lambda *args: affine_coupling_reference(*args)[:2],
    tensors=6,
)
_coupling_with_copy = NativeOp(
    "coupling_with_copy",
    f"{_OPERANDS} -> (Tensor, Tensor, Tensor, Tensor)",
    allocate=_allocate_with_copy,
    run=_run,
    allocate_grads=_allocate_grads,
    run_backward=_run_backward,
    reference=affine_coupling_with_copy_reference,
    tensors=6,
)
_inverse = NativeOp(
    "coupling_inverse",
    f"(Tensor y1, Tensor y2, Tensor a, {_VECTORS}) -> (Tensor, Tensor)",
    allocate=_allocate_inverse,
    run=_run_inverse,
    reference=affine_coupling_inverse_reference,
    tensors=6,
)
