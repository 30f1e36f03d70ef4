"""mSTC, mini ShanghaiTech Campus: every fifth frame of the videos of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msflow_ext.data import video
from msflow_ext.data.dataset import DataSet, Faults, Frame, Item, list_images, subfolders
from msflow_ext.data.walk import walk

EVERY = 5


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read a scene, ``01`` to ``13``: the videos whose names begin with it, such as ``01_0014``.

    A video is a folder of frames, ``training/frames/VIDEO`` or ``testing/frames/VIDEO``, or a file
    in ``training/videos`` or ``testing/videos``. Frames 0, 5, 10, ... are read. ``testing`` holds
    ``test_frame_mask/VIDEO.npy``, ``(frames,)``, and optionally ``test_pixel_mask/VIDEO.npy``,
    ``(frames, H, W)``. These are bool or integer arrays, above 0 on anomalies.

    Args:
        root: the folder with ``training`` and ``testing``.
        category: the scene.
        split_seed: unused, because this layout has its own test images.

    Raises:
        ValueError: the scene does not exist, or there are no videos.
        FileNotFoundError: the folder ``training`` does not exist.
        ModuleNotFoundError: there are video files, and the packages to decode them are missing.

    References:
        Liu et al., "Future Frame Prediction for Anomaly Detection", CVPR 2018. Every fifth frame as
        in Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
    """
    scenes = categories(root)
    if category is None or category not in scenes:
        raise ValueError(f"category of {root} must be one of {', '.join(scenes)}, got {category!r}")
    faults: Faults = []
    train: list[Item] = []
    for name, clip in _videos(root / "training", category).items():
        frames = _frames(clip, faults)
        train += [
            Item(f"train/{name}/{i:04}", 0, "good", frames[i]) for i in range(0, len(frames), EVERY)
        ]
    test: list[Item] = []
    tested = _videos(root / "testing", category)
    for name, clip in tested.items():
        test += _tested(root / "testing", name, _frames(clip, faults), faults)
    faults += [
        ValueError(f"mask {mask} has no video of the same name")
        for mask in sorted((root / "testing").glob("test_*_mask/*.npy"))
        if _scene(mask.stem) == category and mask.stem not in tested
    ]
    return DataSet("mstc", category, tuple(train), tuple(test), tuple(faults))


def categories(root: Path) -> list[str]:
    """Return the scenes that have videos."""
    if not (root / "training").is_dir():
        raise FileNotFoundError(f"{root / 'training'} is not a folder")
    parts = ("training", "testing")
    scenes = sorted({_scene(name) for part in parts for name in _videos(root / part)})
    if not scenes:
        raise ValueError(f"{root / 'training'} holds neither frames/VIDEO nor videos")
    return scenes


def _videos(part: Path, scene: str | None = None) -> dict[str, Path]:
    """Return the folder or file of each video by name; a folder is preferred to a file."""
    found: dict[str, Path] = {}
    if (part / "videos").is_dir():
        files = walk(part / "videos", video.SUFFIXES, deep=False).paths
        found = {path.stem: path for path in files}
    if (part / "frames").is_dir():
        found |= {name: part / "frames" / name for name in subfolders(part / "frames")}
    return {name: found[name] for name in sorted(found) if scene in (None, _scene(name))}


def _scene(name: str) -> str:
    return name.split("_")[0]


def _frames(clip: Path, faults: Faults) -> Sequence[Path | Frame]:
    if clip.is_dir():
        files = list_images(clip, faults)
        files.sort(key=lambda path: (len(path.stem), path.stem))  # 1000 comes after 999
        return files
    try:
        return video.frames(clip)
    except (OSError, ValueError) as error:
        faults.append(error)
        return []


def _tested(folder: Path, name: str, frames: Sequence[Path | Frame], faults: Faults) -> list[Item]:
    if not frames:
        return []
    labels = _masks(folder / "test_frame_mask" / f"{name}.npy", 1, len(frames), faults)
    pixels: Sequence[np.ndarray | None] | np.ndarray | None = [None] * len(frames)
    if (folder / "test_pixel_mask").is_dir():
        pixels = _masks(folder / "test_pixel_mask" / f"{name}.npy", 3, len(frames), faults)
    if labels is None or pixels is None:
        return []
    items = []
    for i in range(0, len(frames), EVERY):
        abnormal = bool(labels[i] > 0)
        defect = "abnormal" if abnormal else "good"
        items.append(Item(f"{name}/{i:04}", int(abnormal), defect, frames[i], pixels[i]))
    return items


def _masks(path: Path, axes: int, frames: int, faults: Faults) -> np.ndarray | None:
    """Map the array in a file into memory, so that only the masks in use are read."""
    try:
        masks = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        faults.append(FileNotFoundError(f"{path} is not a file"))
        return None
    except (EOFError, OSError, ValueError) as error:
        faults.append(ValueError(f"{path} cannot be read: {error}"))
        return None
    if not isinstance(masks, np.ndarray):  # an archive of arrays
        faults.append(ValueError(f"{path} must hold one array, got several"))
        return None
    if masks.ndim == axes and len(masks) == frames and masks.dtype.kind in "biu":
        return masks
    expected = "(frames,)" if axes == 1 else "(frames, H, W)"
    faults.append(
        ValueError(
            f"{path} must be {expected} of bool or integer with {frames} frames, "
            f"got {masks.shape} of {masks.dtype}"
        )
    )
    return None
