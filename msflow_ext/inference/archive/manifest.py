"""The manifest of an archive: digests of its images and model, and its settings, stored beside the scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from msflow_ext.data.sources import images_of
from msflow_ext.hardware import versions
from msflow_ext.inference.archive.parquet import Store
from msflow_ext.runs.checkpoint import CHECKPOINT

# Readers of Parquet folders skip names that begin with an underscore.
MANIFEST, IMAGES = "_manifest.json", "_images.parquet"

Images = Sequence[tuple[str, int]]  # path, and size in bytes


def listed(source: Any) -> Images:
    """Return the path and size of every image in files and folders.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: there are no images, one is given twice, or a path is not valid UTF-8.
    """
    images: dict[str, int] = {}
    for each in [source] if isinstance(source, (str, Path)) else source:
        for _, path in images_of(Path(each)):
            name = path.as_posix()
            if not path.is_file():
                raise FileNotFoundError(f"{name} is not a file")
            if name in images:
                raise ValueError(f"{name} is given twice")
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name!a} must be UTF-8 for Parquet. Rename it") from None
            images[name] = path.stat().st_size
    if not images:
        raise ValueError("source must hold images, got none")
    return list(images.items())


def described(images: Images, sha256: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest: the digests of images and model, and the settings."""
    lines = (f"{path}\n{size}\n".encode() for path, size in images)
    return {"images": _sha256(lines), "model": sha256, "settings": settings}


def digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest."""
    return _sha256([json.dumps(manifest, sort_keys=True).encode()])


def write(store: Store, manifest: dict[str, Any], images: Images) -> None:
    """Write a manifest and its list of images; raise OSError if they cannot be written."""
    import pyarrow

    paths, sizes = zip(*images, strict=True)
    table = pyarrow.table({"path": paths, "bytes": sizes})
    store.write_table(IMAGES, table, {"images": manifest["images"]})
    facts = {"count": len(images), "versions": versions()}
    store.write(MANIFEST, json.dumps({**manifest, **facts}, indent=1).encode())


def check(store: Store, expected: dict[str, Any], images: Images) -> None:
    """Raise ValueError, naming the difference, unless the stored manifest equals ``expected``."""
    where, rest = store.path(MANIFEST), "Choose another --out"
    try:
        there = json.loads(store.read(MANIFEST).to_pybytes())
        settings, model, listed = dict(there["settings"]), there["model"], there["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if model != expected["model"]:
        raise ValueError(f"{where} belongs to another model than --run. {rest}")
    for name, value in expected["settings"].items():
        if settings.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} must be {settings.get(name)} as in {where}, got {value}. {rest}"
            )
    if listed != expected["images"]:
        rows = store.read_table(IMAGES, ("path", "bytes")).to_pylist()
        old = [(row["path"], row["bytes"]) for row in rows]
        a, b = next((a, b) for a, b in zip_longest(old, images) if a != b)
        raise ValueError(
            f"{where} lists other images ({len(old)}) than those given ({len(images)}); the first "
            f"difference is {(b or a)[0]}. {rest}"
        )


def checkpoint_of(run: str | Path) -> Path:
    """Return the checkpoint of a run folder or the given file; raise FileNotFoundError if it is missing."""
    path = Path(run) / CHECKPOINT if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"{path} cannot be read: no such checkpoint")
    return path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return _sha256(iter(partial(file.read, 2**20), b""))


def _sha256(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
