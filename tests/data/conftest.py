"""Fixtures for the tests of the data: small pictures on disk, and one that is too large."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Save = Callable[..., Path]


@pytest.fixture
def save() -> Save:
    """Return ``save(path, value=100, size=(8, 8))``, which writes a flat gray picture and its folders."""

    def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 8)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).save(path)
        return path

    return picture


@pytest.fixture
def bomb() -> bytes:
    """Return a PNG whose header says 60000x60000 pixels, with empty data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + end
