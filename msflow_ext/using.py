"""The commands that use a trained run: evaluate, predict, serve and export."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.options import open_data
from msflow_ext.options.training import DATA
from msflow_ext.printing import print_table

if TYPE_CHECKING:
    from msflow_ext.data import DataSet, Images
    from msflow_ext.evaluation import Evaluation, Truth
    from msflow_ext.inference import Detector, Result
    from msflow_ext.scoring import Scoring

log = logging.getLogger(__name__)


def evaluate(options: Any) -> int:
    """Test a trained model on labelled images: those of its own run, or others."""
    from msflow_ext import evaluation
    from msflow_ext.checkpoint import write_text
    from msflow_ext.data import Images
    from msflow_ext.features import Features
    from msflow_ext.inference import load
    from msflow_ext.report import write_scores

    out = _checked_out(options.out) if options.out else None
    detector = load(options.run, options.device, false_alarms=options.false_alarms)
    model = detector.model
    own = not (options.data or options.normal)
    dataset = open_data(_settings(Path(options.run)) if own else vars(options))
    _check_classes(dataset)
    images = Images(dataset.test, model.image_size)
    truth = evaluation.Truth.of(images)
    seen = Images(dataset.test, model.image_size, detector.fit)
    features = Features(model, seen, progress="features")
    found = evaluation.evaluate(model.predict_features, features, truth)
    print_table([(f"{dataset.name} {dataset.category}", type(model).__name__, found.metrics)])
    written = {**found.metrics, **_decisions(detector, truth, images, found, options)}
    if out:
        items = zip(images.items, found.scores.tolist(), strict=True)
        rows = ((i.name, i.defect, i.label, s) for i, s in items)
        write_scores(out / "scores.csv", rows, aupimo=found.aupimo)
        write_text(out / "evaluation.json", json.dumps(written, indent=1))
    return 0


def predict(options: Any) -> int:
    """Score images: files, or folders with all that is in them, or all that comes into one folder."""
    import torch
    from tqdm import tqdm

    from msflow_ext._pictures import write_pictures
    from msflow_ext.report import write_scores

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.engine or options.maps or options.address:
        return _archive(options)
    out = _checked_out(options.out)
    if options.watch:
        return _watch(options, out)
    scoring = _scoring(options)
    detector = scoring.load(options.run, options.device)
    rows: list[tuple[str, str, int | None, float]] = []
    p_values: list[float | None] = []

    named: set[str] = set()

    def noted() -> Iterator[Result]:
        found = scoring.stream(detector, options.paths)
        for result in tqdm(found, unit="image", disable=None):
            if result.name in named:
                raise ValueError(f"two images are called {result.name}: predict them apart")
            named.add(result.name)
            rows.append((result.name, "", result.label, result.score))
            p_values.append(result.p_value)
            yield result

    try:
        if options.score_only:
            deque(noted(), maxlen=0)
        else:
            write_pictures(out, noted(), detector.colours)
    finally:
        if rows:
            known = p_values if detector.calibration else None
            write_scores(out / "scores.csv", rows, p_value=known)
    print(f"{len(rows)} images: {out / 'scores.csv'}")
    return 0


def _archive(options: Any) -> int:
    """Score images into Parquet; those that cannot be scored have a row that says why, and status 2."""
    from msflow_ext import bulk, engines

    if not options.engine or options.watch or options.score_only:
        raise ValueError("Parquet takes --engine, and neither --watch nor --score-only")
    engine, device = engines.chosen(options), engines.device_of(options)
    chosen = {name: options[name] for name in ("maps", "shard_size", "threads")}
    archive = bulk.prepare(
        options.run, options.paths, options.out, _scoring(options), device=device, **chosen
    )
    wrong = archive.score(engine, progress=True)
    print(f"{archive.images} images: {options.out}")
    if wrong:
        count = f"{len(wrong)} of {archive.images} images have no score, see column error"
        raise RuntimeError(f"{count}; the first: {wrong[0][1]}")
    return 0


def serve(options: Any) -> int:
    """Answer images over HTTP, with a page to drop them on: score, label, mask and heat map."""
    from msflow_ext import serving

    names = ("max_bytes", "max_pixels", "concurrency", "timeout")
    serving.serve(
        options.run,
        host=options.host,
        port=options.port,
        token=options.token,
        limits=serving.Limits(**{name: options[name] for name in names}),
        device=options.device,
        false_alarms=options.false_alarms,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    return 0


def _scoring(options: Any) -> Scoring:
    """How the options want images to be scored."""
    from msflow_ext.scoring import Scoring

    return Scoring(**{name: options[name] for name in Scoring.__dataclass_fields__})


def _watch(options: Any, out: Path) -> int:
    """Score what arrives in a folder: first the pictures of an image are written, then its row."""
    from msflow_ext._heat_maps import file_name
    from msflow_ext._pictures import write_pictures
    from msflow_ext.printing import sentence
    from msflow_ext.report import colour_range
    from msflow_ext.watching import ScoreLog, arrivals, stopped_by_signals

    folder = _watched(options.paths, out)
    with stopped_by_signals() as stop:
        scoring = _scoring(options)
        detector = scoring.load(options.run, options.device)
        scores = ScoreLog(out / "scores.csv", *(["p_value"] if detector.calibration else []))
        before, colours, taken = len(scores.names), detector.colours, set()
        for name in scores.names:  # so that pictures are called as if there was no interruption
            file_name(name, taken)
        log.info("watching %s, %d images scored before", folder, before)
        for name, path in arrivals(folder, scores.names, stop):
            try:
                (result,) = scoring.stream(detector, path, workers=1)
            except (OSError, ValueError, ArithmeticError) as error:
                log.warning("%s is passed over: %s", name, sentence(error))
                continue
            if not options.score_only:
                colours = colours or colour_range([result.map])
                stem = file_name(name, taken).removesuffix(".png")
                write_pictures(out, iter([replace(result, name=stem)]), colours)
            more = [] if result.p_value is None else [result.p_value]
            scores.append(name, result.label, result.score, *more)
    print(f"{len(scores.names) - before} images: {scores.path}")
    return 0


def _watched(paths: Sequence[str], out: Path) -> Path:
    """The one folder to watch; pictures that are written must not come in there."""
    if len(paths) > 1:
        raise ValueError(f"--watch wants one folder, got {' '.join(paths)}")
    folder = Path(paths[0])
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder to watch")
    for written in (out / "maps", out / "masks"):
        inner, outer = written.resolve(), folder.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise ValueError(f"--out {out} writes images into {folder}, which is watched")
    return folder


def export(options: Any) -> int:
    """Write a trained model as a graph for torch.export, C++, ONNX Runtime or OpenVINO."""
    import torch

    from msflow_ext.data import Images
    from msflow_ext.export import export as write
    from msflow_ext.inference import load

    detector = load(options.run, "cpu")
    images = None
    with suppress(ImportError, OSError, ValueError):  # without its data, random images must do
        test = open_data(_settings(Path(options.run))).test
        seen = Images((test[0], test[-1]), detector.model.image_size, detector.fit)
        images = torch.stack([seen[i] for i in range(2)])
    found = write(detector, options.format, options.out, images=images)
    compared = "random images" if images is None else "random and test images"
    texts = ", ".join(f"{difference:.1e} of {name}" for name, difference in found.items())
    print(
        f"{options.out}: differs from the run on {compared} by at most {texts}, relative to the largest value"
    )
    return 0


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
    for name in DATA:
        kind = int if name == "split_seed" else str
        if not isinstance(settings.get(name), kind | None):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {settings[name]!r}")
    return settings


def _decisions(
    detector: Detector, truth: Truth, images: Images, found: Evaluation, options: Any
) -> dict[str, Any]:
    """What the run's thresholds do on these images and, if asked for, those tuned on them; printed too."""
    from msflow_ext import decisions

    written: dict[str, Any] = {}
    if detector.calibration and detector.threshold is not None:
        labels = [item.label for item in images.items]
        written["decisions"] = decisions.rates(labels, found.scores, detector.threshold)
        shares = (
            f"{'-' if share is None else f'{share:.1%}'} of the {kind} images"
            for share, kind in zip(
                written["decisions"].values(), ("good", "defective"), strict=True
            )
        )
        print(f"over the threshold {detector.threshold:.6g}: {', '.join(shares)}")
    if options.tune_thresholds:
        written["test_tuned"] = {
            level: decisions.tuned(known, values)
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
    """ValueError if there is nothing to tell good images from defective ones by."""
    labels = [item.label for item in dataset.test]
    good, bad = labels.count(0), labels.count(1)
    if not good or not bad or good + bad < len(labels):
        raise ValueError(
            f"{dataset.name} {dataset.category} cannot be measured: good and defective test images "
            f"are wanted, got {good} good, {bad} defective and {len(labels) - good - bad} without "
            "a label (msflow predict scores images of any kind)"
        )


def _checked_out(out: str) -> Path:
    """A folder that can be written to, in which no run is; else its scores and maps would be lost."""
    from msflow_ext.checkpoint import CHECKPOINT, check_writable

    if (Path(out) / CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a run, choose another folder")
    check_writable(Path(out))
    return Path(out)
