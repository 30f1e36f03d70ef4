"""A small untrained detector, images, and a folder of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msflow_ext as mx
from msflow_ext.data import Item
from msflow_ext.inference.detector import Detector, load
from msflow_ext.runs.checkpoint import save_checkpoint


def _model() -> mx.MSFlow:
    options = {"image_size": 64, "pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mx.MSFlow("test_efficientnet", seed=1, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the checkpoint of an untrained model; tests must not write to it."""
    folder = tmp_path_factory.mktemp("run")
    model = _model()
    header = {"model": "MSFlow", "config": model.config, "colours": [0.5, 2.0]}
    save_checkpoint(folder / "model.safetensors", header, model)
    return folder


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return load(run, device="cpu")


@pytest.fixture
def items() -> list[Item]:
    """Three good images of noise and three with a white square."""
    rng = np.random.default_rng(0)
    found = []
    for label, kind in enumerate(("good", "square")):
        for i in range(3):
            image, mask = rng.integers(90, 110, (64, 64), dtype=np.uint8), np.zeros((64, 64), bool)
            mask[16:40, 8:32] = label == 1
            image[mask] = 255
            found.append(Item(f"{kind}/{i}", label, kind, image, mask))
    return found


@pytest.fixture
def folder(tmp_path, items) -> Path:
    for item in items:
        path = tmp_path / "images" / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.image).save(path)
    return tmp_path / "images"
