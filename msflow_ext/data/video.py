"""Videos, through the optional package imageio; all but GIF also need PyAV."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.data.dataset import Frame

#: By suffix, what a file must hold: others could open further files, or start programs.
KINDS = {".avi": "avi", ".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".gif": "gif"}
SUFFIXES = tuple(KINDS)


def frames(video: Path) -> list[Frame]:
    """Return every frame of a video, none of them decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded.
        ModuleNotFoundError: the package is not installed.
    """
    return [Frame(video, index) for index in range(_decoded(video, _count))]


def load_frame(frame: Frame) -> np.ndarray:
    """Return a frame as ``(H, W)`` or ``(H, W, 3)`` uint8.

    Frames that are read in their order come one after the other; for others, the video is searched from the last
    key frame on. Each thread keeps the video that it read last open.

    Raises:
        As :func:`frames`.
    """
    return _decoded(frame.video, lambda video: video.read(index=frame.index))


def _count(video: Any) -> int:
    claimed = video.properties(index=...).n_images
    return claimed or sum(1 for _ in video.iter())  # some containers do not say


def _decoded(path: Path, read: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        return read(_last.opened(path))
    except ImportError as error:
        raise ModuleNotFoundError(
            f"video {path} needs the packages imageio and av: pip install imageio av"
        ) from error
    except Exception as error:  # each plugin raises its own
        _last.close()
        raise ValueError(f"video {path} cannot be decoded: {error}") from error


def _opened(path: Path) -> Any:
    import imageio.v3

    kind = KINDS[path.suffix.lower()]
    if kind != "gif":
        options: Any = {"plugin": "pyav", "format": kind}
        return imageio.v3.imopen(path, "r", **options)
    from PIL import Image

    with Image.open(path, formats=("GIF",)):  # or an error: imageio takes any kind
        return imageio.v3.imopen(path, "r", plugin="pillow")


class _Last(threading.local):
    """The last video of each thread, kept open: closing one takes imageio half a second."""

    key: Any = None
    video: Any = None

    def opened(self, path: Path) -> Any:
        key = (os.getpid(), path, path.stat().st_mtime_ns)  # a forked process opens it anew
        if key != self.key:
            self.close()
            self.video, self.key = _opened(path), key
        return self.video

    def close(self) -> None:
        video, self.video, self.key = self.video, None, None
        if video is not None:
            video.close()


_last = _Last()
