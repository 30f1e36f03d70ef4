"""Forwards of other packages' modules on the kernels of msflow_ext, for ``accelerate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.activations import is_plain
from msflow_ext.compat.accelerated.swap import Accelerated, leaves_pytorch
from msflow_ext.compat.freia import hard_permutation
from msflow_ext.ops import accumulation_dtype
from msflow_ext.ops._backend import hides_values

LIMIT = 1e6  # CS-Flow's coupling clips its outputs to this magnitude


@dataclass
class BlockFacts:
    """Facts about an ``AllInOneBlock``.

    Attributes:
        clamp_form: see :func:`msflow_ext.ops.affine_coupling`.
        fixed_size: True if the block refuses other sizes than it was built for.
        perm: hard permutation as an index on the CPU, or None if the block multiplies by a matrix.
        stamp: addresses of the tensors that were read, and how often they had been written to in place.
    """

    clamp_form: str
    fixed_size: bool
    perm: Tensor | None = None
    stamp: tuple[int, ...] = ()

    def read(self, w: Tensor, w_inv: Tensor) -> None:
        """Read the permutation from the parameters ``w_perm`` and ``w_perm_inv``."""
        perm, inverse = hard_permutation(w), hard_permutation(w_inv)
        fits = perm is not None and inverse is not None and inverse.equal(perm.argsort())
        self.perm = perm.cpu() if perm is not None and fits else None
        self.stamp = _stamp(w, w_inv)

    def holds(self, w: Tensor, w_inv: Tensor) -> bool:
        """Return whether the parameters still are the permutation that was read.

        On the CPU their values are compared, because a write through ``.data`` does not change the stamp. On other
        devices only stamps are compared, because reading values would wait for the device.
        """
        if w.is_meta:
            return True
        if self.perm is None or w.device.type != "cpu":
            return self.stamp == _stamp(w, w_inv)
        pairs = ((w, self.perm), (w_inv, self.perm.argsort()))
        return all(_is_permutation(matrix, index) for matrix, index in pairs)


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    versions = (0 if t.is_inference() else t._version for t in tensors)
    return *(t.data_ptr() for t in tensors), *versions


def _is_permutation(w: Tensor, index: Tensor) -> bool:
    """Return whether ``w`` is the permutation ``index (C,)``, as an index or as a matrix of zeros and ones."""
    if w.dim() == 1:
        return w.equal(index)
    ones = torch.arange(len(index)) * len(index) + index
    return bool(w.take(ones).eq(1).all()) and int(w.count_nonzero()) == len(index)


class FastBlock(Accelerated):
    """``AllInOneBlock`` of FrEIA or anomalib: coupling, global affine and hard permutation in one pass."""

    def forward(
        self, x: Any, c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        c = [] if c is None else c
        y = x[0]
        if leaves_pytorch(y) or not accepts(self, y):
            return super().forward(x, c, rev=rev, jac=jac)
        perm = permutation(self)
        if rev:
            y = self.permute_function(y, self.w_perm_inv) if perm is None else y
            y1, y2 = y.split(self.splits, 1)
            x1, x2, log_det = uncouple(self, y1, y2, c, perm)
            y = torch.cat((x1, x2), 1)
            if self.reverse_pre_permute:
                y = self._pre_permute(y, rev=True) if perm is None else y.index_select(1, perm)
            return (y,), log_det
        if self.reverse_pre_permute:
            y = self._pre_permute(y) if perm is None else y.index_select(1, perm.argsort())
        x1, x2 = y.split(self.splits, 1)
        y, _, log_det = couple(self, x1, x2, c, perm, split=self.in_channels)
        return (self.permute_function(y, self.w_perm) if perm is None else y,), log_det

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.w_perm.is_meta:
            self._accelerated.read(self.w_perm, self.w_perm_inv)


class FastSequence(Accelerated):
    """FrEIA's ``SequenceINN`` of :class:`FastBlock`, without cat and split between the blocks."""

    def forward(
        self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[Any, Tensor]:
        y = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
        blocks = list(self.module_list)
        if leaves_pytorch(y) or not all(chains(block, y) for block in blocks):
            return super().forward(x_or_z, c, rev=rev, jac=jac)
        perms = [permutation(block) for block in blocks]
        if any(perm is None for perm in perms):
            return super().forward(x_or_z, c, rev=rev, jac=jac)
        steps = list(zip(blocks, self.conditions, perms, strict=True))
        if any(isinstance(block.subnet, FastSubnet) for block in blocks):
            c = [once(t) if len(t) == len(y) else t for t in c or ()]
        y1, y2 = y.split(blocks[0].splits, 1)
        total: Any = 0
        for i, (block, k, perm) in enumerate(reversed(steps) if rev else steps):
            cond = [] if k is None else [c[k]]
            if rev:
                y1, y2, log_det = uncouple(block, y1, y2, cond, perm)
            else:
                split = block.splits[0] if i + 1 < len(steps) else block.in_channels
                y1, y2, log_det = couple(block, y1, y2, cond, perm, split=split)
            total = log_det + total
        y = torch.cat((y1, y2), 1) if rev else y1
        return (y,) if self.force_tuple_output else y, total


class FastSubnet(Accelerated):
    """MSFlow's subnet of convolution, LayerNorm over channels, ReLU and convolution, with norm and ReLU in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if leaves_pytorch(x) or not is_plain(self.ln):
            return super().forward(x)
        return self.conv2(normalized(self.ln, self.conv1(x)))


class FastGlowCoupling(Accelerated):
    """CS-Flow's coupling of several scales; its published inverse is not the inverse, and is not replaced."""

    def forward(
        self, input_tensor: Any, rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        if rev or leaves_pytorch(input_tensor[0]):
            return super().forward(input_tensor, rev=rev, jac=jac)
        sizes = (self.split_len1, self.split_len2)
        left, right = zip(*(x.split(sizes, 1) for x in input_tensor), strict=True)
        options: dict[str, Any] = {"clamp": float(self.clamp), "clamp_form": "atan"}
        y, z, log_dets = [], [], []
        for x, a in zip(left, self.cross_convolution2(*right), strict=True):
            x, a = of_one_dtype(x, a)
            _, y1, log_det = ops.affine_coupling(x[:, :0], x, a, split=0, **options)
            y.append(y1)
            log_dets.append(log_det)
        for y1, x, a in zip(y, right, self.cross_convolution1(*y), strict=True):
            y1, x, a = of_one_dtype(y1, x, a)
            whole, _, log_det = ops.affine_coupling(
                y1, x, a, split=sum(sizes), limit=LIMIT, **options
            )
            z.append(whole)
            log_dets.append(log_det)
        return z, torch.stack(log_dets).sum()


def couple(
    block: Any, x1: Tensor, x2: Tensor, c: Sequence[Tensor], perm: Tensor | None, *, split: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of a block in two halves, the first with ``split`` channels, and the log-determinant."""
    x1, x2, a = of_one_dtype(x1, x2, _subnet(block, x1, c))
    options = _options(block)
    return ops.affine_coupling(x1, x2, a, *_affine(block, x2), perm, split=split, **options)


def uncouple(
    block: Any, y1: Tensor, y2: Tensor, c: Sequence[Tensor], perm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of :func:`couple` from its results, and the log-determinant of the inverse."""
    affine = (*_affine(block, y1), perm)
    x1 = ops.conditioning_half(y1, y2, block.splits[0], *affine)
    y1, y2, a = of_one_dtype(y1, y2, _subnet(block, x1, c))
    x2, log_det = ops.affine_coupling_inverse(y1, y2, a, *affine, **_options(block))
    return x1, x2, log_det


def _subnet(block: Any, x1: Tensor, c: Sequence[Tensor]) -> Tensor:
    if not block.conditional:
        return block.subnet(x1)
    if len(c) == 1 and splits_conv1(block.subnet, x1, c[0]):
        conv, weight = block.subnet.conv1, block.subnet.conv1.weight
        h = conv._conv_forward(x1, weight[:, : x1.size(1)], None)
        bias_map = conv._conv_forward(c[0], weight[:, x1.size(1) :], conv.bias)
        return block.subnet.conv2(normalized(block.subnet.ln, h, bias_map))
    return block.subnet(torch.cat((x1, *(t.expand(len(x1), *t.shape[1:]) for t in c)), 1))


def splits_conv1(subnet: Any, x1: Tensor, c: Tensor) -> bool:
    """Return whether the first convolution may run separately on ``x1`` and on a condition that all samples share.

    This splits its weight, which is only faster if there are more positions than channels.
    """
    return (
        isinstance(subnet, FastSubnet)
        and len(c) < len(x1)
        and x1.numel() > 4 * x1.size(1) ** 2
        and type(subnet.conv1).forward is nn.Conv2d.forward
        and subnet.conv1.groups == 1
        and all(is_plain(m) for m in (subnet, subnet.conv1, subnet.ln))
    )


def once(c: Tensor) -> Tensor:
    """Return the condition of one sample if all samples share it and that is cheap to find out, else ``c``."""
    cheap = c.device.type == "cpu" and not hides_values() and not c.requires_grad
    return c[:1] if cheap and len(c) and c.equal(c[:1].expand_as(c)) else c


def normalized(ln: nn.LayerNorm, h: Tensor, bias_map: Tensor | None = None) -> Tensor:
    """Return ``relu(ln(h + bias_map))`` over the channels at each position."""
    dtype = accumulation_dtype(h.dtype)
    vectors = ln.weight.to(dtype), ln.bias.to(dtype)
    return ops.channel_norm(h, *vectors, bias_map, eps=ln.eps)


def _affine(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    scale = block.global_scale_activation(block.global_scale.flatten().to(dtype))
    return scale, block.global_offset.flatten().to(dtype)


def _options(block: Any) -> dict[str, Any]:
    return {"clamp": float(block.clamp), "clamp_form": block._accelerated.clamp_form}


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``(*x, a)`` in the dtypes that the coupling needs; under autocast a subnet may return another dtype."""
    *x, a = tensors
    dtype = torch.promote_types(x[-1].dtype, a.dtype)
    return *(t.to(dtype) for t in x), a if dtype is torch.float32 else a.to(dtype)


def permutation(block: Any) -> Tensor | None:
    """Return the current hard permutation of the block as an index, or None if it must multiply by a matrix."""
    facts, w, w_inv = block._accelerated, block.w_perm, block.w_perm_inv
    if facts.perm is None or w.requires_grad or torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling():
        return _compiled_permutation(w, w_inv)
    if not facts.holds(w, w_inv):
        facts.read(w, w_inv)
    if facts.perm is None or w.device.type == "cpu":
        return facts.perm
    return w if w.dim() == 1 else w.flatten(1).argmax(1)


def _compiled_permutation(w: Tensor, w_inv: Tensor) -> Tensor:
    """Return the permutation in a compiled graph, where a matrix that is not a permutation is an error."""
    if w.dim() == 1:
        return w
    index = w.flatten(1).argmax(1)
    matrix = nn.functional.one_hot(index, len(w))
    fits = (w.flatten(1) == matrix).all() & (w_inv.flatten(1) == matrix.mT).all()
    torch.ops.aten._assert_async.msg(
        fits, "w_perm must still be a permutation; call accelerate() again"
    )
    return index


def accepts(block: Any, x: Tensor) -> bool:
    """Return whether ``x`` has the shape that the block needs; the original forward reports other shapes."""
    shape = block.dims_in[0]
    if block._accelerated.fixed_size:
        return x.shape[1:] == tuple(shape)
    return x.dim() == 1 + len(shape) and x.size(1) == block.in_channels


def chains(block: Any, x: Tensor) -> bool:
    """Return whether the block may run on two halves, without its ``__call__``."""
    fast = isinstance(block, FastBlock) and is_plain(block)
    return fast and accepts(block, x) and not block.reverse_pre_permute
