"""The command ``predict``."""

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
    """Score images, folders of images, or images as they arrive in a folder."""
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
    # If the process is killed, the next one removes the pictures of the images in this table.
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
    """Score images into Parquet; an image that cannot be scored has a row with its error."""
    from msflow_ext.inference.archive import job

    if not options.engine:
        raise ValueError("--engine must be given with --maps or --address")
    if options.watch or options.score_only:
        raise ValueError("--engine must be given without --watch and --score-only")
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
    """Print how many images were scored, and return the exit status: 1 if one has no score."""
    print(f"{images} {'image' if images == 1 else 'images'}: {written}")
    if wrong:
        log.warning("%d of %d have no score, see column error", len(wrong), images)
    return int(bool(wrong))


def _images(options: Any) -> dict[str, Path]:
    """Return the images that the options name, except the pictures that this command writes."""
    from msflow_ext.data.sources import listed

    return listed(options.paths, apart=_written(options.paths, Path(options.out)))


def _written(paths: Sequence[str], out: Path) -> list[Path]:
    """Return the folders that pictures are written into.

    Raises:
        ValueError: if one of them is also read.
    """
    written = [out / "maps", out / "masks"]
    for path in paths:
        for folder in written:
            if Path(path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"--out must not write into {folder}, from which images are read")
    return written


def _scoring(options: Any) -> Scoring:
    """Return the settings with which the options score images."""
    from msflow_ext.inference.settings import Scoring

    return Scoring(**{name: getattr(options, name) for name in Scoring.__dataclass_fields__})


def _watch(options: Any, out: Path) -> int:
    """Score images as they arrive in a folder: write first the pictures of an image, then its row."""
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
        for name in scores.names:  # pictures get the same names as without an interruption
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
    """Return the folder to watch."""
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
        help="Images, and folders whose images are scored, subfolders included.",
    )
    text = (
        "Folder to write scores.csv, maps/*.png and, if the run has thresholds, masks/*.png into."
    )
    add_out(part, text)
    part.add_argument(
        "--score-only",
        action="store_true",
        help="Write the table of scores without heat maps and masks.",
    )
    part.add_argument(
        "--watch",
        action="store_true",
        help="Score images as they arrive in the folder PATH, until interrupted.",
    )
    text = "Skip an image that cannot be scored (its row has the error; the exit status is 1), or stop at it."
    add_choice(part, "--on-error", ON_ERROR, text, default="skip")
    labels = part.add_argument_group("labels")
    add_false_alarms(labels)
    labels.add_argument(
        "--threshold",
        type=number,
        metavar="SCORE",
        help="Score above which an image is labeled defective; by default the threshold of the run.",
    )
    tiles = part.add_argument_group("large images")
    tiles.add_argument(
        "--tile",
        action="store_true",
        help="Cut images into tiles of the model's input size. The run's thresholds and p-values "
        "do not apply to them.",
    )
    tiles.add_argument(
        "--overlap",
        type=number,
        default=0.25,
        metavar="SHARE",
        help="Share of a tile that overlaps its neighbor.",
    )
    archive = part.add_argument_group("archives")
    text = "Write Parquet files into --out, a folder or URI, in this process or on Ray. The same command resumes."
    add_engine(archive, default=None, text=text)
    text = "Write the anomaly maps into the Parquet files, as arrays or as PNG heat maps."
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
        help="Images, or tiles, that are scored at once.",
    )
    add_precision(hardware)
    add_device(hardware)
    add_threads(hardware)
