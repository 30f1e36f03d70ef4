"""Base class of optimized modules, which pack a copy of the weights for inference."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor, nn

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_PACKING = Lock()


class Optimized(nn.Module, ABC):
    """Copy of a module for inference, which runs the result of :meth:`_pack`.

    Parameters and buffers are copies, with the names and dtypes of the original. Only they are part of a ``state_dict``,
    a copy or a pickle. After a change (``load_state_dict``, in place, another device), the next call packs them again. A
    change through ``tensor.data`` is not noticed, as in autograd.

    The copy is also an instance of the original's class: ``OptimizedHead(head)`` is an ``OptimizedHead`` and a
    ``type(head)``.

    Args:
        original: the module to copy, which does not change; it may be an optimized one.
        dtype: dtype of the arithmetic; weights keep theirs.

    Raises:
        TypeError: ``dtype`` is not a floating-point dtype. Later, a conversion to another dtype, such as ``half()``.
    """

    def __new__(cls, original: nn.Module, *_: Any, **__: Any) -> Self:
        return object.__new__(_both(cls, type(original)))

    def __init__(self, original: nn.Module, dtype: torch.dtype) -> None:
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        with torch.inference_mode(False):  # inference tensors could not be changed later
            vars(self).update(vars(copy.deepcopy(original)))
        self.dtype = dtype
        self._kept: _Kept | None = None
        self.requires_grad_(False).eval()

    @abstractmethod
    def _pack(self) -> Any:
        """Return what runs, packed from the parameters and buffers."""

    def packed(self) -> Any:
        """Return the packed object, which is packed again if the weights have changed."""
        kept = self._kept
        if kept is None or kept.is_stale():
            with _PACKING:
                kept = self._kept
                if kept is None or kept.is_stale():  # unless another thread has packed meanwhile
                    kept = self._kept = self._packed_now()
        return kept.packed

    def _packed_now(self) -> _Kept:
        device = next(self.parameters()).device.type
        plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False)
        with plain[0], plain[1], plain[2]:
            kept = _Kept(self)
            kept.packed = self._pack()
        return kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        expected = {fn(torch.zeros(1, dtype=dtype)).dtype for dtype in FLOATING}
        weights = {t.dtype for t in self.parameters()} | {self.dtype}
        if len(expected) == 1 and expected != weights:
            raise TypeError(
                f"dtype must be {self.dtype}, which this model was optimized for, got {expected.pop()}: "
                "call optimize(dtype) for another one"
            )
        self._kept = None
        return super()._apply(fn, recurse)

    def __reduce__(self) -> Any:
        return _blank, type(self).__bases__, {**self.__dict__, "_kept": None}


@cache
def _both(optimized: type[Any], original: type[Any]) -> type[Any]:
    """Return the class of an optimized copy."""
    if issubclass(original, optimized):
        return original
    return type(f"Optimized{original.__name__}", (optimized, original), {})


def _blank(optimized: type[Any], original: type[Any]) -> Any:
    """Return an object without state, for copies and pickles."""
    return object.__new__(_both(optimized, original))


class _Kept:
    """Packed object, with identity and version of the tensors that it was packed from."""

    packed: Any

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (place, name)
            for part in module.modules()
            for place in (part._parameters, part._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]
        self._tensors = self._now()
        self._versions = _versions(self._tensors)

    def is_stale(self) -> bool:
        """Return whether a tensor has been replaced or changed in place."""
        now = self._now()
        return list(map(id, now)) != list(map(id, self._tensors)) or (
            _versions(now) != self._versions
        )

    def _now(self) -> list[Any]:
        return [place.get(name) for place, name in self._places]


def _versions(tensors: list[Any]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except (AttributeError, RuntimeError):  # None, or an inference tensor, which has no version
        return []
