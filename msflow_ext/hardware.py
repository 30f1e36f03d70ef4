"""Query the processors, memory, devices and instructions of the machine, and package versions."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def has_amx() -> bool:
    """Return whether the CPU has AMX, matrix units for bfloat16."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def has_bfloat16() -> bool:
    """Return whether PyTorch has bfloat16 instructions for convolutions, or True if unknown.

    Without them, bfloat16 is up to 50 times slower than float32.
    """
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return ``device``, by default the GPU if there is one; raise a ValueError if it is not available."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not available: {reason}") from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in ("msflow-ext", "torch", "timm", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


#: Files with the memory limit and use of a container, in versions 2 and 1 of Linux control groups.
GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def cores() -> int:
    """Return the number of processors that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the available bytes within the limit of the container, or None if unknown."""
    found = []
    available = re.search(r"MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"))
    if available:
        found.append(1024 * int(available.group(1)))
    for group in GROUPS:
        limit, used = (_text(root / "sys/fs/cgroup" / name).strip() for name in group)
        if limit.isdigit() and used.isdigit():  # "max" is no limit
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
