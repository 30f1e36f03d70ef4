"""Memory of a call: its peak, and what it keeps for the backward pass."""

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
    """Return bytes by which a call lifts the process's resident memory at its highest; None unless on Linux."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else memory freed earlier would hide what the call allocates
        clear.write_text("5")  # resets the high-water mark
    except (AttributeError, OSError):
        run()
        return None
    before = _kilobytes(status, "VmRSS")
    run()
    return 1024 * max(0, _kilobytes(status, "VmHWM") - before)


def saved(run: Callable[[], Any]) -> int:
    """Return the bytes of tensors that a call made and that are alive when its backward pass begins.

    Of a call without a backward pass: that its results hold, and they themselves. Parameters and inputs, which exist before, do not count; neither does what the backward pass makes again.
    """
    watch = _Made()
    found: list[int] = []
    with _before_backward(lambda: found.append(watch.alive())), watch:
        results = run()
        found.append(watch.alive())
        del results
    return found[0]


class _Made(TorchDispatchMode):
    """Record every storage that operations inside the block make, without keeping it alive."""

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
    """Call a function before every backward pass inside the block."""

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
