"""Train a tiny model in processes that are killed at random moments; a script of test_kills.py.

``python killed_training.py FOLDER KILLS SEED`` prints, as JSON, one row per kill: the run and the moment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from msflow_ext import MSFlow
from msflow_ext.data import DataSet, Item
from msflow_ext.training.loop import train
from msflow_ext.training.recipe import Recipe

EPOCHS = 6


def toy_data() -> DataSet:
    """Return images of gray noise; the defective ones have a white square, which is their mask."""
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), bool)
    mask[16:40, 8:32] = True
    images = [rng.integers(90, 110, (64, 64), dtype=np.uint8) for _ in range(10)]
    for image in images[8:]:
        image[mask] = 255
    good = [Item(f"good/{i}", 0, "good", image) for i, image in enumerate(images[:8])]
    bad = [Item(f"square/{i}", 1, "square", image, mask) for i, image in enumerate(images[8:])]
    return DataSet("squares", "white", tuple(good[:6]), (*good[6:], *bad))


def train_here(run: Path) -> None:
    """Train to the end, or resume the run in the folder ``run``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    options = {"pretrained": False, "blocks": (1, 1, 2), "cond_channels": 8, "seed": 1}
    model = MSFlow("test_efficientnet", image_size=64, **options)
    recipe = Recipe(
        epochs=EPOCHS, batch_size=4, noise=0.1, eval_every=1, hold_out=0.34, false_alarms=0.4
    )
    train(model, toy_data(), run, recipe, device="cpu", resume=True)


def start(run: Path) -> int:
    """Start a process that trains, and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        train_here(run)
    except BaseException as error:
        print(f"{run}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def status_after(child: int, seconds: float) -> int | None:
    """Return the exit status of a process that ends within ``seconds``, or kill it and return None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(folder: Path, kills: int, seed: int) -> None:
    """Train one run without kills, then kill and resume runs until there were ``kills`` kills."""
    began = time.monotonic()
    assert status_after(start(folder / "undisturbed"), 600) == 0
    whole = time.monotonic() - began
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, float]] = []
    run = 0
    status: int | None = 0
    while len(rows) < kills or status is None:
        seconds = rng.uniform(0, whole) if len(rows) < kills else 600.0
        status = status_after(start(folder / f"run{run}"), seconds)
        if status is None:
            rows.append((f"run{run}", round(seconds, 3)))
        elif status == 0:
            run += 1
        else:
            sys.exit(1)
    print(json.dumps(rows))


if __name__ == "__main__":
    # Python warns of a fork beside threads, but no thread has computed anything yet.
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
