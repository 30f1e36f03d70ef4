"""Train a tiny model in float64, in one process or as one of several; a script of test_ranks.py.

``python training_together.py FOLDER RANK SIZE`` runs all cases into FOLDER. The processes meet through a file there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would keep alive
from torch import Tensor

from msflow_ext import MSFlow
from msflow_ext.data import DataSet, Item
from msflow_ext.distributed.ranks import Ranks, join
from msflow_ext.training import loop
from msflow_ext.training.finish import Metrics
from msflow_ext.training.loop import train
from msflow_ext.training.recipe import Recipe

SIZE = 48  # pixels
BASE = Recipe(
    epochs=3, batch_size=4, eval_every=1, lr=1e-3, warmup=0.0, noise=0.1, weight_decay=1e-3
)
#: Two processes have 4 and 3 of the 7 training images, so that the second batch is uneven.
CASES: dict[str, tuple[dict[str, Any], Recipe]] = {
    "uneven": ({"anomaly_map": "clamped"}, BASE),
    "often-empty": ({}, replace(BASE, batch_size=2, cache="disk", hold_out=0.3, false_alarms=0.4)),
    "always-empty": ({}, replace(BASE, batch_size=1, cache="off", epochs=1)),
    "standardized": ({"standardize": True, "whiten": True}, BASE),
}


class Interrupted(BaseException):
    """An interruption that no code in a run may catch."""


def build(**options: Any) -> MSFlow:
    """Return the same model each time, in float64, with features that are independent of the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small: dict[str, Any] = {"blocks": (1, 1, 2), "cond_channels": 8, "seed": 1, **options}
        model = MSFlow("test_efficientnet", image_size=SIZE, pretrained=False, **small)
    for part in (model.head, model.whitening, model.clamped):
        if part is not None:
            part.double()
    model.head.register_forward_pre_hook(lambda _, given: ([x.double() for x in given[0]],))
    together = model.features

    def one_by_one(_: MSFlow, images: Tensor) -> list[Tensor]:
        parts = [together(image[None]) for image in images]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    model.features = MethodType(one_by_one, model)  # type: ignore[method-assign]
    return model


def toy_data(bad: Path | None = None) -> DataSet:
    """Return images of gray noise; defective ones have a white square, which is their mask."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:20, 4:16] = True
    images: list[Any] = [rng.integers(90, 110, (SIZE, SIZE), dtype=np.uint8) for _ in range(12)]
    for image in images[10:]:
        image[mask] = 255
    if bad:
        images[1] = bad  # the first image of the second process
    good = [Item(f"good/{i}", 0, "good", image) for i, image in enumerate(images[:10])]
    defective = [
        Item(f"square/{i}", 1, "square", image, mask) for i, image in enumerate(images[10:])
    ]
    return DataSet("squares", "white", tuple(good[:7]), (*good[7:], *defective))


def run_case(name: str, folder: Path, ranks: Ranks, **more: Any) -> Metrics:
    """Train one of ``CASES`` into the folder of its name."""
    options, recipe = CASES[name]
    with torch.random.fork_rng(devices=[]):
        return train(
            build(**options), toy_data(), folder / name, recipe, device="cpu", ranks=ranks, **more
        )


def run_all(folder: Path, ranks: Ranks) -> None:
    """Run all ``CASES``, one case that is interrupted after two epochs, and all that must fail."""
    for name in CASES:
        run_case(name, folder, ranks, baseline=name == "uneven")
    with interrupted_after(2):
        run_case("uneven", folder / "interrupted", ranks)
    failures = {name: str(failure(name, folder, ranks)) for name in FAILURES}
    (folder / f"failures-{ranks.rank}.json").write_text(json.dumps(failures))


@contextmanager
def interrupted_after(epochs: int) -> Iterator[None]:
    """End trainings in the block after ``epochs`` epochs, as if they were killed."""
    real, calls = loop.train_epoch, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > epochs:
            raise Interrupted
        return real(*args, **options)

    loop.train_epoch = counted
    try:
        yield
    except Interrupted:
        pass
    finally:
        loop.train_epoch = real


def infinite_loss(folder: Path, ranks: Ranks) -> None:
    """Make the loss of one process infinite in the second epoch."""
    model, calls = build(), []
    real = model.head.loss

    def spoilt(_: Any, features: list[Tensor]) -> Tensor:
        calls.append(1)
        last = ranks.rank == ranks.size - 1
        return real(features) * (float("inf") if last and len(calls) > 2 else 1.0)

    model.head.loss = MethodType(spoilt, model.head)
    recipe = replace(BASE, seed=3)
    train(model, toy_data(), folder / "infinite", recipe, device="cpu", ranks=ranks)


def broken_image(folder: Path, ranks: Ranks) -> None:
    """Train with a damaged image, which only one process reads."""
    path = folder.parent / "broken.png"
    path.write_bytes(b"")
    train(build(), toy_data(path), folder / "broken", BASE, device="cpu", ranks=ranks)


def other_data(folder: Path, ranks: Ranks) -> None:
    """Train with fewer images in the last process than in the first."""
    data = toy_data()
    if ranks.rank:
        data = replace(data, train=data.train[1:])
    train(build(), data, folder / "other", BASE, device="cpu", ranks=ranks)


def too_few(folder: Path, ranks: Ranks) -> None:
    """Train on a single image."""
    data = replace(toy_data(), train=toy_data().train[:1])
    train(build(), data, folder / "few", replace(BASE, epochs=1), device="cpu", ranks=ranks)


FAILURES = {f.__name__: f for f in (infinite_loss, broken_image, other_data, too_few)}


def failure(name: str, folder: Path, ranks: Ranks) -> str | None:
    """Return the type and the text of the error of a case."""
    try:
        FAILURES[name](folder, ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size
    )
    pair = folder / "pair"
    run_all(pair, join())
    if rank == 0:
        shutil.copytree(folder / "single" / "interrupted", pair / "resumed")
    dist.barrier()
    run_case("uneven", pair / "resumed", join(), resume=True)
    dist.destroy_process_group()  # gloo's threads would outlive the interpreter and abort the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
