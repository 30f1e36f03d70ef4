"""Flags that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msflow_ext.choices import ENGINES, PRECISIONS
from msflow_ext.cli.parser import OneOf, count, number, whole
from msflow_ext.data import LAYOUTS, PACKAGED
from msflow_ext.training.recipe import PRESETS

if TYPE_CHECKING:
    from msflow_ext.distributed.executors import Engine

DATA_HELP = f"Folder of the data set, or {' or '.join(PACKAGED)} of the extra demo."


def add_choice(part: Any, flag: str, words: tuple[str, ...], text: str, **more: Any) -> None:
    """Add a flag whose value must be one of ``words``."""
    part.add_argument(flag, type=OneOf(words), choices=words, help=text, **more)


def add_model(part: Any) -> None:
    text = "Model to train."
    add_choice(part, "--model", tuple(PRESETS["paper"]), text, default="msflow")
    text = (
        "Hyper-parameters of the paper, or robust ones that scored higher on average on other data."
    )
    add_choice(part, "--preset", tuple(PRESETS), text, default="paper")


def add_data(part: Any) -> None:
    part.add_argument("--data", metavar="DIR", help=DATA_HELP)
    add_layout(part)


def add_layout(part: Any) -> None:
    add_choice(part, "--layout", LAYOUTS, "Layout of the data set's folder.")
    part.add_argument(
        "--category",
        metavar="NAME",
        help="Category of the data set, such as bottle. train and data check also accept a,b for "
        "several; train, data check and evaluate also accept all.",
    )
    part.add_argument(
        "--split-seed",
        type=whole,
        default=0,
        metavar="N",
        help="Seed that splits the good images into training and test images, if the data set has "
        "no fixed split.",
    )
    for name, text in (
        ("normal", "Folder of normal training images"),
        ("abnormal", "Folder of defective test images"),
        ("masks", "Folder of the masks of the defective images"),
    ):
        part.add_argument(f"--{name}", metavar="DIR", help=f"{text}, for --layout folder.")
    part.add_argument(
        "--csv",
        metavar="FILE",
        help="CSV file that lists images in the columns path, label, mask and split, for "
        "--layout folder.",
    )


def add_run(part: Any) -> None:
    part.add_argument(
        "--run", required=True, metavar="DIR", help="Run folder, or checkpoint file of the model."
    )


def add_false_alarms(part: Any) -> None:
    part.add_argument(
        "--false-alarms",
        type=number,
        metavar="SHARE",
        help="Share of normal images that may exceed the threshold; by default that of the run.",
    )


def add_out(part: Any, text: str, metavar: str = "DIR") -> None:
    part.add_argument("--out", required=True, metavar=metavar, help=text)


def add_device(part: Any) -> None:
    text = "Device to compute on: cpu, cuda, cuda:1, ...; by default a GPU if there is one."
    part.add_argument("--device", metavar="DEVICE", help=text)


def add_precision(part: Any) -> None:
    text = "Precision of the optimized model; by default the model is used as it was trained."
    add_choice(part, "--precision", PRECISIONS, text)


def add_threads(part: Any) -> None:
    part.add_argument(
        "--threads",
        type=count,
        metavar="THREADS",
        help="CPU threads that torch uses; by default torch chooses.",
    )


def add_again(part: Any) -> None:
    part.add_argument("--resume", action="store_true", help="Continue the run in --out.")
    part.add_argument("--overwrite", action="store_true", help="Replace the run in --out.")


def add_engine(part: Any, *, default: str | None, text: str) -> None:
    add_choice(part, "--engine", ENGINES, text, default=default)
    part.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Address of a Ray cluster, or auto; by default Ray is started on this machine.",
    )
    part.add_argument(
        "--tasks-at-once",
        type=count,
        metavar="N",
        help="Largest number of simultaneous tasks on Ray; by default as many as fit.",
    )
    part.add_argument(
        "--cpus-per-task",
        type=count,
        default=1,
        metavar="N",
        help="CPU cores, and threads, of each task on Ray.",
    )
    part.add_argument(
        "--gpus-per-task",
        type=number,
        default=0.0,
        metavar="N",
        help="GPUs of each task on Ray, which may be a fraction such as 0.5.",
    )


def chosen_engine(options: Any) -> Engine:
    """Return the engine that the flags choose.

    Raises:
        ValueError: if a flag of Ray is given for another engine.
    """
    from msflow_ext.distributed.executors import on_ray, one_by_one

    if options.engine == "ray":
        return on_ray(
            options.address,
            at_once=options.tasks_at_once,
            cpus=options.cpus_per_task,
            gpus=options.gpus_per_task,
        )
    for name in ("address", "tasks_at_once"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be given with --engine ray, got engine {options.engine}")
    return one_by_one


def device_of(options: Any) -> str | None:
    """Return the device that a task uses. On Ray it is the CPU unless the task reserves a GPU."""
    if options.engine != "ray":
        return options.device
    device = options.device or ("cuda" if options.gpus_per_task else "cpu")
    if device.startswith("cuda") and not options.gpus_per_task:
        raise ValueError(f"--device {device} with --engine ray needs --gpus-per-task")
    return device
