"""The flags of every command; each may also stand in a YAML file that ``--config`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msflow_ext.data import FITS, LAYOUTS, PACKAGED
from msflow_ext.features import CACHES
from msflow_ext.flows import MEMORY
from msflow_ext.recipe import PRECISIONS, PRESETS, Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from msflow_ext.data import DataSet

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
    *("standardize", "score", "anomaly_map", "position_base"),
)
SETTINGS = (
    *(*DATA, *RECIPE, *MODEL),
    *("model", "preset", "backbone", "image_size", "weights", "baseline"),
)
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
    _add_model(part)
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
    _add_model(part)
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
        ("--score", str | None, "of an image: paper, log or nll"),
        (
            "--anomaly-map",
            str | None,
            "paper, or clamped for no scale to outshout others",
        ),
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
    _add_out(part, "folder for scores.csv, maps/*.png and, of a run with thresholds, masks/*.png")
    _add_false_alarms(part)
    part.add_argument("--threshold", type=float | None, help="label by this score instead")
    part.add_argument("--score-only", action="store_true", help="write no maps")
    part.add_argument("--batch-size", type=int, default=8, help="images at a time")
    _add_device(part)


def _compare(part: ArgumentParser) -> None:
    part.add_argument("runs", nargs="+", help="run folders; differences are from the first")
    part.add_argument("--out", default="comparison.html", help="page to write")


def _convert(part: ArgumentParser) -> None:
    part.add_argument("source", help="run folder, .safetensors, or a checkpoint of another package")
    part.add_argument("--to", default="msflow_ext", help="or msflow, gathierry, anomalib")
    _add_out(part, "file to write, .safetensors for one of ours")
    part.add_argument("--backbone", type=str | None, help="of a file that does not name its own")
    part.add_argument("--weights", type=str | None, help="file of backbone weights")
    part.add_argument("--image-size", type=int | None, help="side of the square input in pixels")
    part.add_argument("--clamp", type=float | None, help="it was trained with (default: 1.9 or 2)")
    part.add_argument("--clamp-form", type=str | None, help="0.2 or head, by the version of FrEIA")


def _bench(part: ArgumentParser) -> None:
    _add_threads(part)
    part.add_argument("--seconds", type=float, default=20.0, help="of timing each comparison")
    part.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works")


def _data(part: ArgumentParser) -> None:
    import jsonargparse

    text = "report what a data set holds and what is wrong with it"
    check = jsonargparse.ArgumentParser(exit_on_error=False, description=text)
    check.add_argument("data", type=str | None, nargs="?", help=_DATA)
    _add_layout(check)
    part.add_subcommands(dest="action").add_subcommand("check", check, help=text)


def _add_model(part: ArgumentParser) -> None:
    models, presets = tuple(PRESETS["paper"]), tuple(PRESETS)
    part.add_argument("--model", choices=models, default="msflow", help="what to train")
    part.add_argument(
        "--preset",
        choices=presets,
        default="paper",
        help="as in its paper, or as was better and steadier on average",
    )


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
    "compare": _compare,
    "convert": _convert,
    "bench": _bench,
}
