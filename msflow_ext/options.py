"""The flags of every command; each may also stand in a YAML file that ``--config`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msflow_ext.data import FITS, LAYOUTS, PACKAGED
from msflow_ext.features import CACHES
from msflow_ext.recipe import PRECISIONS, Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from msflow_ext.data import DataSet

DATA = ("data", "layout", "category", "split_seed", "normal", "abnormal", "masks", "csv")
RECIPE = (
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "precision",
    "cache",
    "eval_every",
    "workers",
    "fit",
    "hold_out",
    "false_alarms",
)
SETTINGS = (*DATA, *RECIPE, "model", "backbone", "image_size", "weights", "baseline")
_DATA = f"{' or '.join(PACKAGED)} (packages), or a folder"


def parser(commands: Mapping[str, Callable[[Any], int]]) -> ArgumentParser:
    """The parser of ``msflow``; a command's docstring is its help."""
    import jsonargparse

    whole = jsonargparse.ArgumentParser(
        prog="msflow",
        exit_on_error=False,
        description="Anomaly detection with normalizing flows. --debug shows where an error arose.",
    )
    subcommands = whole.add_subcommands(dest="command")
    for name, command in commands.items():
        part = jsonargparse.ArgumentParser(exit_on_error=False, description=command.__doc__)
        subcommands.add_subcommand(name, part, help=command.__doc__)
        _FLAGS[name](part)
    return whole


def open_data(options: Mapping[str, Any], *, strict: bool = True) -> DataSet:
    """The data set that the options name; ``strict`` as :func:`msflow_ext.data.open_dataset` has it."""
    from msflow_ext.data import open_dataset

    given = {name: options[name] for name in DATA if name in options}
    return open_dataset(**given, strict=strict)


def _info(part: ArgumentParser) -> None:
    part.add_argument("--check", action="store_true", help="run every kernel against its reference")


def _demo(part: ArgumentParser) -> None:
    _add_out(part, "folder for the two run folders")
    _add_threads(part)
    _add_again(part)


def _train(part: ArgumentParser) -> None:
    part.add_argument("--config", action="config", help="YAML file of any of these flags")
    _add_data(part)
    part.add_argument(
        "--split-seeds", type=int, nargs="+", help="train on each of these splits, make a table"
    )
    part.add_argument("--seeds", type=int, nargs="+", help="train with each seed, make a table")
    part.add_argument("--model", choices=("msflow",), default="msflow", help="what to train")
    part.add_argument(
        "--backbone",
        default="wide_resnet50_2",
        help="timm CNN, or efficientnet_lite0, whose weights a pip package holds",
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
    for name, kind, text in (
        ("--epochs", int, "passes over the training images"),
        ("--batch-size", int, "images per step"),
        ("--lr", float, "learning rate between warm-up and decay"),
        ("--seed", int, "of initial weights and order of the images"),
        ("--hold-out", float, "share of the training images that only set the thresholds"),
        ("--false-alarms", float, "share of normal images that may exceed the thresholds"),
    ):
        part.add_argument(
            name, type=kind, default=getattr(Recipe, name[2:].replace("-", "_")), help=text
        )
    part.add_argument(
        "--precision", choices=PRECISIONS, default=Recipe.precision, help="of the flows"
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
    _add_device(part)
    _add_threads(part)
    _add_out(part, "run folder to write")
    _add_again(part)


def _evaluate(part: ArgumentParser) -> None:
    _add_run(part)
    _add_data(part)
    _add_device(part)
    _add_false_alarms(part)
    part.add_argument(
        "--tune-thresholds",
        action="store_true",
        help="also find the thresholds of the largest F1 on these very images",
    )
    part.add_argument("--out", type=str | None, help="folder for scores.csv and evaluation.json")


def _predict(part: ArgumentParser) -> None:
    _add_run(part)
    part.add_argument("paths", nargs="+", help="images, and folders with all that is in them")
    _add_out(part, "folder for scores.csv and maps/*.png")
    _add_false_alarms(part)
    part.add_argument("--threshold", type=float | None, help="label by this score instead")
    part.add_argument("--score-only", action="store_true", help="write no maps")
    part.add_argument("--batch-size", type=int, default=8, help="images at a time")
    _add_device(part)


def _data(part: ArgumentParser) -> None:
    import jsonargparse

    text = "report what a data set holds and what is wrong with it"
    check = jsonargparse.ArgumentParser(exit_on_error=False, description=text)
    check.add_argument("data", type=str | None, nargs="?", help=_DATA)
    _add_layout(check)
    part.add_subcommands(dest="action").add_subcommand("check", check, help=text)


def _add_data(part: ArgumentParser) -> None:
    part.add_argument("--data", type=str | None, help=_DATA)
    _add_layout(part)


def _add_layout(part: ArgumentParser) -> None:
    part.add_argument("--layout", type=str | None, help=f"of a folder: {' or '.join(LAYOUTS)}")
    part.add_argument(
        "--category",
        type=str | None,
        help="mono, brick, bottle, ...; train: also several (a,b), or all",
    )
    part.add_argument("--split-seed", type=int, default=0, help="where the set has no fixed split")
    for name in ("normal", "abnormal", "masks"):
        part.add_argument(
            f"--{name}", type=str | None, help=f"folder of {name}, with layout folder"
        )
    part.add_argument(
        "--csv", type=str | None, help="list of path, label, mask, split, with layout folder"
    )


def _add_run(part: ArgumentParser) -> None:
    part.add_argument("--run", required=True, help="run folder, or a checkpoint file")


def _add_false_alarms(part: ArgumentParser) -> None:
    part.add_argument(
        "--false-alarms",
        type=float | None,
        help="share of normal images that may exceed the thresholds (default: the run's)",
    )


def _add_out(part: ArgumentParser, text: str) -> None:
    part.add_argument("--out", required=True, help=text)


def _add_device(part: ArgumentParser) -> None:
    part.add_argument(
        "--device", type=str | None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )


def _add_threads(part: ArgumentParser) -> None:
    part.add_argument("--threads", type=int | None, help="CPU threads of torch")


def _add_again(part: ArgumentParser) -> None:
    part.add_argument("--resume", action="store_true", help="continue the run in the folder")
    part.add_argument("--overwrite", action="store_true", help="remove the run in the folder")


_FLAGS: dict[str, Callable[[ArgumentParser], None]] = {
    "info": _info,
    "data": _data,
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
}
