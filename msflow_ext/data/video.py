"""Decode videos with the optional package imageio, and PyAV for all formats except GIF."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.data.dataset import Frame

#: The container format required for each suffix: others could open further files or start programs.
KINDS = {".avi": "avi", ".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".gif": "gif"}
SUFFIXES = tuple(KINDS)


def frames(video: Path) -> list[Frame]:
    """List every frame of a video without decoding one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be decoded.
        ModuleNotFoundError: imageio or PyAV is not installed.
    """
    return [Frame(video, index) for index in range(_decoded(video, _count))]


def load_frame(frame: Frame) -> np.ndarray:
    """Decode a frame into uint8 ``(H, W)`` or ``(H, W, 3)``.

    Reading frames in order is fastest; for other frames, the decoder starts at the last key frame.
    Each thread keeps the video that it read last open. Raises as :func:`frames`.
    """
    return _decoded(frame.video, lambda video: video.read(index=frame.index))


def _count(video: Any) -> int:
    claimed = video.properties(index=...).n_images
    return claimed or sum(1 for _ in video.iter())  # some containers do not store the number


def _decoded(path: Path, read: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        return read(_last.opened(path))
    except ImportError as error:
        raise ModuleNotFoundError(
            f"video {path} needs the packages imageio and av: pip install imageio av"
        ) from error
    except Exception as error:  # each plugin raises its own types
        _last.close()
        raise ValueError(f"video {path} cannot be decoded: {error}") from error


def _opened(path: Path) -> Any:
    import imageio.v3

    kind = KINDS[path.suffix.lower()]
    if kind != "gif":
        options: Any = {"plugin": "pyav", "format": kind}
        return imageio.v3.imopen(path, "r", **options)
    from PIL import Image

    with Image.open(path, formats=("GIF",)):  # raises for other formats, which imageio would accept
        return imageio.v3.imopen(path, "r", plugin="pillow")


class _Last(threading.local):
    """The video that a thread read last, kept open because closing it takes imageio half a second."""

    key: Any = None
    video: Any = None

    def opened(self, path: Path) -> Any:
        key = (os.getpid(), path, path.stat().st_mtime_ns)  # a forked process opens it again
        if key != self.key:
            self.close()
            self.video, self.key = _opened(path), key
        return self.video

    def close(self) -> None:
        video, self.video, self.key = self.video, None, None
        if video is not None:
            video.close()


_last = _Last()
