"""The pages of the documentation, and a folder of images and a trained run that their code blocks use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli

IMAGES = {"normal": 30, "odd": 6}
TRAIN = """train --layout folder --normal normal --abnormal odd --masks masks --hold-out 0.5 --false-alarms 0.1
    --backbone efficientnet_lite0 --image-size 64 --epochs 1 --device cpu --threads 1 --out runs/mine"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``normal``, ``odd``, ``masks``, ``photos`` and ``runs/mine``; tests must not write to it."""
    folder, rng = tmp_path_factory.mktemp("template"), np.random.default_rng(0)

    def save(name: str, height: int, width: int, box: tuple[slice, slice] | None = None) -> None:
        pixels = rng.integers(90, 110, (height, width), dtype=np.uint8)
        if box:
            pixels[box] = 255
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)

    for kind, count in IMAGES.items():
        for i in range(count):
            box = (slice(8, 32), slice(4 * i, 4 * i + 24)) if kind == "odd" else None
            save(f"{kind}/{i:03}.png", 64, 64, box)
            if box:
                _save_mask(folder / f"masks/{i:03}.png", box)
    save("photos/large.jpg", 90, 160)
    save("photos/small.png", 64, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(TRAIN.split()) == 0
    return folder


def _save_mask(path: Path, box: tuple[slice, slice]) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[box] = 255
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, which is the working folder during the test."""
    copy = shutil.copytree(template, tmp_path / "work")
    _point_to(copy / "runs/mine/config.yaml", template, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return copy


def _point_to(config: Path, old: Path, new: Path) -> None:
    """Replace the absolute paths that a run's configuration holds."""
    config.write_text(config.read_text("utf-8").replace(str(old), str(new)), encoding="utf-8")
