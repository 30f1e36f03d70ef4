"""Provide a small data set, a finished run, and helpers that run commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli

SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    """Return a data set in the layout of MVTec AD: ``plate``, gray noise with white squares as defects."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def write(path: Path, pixels: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for i in range(4):
        write(root / f"plate/train/good/{i}.png", rng.integers(90, 110, (64, 64), dtype=np.uint8))
    for i in range(2):
        write(root / f"plate/test/good/{i}.png", rng.integers(90, 110, (64, 64), dtype=np.uint8))
        image, mask = rng.integers(90, 110, (64, 64), dtype=np.uint8), np.zeros((64, 64), bool)
        mask[8:32, 16:40] = True
        image[mask] = 255
        write(root / f"plate/test/square/{i}.png", image)
        write(root / f"plate/ground_truth/square/{i}_mask.png", mask)
    return root


@pytest.fixture(scope="session")
def train_command() -> Callable[..., list[str]]:
    """Return ``train_command(data, out, *more)``, which gives the words that train one epoch on ``plate``."""

    def words(data: Path, out: Path, *more: str) -> list[str]:
        chosen = ["--data", str(data), "--layout", "mvtec", "--category", "plate", "--epochs", "1"]
        return ["train", *chosen, *SMALL, "--out", str(out), *more]

    return words


@pytest.fixture(scope="package")
def run(data, train_command, tmp_path_factory) -> Path:
    """Return a finished run; tests must not write to it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(train_command(data, out, "--baseline")) == 0
    return out


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return ``fails(*words)``, which runs a command that must fail and returns its error."""

    def sentence(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(list(words)) == 2
        *before, last = capsys.readouterr().err.splitlines()
        assert last.startswith("msflow: error: ")
        assert not any("Traceback" in line for line in before)
        return last

    return sentence
