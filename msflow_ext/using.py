"""The commands that use a trained run: predict, serve and export."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.options import open_data, run_settings
from msflow_ext.run_folder import checked_out

if TYPE_CHECKING:
    from msflow_ext.inference import Result
    from msflow_ext.scoring import Scoring

log = logging.getLogger(__name__)


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
    out = checked_out(options.out)
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
        precision=options.precision,
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
        test = open_data(run_settings(Path(options.run))).test
        seen = Images((test[0], test[-1]), detector.model.image_size, detector.fit)
        images = torch.stack([seen[i] for i in range(2)])
    found = write(detector, options.format, options.out, images=images)
    compared = "random images" if images is None else "random and test images"
    texts = ", ".join(f"{difference:.1e} of {name}" for name, difference in found.items())
    print(
        f"{options.out}: differs from the run on {compared} by at most {texts}, relative to the largest value"
    )
    return 0
