"""Flags that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msflow_ext.choices import ENGINES, PRECISIONS
from msflow_ext.data import LAYOUTS, PACKAGED
from msflow_ext.distributed.executors import Engine, on_ray, one_by_one
from msflow_ext.training.recipe import PRESETS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DATA_HELP = f"{' or '.join(PACKAGED)} (packages), or a folder"


def add_model(part: ArgumentParser) -> None:
    models, presets = tuple(PRESETS["paper"]), tuple(PRESETS)
    part.add_argument("--model", choices=models, default="msflow", help="what to train")
    part.add_argument(
        "--preset",
        choices=presets,
        default="paper",
        help="as in its paper, or as was better and steadier on average",
    )


def add_data(part: ArgumentParser) -> None:
    part.add_argument("--data", type=str | None, help=DATA_HELP)
    add_layout(part)


def add_layout(part: ArgumentParser) -> None:
    part.add_argument("--layout", type=str | None, help=f"of a folder: {' or '.join(LAYOUTS)}")
    part.add_argument(
        "--category",
        type=str | None,
        help="mono, brick, bottle, ...; train, data check: also several (a,b); they and evaluate: all",
    )
    part.add_argument("--split-seed", type=int, default=0, help="where the set has no fixed split")
    for name in ("normal", "abnormal", "masks"):
        part.add_argument(
            f"--{name}", type=str | None, help=f"folder of {name}, with layout folder"
        )
    part.add_argument(
        "--csv", type=str | None, help="list of path, label, mask, split, with layout folder"
    )


def add_run(part: ArgumentParser) -> None:
    part.add_argument("--run", required=True, help="run folder, or a checkpoint file")


def add_false_alarms(part: ArgumentParser) -> None:
    part.add_argument(
        "--false-alarms",
        type=float | None,
        help="share of normal images that may exceed the thresholds (default: the run's)",
    )


def add_out(part: ArgumentParser, text: str) -> None:
    part.add_argument("--out", required=True, help=text)


def add_device(part: ArgumentParser) -> None:
    part.add_argument(
        "--device", type=str | None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )


def add_precision(part: ArgumentParser) -> None:
    part.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the prepacked form (default: the model as it trained)",
    )


def add_threads(part: ArgumentParser) -> None:
    part.add_argument("--threads", type=int | None, help="CPU threads of torch")


def add_again(part: ArgumentParser) -> None:
    part.add_argument("--resume", action="store_true", help="continue the run in the folder")
    part.add_argument("--overwrite", action="store_true", help="remove the run in the folder")


def add_engine(part: ArgumentParser, *, default: str | None, text: str) -> None:
    part.add_argument("--engine", choices=ENGINES, default=default, help=text)
    part.add_argument(
        "--address",
        type=str | None,
        help="of a Ray cluster, HOST:PORT or auto (default: a Ray of its own on this machine)",
    )
    part.add_argument("--tasks-at-once", type=int | None, help="Ray: at most (default: what fits)")
    part.add_argument("--cpus-per-task", type=int, default=1, help="Ray: for each, and its threads")
    part.add_argument("--gpus-per-task", type=float, default=0.0, help="Ray: also a part, as 0.5")


def chosen_engine(options: Any) -> Engine:
    """The engine that flags ask for; ValueError if flags of Ray stand beside another one."""
    if options.engine == "ray":
        return on_ray(
            options.address,
            at_once=options.tasks_at_once,
            cpus=options.cpus_per_task,
            gpus=options.gpus_per_task,
        )
    for name in ("address", "tasks_at_once"):
        if options[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --engine ray")
    return one_by_one


def device_of(options: Any) -> str | None:
    """The device that a task computes on: with Ray the CPU, unless it keeps a GPU for itself."""
    if options.engine != "ray":
        return options.device
    device = options.device or ("cuda" if options.gpus_per_task else "cpu")
    if device.startswith("cuda") and not options.gpus_per_task:
        raise ValueError(f"--device {device} with --engine ray needs --gpus-per-task")
    return device
