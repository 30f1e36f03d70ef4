"""Arguments of a coupling as one tuple, and their checks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msflow_ext.ops._shapes import accumulation_dtype

#: Clamp forms, in the order of ``csrc/coupling/formula.h``.
CLAMP_FORMS = ("0.2", "head", "atan")

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]


class CouplingCall(NamedTuple):
    """Operands of a coupling, then its options, in the order of the registered op's arguments.

    :func:`~msflow_ext.ops.affine_coupling` explains them. For the inverse, ``x1`` and ``x2`` hold ``y1`` and ``y2``.
    The inverse ignores ``limit`` and ``split``.
    """

    x1: Tensor
    x2: Tensor
    a: Tensor
    scale: Tensor | None
    offset: Tensor | None
    perm: Tensor | None
    clamp: float
    clamp_form: str
    limit: float = math.inf
    split: int | None = None

    @property
    def vectors(self) -> Vectors:
        """Return ``scale``, ``offset`` and ``perm``."""
        return self[3:6]

    @property
    def channels(self) -> int:
        """Return the number of channels of both halves together."""
        return self.x1.size(1) + self.x2.size(1)


def check_forward(call: CouplingCall) -> None:
    """Raise an error for arguments that :func:`~msflow_ext.ops.affine_coupling` does not support."""
    x1, x2, a = call[:3]
    _check_halves(x1, x2, "x1", "x2")
    c1, c2 = x1.size(1), x2.size(1)
    if a.shape != (x1.size(0), 2 * c2, *x2.shape[2:]):
        raise ValueError(
            f"a must have shape (N, 2 * C2, *) for x2 of shape {tuple(x2.shape)}, got {tuple(a.shape)}"
        )
    if call.split is None or not 0 <= call.split <= c1 + c2:
        raise ValueError(f"split must be in 0..{c1 + c2}, got {call.split}")
    if not call.limit > 0:
        raise ValueError(f"limit must be positive, got {call.limit}")
    _check_subnet(call)
    check_vectors(x2, c1 + c2, call.vectors)


def check_inverse(call: CouplingCall) -> None:
    """Raise an error for arguments that :func:`~msflow_ext.ops.affine_coupling_inverse` does not support."""
    y1, y2, a = call[:3]
    _check_halves(y1, y2, "y1", "y2")
    channels = call.channels
    if (
        a.dim() != y2.dim()
        or (a.size(0), *a.shape[2:]) != (y2.size(0), *y2.shape[2:])
        or a.size(1) % 2
        or a.size(1) // 2 > channels
    ):
        raise ValueError(
            f"a must have shape (N, 2 * C2, *) with C2 <= {channels} for y2 of shape {tuple(y2.shape)}, got "
            f"{tuple(a.shape)}"
        )
    _check_subnet(call)
    check_vectors(y2, channels, call.vectors)


def check_results(y1: Tensor, y2: Tensor) -> None:
    """Raise an error for tensors that cannot be the results of a coupling."""
    _check_halves(y1, y2, "y1", "y2")


def check_vectors(x: Tensor, channels: int, vectors: Vectors) -> None:
    """Raise an error for a scale, offset or permutation that does not fit ``x`` and its channels."""
    device, accumulation = x.device, accumulation_dtype(x.dtype)
    for name, vector in zip(("scale", "offset", "perm"), vectors, strict=True):
        if vector is None:
            continue
        dtype = torch.int64 if name == "perm" else accumulation
        if vector.shape != (channels,):
            raise ValueError(
                f"{name} must have shape ({channels},), one value per channel, got {tuple(vector.shape)}"
            )
        if vector.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype} for {x.dtype} data, got {vector.dtype}")
        if vector.device != device:
            raise ValueError(f"{name} must be on {device}, got {vector.device}")


def _check_halves(first: Tensor, second: Tensor, name1: str, name2: str) -> None:
    """Check that two halves fit together."""
    shape1, shape2 = first.shape, second.shape
    if min(len(shape1), len(shape2)) < 2 or shape1[0] != shape2[0] or shape1[2:] != shape2[2:]:
        raise ValueError(
            f"{name1} and {name2} must have shapes (N, C1, *) and (N, C2, *) with equal N and *, got "
            f"{tuple(shape1)} and {tuple(shape2)}"
        )
    if not second.is_floating_point() or first.dtype is not second.dtype:
        raise TypeError(
            f"{name1} and {name2} must have the same floating-point dtype, got {first.dtype} and {second.dtype}"
        )
    if first.device != second.device:
        raise ValueError(
            f"{name1} and {name2} must be on the same device, got {first.device} and {second.device}"
        )


def _check_subnet(call: CouplingCall) -> None:
    """Check the subnet's output and the clamp."""
    x, a = call.x2, call.a
    if a.dtype is not x.dtype and not (
        x.dtype is torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(f"a must be {x.dtype}, or half precision for float32 data, got {a.dtype}")
    if a.device != x.device:
        raise ValueError(f"a must be on {x.device}, got {a.device}")
    if not 0 < call.clamp < math.inf:
        raise ValueError(f"clamp must be positive and finite, got {call.clamp}")
    if call.clamp_form not in CLAMP_FORMS:
        raise ValueError(f"clamp_form must be one of {CLAMP_FORMS}, got {call.clamp_form!r}")
