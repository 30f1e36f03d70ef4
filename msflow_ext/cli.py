"""The command ``msflow``: info, demo, data, train, evaluate, predict, serve, export, compare, convert, bench."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext import distributed
from msflow_ext.distributed import ProcessFailed
from msflow_ext.evaluating import evaluate
from msflow_ext.launching import launch, processes_to_start
from msflow_ext.options import open_data, parser
from msflow_ext.options.training import MODEL, RECIPE, SETTINGS
from msflow_ext.printing import FAILURES, print_table, rows_of, sentence
from msflow_ext.recipe import PRESETS
from msflow_ext.using import export, predict, serve

if TYPE_CHECKING:
    from msflow_ext import series
    from msflow_ext.data import DataSet

DEMO = (
    ("--data", "elpv", "--category", "mono", "--epochs", "24"),
    ("--data", "textures", "--category", "brick", "--epochs", "40"),
)
SILENCE = 2.0  # seconds in which the process that failed has said why


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if a kernel is wrong, 2 after an error.

    An error is one sentence on stderr; ``--debug`` or ``MSFLOW_DEBUG=1`` shows where it arose.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("MSFLOW_DEBUG"))
    try:
        parsed = parser(COMMANDS).parse_args([each for each in arguments if each != "--debug"])
        _log_to_stderr()
        options = parsed[parsed.command]
        if parsed.command == "train" and (devices := _processes_to_start(options)):
            return launch(arguments, devices, options.num_nodes, options.rendezvous)
        return COMMANDS[parsed.command](options)
    except KeyboardInterrupt:
        if distributed.local_rank():
            return 2
        message = "interrupted; what was written is kept"
    except FAILURES as error:
        if debug:
            raise
        if isinstance(error, ProcessFailed) and (error.here or distributed.local_rank()):
            # Another one says so, before all are ended with the first that ends.
            time.sleep(SILENCE)
            return 2
        message = sentence(error)
    print(f"msflow: error: {message}", file=sys.stderr)
    return 2


def info(options: Any) -> int:
    """Say what is installed, and which backend each op takes and why."""
    import msflow_ext

    print(json.dumps(msflow_ext.info(), indent=2))
    if not options.check:
        return 0
    rows = msflow_ext.testing.check()
    wrong = [row for row in rows if not row[1] <= row[2]]
    for case, error, bound in wrong:
        print(f"WRONG {case}: relative error {error:.1e}, {bound:.1e} is granted")
    print(f"{len(rows) - len(wrong)} of {len(rows)} kernel runs agree with their reference")
    return 1 if wrong else 0


def demo(options: Any) -> int:
    """Train a model on solar cells (ELPV mono) and on brick, beside a Gaussian baseline."""
    rows = []
    for arguments in DEMO:
        out = Path(options.out) / "-".join(arguments[1:4:2])
        command = ["train", *arguments, "--backbone", "efficientnet_lite0", "--image-size", "192"]
        command += ["--model", options.model, "--preset", options.preset]
        command += ["--baseline", "--out", str(out)]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += [f"--{flag}" for flag in ("resume", "overwrite") if options[flag]]
        rows += rows_of(_train(parser(COMMANDS).parse_args(command).train))
    print_table(rows)
    return 0


def data(options: Any) -> int:
    """Look at a data set before training on it: data check."""
    from msflow_ext.data import check_dataset

    chosen, faults = vars(options[options.action]), 0
    every = chosen["data"] and chosen["category"] is None
    for name in _categories({**chosen, "category": "all"} if every else chosen):
        report = check_dataset(open_data({**chosen, "category": name}, strict=False))
        print(report)
        faults += len(report.faults)
    return 2 if faults else 0


def train(options: Any) -> int:
    """Train a model on good images, test it, and write a run folder, or one for each category and seed."""
    from msflow_ext import engines, series

    ranks = distributed.join(options.device)
    if not ranks.first:
        logging.getLogger("msflow_ext").setLevel(logging.CRITICAL)
    out, engine, chosen = Path(options.out), engines.chosen(options), options.clone()
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
        chosen.resume, chosen.device = not options.overwrite, engines.device_of(options)
    work = partial(_train_trial, chosen)
    runs = series.do_all(trials, out, work, FAILURES, engine, write=ranks.first)
    with ranks.agreed():
        series.conclude(runs, out, show=ranks.first)
    return 0


def compare(options: Any) -> int:
    """Compare finished runs on the same test images: metrics, settings, images they disagree on."""
    from msflow_ext import comparison
    from msflow_ext.tested_runs import read_runs

    runs = read_runs(options.runs)
    comparison.write_comparison(options.out, runs)
    print("\n".join((*comparison.lines(runs), "", options.out)))
    return 0


def convert(options: Any) -> int:
    """Make a checkpoint of another package one of ours, or ours one of theirs."""
    from msflow_ext.convert import convert as write

    names = {"backbone": "backbone", "weights": "pretrained", "image_size": "image_size"}
    names |= {"clamp": "clamp", "clamp_form": "clamp_form"}
    given = {name: options[flag] for flag, name in names.items() if options[flag] is not None}
    print(write(options.source, options.out, options.to, **given))
    return 0


def bench(options: Any) -> int:
    """Measure flows, pipeline and a training step against the alternatives on this machine."""
    from msflow_ext.bench import compare

    for line in compare(options.threads, seconds=options.seconds, tiny=options.tiny):
        print(line, flush=True)
    return 0


COMMANDS: dict[str, Callable[[Any], int]] = {
    command.__name__: command
    for command in (
        info,
        demo,
        data,
        train,
        evaluate,
        predict,
        serve,
        export,
        compare,
        convert,
        bench,
    )
}


def _trials(options: Any) -> list[series.Trial]:
    """The trainings that the options ask for; none if it is one, of which no table is made."""
    from msflow_ext import series
    from msflow_ext.data import FIXED

    categories = _categories(vars(options))
    if categories == [options.category] and not (options.seeds or options.split_seeds):
        return []
    split_seeds = options.split_seeds or [options.split_seed]
    if len(split_seeds) > 1 and options.layout in FIXED:
        raise ValueError(f"--split-seeds: layout {options.layout} says itself what is tested")
    seeds = options.seeds or [options.seed]
    return series.plan(Path(options.out), categories, split_seeds, seeds)


def _categories(options: Mapping[str, Any]) -> list[str | None]:
    """The categories that ``--category`` names: all, several with commas, one or None."""
    from msflow_ext.data import list_categories

    category = options["category"]
    if category == "all":
        return [*list_categories(options["data"], options["layout"])] or [None]
    return [*category.split(",")] if category else [None]


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

    from msflow_ext import training

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
    import msflow_ext

    kind: Any = {"msflow": msflow_ext.MSFlow, "fastflow": msflow_ext.FastFlow}[options.model]
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


def _processes_to_start(options: Any) -> int:
    names = ("devices", "num_nodes", "rendezvous", "device")
    return processes_to_start(**{name: options[name] for name in names})


def _log_to_stderr() -> None:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)  # above a bar, if there is one

    logger = logging.getLogger("msflow_ext")
    logger.handlers, logger.propagate = [Lines()], False
    logger.setLevel(logging.INFO)
