"""The commands ``train`` and ``demo``, and their flags."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.cli.console import conclude, print_table, rows_of
from msflow_ext.cli.data import DATA, categories, open_data
from msflow_ext.cli.flags import (
    add_again,
    add_data,
    add_device,
    add_engine,
    add_model,
    add_out,
    add_threads,
    chosen_engine,
    device_of,
)
from msflow_ext.data import FITS
from msflow_ext.distributed import ranks as distributed
from msflow_ext.distributed.launch import processes_to_start
from msflow_ext.errors import FAILURES
from msflow_ext.features import CACHES
from msflow_ext.flows import MEMORY
from msflow_ext.models.base import PRECISIONS
from msflow_ext.training.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from msflow_ext.data import DataSet
    from msflow_ext.training import sweep as series

DEMO = (
    ("--data", "elpv", "--category", "mono", "--epochs", "24"),
    ("--data", "textures", "--category", "brick", "--epochs", "40"),
)


def demo(options: Any) -> int:
    """Train a model on solar cells (ELPV mono) and on brick, beside a Gaussian baseline."""
    rows = []
    for arguments in DEMO:
        out = Path(options.out) / "-".join(arguments[1:4:2])
        command = [*arguments, "--backbone", "efficientnet_lite0", "--image-size", "192"]
        command += ["--model", options.model, "--preset", options.preset]
        command += ["--baseline", "--out", str(out)]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += [f"--{flag}" for flag in ("resume", "overwrite") if options[flag]]
        rows += rows_of(_train(_parsed(command)))
    print_table(rows)
    return 0


def train(options: Any) -> int:
    """Train a model on good images, test it, and write a run folder, or one for each category and seed."""
    from msflow_ext.training import sweep as series

    ranks = distributed.join(options.device)
    if not ranks.first:
        logging.getLogger("msflow_ext").setLevel(logging.CRITICAL)
    out, engine, chosen = Path(options.out), chosen_engine(options), options.clone()
    with ranks.agreed():
        trials = _trials(options)
        if not (options.resume or options.overwrite):
            series.refuse_old(trials)
        if not trials and options.engine != "local":
            several = "--category all or a,b, --seeds or --split-seeds"
            raise ValueError(f"--engine {options.engine} is for several trainings: {several}")
    if not trials:
        rows = rows_of(_train(options))
        if ranks.first:
            print_table(rows)
        return 0
    if options.engine != "local":  # a training whose worker dies goes on from its checkpoint
        chosen.resume, chosen.device = not options.overwrite, device_of(options)
    work = partial(_train_trial, chosen)
    runs = series.do_all(trials, out, work, FAILURES, engine, write=ranks.first)
    with ranks.agreed():
        conclude(runs, out, show=ranks.first)
    return 0


def _parsed(arguments: list[str]) -> Any:
    """The options of ``train`` that these arguments give."""
    import jsonargparse

    part = jsonargparse.ArgumentParser(exit_on_error=False)
    train_flags(part)
    return part.parse_args(arguments)


def _trials(options: Any) -> list[series.Trial]:
    """The trainings that the options ask for; none if it is one, of which no table is made."""
    from msflow_ext.data import FIXED
    from msflow_ext.training import sweep as series

    chosen = categories(vars(options))
    if chosen == [options.category] and not (options.seeds or options.split_seeds):
        return []
    split_seeds = options.split_seeds or [options.split_seed]
    if len(split_seeds) > 1 and options.layout in FIXED:
        raise ValueError(f"--split-seeds: layout {options.layout} says itself what is tested")
    seeds = options.seeds or [options.seed]
    return series.plan(Path(options.out), chosen, split_seeds, seeds)


def _train_trial(options: Any, trial: series.Trial) -> dict[str, Any]:
    """One training of a series."""
    chosen = options.clone()
    for name in ("category", "split_seed", "seed"):
        chosen[name] = getattr(trial, name)
    chosen.out = str(trial.folder)
    return _train(chosen)


def _train(options: Any) -> dict[str, Any]:
    """Train as the options say; what ``metrics.json`` holds."""
    import torch

    from msflow_ext.training import loop as training

    if options.threads:
        torch.set_num_threads(options.threads)
    ranks = distributed.join(options.device)
    with ranks.agreed():
        dataset = open_data(vars(options))
        model = _build(options, dataset)
    given = {name: options[name] for name in RECIPE if options[name] is not None}
    recipe = replace(PRESETS[options.preset][options.model].recipe, **given)
    metrics = training.train(
        model,
        dataset,
        options.out,
        recipe,
        device=options.device,
        settings={name: options[name] for name in SETTINGS},
        resume=options.resume,
        overwrite=options.overwrite,
        baseline=options.baseline,
        progress=True,
        ranks=ranks,
    )
    logging.getLogger(__name__).info("%s", Path(options.out) / "report.html")
    return metrics


def _build(options: Any, dataset: DataSet) -> Any:
    """The untrained model that the options ask for."""
    from msflow_ext.models.fastflow import FastFlow
    from msflow_ext.models.msflow import MSFlow

    kind: Any = {"msflow": MSFlow, "fastflow": FastFlow}[options.model]
    given = {name: options[name] for name in MODEL if options[name] is not None}
    if wrong := [name for name in given if name not in signature(kind).parameters]:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise ValueError(f"{flag} is not an option of --model {options.model}")
    size = options.image_size
    small = dataset.category == "transistor" or dataset.name == "mstc"
    if size is None and small and options.model == "msflow":
        size = 256  # as its authors train these
    return kind(
        options.backbone,
        image_size=size,
        pretrained=options.weights or True,
        seed=options.seed,
        **{**PRESETS[options.preset][options.model].model, **given},
    )


def devices_to_start(options: Any) -> int:
    names = ("devices", "num_nodes", "rendezvous", "device")
    return processes_to_start(**{name: options[name] for name in names})


RECIPE = (
    "epochs",
    "batch_size",
    "lr",
    "noise",
    "seed",
    "precision",
    "memory",
    "cache",
    "eval_every",
    "workers",
    "fit",
    "hold_out",
    "false_alarms",
)


MODEL = (  # arguments of a model; None: as the preset or the model has it
    *("out_indices", "blocks", "steps", "hidden_ratio", "conv3x3_only"),
    *("standardize", "whiten", "score", "anomaly_map", "smoothing"),
)


SETTINGS = (
    *(*DATA, *RECIPE, *MODEL),
    *("model", "preset", "backbone", "image_size", "weights", "baseline"),
)


def demo_flags(part: ArgumentParser) -> None:
    add_model(part)
    add_out(part, "folder for the two run folders")
    add_threads(part)
    add_again(part)


def train_flags(part: ArgumentParser) -> None:
    part.add_argument("--config", action="config", help="YAML file of any of these flags")
    add_data(part)
    part.add_argument(
        "--split-seeds", type=int, nargs="+", help="train on each of these splits, make a table"
    )
    part.add_argument("--seeds", type=int, nargs="+", help="train with each seed, make a table")
    add_model(part)
    part.add_argument(
        "--backbone",
        default="wide_resnet50_2",
        help="timm network, or efficientnet_lite0, whose weights a pip package holds",
    )
    part.add_argument("--weights", type=str | None, help="file of backbone weights")
    part.add_argument(
        "--image-size",
        type=int | None,
        help="side of the square input in pixels (default: the backbone's preset)",
    )
    part.add_argument(
        "--fit",
        choices=FITS,
        default=Recipe.fit,
        help="how images become square: resized, or padded so that they keep their aspect",
    )
    part.add_argument("--out-indices", type=int, nargs="+", help="maps of the backbone to read")
    part.add_argument("--blocks", type=int, nargs="+", help="steps of each flow of MSFlow")
    for name, kind, text in (
        ("--steps", int | None, "of every flow of FastFlow"),
        (
            "--hidden-ratio",
            float | None,
            "hidden channels of FastFlow's subnets, of those they see",
        ),
        ("--conv3x3-only", bool | None, "true: FastFlow's subnets convolve 3x3 in every step"),
        (
            "--standardize",
            bool | None,
            "true: each channel by its statistics over the training set",
        ),
        (
            "--whiten",
            bool | None,
            "true: features by their covariances at every position, for parts that lie alike",
        ),
        ("--score", str | None, "of an image: paper, log, nll or map"),
        (
            "--anomaly-map",
            str | None,
            "paper, or clamped for no scale to outshout others",
        ),
        ("--smoothing", float | None, "pixels: of a Gaussian filter over the clamped map"),
        ("--epochs", int | None, "passes over the training images"),
        ("--batch-size", int | None, "images per step"),
        ("--lr", float | None, "learning rate between warm-up and decay"),
        ("--noise", float | None, "standard deviation of noise on the features in training"),
        ("--hold-out", float | None, "share of the training images that only set the thresholds"),
        ("--false-alarms", float | None, "share of normal images that may exceed the thresholds"),
    ):
        part.add_argument(name, type=kind, help=f"{text} (default: the preset's)")
    part.add_argument(
        "--seed", type=int, default=Recipe.seed, help="of initial weights and order of the images"
    )
    part.add_argument(
        "--precision", choices=PRECISIONS, default=Recipe.precision, help="of the flows"
    )
    part.add_argument(
        "--memory",
        choices=MEMORY,
        default=Recipe.memory,
        help="of training; reversible saves no activations, and takes longer",
    )
    part.add_argument(
        "--cache", choices=CACHES, default=Recipe.cache, help="where features are kept"
    )
    part.add_argument(
        "--eval-every", type=int | None, help="epochs between tests (default: a tenth)"
    )
    part.add_argument(
        "--workers", type=int, default=Recipe.workers, help="threads that decode images"
    )
    part.add_argument("--baseline", action="store_true", help="also fit a PaDiM-style Gaussian")
    add_device(part)
    for name, kind, text in (
        ("--devices", int | None, "processes here, one per GPU, or on the CPU (default: 1)"),
        ("--num-nodes", int | None, "machines that run this command (default: 1)"),
        ("--rendezvous", str | None, "HOST:PORT where several machines meet: on one of them"),
    ):
        part.add_argument(name, type=kind, help=text)
    add_threads(part)
    add_out(part, "run folder to write")
    add_again(part)
    add_engine(part, default="local", text="of several trainings: one by one, or at once on Ray")
