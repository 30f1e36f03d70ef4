"""FrEIA's ``AllInOneBlock`` on the kernels of msflow_ext, with its options, results and state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.choices import CLAMP_FORMS, ClampForm
from msflow_ext.flows import inverse_softplus_scale
from msflow_ext.ops._shapes import accumulation_dtype, per_channel
from msflow_ext.ops.coupling import log_scale_and_shift

#: For each ``global_affine_type``, the function from parameter to positive scale, and its inverse.
_SCALES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "SIGMOID": (lambda p: 10 * torch.sigmoid(p - 2), lambda scale: 2 - math.log(10 / scale - 1)),
    "SOFTPLUS": (lambda p: 0.1 * F.softplus(p, beta=0.5), inverse_softplus_scale),
    "EXP": (torch.exp, math.log),
}


class AllInOneBlock(nn.Module):
    r"""Affine coupling, a scale and shift per channel, and a permutation, as in FrEIA's block of this name.

    .. math:: y = W (\mathrm{scale} \odot [x_1,\; x_2 e^{s} + t] + \mathrm{offset}), \quad
        (s, t) \text{ from subnet}([x_1, c_1, c_2, \dots])

    State dicts have FrEIA's keys and shapes. FrEIA 0.2 stores a hard permutation as a matrix of zeros and ones, FrEIA's
    master stores it as an index. The block loads both, saves the form of its ``clamp_form``, and always runs on the
    index. Permutations are drawn from torch's random generator, not from numpy's.

    Args:
        dims_in: shape of the input without batch, ``[(C, *)]``, with up to three sizes after ``C``. Only their number
            matters.
        dims_c: shapes of the conditions without batch, with the same sizes after their channels.
        subnet_constructor: ``(channels_in, channels_out) -> nn.Module``.
        affine_clamping: bound of ``s``.
        gin_block: subtract from ``s`` its mean over a sample, and do not scale, which preserves the volume.
        global_affine_init: initial scale.
        global_affine_type: map from ``global_scale`` to the scale: ``"SOFTPLUS"``, ``"SIGMOID"`` or ``"EXP"``.
        permute_soft: use a random rotation as :math:`W` instead of a permutation.
        learned_householder_permutation: number of learned reflections by which :math:`W` is multiplied.
        reverse_permutation: apply the inverse of :math:`W` to ``x`` first.
        clamp_form: form of the clamp of ``s``, see :func:`msflow_ext.ops.affine_coupling`: ``"0.2"`` as in FrEIA 0.2,
            or ``"head"`` as in its master.

    Shape:
        - Input: one tensor ``(N, C, *)``, and conditions ``(N, C_i, *)``
        - Output: one tensor ``(N, C, *)``, and the log-determinant ``(N,)``

    Raises:
        ValueError: if an argument or an input does not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from msflow_ext.compat import AllInOneBlock
        >>> def subnet(channels_in, channels_out):
        ...     return nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = AllInOneBlock([(8, 16, 16)], subnet_constructor=subnet)
        >>> x = torch.randn(2, 8, 16, 16)
        >>> (y,), log_det = block([x])
        >>> y.shape, log_det.shape
        (torch.Size([2, 8, 16, 16]), torch.Size([2]))
        >>> (restored,), _ = block([y], rev=True)
        >>> torch.allclose(restored, x, atol=1e-4)
        True

    References:
        FrEIA 0.2 and master, ``FrEIA.modules.AllInOneBlock``.
    """

    perm: Tensor | None

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] = (),
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
        clamp_form: ClampForm = "0.2",
    ) -> None:
        super().__init__()
        _check_dims(dims_in, dims_c)
        _check_options(affine_clamping, learned_householder_permutation, clamp_form)
        if subnet_constructor is None:
            raise ValueError("AllInOneBlock: subnet_constructor must be given")
        self.dims_in, self.dims_c = list(dims_in), list(dims_c)
        self.channels, self.rank = dims_in[0][0], len(dims_in[0]) - 1
        self.conditioning = self.channels - self.channels // 2
        self.condition_channels = sum(dims[0] for dims in dims_c)
        self.clamp, self.clamp_form = float(affine_clamping), clamp_form
        self.gin_block = gin_block
        self.global_affine_type = global_affine_type
        self.reverse_permutation = reverse_permutation
        self.householder = learned_householder_permutation > 0

        c, ones = self.channels, [1] * self.rank
        start = _initial_global_scale(global_affine_type, global_affine_init)
        self.global_scale = nn.Parameter(torch.full((1, c, *ones), start))
        self.global_offset = nn.Parameter(torch.zeros(1, c, *ones))
        perm = None if permute_soft else torch.randperm(c)
        w = _random_rotation(c) if perm is None else _matrix(perm)
        if self.householder:
            vectors = 0.2 * torch.randn(learned_householder_permutation, c)
            self.vk_householder, self.w_0 = nn.Parameter(vectors), nn.Parameter(w, False)
        else:
            w_inv = w.T.clone(memory_format=torch.contiguous_format)
            pair = w.view(c, c, *ones), w_inv.view(c, c, *ones)
            if perm is not None and clamp_form == "head":
                pair = perm, torch.argsort(perm)
            self.w_perm, self.w_perm_inv = (nn.Parameter(p, False) for p in pair)
        self.register_buffer("perm", None if self.householder else perm, persistent=False)
        self.subnet = subnet_constructor(self.conditioning + self.condition_channels, 2 * (c // 2))

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Transform ``x`` forward, or back with ``rev``.

        Args:
            x: a list or tuple of one tensor ``(N, C, *)``.
            c: the conditions.
            rev: compute the inverse.
            jac: ignored; the log-determinant is always computed.

        Returns:
            A tuple of one tensor like that of ``x``, and the log-determinant ``(N,)`` of the computed direction in
            nats. It is float64 for float64 inputs, and float32 otherwise.
        """
        self._check(x, c)
        permute, restore = self._permutation()
        fused = self.perm is not None
        if rev:
            v, log_det = self._uncouple(x[0] if fused else restore(x[0]), c)
            return (permute(v) if self.reverse_permutation else v,), log_det
        v, log_det = self._couple(restore(x[0]) if self.reverse_permutation else x[0], c)
        return (v if fused else permute(v),), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs, which are those of the inputs."""
        return input_dims

    def _couple(self, x: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the coupling, the global affine and, if it is hard, the permutation."""
        x1, x2 = x[:, : self.conditioning], x[:, self.conditioning :]
        a = self.subnet(torch.cat((x1, *c), 1))
        affine = _, offset, perm = self._affine(x.dtype)
        if self.gin_block:
            s, t = self._centred(a, x.dtype)
            v = torch.cat((x1, x2 * torch.exp(s) + t), 1) + per_channel(offset, x)
            y = v if perm is None else v.index_select(1, perm)
            return y.to(x.dtype), s.flatten(1).sum(1)
        y, _, log_det = ops.affine_coupling(
            x1, x2, a, *affine, clamp=self.clamp, clamp_form=self.clamp_form, split=self.channels
        )
        return y, log_det

    def _uncouple(self, y: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the inverse of :meth:`_couple`."""
        y1, y2 = y[:, : self.conditioning], y[:, self.conditioning :]
        affine = self._affine(y.dtype)
        u = ops.conditioning_half(
            y1, y2, self.channels if self.gin_block else self.conditioning, *affine
        )
        x1 = u[:, : self.conditioning]
        a = self.subnet(torch.cat((x1, *c), 1))
        if self.gin_block:
            s, t = self._centred(a, y.dtype)
            x2, log_det = (u[:, self.conditioning :] - t) * torch.exp(-s), -s.flatten(1).sum(1)
            x2 = x2.to(y.dtype)
        else:
            x2, log_det = ops.affine_coupling_inverse(
                y1, y2, a, *affine, clamp=self.clamp, clamp_form=self.clamp_form
            )
        return torch.cat((x1, x2), 1), log_det

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return scale (None for GIN), offset and hard permutation, ``(C,)`` each, for data of ``dtype``."""
        dtype = accumulation_dtype(dtype)
        scale, _ = _SCALES[self.global_affine_type]
        scale = None if self.gin_block else scale(self.global_scale.flatten().to(dtype))
        return scale, self.global_offset.flatten().to(dtype), self.perm

    def _centred(self, a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``s`` without its mean over each sample, and ``t``."""
        s, t = log_scale_and_shift(a.to(accumulation_dtype(dtype)), self.clamp, self.clamp_form)
        return s - s.mean(tuple(range(1, s.dim())), keepdim=True), t

    def _permutation(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return the functions that multiply by W and by its inverse."""
        perm = self.perm
        if perm is not None:
            return (
                lambda x: x.index_select(1, perm),
                lambda x: x.index_select(1, torch.argsort(perm)),
            )
        product = (F.linear, F.conv1d, F.conv2d, F.conv3d)[self.rank]
        if self.householder:
            w = self.w_0
            for v in self.vk_householder:
                w = w - torch.outer(w @ v, 2 / v.square().sum() * v)
            w, w_inv = (m.reshape(*m.shape, *[1] * self.rank) for m in (w, w.T))
        else:
            w, w_inv = self.w_perm, self.w_perm_inv
        return lambda x: product(x, w), lambda x: product(x, w_inv)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        names = () if self.householder else ("w_perm", "w_perm_inv")
        for name in names:
            if prefix + name in state_dict:
                like = getattr(self, name)
                state_dict[prefix + name] = _encoded(state_dict[prefix + name], like)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if names:
            self.perm, inverse = hard_permutation(self.w_perm), hard_permutation(self.w_perm_inv)
            if self.perm is None or inverse is None:
                fit = self.perm is inverse and self.w_perm.dim() > 1
            else:
                fit = torch.equal(inverse, torch.argsort(self.perm))
            if not fit:
                error_msgs.append(f"{prefix}w_perm and w_perm_inv must be inverse permutations.")

    def _check(self, x: Sequence[Tensor], c: Sequence[Tensor]) -> None:
        if not isinstance(x, (list, tuple)) or len(x) != 1:
            raise ValueError(
                f"AllInOneBlock: x must be a list or tuple of one tensor, got {_kind(x)}"
            )
        if x[0].dim() != 2 + self.rank or x[0].size(1) != self.channels:
            raise ValueError(
                f"AllInOneBlock: x must hold a tensor (N, {self.channels}, *) with {2 + self.rank} dimensions, got "
                f"{tuple(x[0].shape)}"
            )
        if not isinstance(c, (list, tuple)) or self.condition_channels != sum(t.size(1) for t in c):
            raise ValueError(
                f"AllInOneBlock: c must be a list or tuple of tensors with {self.condition_channels} channels in all, "
                f"got {_kind(c)}"
            )


def hard_permutation(w: Tensor) -> Tensor | None:
    """Return the index ``(C,)`` int64 of a permutation, or None if ``w`` is not a permutation.

    Args:
        w: an index, or its matrix ``(C, C, *)``, such that ``y[:, k] = x[:, index[k]]``.
    """
    index = w.detach().long() if w.dim() == 1 else w.detach().flatten(1).argmax(1)
    if not torch.equal(index.sort().values, torch.arange(len(w), device=w.device)):
        return None
    return index if w.dim() == 1 or torch.equal(w.flatten(1), _matrix(index).to(w)) else None


def _encoded(w: Tensor, like: Tensor) -> Tensor:
    """Return ``w`` in the encoding of ``like``, index or matrix, or unchanged if it is not a permutation."""
    index = None if w.dim() == like.dim() else hard_permutation(w)
    if index is None:
        return w
    matrix = _matrix(index).to(like.dtype)
    return index if like.dim() == 1 else matrix.view(*matrix.shape, *like.shape[2:])


def _matrix(index: Tensor) -> Tensor:
    return torch.eye(len(index), device=index.device)[index]


def _random_rotation(channels: int) -> Tensor:
    """Return a random rotation, uniform over all: QR of a normal matrix with fixed signs and determinant 1."""
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    q = q * torch.where(r.diagonal() < 0, -1, 1)
    q[:, 0] *= torch.linalg.det(q).sign()
    return q.float().contiguous()


def _initial_global_scale(kind: str, scale: float) -> float:
    if kind not in _SCALES:
        raise ValueError(
            f"AllInOneBlock: global_affine_type must be one of {tuple(_SCALES)}, got {kind!r}"
        )
    limit = 10 if kind == "SIGMOID" else math.inf
    if not 0 < scale < limit:
        raise ValueError(
            f"AllInOneBlock: global_affine_init must be in (0, {limit}) for {kind}, got {scale}"
        )
    return _SCALES[kind][1](scale)


def _check_dims(dims_in: Sequence[Sequence[int]], dims_c: Sequence[Sequence[int]]) -> None:
    if len(dims_in) != 1 or not 1 <= len(dims_in[0]) <= 4 or dims_in[0][0] < 1:
        raise ValueError(
            "AllInOneBlock: dims_in must hold one shape (C, *) of at most four sizes, got "
            f"{list(dims_in)}"
        )
    if any(tuple(dims[1:]) != tuple(dims_in[0][1:]) for dims in dims_c):
        raise ValueError(
            f"AllInOneBlock: dims_c must have the sizes of dims_in {list(dims_in)} after the channels, got "
            f"{list(dims_c)}"
        )


def _check_options(clamp: float, reflections: int, clamp_form: ClampForm) -> None:
    if not 0 < clamp < math.inf:
        raise ValueError(f"AllInOneBlock: affine_clamping must be positive, got {clamp}")
    if reflections < 0:
        raise ValueError(
            f"AllInOneBlock: learned_householder_permutation must be at least 0, got {reflections}"
        )
    if clamp_form not in CLAMP_FORMS:
        raise ValueError(f"AllInOneBlock: clamp_form must be '0.2' or 'head', got {clamp_form!r}")


def _kind(value: Any) -> str:
    """Return the shapes or the type of a value, for an error."""
    if isinstance(value, (list, tuple)):
        return str([tuple(v.shape) if isinstance(v, Tensor) else v for v in value])
    return f"a {type(value).__name__}"
