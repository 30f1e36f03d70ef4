"""A detector with a precision scores an image alike in every batch, copy and process."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext.inference.detector import Detector, load

pytestmark = [
    pytest.mark.family("optimized models"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("precision", ["float32", "bfloat16"]),
]
ROUNDING = 2e-6  # of float32 sums in another order


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def scores(detector: Detector, photos: Path, batch_size: int = 4) -> list[float]:
    return [result.score for result in detector.predict(photos, batch_size=batch_size)]


OTHER = """
import pickle, sys, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    detector = pickle.load(file)
print([result.score for result in detector.predict(sys.argv[2], batch_size=4)])
"""


def test_copies_pickles_and_other_processes_score_alike(run, photos, precision, tmp_path):
    detector = load(run, device="cpu", precision=precision)
    expected = scores(detector, photos)
    for duplicate in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert scores(duplicate, photos) == expected
    (tmp_path / "detector").write_bytes(pickle.dumps(detector))
    command = [sys.executable, "-c", OTHER, str(tmp_path / "detector"), str(photos)]
    # Away from the sources, which would shadow the installed package.
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(said.stdout) == expected


@pytest.mark.parametrize("first", [1, 2, 9])
def test_the_size_of_the_first_batch_changes_no_score(run, photos, precision, first):
    detector = load(run, device="cpu", precision=precision)
    scores(detector, photos, first)
    alone = scores(load(run, device="cpu", precision=precision), photos, 1)
    for size in (1, 3, 8):
        assert scores(detector, photos, size) == pytest.approx(alone, rel=ROUNDING)
