"""Files that ``torch.save`` wrote, read without executing code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Packages whose objects stand beside the weights: settings, transforms, metrics.
_BESIDE = (
    *("anomalib", "jsonargparse", "lightning", "omegaconf", "pathlib"),
    *("pytorch_lightning", "torchmetrics", "torchvision"),
)


class Unread:
    """Placeholder of an object of another package, whose code is not run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch_file(path: str | Path) -> Any:
    """Return the content of a file, with tensors on the CPU and :class:`Unread` for objects of other packages.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or it holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = _load(path)
        _check_storage(content)
        return content
    except Exception as error:  # torch.load raises many kinds of exception for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable torch checkpoint: {reason}") from error


def _load(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not (beside := _beside(path)):
            raise
        with torch.serialization.safe_globals(beside):
            return torch.load(path, map_location="cpu", weights_only=True)


def _beside(path: str | Path) -> list[Any]:
    """Return ``(Unread, name)`` for each class of another package in the file; none if one is of no package known."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    known = all(name.split(".")[0] in _BESIDE for name in names)
    return [(Unread, name) for name in names] if known else []


def _check_storage(content: Any) -> None:
    """Raise ValueError if a tensor is larger than what is stored of it, such as one number that is repeated.

    What has the size of the tensors is then no larger than the file. A part that is held twice is looked at once.
    """
    left, seen = [content], set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
        elif isinstance(each, Tensor) and each.untyped_storage().nbytes() < each.nbytes:
            raise ValueError(f"a tensor of {tuple(each.shape)} is stored as fewer numbers")
