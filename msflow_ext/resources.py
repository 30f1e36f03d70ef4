"""What this process may use of the machine: processors and memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

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
