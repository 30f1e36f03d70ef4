"""The command ``evaluate``."""

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
    """Test a trained model on the test images of its run or on other labeled images."""
    from msflow_ext.runs.folder import checked_out

    with locked(checked_out(options.out)) if options.out else nullcontext() as out:
        return _test_all(options, out) if options.category == "all" else _test_one(options, out)


def _test_one(options: Any, out: Path | None) -> int:
    """Test a run, and print its results."""
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
        raise ValueError(
            f"--out must be a folder other than {parent} with --category all, got {options.out}"
        )

    def one(trial: sweep.Trial) -> Mapping[str, Any]:
        chosen = copy(options)
        chosen.run = str(trial.folder)
        chosen.category, chosen.split_seed = trial.category, trial.split_seed
        return _test(chosen, checked_out(out / trial.folder.relative_to(parent)))

    conclude(sweep.do_all(_trials(parent), out, one, FAILURES), out)
    return 0


def _trials(parent: Path) -> list[sweep.Trial]:
    """Return the finished runs below a folder.

    Raises:
        ValueError: if a run is not finished, or two have the same category and seeds.
        FileNotFoundError: if there are no runs, or a run has no ``config.yaml``.
    """
    from msflow_ext.runs.checkpoint import CHECKPOINT
    from msflow_ext.runs.folder import METRICS
    from msflow_ext.training.sweep import Trial

    found: dict[tuple[Any, ...], Trial] = {}
    for folder in sorted(path.parent for path in parent.rglob(CHECKPOINT)):
        if not (folder / METRICS).exists():
            raise ValueError(f"{folder} must be a finished run; train it with --resume first")
        settings = run_settings(folder)
        split_seed, seed = (int(settings.get(name, 0)) for name in ("split_seed", "seed"))
        trial = Trial(settings.get("category"), split_seed, seed, folder)
        first = found.setdefault((trial.category, split_seed, seed), trial)
        if first is not trial:
            raise ValueError(
                f"{first.folder} and {folder} have the same category and seeds; the table needs one "
                "run of each"
            )
    if not found:
        raise FileNotFoundError(
            f"{parent} must contain finished runs; write them with train --category all"
        )
    return list(found.values())


def _test(options: Any, out: Path | None) -> dict[str, Any]:
    """Test a run, write the results into ``out``, and return the metrics with their data and model."""
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
    """Return and print the decisions of the run's threshold and, if asked for, thresholds tuned on these images."""
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
    """Raise ValueError unless the test images are all labeled, and some are good and some defective."""
    labels = [item.label for item in dataset.test]
    good, bad = labels.count(0), labels.count(1)
    if not good or not bad or good + bad < len(labels):
        raise ValueError(
            f"{dataset.name} {dataset.category} must have good and defective test images, all with "
            f"labels, got {good} good, {bad} defective and {len(labels) - good - bad} without a "
            "label; score such images with msflow predict"
        )


def evaluate_flags(part: Any) -> None:
    add_run(part)
    text = "Folder to write scores.csv and evaluation.json into; by default nothing is written."
    part.add_argument("--out", metavar="DIR", help=text)
    add_data(part.add_argument_group("data", "By default the test images of the run."))
    evaluation = part.add_argument_group("evaluation")
    add_false_alarms(evaluation)
    evaluation.add_argument(
        "--tune-thresholds",
        action="store_true",
        help="Also find the thresholds with the largest F1 on the images that are tested.",
    )
    hardware = part.add_argument_group("hardware")
    add_precision(hardware)
    add_device(hardware)
