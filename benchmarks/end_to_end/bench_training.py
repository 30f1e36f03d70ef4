"""A training step and whole training runs, compared with the reference implementation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.aupro import published
from benchmarks.harness import run_in_pytest
from msflow_ext import MSFlow
from msflow_ext.bench import DEMO, TINY, Case, Provider
from msflow_ext.bench.cases import REFERENCE, training_step
from msflow_ext.bench.reference import ReferenceMSFlow, predict
from msflow_ext.choices import PaddingMode
from msflow_ext.data import DataSet, Images, Item
from msflow_ext.data.synthetic import blob, draw


def test_training(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    if quick:
        small = {"blocks": (1, 1), "train": 4, "test": 4, "epochs": 2}
        steps = [training_step(batch=2, **TINY), training_step(batch=1, **TINY)]
        return [*steps, run_case("resnet18", 64, **small)]
    return [
        training_step(),
        training_step(batch=8, **DEMO),
        training_step(batch=1),
        run_case("efficientnet_lite0", 192, train=16, test=8, epochs=100, padding_mode="zeros"),
        run_case("wide_resnet50_2", 256, train=8, test=4, epochs=10),
    ]


def run_case(
    backbone: str,
    size: int,
    *,
    train: int,
    test: int,
    epochs: int,
    blocks: tuple[int, ...] = (2, 5, 8),
    padding_mode: PaddingMode = "reflect",
) -> Case:
    """Return the case of features, all epochs and a test after each, which compares the losses of all epochs."""
    from msflow_ext.training.recipe import Recipe

    dataset = textures(train, test, size)
    bf16 = Recipe(epochs=epochs, eval_every=1, precision="bfloat16")
    fp32 = Recipe(epochs=epochs, eval_every=1)

    def model() -> MSFlow:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MSFlow(
                backbone,
                image_size=size,
                pretrained=False,
                blocks=blocks,
                padding_mode=padding_mode,
                standardize=False,
                seed=0,
            )

    return Case(
        name=f"training run {backbone} {size} px, {train} + {test} images, {epochs} epochs",
        inputs=lambda: [dataset],
        providers={
            f"{REFERENCE} fp32": Provider(lambda: reference_run(model, fp32)),
            "ours fp32": Provider(lambda: our_run(model, fp32), 2e-2),
            "ours bf16": Provider(lambda: our_run(model, bf16), 0.1, bf16=True),
        },
        expected=f"{REFERENCE} fp32",
        grad=True,
        rounds=1,
    )


def our_run(model: Callable[[], MSFlow], recipe: Any) -> Callable[[DataSet], list[float]]:
    """Return a training run as in ``msflow train``, with its reports."""
    from msflow_ext.training.loop import train

    def run(dataset: DataSet) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            return train(model(), dataset, Path(folder) / "run", recipe, device="cpu")["losses"]

    return run


def reference_run(model: Callable[[], MSFlow], recipe: Any) -> Callable[[DataSet], list[float]]:
    """Return the run of the same recipe by the reference implementation.

    It runs the backbone in every epoch, and tests with scikit-learn and 800 thresholds. Images are decoded only once,
    which is in its favor. It runs in float32, because its losses under autocast are very different.
    """

    def run(dataset: DataSet) -> list[float]:
        net = model().eval()
        size = net.image_size
        train, test = Images(dataset.train, size), Images(dataset.test, size)
        pixels = torch.stack([train[i] for i in range(len(train))])
        maps = [tuple(f.shape[2:]) for f in net.features(pixels[:1])]
        flows = ReferenceMSFlow(net.head, maps, "dense" if REFERENCE == "reference" else "index")
        parameters = [p for p in flows.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters)
        tested = torch.stack([test[i] for i in range(len(test))])
        masks = np.array([test.mask(i) for i in range(len(test))])
        losses = []
        for epoch in range(recipe.epochs):
            optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
            total = 0.0
            for chunk in recipe.order(epoch, len(pixels)).split(recipe.batch_size):
                loss = flows.loss(net.features(pixels[chunk]))
                loss.backward()
                clip_grad_norm_(parameters, recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item() * len(chunk)
            losses.append(total / len(pixels))
            found = [scores_of(net, flows, each) for each in tested.split(recipe.batch_size)]
            measure(dataset, masks, *(torch.cat(part).numpy() for part in zip(*found, strict=True)))
        dimensions = sum(f[0].numel() for f in net.features(pixels[:1]))
        return [loss / dimensions for loss in losses]

    return run


@torch.no_grad()
def scores_of(net: MSFlow, flows: ReferenceMSFlow, images: Tensor) -> tuple[Tensor, Tensor]:
    found = predict(flows.log_likelihood(net.features(images)), net.image_size)
    return found.score, found.anomaly_map


def measure(dataset: DataSet, masks: np.ndarray, scores: np.ndarray, maps: np.ndarray) -> None:
    from sklearn.metrics import roc_auc_score

    roc_auc_score([item.label for item in dataset.test], scores)
    roc_auc_score(masks.ravel(), maps.ravel())
    published(masks, maps)


def textures(train: int, test: int, side: int) -> DataSet:
    """Return a data set of grained gray noise, in which every other test image has a stain."""
    rng = np.random.default_rng(0)

    def image() -> np.ndarray:
        coarse = torch.from_numpy(rng.uniform(60, 190, (1, 1, side // 4, side // 4)))
        fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
        return fine[0, 0].numpy().astype(np.uint8)

    good = tuple(Item(f"train/{i}", 0, "good", image()) for i in range(train))
    items = []
    for i in range(test):
        picture, mask = image(), np.zeros((side, side), bool)
        if i % 2:
            picture, mask = draw(blob, picture, rng)
        items.append(Item(f"test/{i}", i % 2, "blob" if i % 2 else "good", picture, mask))
    return DataSet("textures", f"noise {side} px", good, tuple(items))
