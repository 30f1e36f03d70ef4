"""Fixtures: a tiny model, images to train it on, and a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msflow_ext import MSFlow
from msflow_ext.data import DataSet, Item
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training.loop import Recipe, train

SIZE = 64


@pytest.fixture(scope="session")
def build_model() -> Callable[..., MSFlow]:
    """Return a function that builds the same tiny MSFlow each time, on a backbone with random weights."""

    def build(**options: Any) -> MSFlow:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MSFlow(
                "test_efficientnet",
                image_size=SIZE,
                pretrained=False,
                blocks=(1, 1, 2),
                cond_channels=8,
                seed=1,
                **options,
            )

    return build


@pytest.fixture(scope="module")
def squares() -> DataSet:
    """Return images of gray noise; the defective ones have a white square, which is their mask."""
    rng = np.random.default_rng(0)

    def good(name: str) -> Item:
        return Item(name, 0, "good", rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8))

    def defective(name: str) -> Item:
        image = rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[16:40, 8:32] = True
        image[mask] = 255
        return Item(name, 1, "square", image, mask)

    trained = tuple(good(f"train/good/{i}") for i in range(6))
    tested = [good(f"good/{i}") for i in range(3)] + [defective(f"square/{i}") for i in range(3)]
    return DataSet("squares", "white", trained, tuple(tested))


@pytest.fixture(scope="module")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, squares: DataSet, build_model: Callable[..., MSFlow]
) -> Path:
    """Return the folder of a run of two epochs; tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(build_model(), squares, folder, Recipe(epochs=2, batch_size=4), device="cpu")
    return folder


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path], bool]:
    """Return a function that tells whether two runs ended with the same weights, bit for bit."""

    def same(run: Path, other: Path) -> bool:
        a, b = (read_checkpoint(each / "model.safetensors")[1] for each in (run, other))
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return same
