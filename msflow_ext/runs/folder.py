"""File names in a run folder, and the check that no run is overwritten."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from msflow_ext.data.dataset import SUFFIXES
from msflow_ext.files import check_writable
from msflow_ext.runs.checkpoint import CHECKPOINT

METRICS = "metrics.json"  # written last, so a run with this file is finished


def checked_out(out: str | Path) -> Path:
    """Return the path of a writable folder without a run, whose scores and maps would be overwritten.

    Raises:
        ValueError: the folder holds a run.
        OSError: the folder cannot be written.
    """
    if (Path(out) / CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a run: choose another folder")
    check_writable(Path(out))
    return Path(out)


def map_paths(out_dir: str | Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield the path of each image's map."""
    taken: set[str] = set()
    for name in names:
        yield Path(out_dir) / "maps" / file_name(name, taken)


def file_name(name: str, taken: set[str]) -> str:
    """Convert ``name`` to a flat PNG file name that is not in ``taken``, and add it to ``taken``."""
    stem = (
        re.sub(r"[^\w.-]+", "-", bare_name(name))
        .strip(".-")
        .encode()[-200:]
        .decode(errors="ignore")
    )
    stem = stem or "image"
    numbered = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
    chosen = next(c for c in numbered if c.casefold() not in taken)  # some file systems ignore case
    taken.add(chosen.casefold())
    return f"{chosen}.png"


def bare_name(name: str) -> str:
    """Return the name of an image without its suffix: ``scar/006`` of ``scar/006.png``."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in SUFFIXES else name
