"""Affine coupling of a flow step, with its permutation, global affine and log-determinant in one pass."""

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
        x1: Conditioning half, which the subnet reads.
        x2: Transformed half: float32, float64, bfloat16 or float16. The reference runs float16 on the CPU.
        a: Output of the subnet, first :math:`a_s`, then :math:`a_t`. It may have half precision if ``x2`` is float32.
        scale, offset: Global affine in the accumulation dtype: float64 for float64, otherwise float32.
        perm: Permutation, int64. The CPU kernels check it, the reference does not. On CUDA, a channel whose index is
            out of range becomes NaN.
        clamp: :math:`\alpha > 0`.
        clamp_form: ``"0.2"`` as above; ``"head"``: :math:`\alpha \tanh(0.1 a_s / \alpha)`;
            ``"atan"``: :math:`0.636\, \alpha \arctan(a_s / \alpha)` and a shift by :math:`a_t` itself.
        limit: Positive bound. The results are clamped to ``[-limit, limit]``; ``log_det`` ignores it.
        split: Number of channels of ``y1``, by default that of ``x1``.
        log_det: If False, return None for ``log_det``, which saves one kernel launch on a GPU.

    Shape:
        - x1, x2: ``(N, C1, *)`` and ``(N, C2, *)``; ``C1`` may be 0.
        - a: ``(N, 2 * C2, *)``.
        - scale, offset, perm: ``(C1 + C2,)``.

    Returns:
        ``y1 (N, split, *)``, ``y2 (N, C1 + C2 - split, *)`` and ``log_det (N,)``. ``y1`` and ``y2`` have the memory
        format and dtype of ``x2``; ``log_det`` is in nats, in the accumulation dtype.

    Raises:
        ValueError: A shape, a device or a value does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> x1, x2, a = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
        >>> y1, y2, log_det = affine_coupling(x1, x2, a)
        >>> torch.equal(y1, x1), y2.shape, log_det.shape
        (True, torch.Size([2, 4, 8, 8]), torch.Size([2]))

    References:
        FrEIA 0.2, ``AllInOneBlock`` (``"0.2"``); FrEIA master (``"head"``); the fusion flow of MSFlow
        (``"atan"``).
    """
    call = _checked((x1, x2, a), (scale, offset, perm), clamp, clamp_form, limit, split)
    op = _coupling if log_det else _coupling_results
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
    """Compute :func:`affine_coupling`, and a copy of ``y1`` in the dtype of ``a``.

    The arguments are those of :func:`affine_coupling`. The next subnet reads the copy if subnets run in half precision
    and the flow in float32. It is written in the same pass, and its gradient is added to that of ``y1``.

    Returns:
        ``y1``, ``y2`` and ``log_det`` of :func:`affine_coupling`, and ``copy (N, split, *)`` in the memory format of
        ``y1``. If ``a`` has the dtype of ``x2``, ``copy`` is ``y1`` itself.

    Examples:
        >>> x1, x2, a = torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 6, 4).bfloat16()
        >>> y1, y2, log_det, copy = affine_coupling_with_copy(x1, x2, a)
        >>> y1.dtype, copy.dtype
        (torch.float32, torch.bfloat16)
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
    """Invert :func:`affine_coupling`: return the transformed half and the log-determinant of the inverse.

    Compute the conditioning half with :func:`conditioning_half` first: the subnet needs it to compute ``a``. The other
    arguments are those of :func:`affine_coupling`; ``a (N, 2 * C2, *)`` defines the number of transformed channels.

    Returns:
        ``x2 (N, C2, *)``, and ``log_det (N,)`` in nats, the negative of that of the forward pass.

    Examples:
        >>> x1, x2, a = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 6, 5)
        >>> y1, y2, log_det = affine_coupling(x1, x2, a)
        >>> back, inverse_log_det = affine_coupling_inverse(y1, y2, a)
        >>> torch.allclose(back, x2, atol=1e-5), torch.allclose(inverse_log_det, -log_det)
        (True, True)
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
    """Return the conditioning half ``x1 (N, channels, *)`` from the results of :func:`affine_coupling`.

    Examples:
        >>> perm, (x1, x2) = torch.tensor([2, 0, 1]), torch.randn(4, 3).split([1, 2], 1)
        >>> y1, y2, _ = affine_coupling(x1, x2, torch.randn(4, 4), perm=perm)
        >>> torch.equal(conditioning_half(y1, y2, 1, perm=perm), x1)
        True
    """
    check_results(y1, y2)
    vectors = (scale, offset, perm)
    whole = torch.cat((y1, y2), 1)
    if not 0 <= channels <= whole.size(1):
        raise ValueError(f"channels must be in 0..{whole.size(1)}, got {channels}")
    check_vectors(y2, whole.size(1), vectors)
    u = _undo_affine(whole.to(accumulation_dtype(y2.dtype)), vectors)
    return u[:, :channels].to(y2.dtype)


def affine_coupling_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`affine_coupling` in plain PyTorch, from the fields of a ``CouplingCall``; round once, at the end."""
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
    """Compute :func:`affine_coupling_with_copy` in plain PyTorch, from the fields of a ``CouplingCall``."""
    y1, y2, log_det = affine_coupling_reference(*arguments)
    return y1, y2, log_det, y1.to(CouplingCall(*arguments).a.dtype)


def affine_coupling_inverse_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute :func:`affine_coupling_inverse` in plain PyTorch, from the first eight fields of a ``CouplingCall``."""
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
    """Return the log-scale ``s`` and the shift of :func:`affine_coupling`, from a subnet's output ``a``."""
    a_s, a_t = a.chunk(2, 1)
    if clamp_form == "0.2":
        return clamp * torch.tanh(0.1 * a_s), 0.1 * a_t
    if clamp_form == "head":
        return clamp * torch.tanh(0.1 * a_s / clamp), 0.1 * a_t
    return 0.636 * clamp * torch.atan(a_s / clamp), a_t


def _undo_affine(y: Tensor, vectors: Vectors) -> Tensor:
    """Invert the permutation and the global affine."""
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
    """Check the arguments of a coupling and return them as a tuple."""
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


# In channels_last, the CUDA kernels keep all channels of a position in shared memory, with 2 bytes per channel for the
# permutation. Every GPU has this much.
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
    """Describe a call to the kernels. Also return the vectors that the description points to.

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
_coupling_results = NativeOp(
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
