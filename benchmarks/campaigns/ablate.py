"""Measure the accuracy with and without parts of models and recipes: `python -m benchmarks.campaigns.ablate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report, results
from benchmarks.campaigns.ablations import variants
from msflow_ext import FastFlow, MSFlow, metrics, ops
from msflow_ext.data import DataSet, Images, open_dataset
from msflow_ext.evaluation.evaluator import Truth
from msflow_ext.features import Features
from msflow_ext.models.anomaly_map import ClampedMap
from msflow_ext.models.padim import Padim, PadimPrediction
from msflow_ext.training.loop import make_optimizer
from msflow_ext.training.recipe import PRESETS

Row = dict[str, Any]
FILE = results.FOLDER / "ablations.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "notes" / "accuracy.md"
BACKBONE, SIZE = "efficientnet_lite0", 192
EPOCHS = {"mono": 24, "poly": 24, "brick": 40}
BATCH = 16  # images of a batch in tests
BASELINES = ("Gaussian", "1-NN")

#: End of names in older rows, of scores with a Gaussian per position after the flow. It gained nothing and was removed.
PER_POSITION = ", position base"

#: By title of a column, the names of a score in the rows of results; a row has at most one of them.
SCORES: dict[str, Sequence[str]] = {
    "paper's score": ("paper", "log 3%"),
    "NLL, top 1%": ("nll 1%",),
    "NLL, top 3%": ("nll 3%",),
    "NLL, top 10%": ("nll 10%",),
    "NLL, top 3%, Gaussian per position": (f"nll 3%{PER_POSITION}",),
    "map, top 3%": ("clamped score",),
    "map, top 3%, Gaussian per position": (f"clamped score{PER_POSITION}",),
    "map, top 1%": ("clamped score 1%",),
    "map, top 1%, Gaussian per position": (f"clamped score 1%{PER_POSITION}",),
    "smoothed map, top 3%": ("smoothed score",),
    "smoothed map, top 1%": ("smoothed score 1%",),
    "smoothed map, top 1%, Gaussian per position": (f"smoothed score 1%{PER_POSITION}",),
    "additive map, top 3%": ("additive score",),
}
MAPS: dict[str, Sequence[str]] = {
    "additive": ("paper", "additive"),
    "additive, Gaussian per position": (f"additive{PER_POSITION}",),
    "multiplicative": ("multiplicative",),
    "softly limited": ("clamped",),
    "smoothed": ("smoothed",),
    "smoothed, Gaussian per position": (f"smoothed{PER_POSITION}",),
}

#: A column of a table: data, names of the score, and the index of its number.
Column = tuple[str, Sequence[str], int]
TABLES: dict[str, dict[str, Column]] = {
    **{
        f"Image AUROC, {data}": {title: (data, how, 0) for title, how in SCORES.items()}
        for data in EPOCHS
    },
    **{
        f"{metric} of maps, brick": {title: ("brick", how, i) for title, how in MAPS.items()}
        for i, metric in ((1, "Pixel AUROC"), (2, "AUPRO"))
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    o = parser().parse_args(arguments)
    if o.table:
        report.update(PAGE, "ablations", "\n".join(tables(rows(o.file))))
        return 0
    done = {(row["variant"], row["data"], row["seed"]) for row in rows(o.file)}
    for seed, data, name in product(o.seeds, o.data, o.variants or [*BASELINES, *variants()]):
        if (name, data, seed) in done:
            continue
        began = time.monotonic()
        found = run(name, data, seed, o.brick, o.epochs)
        seconds = round(time.monotonic() - began)
        row = {"variant": name, "data": data, "seed": seed, "seconds": seconds, **found}
        o.file.parent.mkdir(parents=True, exist_ok=True)
        with o.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}, {data} {seed}: {seconds} s", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.campaigns.ablate", description=__doc__
    )
    add = found.add_argument
    text = f"Variants to measure (default: all): {', '.join((*BASELINES, *variants()))}."
    add("variants", nargs="*", help=text)
    text = "Data to measure on (default: all)."
    add("--data", nargs="+", choices=tuple(EPOCHS), default=list(EPOCHS), help=text)
    text = "Seeds of split, weights and order of the images."
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help=text)
    text = "Number of epochs (default: that of the variant or of the data)."
    add("--epochs", type=int, help=text)
    text = "Folder of brick in the layout of MVTec AD (default: the packaged texture)."
    add("--brick", type=Path, help=text)
    text = "File of rows; rows that exist are not computed again."
    add("--file", type=Path, default=FILE, help=text)
    text = "Write the tables into docs/notes/accuracy.md, and measure nothing."
    add("--table", action="store_true", help=text)
    return found


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(found: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of all tables with their titles."""
    for title, columns in TABLES.items():
        yield from ("", f"### {title}", "", *table(found, columns))
    yield ""


def table(found: Sequence[Row], columns: Mapping[str, Column]) -> Iterator[str]:
    """Yield a line per variant: mean and standard deviation in percent, and the number of seeds."""
    yield f"| variant | {' | '.join(columns)} |"
    yield "|---|" + "---:|" * len(columns)
    for name in dict.fromkeys(row["variant"] for row in found):
        mine = [row for row in found if row["variant"] == name]
        cells = [_cell(mine, *column) for column in columns.values()]
        if set(cells) != {"-"}:
            yield f"| {name} | {' | '.join(cells)} |"


def run(name: str, data: str, seed: int, brick: Path | None, epochs: int | None) -> Row:
    """Train and test a variant, and return its epochs, last loss, and the results of each score."""
    dataset = load(data, seed, brick)
    if name in BASELINES:
        model = MSFlow(BACKBONE, image_size=SIZE, seed=seed)
        return {"scores": {"paper": baseline(name, features_of(model, dataset, data, seed, None))}}
    variant = variants()[name]
    epochs = epochs or variant.epochs or EPOCHS[data]
    options = {**variant.arguments, "image_size": SIZE, "seed": seed}
    model = variant.model(BACKBONE, **options)
    if variant.change:
        variant.change(model)
    cached = features_of(model, dataset, data, seed, variant.change)
    loss = fit(model, cached.trained, replace(variant.recipe, epochs=epochs, seed=seed))
    return {"epochs": epochs, "loss": loss, "scores": scores(model, cached)}


@lru_cache(maxsize=1)
def load(data: str, seed: int, brick: Path | None) -> DataSet:
    if data != "brick":
        return open_dataset("elpv", category=data, split_seed=seed)
    if brick is None:
        return open_dataset("textures", category="brick")
    return open_dataset(str(brick.parent), "mvtec", brick.name)


@dataclass(frozen=True)
class Cached:
    """Features of a data set in memory, which variants with the same backbone share."""

    trained: Features
    tested: Features
    truth: Truth


_kept: dict[Any, Cached] = {}


def features_of(model: Any, dataset: DataSet, *key: Any) -> Cached:
    """Return the features of a data set, cached by model and by ``key``, on which they also depend."""
    key = (*key, type(model), model.head.channels, model.standardize, model.config["whiten"])
    if key not in _kept:
        while len(_kept) > 1:
            _kept.pop(next(iter(_kept)))
        trained = Features(model, Images(dataset.train, SIZE))
        if model.standardize:
            trained.standardize()
        images = Images(dataset.test, SIZE)
        _kept[key] = Cached(trained, Features(model, images), Truth.of(images))
    return _kept[key]


def fit(model: Any, features: Features, recipe: Any) -> float:
    """Train as :func:`msflow_ext.training.train`, without a run folder, and return the mean loss of the last epoch."""
    head, adam, losses = model.head.train(), make_optimizer(model.head, recipe.weight_decay), []
    clip = recipe.clip or float("inf")
    for epoch in range(recipe.epochs):
        adam.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        chunks = recipe.order(epoch, len(features)).split(recipe.batch_size)
        losses = []
        for batch in recipe.disturbed(epoch, (features[chunk] for chunk in chunks)):
            loss = head.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), clip)
            adam.step()
            adam.zero_grad()
            losses.append(loss.item() / sum(x[0].numel() for x in batch))
    head.eval()
    return round(mean(losses), 4)


@torch.no_grad()
def scores(model: Any, cached: Cached) -> dict[str, list[float]]:
    """Return image AUROC and, with masks, pixel AUROC and AUPRO of every score."""
    normal, maps = (_likelihoods(model, each) for each in (cached.trained, cached.tested))
    truth = cached.truth
    found: dict[str, list[float]] = {}
    if isinstance(model, FastFlow):
        means = _in_batches(maps, lambda part: ops.mean_aggregate(part, SIZE))
        found["paper"] = judge(truth, *(_joined(means, n) for n in ("score", "anomaly_map")))
    for top_k in (0.01, 0.1, 0.03):
        parts = _in_batches(maps, partial(ops.aggregate, size=SIZE, top_k=top_k))
        for score in ("log", "nll"):
            found[f"{score} {top_k:.0%}"] = judge(truth, _joined(parts, f"{score}_score"))
    nll, additive = _joined(parts, "nll_score"), _joined(parts, "anomaly_map")
    found["additive"] = judge(truth, nll, additive)
    found["additive score"] = judge(truth, top_k_mean(additive))
    found["multiplicative"] = judge(truth, nll, _joined(parts, "image_map"))
    for how, smoothing in (
        ("clamped", 0.0),
        ("smoothed", PRESETS["robust"]["msflow"].model["smoothing"]),
    ):
        clamped = ClampedMap(len(maps), smoothing)
        clamped.fit([normal])
        whole = torch.cat(_in_batches(maps, partial(clamped, size=SIZE)))
        found[how] = judge(truth, nll, whole)
        found[f"{how} score"] = judge(truth, top_k_mean(whole))
        found[f"{how} score 1%"] = judge(truth, top_k_mean(whole, 0.01))
    return found


def top_k_mean(maps: Tensor, share: float = 0.03) -> Tensor:
    """Return the mean of the largest share of each map; 3% of the multiplicative map gives the paper's score."""
    return maps.flatten(1).topk(int(share * SIZE**2)).values.mean(1)


def baseline(name: str, cached: Cached) -> list[float]:
    """Return the results of a Gaussian per position, or of the distance to the nearest training feature there."""
    trained, tested = cached.trained, cached.tested
    if name == "Gaussian":
        padim = Padim().fit(trained.batches(BATCH))
        parts = [padim.predict(batch, SIZE) for batch in tested.batches(BATCH)]
    else:
        seen = _embedded(next(trained.batches(len(trained))))
        parts = []
        for batch in tested.batches(BATCH):
            near = torch.cdist(_embedded(batch), seen).amin(2).T
            near = near.reshape(-1, 1, *batch[0].shape[2:])
            maps = F.interpolate(near, (SIZE, SIZE), mode="bilinear")[:, 0]
            parts.append(PadimPrediction(maps.amax((1, 2)), maps))
    return judge(cached.truth, *(_joined(parts, part) for part in ("score", "anomaly_map")))


def judge(truth: Truth, score: Tensor, maps: Tensor | None = None) -> list[float]:
    assert truth.labels is not None
    found = [metrics.auroc(truth.labels, score.numpy())]
    if truth.masks is not None and maps is not None:
        judges = (metrics.auroc, metrics.aupro)
        found += [measure(truth.masks, maps.numpy()) for measure in judges]
    return [round(float(value), 5) for value in found]


def _likelihoods(model: Any, features: Features) -> list[Tensor]:
    parts = [model.head.log_likelihood(batch) for batch in features.batches(BATCH)]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def _in_batches(maps: Sequence[Tensor], function: Callable[[list[Tensor]], Any]) -> list[Any]:
    return [function(list(part)) for part in zip(*(m.split(BATCH) for m in maps), strict=True)]


def _joined(parts: Sequence[Any], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])


def _embedded(features: Sequence[Tensor]) -> Tensor:
    """Return all scales on the finest grid, ``(H * W, N, C)``."""
    grid = features[0].shape[2:]
    whole = torch.cat([F.interpolate(x, grid, mode="bilinear") for x in features], 1)
    return whole.flatten(2).permute(2, 0, 1)


def _cell(found: Sequence[Row], data: str, how: Sequence[str], i: int) -> str:
    values = [
        row["scores"][way][i]
        for row in found
        if row["data"] == data
        for way in [next((way for way in how if way in row["scores"]), "")]
        if len(row["scores"].get(way, ())) > i
    ]
    if not values:
        return "-"
    spread = f" +- {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread} ({len(values)})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
