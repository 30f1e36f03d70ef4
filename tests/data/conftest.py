"""What the tests of the data share: small pictures on disk, and one that is far too large."""

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
    """``save(path, value=100, size=(8, 8))``: a flat gray picture, in folders made for it."""

    def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 8)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).save(path)
        return path

    return picture


@pytest.fixture
def bomb() -> bytes:
    """A PNG's header of 60000x60000 pixels and hardly anything behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + end
