"""Score an archive of images into Parquet files, by any engine: interrupted, it goes on where it was."""

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
    """Images that are scored together and lie in one file."""

    number: int
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Job:
    """What is to be done with every shard.

    Attributes:
        run: run folder or checkpoint file, and ``sha256``, the digest of the latter.
        out: folder or URI, see :class:`msflow_ext.inference.archive.parquet.Store`.
        scoring: how images are scored.
        maps: what of the anomaly maps is kept, ``"array"``, ``"png"`` or None.
        manifest: the digest of everything that rows depend on.
        device: where to compute; None for a GPU if there is one.
        threads: of torch on the CPU; None to leave them.
        on_error: as :meth:`msflow_ext.inference.Detector.predict` takes it.
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
    """A prepared job: ``shards`` of all images, of which the ``finished`` are in their files."""

    job: Job
    shards: tuple[Shard, ...]
    finished: frozenset[int]

    @cached_property
    def images(self) -> int:
        return sum(len(shard.paths) for shard in self.shards)

    def score(
        self, engine: Engine = one_by_one, *, progress: bool = False
    ) -> list[tuple[str, str]]:
        """Write the shards that are not there; path and error of every image that has no score.

        A shard whose workers died again and again does not stop the others.

        Raises:
            RuntimeError: such shards are not written. What else a task raises stops the work; finished
                shards are kept. BlockingIOError: another process writes into the folder.
        """
        store = Store(self.job.out)
        with store.locked():
            lost = self._score_missing(store, engine, progress)
        if lost:
            shard, error = lost[0]
            raise RuntimeError(
                f"{len(lost)} of {len(self.shards)} shards were not written, first "
                f"{store.path(shard.name)} ({shard.paths[0]} to {shard.paths[-1]}): {error}; "
                "the same command again tries these only"
            )
        return [each for shard in self.shards for each in _errors(store, shard)]

    def _score_missing(
        self, store: Store, engine: Engine, progress: bool
    ) -> list[tuple[Shard, TaskLost]]:
        """Write the shards that are not there; those whose workers died."""
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
    """List the images, and write the manifest into ``out`` or compare with the one that is there.

    ``out`` gets ``part-00000.parquet`` and so on, ``shard_size`` images in each in the order of the
    list, see :func:`msflow_ext.inference.archive.parquet.schema`. The list and every setting that a row depends on are
    in the manifest. So each image is once in the output, with the same bits whichever engine, worker
    and restart wrote it, as far as torch computes the same on them: the number of threads counts.

    Args:
        run: run folder or checkpoint file.
        source: image files, and folders with all that is in them.
        out: folder, or URI that pyarrow or fsspec knows.
        on_error: ``"skip"`` for a row with the error of an image that cannot be scored, ``"stop"``
            to end the work with it.

    Raises:
        FileNotFoundError: a file or the run is not there.
        ValueError: no images, or one twice; ``out`` holds the scores of other images, of another
            model or with other settings, or something else; a damaged shard.
        BlockingIOError: another process writes into ``out``. OSError: it cannot be written.
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
    wanted = manifest.described(images, sha256, settings)
    with store.locked():
        names = _claimed(store, wanted, images)
    digest = manifest.digest(wanted)
    paths = [path for path, _ in images]
    starts = range(0, len(paths), shard_size)
    parts = tuple(Shard(n, tuple(paths[i : i + shard_size])) for n, i in enumerate(starts))
    finished = [shard for shard in parts if shard.name in names]
    for shard in finished:
        if store.owner_of(shard.name) != (_owner(digest, shard), len(shard.paths)):
            what = f"{store.path(shard.name)} is not what {manifest.MANIFEST} says"
            raise ValueError(f"{what}: remove it, and it is made again")
    job = Job(str(run), sha256, str(out), scoring, maps, digest, device, threads, on_error)
    return Archive(job, parts, frozenset(shard.number for shard in finished))


def _claimed(store: Store, wanted: dict[str, Any], images: manifest.Images) -> set[str]:
    """The files that are there, once the manifest says that they are of these images."""
    names = store.names()
    if manifest.MANIFEST in names:
        manifest.check(store, wanted, images)
    elif foreign := sorted(n for n in names if n.endswith((".parquet", CHECKPOINT))):
        what = f"{store.path(foreign[0])} is there without {manifest.MANIFEST}"
        raise ValueError(f"{what}: choose another --out")
    else:
        manifest.write(store, wanted, images)
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
    """Loaded once in a process; the same model as the manifest's."""
    if manifest.file_digest(manifest.checkpoint_of(job.run)) != job.sha256:
        raise ValueError(f"{job.run} has changed since the scoring began")
    detector = job.scoring.load(job.run, job.device)
    if job.maps == "png" and not detector.colours:
        raise ValueError(f"--maps png: {job.run} knows no range of colours, take --maps array")
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
    """Path and error of the images of a shard that have no score."""
    found = store.read_table(shard.name, ("path", "error")).to_pylist()
    yield from ((row["path"], row["error"]) for row in found if row["error"] is not None)
