"""The commands ``train`` and ``demo``, and their flags."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import ENGINES
from msflow_ext.cli.config import Config, with_whole_paths
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
from msflow_ext.cli.hyperparameters import (
    MODELS,
    RECIPE,
    all_model_parameters,
    given,
    model_parameters,
    parameters,
)
from msflow_ext.cli.parser import Parser, count, whole
from msflow_ext.errors import FAILURES
from msflow_ext.files import locked
from msflow_ext.training.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from msflow_ext.data import DataSet
    from msflow_ext.training import sweep

DEMO = (
    ("--data", "elpv", "--category", "mono", "--epochs", "24"),
    ("--data", "textures", "--category", "brick", "--epochs", "40"),
)


def demo(options: Any) -> int:
    """Train a model and a Gaussian baseline on solar cells (ELPV mono) and on brick textures."""
    from msflow_ext.cli.console import print_table, rows_of

    rows = []
    for arguments in DEMO:
        out = Path(options.out) / "-".join(arguments[1:4:2])
        command = [*arguments, "--backbone", "efficientnet_lite0", "--image-size", "192"]
        command += ["--model", options.model, "--preset", options.preset]
        command += ["--baseline", "--out", str(out)]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += [f"--{flag}" for flag in ("resume", "overwrite") if getattr(options, flag)]
        rows += rows_of(_train(_parsed(command)))
    print_table(rows)
    return 0


def train(options: Any) -> int:
    """Train a model on good images, test it, and write a run folder for each category and seed."""
    from msflow_ext.cli.console import conclude, print_decisions, print_table, rows_of
    from msflow_ext.distributed.ranks import join
    from msflow_ext.training import sweep

    if options.print_config:
        print(_yaml(_settings(options)), end="")
        return 0
    ranks = join(options.device)
    if not ranks.first:
        logging.getLogger("msflow_ext").setLevel(logging.CRITICAL)
    out, engine, chosen = Path(options.out), chosen_engine(options), copy(options)
    with ranks.agreed():
        trials = _trials(options)
        if not (options.resume or options.overwrite):
            sweep.refuse_old(trials)
        if not trials and options.engine != "local":
            several = "--category all or a,b, --seeds or --split-seeds"
            raise ValueError(
                f"--engine must be local for a single training, got {options.engine}; "
                f"start several with {several}"
            )
    if not trials:
        metrics = _train(options)
        if ranks.first:
            print_table(rows_of(metrics))
            print_decisions(metrics)
        return 0
    if options.engine != "local":  # a training whose worker dies continues from its checkpoint
        chosen.resume, chosen.device = not options.overwrite, device_of(options)
    work = partial(_train_trial, chosen)
    with ExitStack() as stack:
        with ranks.agreed():
            if ranks.first and trials[0].folder != out:  # its training locks its folder
                stack.enter_context(locked(out))
        runs = sweep.do_all(trials, out, work, FAILURES, engine, write=ranks.first)
    with ranks.agreed():
        conclude(runs, out, show=ranks.first)
    return 0


def _parsed(arguments: list[str]) -> Any:
    """Return the options of ``train`` that these arguments give."""
    part = Parser("msflow train")
    train_flags(part)
    return part.parse(arguments)


def _trials(options: Any) -> list[sweep.Trial]:
    """Return the trainings of the series that the options ask for; none for a single training."""
    from msflow_ext.data import FIXED
    from msflow_ext.training import sweep

    chosen = categories(vars(options))
    if chosen == [options.category] and not (options.seeds or options.split_seeds):
        return []
    split_seeds = options.split_seeds or [options.split_seed]
    if len(split_seeds) > 1 and options.layout in FIXED:
        raise ValueError(
            f"--split-seeds must be one seed for layout {options.layout}, which has a fixed split, "
            f"got {len(split_seeds)}"
        )
    if min(split_seeds) < 0:
        raise ValueError(f"--split-seeds must be 0 or more, got {min(split_seeds)}")
    recipe = recipe_of(options)
    seeds = [replace(recipe, seed=seed).seed for seed in options.seeds or [recipe.seed]]
    return sweep.plan(Path(options.out), chosen, split_seeds, seeds)


def _train_trial(options: Any, trial: sweep.Trial) -> dict[str, Any]:
    """Train once, as a part of a series."""
    chosen = copy(options)
    for name in ("category", "split_seed", "seed"):
        setattr(chosen, name, getattr(trial, name))
    chosen.out = str(trial.folder)
    return _train(chosen)


def _train(options: Any) -> dict[str, Any]:
    """Train as the options say, and return what ``metrics.json`` holds."""
    import torch

    from msflow_ext.distributed.ranks import join
    from msflow_ext.training import loop

    if options.threads:
        torch.set_num_threads(options.threads)
    ranks = join(options.device)
    with ranks.agreed():
        recipe = recipe_of(options)
        dataset = open_data(vars(options))
        model = _build(options, dataset, recipe.seed)
    metrics = loop.train(
        model,
        dataset,
        options.out,
        recipe,
        device=options.device,
        settings=_settings(options),
        resume=options.resume,
        overwrite=options.overwrite,
        baseline=options.baseline,
        progress=True,
        ranks=ranks,
    )
    logging.getLogger(__name__).info("%s", Path(options.out) / "report.html")
    return {**metrics}


def recipe_of(options: Any) -> Recipe:
    """Return the recipe of the preset, with the values that the options give.

    Raises:
        ValueError: if a value is out of range.
    """
    preset = PRESETS[options.preset][options.model]
    return replace(preset.recipe, **given(options, parameters(*RECIPE)))


def model_arguments(options: Any) -> dict[str, Any]:
    """Return the arguments of the model in the preset, with the values that the options give.

    Raises:
        ValueError: if an option belongs to another model.
    """
    chosen = given(options, all_model_parameters())
    if wrong := [name for name in chosen if name not in model_parameters(options.model)]:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise ValueError(f"{flag} must not be given with --model {options.model}, which lacks it")
    return {**PRESETS[options.preset][options.model].model, **chosen}


def _build(options: Any, dataset: DataSet, seed: int) -> Any:
    """Build the untrained model that the options ask for."""
    from msflow_ext.models.fastflow import FastFlow
    from msflow_ext.models.msflow import MSFlow

    kind: Any = {"msflow": MSFlow, "fastflow": FastFlow}[options.model]
    arguments = model_arguments(options)
    small = dataset.category == "transistor" or dataset.name == "mstc"
    if small and options.model == "msflow":
        arguments.setdefault("image_size", 256)  # as published for these data
    return kind(pretrained=options.weights or True, seed=seed, **arguments)


def devices_to_start(options: Any) -> int:
    """Return the number of processes to start; 0 if this one trains."""
    from msflow_ext.distributed.launch import processes_to_start

    names = ("devices", "num_nodes", "rendezvous", "device")
    return processes_to_start(**{name: getattr(options, name) for name in names})


def _settings(options: Any) -> dict[str, Any]:
    """Return what ``config.yaml`` of a run holds, with absolute paths so that ``--config`` works anywhere."""
    names = (*DATA, *parameters(*RECIPE), *all_model_parameters())
    names += ("model", "preset", "weights", "baseline")
    given = {name: getattr(options, name) for name in names}
    return {**with_whole_paths(given, Path.cwd()), "seed": recipe_of(options).seed}


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False)


#: Groups of the help of ``train``, and those of the recipe's fields that are not in the group training.
GROUPS = ("data", "model", "training", "evaluation", "hardware", "many runs")
PLACES = {
    **dict.fromkeys(("cache", "memory", "precision", "workers"), "hardware"),
    **dict.fromkeys(("eval_every", "false_alarms", "hold_out"), "evaluation"),
    "fit": "data",
}
SHOWN = "Defaults are those of --preset paper; where both models have the flag, those of MSFlow."


def train_flags(part: Any) -> None:
    part.usage = "%(prog)s --data DIR --layout LAYOUT --out DIR [FLAG ...]"
    part.add_argument(
        "--config",
        action=Config,
        metavar="FILE",
        help="YAML file with values of flags, such as batch_size: 16. Flags after it replace its "
        "values. Relative paths start from the folder of FILE.",
    )
    text = "Print the given flags as YAML for --config, and exit."
    part.add_argument("--print-config", "--print_config", action="store_true", help=text)
    add_out(part, "Run folder to write, or the folder of several runs.")
    add_again(part)
    groups = {name: part.add_argument_group(name) for name in GROUPS}
    groups["model"].description = groups["training"].description = SHOWN
    add_data(groups["data"])
    for name, each in parameters(*RECIPE).items():
        each.add_to(groups[PLACES.get(name, "training")], default=each.default)
    _model_flags(groups["model"])
    text = "Also fit a Gaussian baseline, as in PaDiM, to the same features."
    groups["evaluation"].add_argument("--baseline", action="store_true", help=text)
    _hardware_flags(groups["hardware"])
    _series_flags(groups["many runs"])


def demo_flags(part: Any) -> None:
    add_out(part, "Folder to write the two run folders into.")
    add_model(part)
    add_threads(part)
    add_again(part)


def _model_flags(group: Any) -> None:
    add_model(group)
    text = "File of backbone weights; by default a package or the model hub provides them."
    group.add_argument("--weights", metavar="FILE", help=text)
    for name, each in all_model_parameters().items():
        having = [model for model in MODELS if name in model_parameters(model)]
        note = f"{MODELS[having[0]][0]} only." if len(having) == 1 else ""
        each.add_to(group, note, each.default)


def _hardware_flags(group: Any) -> None:
    add_device(group)
    for flag, kind, unit, text in (
        (
            "--devices",
            count,
            "N",
            "Processes to start on this machine, one per GPU, or on the CPU; by default 1.",
        ),
        ("--num-nodes", count, "N", "Number of machines that run this command; by default 1."),
        ("--rendezvous", str, "HOST:PORT", "Address on one of the machines that all can reach."),
    ):
        group.add_argument(flag, type=kind, metavar=unit, help=text)
    add_threads(group)


def _series_flags(group: Any) -> None:
    group.description = "With these flags or several categories, a table summarizes the runs."
    for flag, text in (
        ("--seeds", "Seeds to train with, one run for each."),
        ("--split-seeds", "Seeds of splits of the good images, one run for each."),
    ):
        group.add_argument(flag, type=whole, nargs="+", metavar="N", help=text)
    text = "Where several trainings run: one after another on this machine, or in parallel on Ray."
    add_engine(group, default=ENGINES[0], text=text)
