"""Videos, through the optional package imageio; all but GIF also need PyAV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .items import Frame

SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".gif")


def frames(video: Path) -> list[Frame]:
    """Every frame of a video, none of them decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded.
        ModuleNotFoundError: the package is not installed.
    """
    return [Frame(video, index) for index in range(_decoded(video, _count))]


def load_frame(frame: Frame) -> np.ndarray:
    """A frame as ``(H, W)`` or ``(H, W, 3)`` uint8.

    The video is opened anew and searched from the last key frame on: a folder of images is faster.

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
    plugin = "pillow" if path.suffix.lower() == ".gif" else "pyav"
    try:
        import imageio.v3

        with imageio.v3.imopen(path, "r", plugin=plugin) as video:
            return read(video)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"video {path} needs the packages imageio and av: pip install imageio av"
        ) from error
    except Exception as error:  # each plugin raises its own
        raise ValueError(f"video {path} cannot be decoded: {error}") from error
