"""The affine coupling of a flow's block with its permutation, global affine and log-determinant in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype, per_channel, positions

#: Clamp forms, in the order of ``csrc/coupling/formula.h``.
CLAMP_FORMS = ("0.2", "head", "atan")


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
    r"""Scale and shift ``x2`` as a subnet of ``x1`` asked in ``a``, then scale, shift and permute all channels.

    .. math::
        s = \alpha \tanh(0.1\, a_s), \quad u = [x_1,\; x_2 e^{s} + 0.1\, a_t], \quad
        v = u \cdot \mathrm{scale} + \mathrm{offset}, \quad y_k = v_{\mathrm{perm}[k]}

    .. math:: \log|\det J| = \textstyle\sum s + P \sum_c \log \mathrm{scale}_c

    Args:
        x1: passive half, ``(N, C1, *)``; ``C1`` may be 0.
        x2: active half, ``(N, C2, *)``, float32, float64, bfloat16 or float16 (on the CPU: reference).
        a: ``(N, 2 * C2, *)``, first :math:`a_s`, then :math:`a_t`; half precision may go with a float32 ``x2``.
        scale, offset: ``(C1 + C2,)`` in the dtype of the accumulation (float64 for float64, else float32).
        perm: ``(C1 + C2,)`` int64, a permutation; the CPU's kernels check that it is one, the reference takes it on
            trust; on CUDA a channel whose index lies outside becomes NaN.
        clamp: :math:`\alpha > 0`.
        clamp_form: ``"0.2"`` as above; ``"head"``: :math:`\alpha \tanh(0.1 a_s / \alpha)`;
            ``"atan"``: :math:`0.636\, \alpha \arctan(a_s / \alpha)` and a shift by :math:`a_t` itself.
        limit: the results are clamped to ``[-limit, limit]``, ``limit > 0``; no term of ``log_det``.
        split: channels of the first result, ``C1`` by default.
        log_det: False where nobody reads it, which saves a GPU the launch of a kernel; the rest has the same bits.

    Returns:
        ``y1 (N, split, *)``, ``y2 (N, C1 + C2 - split, *)`` in the memory format and dtype of ``x2``, and
        ``log_det (N,)`` in nats, float64 for float64 and float32 else, or None.

    Raises:
        ValueError: shapes, devices or values do not fit. TypeError: dtypes do not.

    Source: FrEIA 0.2 ``AllInOneBlock`` ("0.2"), FrEIA master ("head"), MSFlow's fusion flow ("atan").
    """
    arguments = _arguments(x1, x2, a, scale, offset, perm, clamp, clamp_form, limit, split)
    op = _coupling if log_det else _results_alone
    run = op if _backend.is_native(*arguments[:6]) else op.reference
    return run(*arguments) if log_det else (*run(*arguments), None)


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
    """:func:`affine_coupling`, and its first result once more, in the dtype of ``a``.

    Where subnets work in half precision beside a float32 stream, that copy is what the next of them reads. It is
    written in the same pass, and its gradient is added to that of ``y1`` in the pass back.

    Returns:
        ``y1``, ``y2`` and ``log_det`` of :func:`affine_coupling`, and ``copy (N, split, *)`` in the memory format of
        ``y1``; that is ``y1`` itself where ``a`` has the dtype of ``x2``.
    """
    arguments = _arguments(x1, x2, a, scale, offset, perm, clamp, clamp_form, limit, split)
    if not _backend.is_native(*arguments[:6]):
        return affine_coupling_with_copy_reference(*arguments)
    if a.dtype is not x2.dtype:
        return _coupling_with_copy(*arguments)
    y1, y2, log_det = _coupling(*arguments)
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
    """The active half and the log-determinant of :func:`affine_coupling`'s inverse.

    The passive half comes first, from :func:`passive_half`, because the subnet needs it to give ``a``. Arguments
    as for :func:`affine_coupling`; ``a (N, 2 * C2, *)`` tells how many channels are active.

    Returns:
        ``x2 (N, C2, *)`` and ``log_det (N,)`` of the inverse, that is minus the forward's.
    """
    _check_inverse(y1, y2, a, scale, offset, perm, clamp, clamp_form)
    arguments = (y1, y2, a, scale, offset, perm, float(clamp), clamp_form)
    if not _backend.is_native(y1, y2, a, scale, offset, perm):
        return affine_coupling_inverse_reference(*arguments)
    return _inverse(*arguments)


def passive_half(
    y1: Tensor,
    y2: Tensor,
    channels: int,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """``x1 (N, channels, *)`` from the results of :func:`affine_coupling`: what its inverse begins with."""
    _check_halves("y1", y1, "y2", y2)
    whole = torch.cat((y1, y2), 1)
    if not 0 <= channels <= whole.size(1):
        raise ValueError(f"coupling: channels must be in 0..{whole.size(1)}, got {channels}")
    _check_vectors(y2, whole.size(1), scale, offset, perm)
    u = _undo_affine(whole.to(accumulation_dtype(y2.dtype)), scale, offset, perm)
    return u[:, :channels].to(y2.dtype)


def affine_coupling_reference(
    x1: Tensor,
    x2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
    clamp: float,
    clamp_form: str,
    limit: float,
    split: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`affine_coupling` in plain PyTorch, in the dtype of the accumulation until the last rounding."""
    wide = accumulation_dtype(x2.dtype)
    s, t = log_scale_and_shift(a.to(wide), clamp, clamp_form)
    v = torch.cat((x1.to(wide), x2.to(wide) * torch.exp(s) + t), 1)
    log_det = s.flatten(1).sum(1)
    if scale is not None:
        log_det = log_det + positions(x2) * torch.log(scale).sum()
        v = v * per_channel(scale, v)
    if offset is not None:
        v = v + per_channel(offset, v)
    if perm is not None:
        v = v.index_select(1, perm)
    if limit != math.inf:
        v = v.clamp(-limit, limit)
    v = v.to(x2.dtype)
    return v[:, :split], v[:, split:], log_det


def affine_coupling_with_copy_reference(
    x1: Tensor, x2: Tensor, a: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`affine_coupling_with_copy` in plain PyTorch."""
    y1, y2, log_det = affine_coupling_reference(x1, x2, a, *rest)
    return y1, y2, log_det, y1.to(a.dtype)


def affine_coupling_inverse_reference(
    y1: Tensor,
    y2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
    clamp: float,
    clamp_form: str,
) -> tuple[Tensor, Tensor]:
    """:func:`affine_coupling_inverse` in plain PyTorch."""
    wide = accumulation_dtype(y2.dtype)
    s, t = log_scale_and_shift(a.to(wide), clamp, clamp_form)
    u = _undo_affine(torch.cat((y1, y2), 1).to(wide), scale, offset, perm)
    x2 = (u[:, u.size(1) - s.size(1) :] - t) * torch.exp(-s)
    log_det = -s.flatten(1).sum(1)
    if scale is not None:
        log_det = log_det - positions(y2) * torch.log(scale).sum()
    return x2.to(y2.dtype), log_det


def log_scale_and_shift(a: Tensor, clamp: float, clamp_form: str) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` of a subnet's output ``a``, as the docstring of :func:`affine_coupling` defines them."""
    a_s, a_t = a.chunk(2, 1)
    if clamp_form == "0.2":
        return clamp * torch.tanh(0.1 * a_s), 0.1 * a_t
    if clamp_form == "head":
        return clamp * torch.tanh(0.1 * a_s / clamp), 0.1 * a_t
    return 0.636 * clamp * torch.atan(a_s / clamp), a_t


def _undo_affine(
    y: Tensor, scale: Tensor | None, offset: Tensor | None, perm: Tensor | None
) -> Tensor:
    if perm is not None:
        y = y.index_select(1, torch.argsort(perm))
    if offset is not None:
        y = y - per_channel(offset, y)
    return y if scale is None else y / per_channel(scale, y)


def _arguments(
    x1: Tensor,
    x2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
    clamp: float,
    clamp_form: str,
    limit: float,
    split: int | None,
) -> tuple[Any, ...]:
    """Of the kernels and references: checked, the six tensors first."""
    split = x1.size(1) if split is None and x1.dim() > 1 else split
    check_operands(x1, x2, a, scale, offset, perm, clamp, clamp_form, limit, split)
    return x1, x2, a, scale, offset, perm, float(clamp), clamp_form, float(limit), split


def check_operands(
    x1: Tensor,
    x2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
    clamp: float,
    clamp_form: str,
    limit: float,
    split: int | None,
) -> None:
    """Refuse what :func:`affine_coupling` does not take."""
    _check_halves("x1", x1, "x2", x2)
    n, c1, c2 = x1.size(0), x1.size(1), x2.size(1)
    if a.shape != (n, 2 * c2, *x2.shape[2:]):
        raise ValueError(
            f"coupling: a must be (N, 2 * C2, *) for x2 {tuple(x2.shape)}, got {tuple(a.shape)}"
        )
    if split is None or not 0 <= split <= c1 + c2:
        raise ValueError(f"coupling: split must be in 0..{c1 + c2}, got {split}")
    if not limit > 0:
        raise ValueError(f"coupling: limit must be positive, got {limit}")
    _check_subnet(x2, a, clamp, clamp_form)
    _check_vectors(x2, c1 + c2, scale, offset, perm)


def _check_inverse(
    y1: Tensor,
    y2: Tensor,
    a: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
    clamp: float,
    clamp_form: str,
) -> None:
    _check_halves("y1", y1, "y2", y2)
    channels = y1.size(1) + y2.size(1)
    if (
        a.dim() != y2.dim()
        or (a.size(0), *a.shape[2:]) != (y2.size(0), *y2.shape[2:])
        or a.size(1) % 2
        or a.size(1) // 2 > channels
    ):
        raise ValueError(
            f"coupling: a must be (N, 2 * C2, *) with C2 of {channels} channels active, got {tuple(a.shape)} for "
            f"y2 {tuple(y2.shape)}"
        )
    _check_subnet(y2, a, clamp, clamp_form)
    _check_vectors(y2, channels, scale, offset, perm)


def _check_halves(name1: str, first: Tensor, name2: str, second: Tensor) -> None:
    if min(first.dim(), second.dim()) < 2 or (
        (first.size(0), *first.shape[2:]) != (second.size(0), *second.shape[2:])
    ):
        raise ValueError(
            f"coupling: {name1} and {name2} must be (N, C1, *) and (N, C2, *) of one N and *, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not second.is_floating_point() or first.dtype is not second.dtype:
        raise TypeError(
            f"coupling: {name1} and {name2} must have one floating dtype, got {first.dtype} and {second.dtype}"
        )
    if first.device != second.device:
        raise ValueError(
            f"coupling: {name1} and {name2} must be on one device, got {first.device} and {second.device}"
        )


def _check_subnet(x: Tensor, a: Tensor, clamp: float, clamp_form: str) -> None:
    narrower = (torch.bfloat16, torch.float16) if x.dtype is torch.float32 else ()
    if a.dtype is not x.dtype and a.dtype not in narrower:
        raise TypeError(
            f"coupling: a must be {x.dtype}, or half precision beside float32, got {a.dtype}"
        )
    if a.device != x.device:
        raise ValueError(f"coupling: a must be on {x.device}, got {a.device}")
    if not 0 < clamp < math.inf:
        raise ValueError(f"coupling: clamp must be positive and finite, got {clamp}")
    if clamp_form not in CLAMP_FORMS:
        raise ValueError(f"coupling: clamp_form must be one of {CLAMP_FORMS}, got {clamp_form!r}")


def _check_vectors(
    x: Tensor,
    channels: int,
    scale: Tensor | None,
    offset: Tensor | None,
    perm: Tensor | None,
) -> None:
    wide = accumulation_dtype(x.dtype)
    for name, vector, dtype in (
        ("scale", scale, wide),
        ("offset", offset, wide),
        ("perm", perm, torch.int64),
    ):
        if vector is None:
            continue
        if vector.shape != (channels,):
            raise ValueError(
                f"coupling: {name} must be ({channels},), one per channel, got {tuple(vector.shape)}"
            )
        if vector.dtype is not dtype:
            raise TypeError(
                f"coupling: {name} must be {dtype} for {x.dtype} data, got {vector.dtype}"
            )
        if vector.device != x.device:
            raise ValueError(f"coupling: {name} must be on {x.device}, got {vector.device}")


def _allocate_results(x1, x2, *rest):
    channels, split = x1.size(1) + x2.size(1), rest[-1]
    inter = _is_interleaved(x2, channels)
    return _backend.empty(x2, split, inter), _backend.empty(x2, channels - split, inter)


def _allocate(x1, x2, *rest):
    log_det = x2.new_empty(x2.size(0), dtype=accumulation_dtype(x2.dtype))
    return *_allocate_results(x1, x2, *rest), log_det


def _allocate_with_copy(x1, x2, a, *rest):
    copy = _backend.empty(a, rest[-1], _is_interleaved(x2, x1.size(1) + x2.size(1)))
    return *_allocate(x1, x2, a, *rest), copy


def _run(results, x1, x2, a, scale, offset, perm, *options):
    y1, y2, log_det, copy = (*results, None, None)[:4]
    inter = _is_interleaved(x2, x1.size(1) + x2.size(1))
    _keep, v = _backend.views(inter, x1, x2, a, y1, y2, copy)
    job, _dense = coupling_job(x1.size(1), x2, inter, scale, offset, perm, *options)
    _launch("coupling_forward", job, x2, a, *v, 0 if log_det is None else log_det.data_ptr())


def _allocate_grads(x1, x2, a, scale, offset, *_):
    inter = _is_interleaved(x2, x1.size(1) + x2.size(1))
    halves = (_backend.empty(t, t.size(1), inter) for t in (x1, x2, a))
    return *halves, *(None if t is None else t.new_empty(t.shape) for t in (scale, offset)), None


def _run_backward(upstream, grads, _extra, x1, x2, a, scale, offset, perm, *options):
    inter = _is_interleaved(x2, x1.size(1) + x2.size(1))
    y1, y2, log_det, copy = (*upstream, None, None)[:4]
    if log_det is None:
        log_det = x2.new_zeros(x2.size(0), dtype=accumulation_dtype(x2.dtype))
    _keep, v = _backend.views(inter, y1, y2, copy, x1, x2, a, *grads[:3])
    _keep2, (grad_log_det, *grad_vectors) = _backend.addresses(log_det, *grads[3:5])
    job, _dense = coupling_job(x1.size(1), x2, inter, scale, offset, perm, *options)
    _launch("coupling_backward", job, x2, a, *v[:3], grad_log_det, *v[3:], *grad_vectors)


def _allocate_inverse(y1, y2, a, *_):
    inter = _is_interleaved(y2, y1.size(1) + y2.size(1))
    x2 = _backend.empty(a, a.size(1) // 2, inter, y2.dtype)
    return x2, y2.new_empty(y2.size(0), dtype=accumulation_dtype(y2.dtype))


def _run_inverse(results, y1, y2, a, scale, offset, perm, clamp, clamp_form):
    x2, log_det = results
    inter = _is_interleaved(y2, y1.size(1) + y2.size(1))
    _keep, v = _backend.views(inter, y1, y2, a, x2)
    passive = y1.size(1) + y2.size(1) - x2.size(1)
    options = (clamp, clamp_form, math.inf, y1.size(1))
    job, _dense = coupling_job(passive, x2, inter, scale, offset, perm, *options)
    _launch("coupling_inverse", job, x2, a, *v, log_det.data_ptr())


# CUDA keeps all channels of a position in shared memory, and 2 bytes of each that say how they are permuted; every GPU
# grants this much.
_SHARED_BYTES = 24 * 1024


def _is_interleaved(x, channels):
    fits = not _backend.runs_cuda(x) or channels * (x.element_size() + 2) <= _SHARED_BYTES
    return fits and _backend.is_interleaved(x)


def _launch(entry, job, x2, a, *arguments):
    def scratch():
        types = _backend.DTYPES[x2.dtype], _backend.DTYPES[a.dtype]
        return _backend.C.coupling_scratch(job, *types, entry == "coupling_backward")

    _backend.run(entry, x2, job, *arguments, scratch=scratch)


def coupling_job(passive, x2, interleaved, scale, offset, perm, clamp, clamp_form, limit, split):
    """The kernels' description of a call, and the vectors that it points to."""
    dense, vectors = _backend.addresses(scale, offset, perm)
    form = CLAMP_FORMS.index(clamp_form)
    sizes = (x2.size(0), passive, x2.size(1), positions(x2), split)
    return _backend.C.Coupling(sizes, interleaved, form, clamp, limit, *vectors), dense


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
