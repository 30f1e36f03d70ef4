"""What this process may use of the machine: processors, memory, devices, instructions; and versions."""

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
    """Whether it has matrix units for bfloat16."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def has_bfloat16() -> bool:
    """Whether PyTorch convolves in bfloat16 by instructions; by others it is up to 50 times slower than in float32.

    True where PyTorch does not tell.
    """
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """``device``, or the GPU if there is one, else the CPU; ValueError if it is not here."""
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


#: Files with limit and use of a container, by the second and the first version of Linux's control groups.
GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def cores() -> int:
    """How many processors."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine has available and the container grants; None where the system does not tell."""
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
