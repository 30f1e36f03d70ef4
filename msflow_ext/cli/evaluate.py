"""The command ``evaluate``: test a run, or every run of a folder, on labelled images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.cli.data import open_data, run_settings
from msflow_ext.cli.flags import add_data, add_device, add_false_alarms, add_precision, add_run
from msflow_ext.errors import FAILURES
from msflow_ext.files import locked, write_text

if TYPE_CHECKING:
    from msflow_ext.data import DataSet, Images
    from msflow_ext.evaluation.evaluator import Evaluation, Truth
    from msflow_ext.inference.detector import Detector
    from msflow_ext.training import sweep


def evaluate(options: Any) -> int:
    """Test a trained model on labelled images: those of its own run, or others; or all runs of a folder."""
    from msflow_ext.runs.folder import checked_out

    with locked(checked_out(options.out)) if options.out else nullcontext() as out:
        return _test_all(options, out) if options.category == "all" else _test_one(options, out)


def _test_one(options: Any, out: Path | None) -> int:
    """Test a run, and print what is found."""
    from msflow_ext.cli.console import print_table, rows_of

    print_table(rows_of(_test(options, out)))
    return 0


def _test_all(options: Any, out: Path | None) -> int:
    """Test all runs of a folder, and print a table."""
    from msflow_ext.cli.console import conclude
    from msflow_ext.runs.folder import checked_out
    from msflow_ext.training import sweep

    parent = Path(options.run)
    if not out or out.resolve() == parent.resolve():
        raise ValueError("--category all needs --out with another folder than that of the runs")

    def one(trial: sweep.Trial) -> Mapping[str, Any]:
        chosen = copy(options)
        chosen.run = str(trial.folder)
        chosen.category, chosen.split_seed = trial.category, trial.split_seed
        return _test(chosen, checked_out(out / trial.folder.relative_to(parent)))

    conclude(sweep.do_all(_trials(parent), out, one, FAILURES), out)
    return 0


def _trials(parent: Path) -> list[sweep.Trial]:
    """Return the finished trainings below a folder.

    Raises:
        ValueError: two are of one category and seeds, one of them is not finished.
        FileNotFoundError: there are none, or one does not say what it was trained on.
    """
    from msflow_ext.runs.checkpoint import CHECKPOINT
    from msflow_ext.runs.folder import METRICS
    from msflow_ext.training.sweep import Trial

    found: dict[tuple[Any, ...], Trial] = {}
    for folder in sorted(path.parent for path in parent.rglob(CHECKPOINT)):
        if not (folder / METRICS).exists():
            raise ValueError(f"{folder} is not a finished run: train it with --resume first")
        settings = run_settings(folder)
        split_seed, seed = (int(settings.get(name, 0)) for name in ("split_seed", "seed"))
        trial = Trial(settings.get("category"), split_seed, seed, folder)
        first = found.setdefault((trial.category, split_seed, seed), trial)
        if first is not trial:
            raise ValueError(
                f"{first.folder} and {folder} are of one category and seeds: a table has one run "
                "of each"
            )
    if not found:
        raise FileNotFoundError(f"{parent} holds no runs: msflow train --category all makes them")
    return list(found.values())


def _test(options: Any, out: Path | None) -> dict[str, Any]:
    """Test one run and write the results to ``out``. Return the metrics and what they were measured on."""
    from msflow_ext.data import Images
    from msflow_ext.evaluation import evaluator
    from msflow_ext.features import Features
    from msflow_ext.inference.detector import load
    from msflow_ext.inference.output import remove_earlier
    from msflow_ext.reports.results import score_rows
    from msflow_ext.runs.score_table import write_scores

    how = {"false_alarms": options.false_alarms, "precision": options.precision}
    detector = load(options.run, options.device, **how)
    model = detector.model
    own = not (options.data or options.normal)
    dataset = open_data(run_settings(Path(options.run)) if own else vars(options))
    _check_classes(dataset)
    images = Images(dataset.test, model.image_size)
    truth = evaluator.Truth.of(images)
    seen = Images(dataset.test, model.image_size, detector.fit)
    features = Features(model, seen, progress="features")
    found = evaluator.evaluate(model.predict_features, features, truth)
    written = {**found.metrics, **_decisions(detector, truth, images, found, options)}
    if out:
        remove_earlier(out)
        rows = score_rows(images.items, found, detector.threshold, detector.calibration)
        write_scores(out / "scores.csv", rows)
        write_text(out / "evaluation.json", json.dumps(written, indent=1))
    return {
        **written,
        "best": {},
        "baseline": None,
        "data": {"name": dataset.name, "category": dataset.category},
        "model": {"name": type(model).__name__, **model.config},
    }


def _decisions(
    detector: Detector, truth: Truth, images: Images, found: Evaluation, options: Any
) -> dict[str, Any]:
    """Return and print what the run's thresholds decide on these images and, on request, what tuned ones would."""
    from msflow_ext.evaluation import calibration

    written: dict[str, Any] = {}
    if detector.calibration and detector.threshold is not None:
        labels = [item.label for item in images.items]
        written["decisions"] = calibration.rates(labels, found.scores, detector.threshold)
        counted = calibration.counted(written["decisions"])
        print(f"over the threshold {detector.threshold:.6g}: {counted}")
    if options.tune_thresholds:
        written["test_tuned"] = {
            level: calibration.tuned(known, values)
            for level, known, values in (
                ("image", truth.labels, found.scores),
                ("pixel", truth.masks, found.maps),
            )
            if known is not None
        }
        for level, best in written["test_tuned"].items():
            print(f"{level}: F1 {best['f1']:.4f} over {best['threshold']:.6g}, {best['chosen']}")
    return written


def _check_classes(dataset: DataSet) -> None:
    """Raise ValueError unless there are good and defective test images."""
    labels = [item.label for item in dataset.test]
    good, bad = labels.count(0), labels.count(1)
    if not good or not bad or good + bad < len(labels):
        raise ValueError(
            f"{dataset.name} {dataset.category} cannot be measured: there must be good and defective test images, "
            f"got {good} good, {bad} defective and {len(labels) - good - bad} without "
            "a label (msflow predict scores images of any kind)"
        )


def evaluate_flags(part: Any) -> None:
    add_run(part)
    text = "Folder for scores.csv and evaluation.json; by default nothing is written."
    part.add_argument("--out", metavar="DIR", help=text)
    add_data(part.add_argument_group("data", "By default the test images of the run."))
    evaluation = part.add_argument_group("evaluation")
    add_false_alarms(evaluation)
    evaluation.add_argument(
        "--tune-thresholds",
        action="store_true",
        help="Also find the thresholds with the largest F1 on the same images.",
    )
    hardware = part.add_argument_group("hardware")
    add_precision(hardware)
    add_device(hardware)
