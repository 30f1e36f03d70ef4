"""Describe the machine of a measurement: hardware, versions, and the load by other processes."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from msflow_ext.hardware import cores
from msflow_ext.ops import _backend

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "sve")
PACKAGES = (
    "msflow-ext",
    "torch",
    "timm",
    "FrEIA",
    "scikit-learn",
    "numpy",
    "onnxruntime",
    "openvino",
)


def facts() -> dict[str, Any]:
    """Return CPU, memory, versions, commit and date as plain values for JSON, with None if unknown."""
    return {
        "cpu": _cpu_model(),
        "flags": [flag for flag in FLAGS if flag in _cpu_flags()],
        "cores": cores(),
        "cache_mib": cache_bytes() / 2**20,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "kernels": _backend.STATUS,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cache_bytes() -> int:
    """Return the size of the last-level cache, or 32 MiB if unknown."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes) or 32 * 2**20


def load_average() -> float | None:
    """Return the average number of processes that were ready to run over the last minute, or None if unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Others:
    """Measurement of the processor time that other processes use, from construction on."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Return the share of all processors' time in 0..1, or None if unknown (known on Linux)."""
        now = self._now()
        if now is None or self._start is None or now[0] == self._start[0]:
            return None
        total, busy, own = (a - b for a, b in zip(now, self._start, strict=True))
        return round(max(0.0, busy - own) / total, 3)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Return the seconds of all processors together, those in use, and those of this process."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle, per_second = ticks[3] + ticks[4], os.sysconf("SC_CLK_TCK")
        own = os.times()
        used = own.user + own.system + own.children_user + own.children_system
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, used


def others_now(seconds: float = 1.0) -> float | None:
    """Return the share of the machine that other processes use during ``seconds``."""
    others = Others()
    time.sleep(seconds)
    return others.share()


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _cpu_info())
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    found = re.search(r"(?:flags|Features)\s*:\s*(.+)", _cpu_info())
    names = set(found.group(1).split()) if found else set()
    return names | {"neon"} if "asimd" in names else names


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(total / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the source tree of this file, marked if files differ, or None if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
