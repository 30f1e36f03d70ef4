"""Score an archive of images into Parquet files with any engine; interrupted work can be resumed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msflow_ext.choices import MAPS, Maps, OnError
from msflow_ext.distributed.executors import Engine, TaskLost, one_by_one
from msflow_ext.evaluation.calibration import exceeds
from msflow_ext.inference.archive import manifest
from msflow_ext.inference.archive.parquet import Store, schema
from msflow_ext.inference.settings import Scoring
from msflow_ext.runs.checkpoint import CHECKPOINT

if TYPE_CHECKING:
    from msflow_ext.inference.detector import Detector
from msflow_ext.inference.result import Result


@dataclass(frozen=True)
class Shard:
    """Images that are scored together and stored in one Parquet file."""

    number: int
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the file name of the shard."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Job:
    """The settings that all shards share.

    Attributes:
        run: run folder or checkpoint file.
        sha256: digest of the checkpoint file.
        out: folder or URI, see :class:`msflow_ext.inference.archive.parquet.Store`.
        scoring: settings that scores depend on.
        maps: format in which anomaly maps are stored, ``"array"`` or ``"png"``; None for none.
        manifest: digest of all inputs and settings that rows depend on.
        device: device to compute on; None for a GPU if there is one.
        threads: torch's CPU threads; None to leave them unchanged.
        on_error: see :func:`prepare`.
    """

    run: str
    sha256: str
    out: str
    scoring: Scoring
    maps: Maps | None
    manifest: str
    device: str | None
    threads: int | None
    on_error: OnError = "skip"


@dataclass(frozen=True)
class Archive:
    """A prepared job: all ``shards``, and the numbers of those that are ``finished``."""

    job: Job
    shards: tuple[Shard, ...]
    finished: frozenset[int]

    @cached_property
    def images(self) -> int:
        """Return the number of images in all shards."""
        return sum(len(shard.paths) for shard in self.shards)

    def score(
        self, engine: Engine = one_by_one, *, progress: bool = False
    ) -> list[tuple[str, str]]:
        """Write the missing shards, and return the path and error of every image without a score.

        If the workers of a shard die repeatedly, the other shards are still written.

        Raises:
            RuntimeError: shards were not written because their workers died repeatedly.
            BlockingIOError: another process writes into the folder.
            Exception: any other error of a shard stops the work; finished shards are kept.
        """
        store = Store(self.job.out)
        with store.locked():
            lost = self._score_missing(store, engine, progress)
        if lost:
            shard, error = lost[0]
            raise RuntimeError(
                f"{len(lost)} of {len(self.shards)} shards were not written, first "
                f"{store.path(shard.name)} ({shard.paths[0]} to {shard.paths[-1]}): {error}; "
                "run the same command again to retry them"
            )
        return [each for shard in self.shards for each in _errors(store, shard)]

    def _score_missing(
        self, store: Store, engine: Engine, progress: bool
    ) -> list[tuple[Shard, TaskLost]]:
        """Write the missing shards, and return those whose workers died."""
        from tqdm import tqdm

        missing = [shard for shard in self.shards if shard.number not in self.finished]
        before = self.images - sum(len(shard.paths) for shard in missing)
        lost: list[tuple[Shard, TaskLost]] = []
        engine, off = (engine if missing else one_by_one), None if progress else True
        try:
            with (
                tqdm(total=self.images, initial=before, unit="image", disable=off) as bar,
                closing(engine(partial(score_shard, self.job), missing)) as outcomes,
            ):
                for shard, _, error in outcomes:
                    if isinstance(error, TaskLost):
                        lost.append((shard, error))
                    elif error:
                        raise error
                    else:
                        bar.update(len(shard.paths))
        finally:
            _detector.cache_clear()
            store.clear_unfinished()
        return lost


def prepare(
    run: str | Path,
    source: Any,
    out: str | Path,
    scoring: Scoring | None = None,
    *,
    maps: Maps | None = None,
    shard_size: int = 256,
    device: str | None = None,
    threads: int | None = None,
    on_error: OnError = "skip",
) -> Archive:
    """Prepare to score images into Parquet files, or to resume that work.

    The images are listed and split into shards ``part-00000.parquet``, ``part-00001.parquet``, ... of
    ``shard_size`` images each (columns: :func:`msflow_ext.inference.archive.parquet.schema`). A
    manifest in ``out`` records the images and every setting that a row depends on. If ``out`` has a
    manifest, it must agree.

    So each image has exactly one row. The row has the same bits for every engine, worker and restart
    on which torch computes the same; the number of threads matters.

    Args:
        run: run folder or checkpoint file.
        source: image files, and folders, which are searched with their subfolders.
        out: folder, or URI that pyarrow or fsspec supports.
        scoring: settings that scores depend on.
        maps: store anomaly maps as ``"array"`` or ``"png"``; None to store none.
        shard_size: images per Parquet file.
        device: device to compute on; None for a GPU if there is one.
        threads: torch's CPU threads; None to leave them unchanged.
        on_error: ``"skip"`` writes a row with the error of an image that cannot be scored;
            ``"stop"`` raises the error.

    Returns:
        The work, which :meth:`Archive.score` does.

    Raises:
        FileNotFoundError: an image or the run does not exist.
        ValueError: there are no images, or one is given twice; ``out`` belongs to other images,
            another model or other settings, or holds other files; a shard is damaged.
        BlockingIOError: another process writes into ``out``.
        OSError: ``out`` cannot be written.
        ModuleNotFoundError: pyarrow is not installed.
    """
    scoring = scoring or Scoring()
    if shard_size < 1 or scoring.batch_size < 1:
        given = f"{shard_size}, {scoring.batch_size}"
        raise ValueError(f"--shard-size and --batch-size must be 1 or more, got {given}")
    if maps not in (None, *MAPS):
        raise ValueError(f"--maps must be one of {', '.join(MAPS)}, got {maps!r}")
    store, images = Store(str(out)), manifest.listed(source)
    sha256 = manifest.file_digest(manifest.checkpoint_of(run))
    settings = {**asdict(scoring), "maps": maps, "shard_size": shard_size}
    expected = manifest.described(images, sha256, settings)
    with store.locked():
        names = _claimed(store, expected, images)
    digest = manifest.digest(expected)
    paths = [path for path, _ in images]
    starts = range(0, len(paths), shard_size)
    parts = tuple(Shard(n, tuple(paths[i : i + shard_size])) for n, i in enumerate(starts))
    finished = [shard for shard in parts if shard.name in names]
    for shard in finished:
        if store.owner_of(shard.name) != (_owner(digest, shard), len(shard.paths)):
            path = store.path(shard.name)
            raise ValueError(
                f"{path} does not belong to {manifest.MANIFEST}. Remove it, and it is scored again"
            )
    job = Job(str(run), sha256, str(out), scoring, maps, digest, device, threads, on_error)
    return Archive(job, parts, frozenset(shard.number for shard in finished))


def _claimed(store: Store, expected: dict[str, Any], images: manifest.Images) -> set[str]:
    """Write or check the manifest, and return the names of the files in the store."""
    names = store.names()
    if manifest.MANIFEST in names:
        manifest.check(store, expected, images)
    elif foreign := sorted(n for n in names if n.endswith((".parquet", CHECKPOINT))):
        path = store.path(foreign[0])
        raise ValueError(f"{path} has no {manifest.MANIFEST} beside it. Choose another --out")
    else:
        manifest.write(store, expected, images)
    return names


def score_shard(job: Job, shard: Shard) -> None:
    """Score the images of a shard and write its file."""
    import pyarrow

    if job.threads:
        torch.set_num_threads(job.threads)
    detector = _detector(job)
    results = job.scoring.stream(detector, shard.paths, on_error=job.on_error)
    rows = [
        {"path": path, "error": result.error} if result.error else _row(path, result, job, detector)
        for path, result in zip(shard.paths, results, strict=True)
    ]
    table = pyarrow.Table.from_pylist(rows, schema(job.maps))
    Store(job.out).write_table(shard.name, table, _owner(job.manifest, shard))


def _owner(manifest: str, shard: Shard) -> dict[str, Any]:
    return {"manifest": manifest, "shard": shard.number}


@lru_cache(1)
def _detector(job: Job) -> Detector:
    """Load the detector of the manifest, once per process."""
    if manifest.file_digest(manifest.checkpoint_of(job.run)) != job.sha256:
        raise ValueError(f"{job.run} has changed since the scoring began")
    detector = job.scoring.load(job.run, job.device)
    if job.maps == "png" and not detector.colours:
        raise ValueError(
            f"--maps must be array for {job.run}, got png: the run has no color range of heat maps"
        )
    return detector


def _row(path: str, result: Result, job: Job, detector: Detector) -> dict[str, Any]:
    height, width = result.map.shape
    top, left = divmod(int(result.map.argmax()), width)
    threshold = detector.pixel_threshold
    row = {
        "path": path,
        "score": result.score,
        "label": result.label,
        "p_value": result.p_value,
        "map_max": float(result.map.max()),
        "map_mean": float(result.map.mean(dtype=np.float64)),
        "map_area": None if threshold is None else float(exceeds(result.map, threshold).mean()),
        "map_max_x": (left + 0.5) / width,
        "map_max_y": (top + 0.5) / height,
    }
    if job.maps == "array":
        row |= {"map_height": height, "map_width": width, "map": result.map.ravel()}
    if job.maps == "png":
        row["map_png"] = _png(result, detector)
    return row


def _png(result: Result, detector: Detector) -> bytes:
    from msflow_ext.reports.heat_maps import heat_map

    low, high = detector.colours or (0.0, 1.0)
    written = io.BytesIO()
    heat_map(result.image, result.map, low=low, high=high, mask=result.mask).save(written, "PNG")
    return written.getvalue()


def _errors(store: Store, shard: Shard) -> Iterator[tuple[str, str]]:
    """Yield the path and error of each image of a shard without a score."""
    found = store.read_table(shard.name, ("path", "error")).to_pylist()
    yield from ((row["path"], row["error"]) for row in found if row["error"] is not None)
