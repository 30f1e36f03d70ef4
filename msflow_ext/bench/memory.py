"""Measure the memory of a call at its peak, and that saved for its backward pass."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak(run: Callable[[], Any]) -> int | None:
    """Return by how many bytes a call raises the peak of the resident memory; None except on Linux."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed earlier would hide a part
        clear.write_text("5")  # resets the high-water mark
    except (AttributeError, OSError):
        run()
        return None
    before = _kilobytes(status, "VmRSS")
    run()
    return 1024 * max(0, _kilobytes(status, "VmHWM") - before)


def saved(run: Callable[[], Any]) -> int:
    """Return the bytes of tensors that a call has made and that exist when its backward pass begins.

    Without a backward pass, count the results and the tensors that they hold. Parameters and inputs do not count, and
    neither do tensors that the backward pass recomputes.
    """
    watch = _Made()
    found: list[int] = []
    with _before_backward(lambda: found.append(watch.alive())), watch:
        results = run()
        found.append(watch.alive())
        del results
    return found[0]


class _Made(TorchDispatchMode):
    """Mode that records every storage that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def alive(self) -> int:
        return sum(size for held, size in self.storages.values() if not held.expired())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()


@contextmanager
def _before_backward(act: Callable[[], Any]) -> Iterator[None]:
    """Call ``act`` before every backward pass inside the context."""

    def acting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            act()
            return function(*args, **kwargs)

        return call

    with (
        patch.object(torch.autograd, "backward", acting(torch.autograd.backward)),
        patch.object(torch.autograd, "grad", acting(torch.autograd.grad)),
    ):
        yield


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", status.read_text())
    return int(found.group(1)) if found else 0
