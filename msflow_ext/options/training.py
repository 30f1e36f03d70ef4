"""The flags of the commands that train: train and demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msflow_ext.data import FITS
from msflow_ext.features import CACHES
from msflow_ext.flows import MEMORY
from msflow_ext.options.shared import (
    add_again,
    add_data,
    add_device,
    add_engine,
    add_model,
    add_out,
    add_threads,
)
from msflow_ext.recipe import PRECISIONS, Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DATA = ("data", "layout", "category", "split_seed", "normal", "abnormal", "masks", "csv")
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
    *("standardize", "whiten", "score", "anomaly_map", "smoothing", "position_base"),
)
SETTINGS = (
    *(*DATA, *RECIPE, *MODEL),
    *("model", "preset", "backbone", "image_size", "weights", "baseline"),
)


def demo(part: ArgumentParser) -> None:
    add_model(part)
    add_out(part, "folder for the two run folders")
    add_threads(part)
    add_again(part)


def train(part: ArgumentParser) -> None:
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
        "--position-base",
        action="store_true",
        help="fit a Gaussian at every position behind the flow: for parts that always lie alike",
    )
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
