"""The command ``predict``: files and folders, a folder that is watched, an archive."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import MAPS
from msflow_ext.cli.flags import (
    add_choice,
    add_device,
    add_engine,
    add_false_alarms,
    add_out,
    add_precision,
    add_run,
    add_threads,
    chosen_engine,
    device_of,
)
from msflow_ext.cli.parser import count, number
from msflow_ext.files import locked, replacing

if TYPE_CHECKING:
    from msflow_ext.inference.detector import Result
    from msflow_ext.inference.settings import Scoring

log = logging.getLogger(__name__)


def predict(options: Any) -> int:
    """Score images: files, or folders with all that is in them, or all that comes into one folder."""
    import torch

    from msflow_ext.runs.folder import checked_out

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.engine or options.maps or options.address:
        return _archive(options)
    with locked(checked_out(options.out)) as out:
        return _watch(options, out) if options.watch else _score(options, out)


def _score(options: Any, out: Path) -> int:
    """Score the images that are there now."""
    from tqdm import tqdm

    from msflow_ext.runs.results import write_scores

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
    from msflow_ext.inference.archive import job

    if not options.engine or options.watch or options.score_only:
        raise ValueError("Parquet takes --engine, and neither --watch nor --score-only")
    engine, device = chosen_engine(options), device_of(options)
    chosen = {name: getattr(options, name) for name in ("maps", "shard_size", "threads")}
    archive = job.prepare(
        options.run, options.paths, options.out, _scoring(options), device=device, **chosen
    )
    wrong = archive.score(engine, progress=True)
    print(f"{archive.images} images: {options.out}")
    if wrong:
        lost = f"{len(wrong)} of {archive.images} images have no score, see column error"
        raise RuntimeError(f"{lost}; the first: {wrong[0][1]}")
    return 0


def _scoring(options: Any) -> Scoring:
    """How the options want images to be scored."""
    from msflow_ext.inference.settings import Scoring

    return Scoring(**{name: getattr(options, name) for name in Scoring.__dataclass_fields__})


def _watch(options: Any, out: Path) -> int:
    """Score what arrives in a folder: first the pictures of an image are written, then its row."""
    from msflow_ext.errors import sentence
    from msflow_ext.inference.watch import ScoreLog, arrivals, stopped_by_signals
    from msflow_ext.reports.heat_maps import colour_range
    from msflow_ext.runs.folder import file_name

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


def write_pictures(out: Path, results: Iterator[Result], colours: Sequence[float] | None) -> None:
    """Write a heat map, and a mask if it has one, per result; one result is in memory at a time."""
    from msflow_ext.reports.heat_maps import colour_range, save_maps

    first = next(results)
    low, high = colours or colour_range([first.map])
    a, b, c, d = tee(_with_masks(out, chain([first], results)), 4)
    columns = (r.name for r in a), (r.image for r in b), (r.map for r in c), (r.mask for r in d)
    save_maps(out, *columns, low=low, high=high)


def _with_masks(out: Path, results: Iterable[Result]) -> Iterator[Result]:
    """Pass results on and write their masks, white where the map exceeds the threshold."""
    from PIL import Image

    from msflow_ext.runs.folder import file_name

    taken: set[str] = set()
    for result in results:
        name = file_name(result.name, taken)
        if result.mask is not None:
            with replacing(out / "masks" / name) as temporary:
                Image.fromarray(result.mask).save(temporary, "PNG")
        yield result


def predict_flags(part: Any) -> None:
    add_run(part)
    part.add_argument(
        "paths", nargs="+", metavar="PATH", help="Images, and folders with all that is in them."
    )
    text = "Folder for scores.csv, maps/*.png and, of a run with thresholds, masks/*.png."
    add_out(part, text)
    part.add_argument("--score-only", action="store_true", help="Write no heat maps and no masks.")
    part.add_argument(
        "--watch",
        action="store_true",
        help="Score images as they arrive in the one folder given, until interrupted.",
    )
    labels = part.add_argument_group("labels")
    add_false_alarms(labels)
    labels.add_argument(
        "--threshold",
        type=number,
        metavar="SCORE",
        help="Label images with a larger score as defective, instead of by the run's threshold.",
    )
    tiles = part.add_argument_group("large images")
    tiles.add_argument(
        "--tile",
        action="store_true",
        help="Cut images into tiles of the model's size; thresholds and p-values of the run do "
        "not hold for them.",
    )
    tiles.add_argument(
        "--overlap",
        type=number,
        default=0.25,
        metavar="SHARE",
        help="Share by which neighbouring tiles overlap.",
    )
    archive = part.add_argument_group("archives")
    text = "Write Parquet into --out, a folder or URI, from this process or on Ray; the same command resumes."
    add_engine(archive, default=None, text=text)
    text = "Keep the anomaly maps in Parquet, as numbers or as PNG heat maps."
    add_choice(archive, "--maps", MAPS, text)
    archive.add_argument(
        "--shard-size", type=count, default=256, metavar="IMAGES", help="Images per Parquet file."
    )
    hardware = part.add_argument_group("hardware")
    hardware.add_argument(
        "--batch-size",
        type=count,
        default=8,
        metavar="IMAGES",
        help="Images, or tiles, that are scored at a time.",
    )
    add_precision(hardware)
    add_device(hardware)
    add_threads(hardware)
