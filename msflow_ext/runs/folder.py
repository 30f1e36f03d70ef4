"""Names of the files in a run folder, and the check that no run is overwritten."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from msflow_ext.data.dataset import SUFFIXES
from msflow_ext.files import check_writable
from msflow_ext.runs.checkpoint import CHECKPOINT

METRICS = "metrics.json"  # written last: a run with it is finished


def checked_out(out: str | Path) -> Path:
    """A folder that can be written to, in which no run is; else its scores and maps would be lost."""
    if (Path(out) / CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a run, choose another folder")
    check_writable(Path(out))
    return Path(out)


def map_paths(out_dir: str | Path, names: Iterable[str]) -> Iterator[Path]:
    """The file of each name that :func:`save_maps` writes."""
    taken: set[str] = set()
    for name in names:
        yield Path(out_dir) / "maps" / file_name(name, taken)


def file_name(name: str, taken: set[str]) -> str:
    """Flatten ``name`` to a PNG file name that no entry of ``taken`` has, and add it there."""
    stem = (
        re.sub(r"[^\w.-]+", "-", bare_name(name))
        .strip(".-")
        .encode()[-200:]
        .decode(errors="ignore")
    )
    stem = stem or "image"
    numbered = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
    chosen = next(c for c in numbered if c.casefold() not in taken)  # some disks ignore case
    taken.add(chosen.casefold())
    return f"{chosen}.png"


def bare_name(name: str) -> str:
    """Return the name of an image without its suffix: ``scar/006`` of ``scar/006.png``."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in SUFFIXES else name
