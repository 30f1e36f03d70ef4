"""The command ``msflow``: info, demo, data, train, evaluate, predict, convert."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.options import DATA, MODEL, RECIPE, SETTINGS, parser
from msflow_ext.recipe import PRESETS

if TYPE_CHECKING:
    from msflow_ext.data import DataSet
    from msflow_ext.inference import Result

DEMO = (
    ("--data", "elpv", "--category", "mono", "--epochs", "24"),
    ("--data", "textures", "--category", "brick", "--epochs", "40"),
)
FAILURES = (
    ArgumentError,
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if a kernel is wrong, 2 after an error.

    An error is one sentence on stderr; ``--debug`` or ``MSFLOW_DEBUG=1`` shows where it arose.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("MSFLOW_DEBUG"))
    try:
        parsed = parser(COMMANDS).parse_args([each for each in arguments if each != "--debug"])
        _log_to_stderr()
        return COMMANDS[parsed.command](parsed[parsed.command])
    except KeyboardInterrupt:
        message = "interrupted; what was written is kept"
    except FAILURES as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
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
        rows += _train(parser(COMMANDS).parse_args(command).train)
    _print_table(rows)
    return 0


def data(options: Any) -> int:
    """Look at a data set before training on it: data check."""
    from msflow_ext.data import check_dataset, list_categories

    chosen, faults = vars(options[options.action]), 0
    names = [chosen["category"]]
    if chosen["data"] and names == [None]:
        names = list_categories(chosen["data"], chosen["layout"]) or names
    for name in names:
        report = check_dataset(_open_dataset({**chosen, "category": name}, strict=False))
        print(report)
        faults += len(report.faults)
    return 2 if faults else 0


def train(options: Any) -> int:
    """Train a model on good images, test it, and write a run folder."""
    _print_table(_train(options))
    return 0


def evaluate(options: Any) -> int:
    """Test a trained model on labelled images: those of its own run, or others."""
    from msflow_ext import evaluation
    from msflow_ext.checkpoint import write_text
    from msflow_ext.data import Images
    from msflow_ext.features import Features
    from msflow_ext.inference import load
    from msflow_ext.report import write_scores

    out = _not_a_run(options.out) if options.out else None
    model = load(options.run, options.device).model
    own = not (options.data or options.normal)
    dataset = _open_dataset(_settings(Path(options.run)) if own else vars(options))
    if not dataset.test:
        raise ValueError(f"{dataset.name} {dataset.category} has no images to test on")
    images = Images(dataset.test, model.image_size)
    truth = evaluation.Truth.of(images)
    features = Features(model, images, progress="features")
    found = evaluation.evaluate(model.predict_features, features, truth)
    _print_table([(f"{dataset.name} {dataset.category}", type(model).__name__, found.metrics)])
    if out:
        items = zip(images.items, found.scores.tolist(), strict=True)
        write_scores(out / "scores.csv", ((i.name, i.defect, i.label, s) for i, s in items))
        write_text(out / "evaluation.json", json.dumps(found.metrics, indent=1))
    return 0


def predict(options: Any) -> int:
    """Score images: files, or folders with all that is in them."""
    from tqdm import tqdm

    from msflow_ext.inference import load
    from msflow_ext.report import write_scores

    out = _not_a_run(options.out)
    detector = load(options.run, options.device)
    rows: list[tuple[str, str, int | None, float]] = []

    def noted() -> Iterator[Result]:
        found = detector.stream(options.paths, batch_size=options.batch_size)
        for result in tqdm(found, unit="image", disable=None):
            rows.append((result.name, "", result.label, result.score))
            yield result

    try:
        if options.score_only:
            deque(noted(), maxlen=0)
        else:
            _draw(out, noted(), detector.colours)
    finally:
        if rows:
            write_scores(out / "scores.csv", rows)
    print(f"{len(rows)} images: {out / 'scores.csv'}")
    return 0


def convert(options: Any) -> int:
    """Make a checkpoint of another package one of ours, or ours one of theirs."""
    from msflow_ext.convert import convert as write

    names = {"backbone": "backbone", "weights": "pretrained", "image_size": "image_size"}
    names |= {"clamp": "clamp", "clamp_form": "clamp_form"}
    given = {name: options[flag] for flag, name in names.items() if options[flag] is not None}
    print(write(options.source, options.out, options.to, **given))
    return 0


COMMANDS: dict[str, Callable[[Any], int]] = {
    command.__name__: command for command in (info, demo, data, train, evaluate, predict, convert)
}


def _train(options: Any) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Train as the options say; the rows of the table of results."""
    import torch

    from msflow_ext import training

    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = _open_dataset(vars(options))
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
    )
    logging.getLogger(__name__).info("%s", Path(options.out) / "report.html")
    title = f"{dataset.name} {dataset.category}"
    rows: list[tuple[str, str, Mapping[str, Any]]] = [(title, metrics["model"]["name"], metrics)]
    if metrics["baseline"]:
        rows.append((title, metrics["baseline"]["name"], metrics["baseline"]))
    return rows


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


def _open_dataset(options: Mapping[str, Any], *, strict: bool = True) -> DataSet:
    from msflow_ext.data import open_dataset

    given = {name: options[name] for name in DATA if name in options}
    return open_dataset(**given, strict=strict)


def _settings(run: Path) -> dict[str, Any]:
    """What ``config.yaml`` of a run says."""
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there to name the run's data: give --data")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(settings, dict) or "data" not in settings:
        raise ValueError(f"{path} does not name the run's data: give --data")
    return settings


def _not_a_run(out: str) -> Path:
    """A folder to write to, in which no run is; else its scores and maps would be lost."""
    from msflow_ext.checkpoint import CHECKPOINT

    if (Path(out) / CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a run, choose another folder")
    return Path(out)


def _draw(out: Path, results: Iterator[Result], colours: Sequence[float] | None) -> None:
    """Write a heat map per result; one result is in memory at a time."""
    from msflow_ext.report import colour_range, save_maps

    first = next(results)
    low, high = colours or colour_range([first.map])
    a, b, c, d = tee(chain([first], results), 4)
    columns = (r.name for r in a), (r.image for r in b), (r.map for r in c), (r.mask for r in d)
    save_maps(out, *columns, low=low, high=high)


def _print_table(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    from msflow_ext.evaluation import RESULTS

    print(f"{'':20}{'':24}" + "".join(f"{name:>14}" for name in RESULTS.values()))
    for title, method, metrics in rows:
        values = [metrics[key] for key in RESULTS]
        cells = (f"{'-':>14}" if v is None else f"{100 * v:>12.1f} %" for v in values)
        print(f"{title:20}{method:24}" + "".join(cells))


def _log_to_stderr() -> None:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)  # above a bar, if there is one

    logger = logging.getLogger("msflow_ext")
    logger.handlers, logger.propagate = [Lines()], False
    logger.setLevel(logging.INFO)
