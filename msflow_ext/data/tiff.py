"""Refuse TIFF files that Pillow would misread silently, by their tags."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import Any, BinaryIO

_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 258, 259, 262, 277  # tags
_PLANES, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 284, 320, 338, 339
_TAGS = (
    _BITS,
    _COMPRESSION,
    _PHOTOMETRIC,
    _SAMPLES,
    _PLANES,
    _COLOUR_MAP,
    _EXTRA_SAMPLES,
    _SAMPLE_FORMAT,
)

_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MOST_ENTRIES, _MOST_VALUES = 4096, 3 * 2**16

Tags = dict[int, tuple[int, ...]]  # the tags above that a file has

_WHITE_IS_ZERO, _GRAY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_NAMES = {
    _WHITE_IS_ZERO: "gray, white is zero",
    _GRAY: "gray",
    _RGB: "RGB",
    _PALETTE: "palette",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
}
#: Bits per sample, and samples per pixel, that Pillow reads correctly in one plane.
_READ = {
    _WHITE_IS_ZERO: {(1, 1), (2, 1), (4, 1), (8, 1)},
    _GRAY: {(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2)},
    _RGB: {(8, 3), (8, 4), (16, 3), (16, 4)},
    _PALETTE: {(1, 1), (2, 1), (4, 1), (8, 1)},
    _CMYK: {(8, 4), (16, 4)},
    _YCBCR: {(8, 3)},
}
_READ_IN_PLANES = {_GRAY: {(8, 1)}, _RGB: {(8, 3), (8, 4)}, _CMYK: {(8, 4)}}
_RAW, _JPEG, _WEBP = 1, 7, 50001
#: None, CCITT, LZW, JPEG, Deflate, PackBits, LZMA, Zstandard, WebP.
_COMPRESSIONS = (_RAW, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 34925, 50000, _WEBP)
_FORMATS = {1: "uint", 2: "int", 3: "float"}


def read_tags(file: BinaryIO) -> Tags | None:
    """Return the readable tags of the first image of a TIFF file, or None for another kind of file.

    Pillow would read every tag, however long, and returns no tags of a file that it cannot decode.
    """
    file.seek(0)
    header = file.read(16).ljust(16, b"\0")
    order = {b"II": "<", b"MM": ">"}.get(header[:2])
    if order is None or not {42, 43} & set(
        header[2:4]
    ):  # in either byte order: Pillow accepts both
        return None
    start, count, entry = (8, "Q", "HHQ8s") if 43 in header[2:4] else (4, "H", "HHI4s")
    tags: Tags = {}
    with suppress(struct.error):  # cut off
        _seek(file, *struct.unpack_from(order + ("Q" if count == "Q" else "I"), header, start))
        (entries,) = _unpack(file, order + count)
        for _ in range(min(entries, _MOST_ENTRIES)):
            tag, kind, length, value = _unpack(file, order + entry)
            if tag in _TAGS and length:
                tags[tag] = _values(
                    file, order, _TYPES.get(kind, "B"), min(length, _MOST_VALUES), value
                )
    return tags


def refuse_misread(tags: Tags, name: str) -> None:
    """Raise a ValueError unless Pillow reads the pixels of a file with these tags correctly."""
    if not _is_read(tags):
        raise ValueError(
            f"{name} cannot be read: TIFF with {_described(tags)} is not supported. Save it as PNG, or as "
            "TIFF of 8 or 16 unsigned bits, gray or RGB, in one plane, without premultiplied alpha."
        )


def is_lossy(tags: Tags) -> bool:
    """Return whether the compression of the pixels is lossy."""
    return _one(tags, _COMPRESSION, _RAW) in (_JPEG, _WEBP)


def _is_read(tags: Tags) -> bool:
    photometric, compression = _one(tags, _PHOTOMETRIC), _one(tags, _COMPRESSION, _RAW)
    bits, samples = set(tags.get(_BITS, (1,))), _one(tags, _SAMPLES, 1)
    read = {1: _READ, 2: _READ_IN_PLANES}.get(_one(tags, _PLANES, 1), {})
    return (
        len(bits) == 1
        and (*bits, samples) in read.get(photometric, ())
        and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1}
        and tags.get(_EXTRA_SAMPLES, ()) in ((), (0,), (2,))  # (1,): premultiplied
        and compression in _COMPRESSIONS
        and not (photometric == _YCBCR and compression == _RAW)  # may be subsampled
        and not (photometric == _PALETTE and 0 < max(tags.get(_COLOUR_MAP, (0,))) < 256)  # 8 bits
    )


def _described(tags: Tags) -> str:
    formats = {_FORMATS.get(each, "undefined") for each in tags.get(_SAMPLE_FORMAT, (1,))}
    bits = sorted(set(tags.get(_BITS, (1,))))
    pixel = f"{_one(tags, _SAMPLES, 1)} x {'/'.join(sorted(formats))}{'/'.join(map(str, bits))}"
    photometric = _one(tags, _PHOTOMETRIC)
    colors = _NAMES.get(photometric, f"photometric interpretation {photometric}")
    planes = "separate planes" if _one(tags, _PLANES, 1) == 2 else "one plane"
    alpha = ", premultiplied alpha" if 1 in tags.get(_EXTRA_SAMPLES, ()) else ""
    compression = _one(tags, _COMPRESSION, _RAW)
    return f"{pixel} a pixel ({colors}, {planes}, compression {compression}{alpha})"


def _one(tags: Tags, tag: int, default: int = -1) -> int:
    return tags.get(tag, (default,))[0]


def _values(file: BinaryIO, order: str, kind: str, length: int, value: bytes) -> tuple[int, ...]:
    """Return the numbers of a tag: from its entry if they fit, else from where that points."""
    layout = f"{order}{length}{kind}"
    if struct.calcsize(layout) <= len(value):
        return struct.unpack_from(layout, value)
    place = file.tell()
    _seek(file, *struct.unpack(order + ("Q" if len(value) == 8 else "I"), value))
    numbers = _unpack(file, layout)
    file.seek(place)
    return numbers


def _seek(file: BinaryIO, place: int) -> None:
    if place > file.seek(0, os.SEEK_END):
        raise struct.error(f"offset {place} is past the end")
    file.seek(place)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
