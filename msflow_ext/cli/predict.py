"""The command ``predict``: files and folders, a folder that is watched, an archive."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import MAPS, ON_ERROR
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
from msflow_ext.files import locked

if TYPE_CHECKING:
    from msflow_ext.inference.result import Result
    from msflow_ext.inference.settings import Scoring

log = logging.getLogger(__name__)


def predict(options: Any) -> int:
    """Score images: files, folders with their sub-folders, or what arrives in a watched folder."""
    import torch

    from msflow_ext.runs.folder import checked_out

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.engine or options.maps or options.address:
        return _archive(options)
    with locked(checked_out(options.out)) as out:
        return _watch(options, out) if options.watch else _score(options, out)


def _score(options: Any, out: Path) -> int:
    """Score the images that exist now."""
    from tqdm import tqdm

    from msflow_ext.inference import output
    from msflow_ext.inference.output import TABLE
    from msflow_ext.runs.score_table import Row, write_scores

    scoring = _scoring(options)
    detector = scoring.load(options.run, options.device)
    images = _images(options)
    output.remove_earlier(out, images.values())
    # After a kill, this table tells which pictures this command wrote.
    write_scores(out / TABLE, [Row(name, error=output.NOT_SCORED) for name in images])
    rows: list[Row] = []

    def scored() -> Iterator[Result]:
        found = scoring.stream(detector, images.values(), on_error=options.on_error)
        shown = tqdm(found, total=len(images), unit="image", disable=None)
        for name, result in zip(images, shown, strict=True):
            named = replace(result, name=name)
            rows.append(output.row_of(named))
            if named.error:
                _skipped(name, named.error)
            else:
                yield named

    try:
        if options.score_only:
            deque(scored(), maxlen=0)
        else:
            output.write_pictures(out, scored(), detector.colours)
    finally:
        if rows:
            write_scores(out / TABLE, rows)
        else:
            (out / TABLE).unlink()
    return _concluded(len(rows), [row.name for row in rows if row.error], out / TABLE)


def _archive(options: Any) -> int:
    """Score images into Parquet; one that cannot be scored has a row that says why."""
    from msflow_ext.inference.archive import job

    if not options.engine or options.watch or options.score_only:
        raise ValueError("Parquet takes --engine, and neither --watch nor --score-only")
    engine, device = chosen_engine(options), device_of(options)
    chosen = {
        name: getattr(options, name) for name in ("maps", "shard_size", "threads", "on_error")
    }
    paths = list(_images(options).values())
    archive = job.prepare(
        options.run, paths, options.out, _scoring(options), device=device, **chosen
    )
    wrong = archive.score(engine, progress=True)
    for path, error in wrong:
        _skipped(path, error)
    return _concluded(archive.images, [path for path, _ in wrong], options.out)


def _skipped(name: str, error: str) -> None:
    log.warning("%s is skipped: %s", name, error)


def _concluded(images: int, wrong: Collection[str], written: Path | str) -> int:
    """Say how many images were scored, and return the exit status: 1 if one has no score."""
    print(f"{images} {'image' if images == 1 else 'images'}: {written}")
    if wrong:
        log.warning("%d of %d have no score, see column error", len(wrong), images)
    return int(bool(wrong))


def _images(options: Any) -> dict[str, Path]:
    """Return the images that the options name, without pictures that this command writes."""
    from msflow_ext.data.sources import listed

    return listed(options.paths, apart=_written(options.paths, Path(options.out)))


def _written(paths: Sequence[str], out: Path) -> list[Path]:
    """Return the folders that pictures are written into; ValueError if one of them is to be read."""
    written = [out / "maps", out / "masks"]
    for path in paths:
        for folder in written:
            if Path(path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"--out {out} writes images into {folder}, which is read")
    return written


def _scoring(options: Any) -> Scoring:
    """Return the settings of scoring that the options ask for."""
    from msflow_ext.inference.settings import Scoring

    return Scoring(**{name: getattr(options, name) for name in Scoring.__dataclass_fields__})


def _watch(options: Any, out: Path) -> int:
    """Score what arrives in a folder: first the pictures of an image are written, then its row."""
    from msflow_ext.inference.output import TABLE, row_of, write_pictures
    from msflow_ext.inference.watch import ScoreLog, arrivals, stopped_by_signals
    from msflow_ext.reports.heat_maps import colour_range
    from msflow_ext.runs.folder import file_name

    folder, written = _watched(options.paths), _written(options.paths, out)
    with stopped_by_signals() as stop:
        scoring = _scoring(options)
        detector = scoring.load(options.run, options.device)
        scores = ScoreLog(out / TABLE)
        colours, taken, new = detector.colours, set(), dict[str, None]()
        for name in scores.names:  # so that pictures are called as if there was no interruption
            file_name(name, taken)
        log.info("watching %s, %d images scored before", folder, len(scores.names))
        for name, path in arrivals(folder, scores.names, stop, apart=written):
            (result,) = scoring.stream(detector, path, workers=1, on_error=options.on_error)
            result, new[name] = replace(result, name=name), None
            if result.error:
                _skipped(name, result.error)
            elif not options.score_only:
                colours = colours or colour_range([result.map])
                picture = replace(result, name=file_name(name, taken))
                write_pictures(out, [picture], colours)
            scores.append(row_of(result))
    return _concluded(len(new), new.keys() & scores.failed.keys(), scores.path)


def _watched(paths: Sequence[str]) -> Path:
    """Return the one folder to watch."""
    if len(paths) > 1:
        raise ValueError(f"--watch must be given one folder, got {' '.join(paths)}")
    folder = Path(paths[0])
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder to watch")
    return folder


def predict_flags(part: Any) -> None:
    add_run(part)
    part.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="Images and folders with their sub-folders. Patterns such as *.png are expanded by the shell only.",
    )
    text = "Folder for scores.csv, maps/*.png and, of a run with thresholds, masks/*.png."
    add_out(part, text)
    part.add_argument("--score-only", action="store_true", help="Write no heat maps and no masks.")
    part.add_argument(
        "--watch",
        action="store_true",
        help="Score images as they arrive in the one folder given, until interrupted.",
    )
    text = "Skip an image that cannot be scored (a line, a row with its error, and status 1 at the end), or stop at it."
    add_choice(part, "--on-error", ON_ERROR, text, default="skip")
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
