"""Read files of ``torch.save`` without executing code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Packages whose objects are saved next to the weights: settings, transforms, metrics.
_IGNORED = (
    *("anomalib", "jsonargparse", "lightning", "omegaconf", "pathlib"),
    *("pytorch_lightning", "torchmetrics", "torchvision"),
)


class Unread:
    """Placeholder of an object of another package, which runs none of its code."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch_file(path: str | Path) -> Any:
    """Return the content of a file with tensors on the CPU, and :class:`Unread` for objects of known packages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, or holds objects of unknown packages.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} cannot be read: no such file")
    try:
        content = _load(path)
        _check_storage(content)
        return content
    except Exception as error:  # torch.load raises many kinds of exception for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a torch checkpoint: {reason}") from error


def _load(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not (ignored := _ignored(path)):
            raise
        with torch.serialization.safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True)


def _ignored(path: str | Path) -> list[Any]:
    """Return ``(Unread, name)`` for each class in the file, or nothing if one is of an unknown package."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    known = all(name.split(".")[0] in _IGNORED for name in names)
    return [(Unread, name) for name in names] if known else []


def _check_storage(content: Any) -> None:
    """Raise ValueError if a tensor is larger than its storage, such as one number that is repeated.

    Allocations of the size of a tensor are then at most as large as the file. A shared part is checked once.
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
            raise ValueError(f"a tensor of shape {tuple(each.shape)} is stored as fewer numbers")
