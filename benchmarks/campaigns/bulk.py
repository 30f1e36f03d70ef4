"""Measure scoring of an archive in one process and with Ray workers: `python -m benchmarks.campaigns.bulk`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.campaigns.serving import image, toy
from benchmarks.report import machine_line
from msflow_ext.bench import machine
from msflow_ext.distributed import executors
from msflow_ext.inference.archive import Archive, prepare
from msflow_ext.inference.archive.parquet import Store

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    facts, before = machine.facts(), machine.others_now()
    torch.set_num_threads(1)  # as in the workers
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or toy(Path(scratch))
        photos = archive(Path(scratch) / "photos", options.images, options.side)
        shared = {"shard_size": options.shard_size, "device": "cpu", "threads": 1}
        rows: list[Row] = []
        for workers in (0, *options.workers):
            out = Path(scratch) / f"out-{workers}"
            rows.append(measure(prepare(run, photos, out, **shared), workers))
            if content(out) != content(Path(scratch) / "out-0"):
                raise SystemExit(
                    f"{workers} workers must write the bytes of one process, got others"
                )
            print(line(rows[-1], rows[0]), flush=True)
    document = {
        "machine": facts,
        "run": str(options.run or "efficientnet_lite0 at 192 px, untrained"),
        "archive": f"{options.images} JPEGs, {options.side}x{options.side}",
        "shard_size": options.shard_size,
        "others": before,
        "rows": rows,
    }
    path = results.write(options.file or results.file_for(facts, "bulk"), document)
    path.with_suffix(".md").write_text("\n".join(markdown(document)) + "\n")
    print(path, path.with_suffix(".md"))
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.campaigns.bulk", description=__doc__)
    add = found.add_argument
    counts = sorted({1, machine.cores()})
    add("--run", type=Path, help="Run folder (default: an untrained model).")
    add(
        "--workers",
        type=int,
        nargs="*",
        default=counts,
        help=f"Numbers of Ray workers (default: {counts}).",
    )
    add("--images", type=int, default=2000, help="Number of images in the archive.")
    add("--side", type=int, default=512, help="Side of an image in pixels.")
    add("--shard-size", type=int, default=50, help="Number of images in a Parquet file.")
    add("--file", type=Path, help="File to write (default: in benchmarks/results).")
    return found


def archive(folder: Path, count: int, side: int) -> Path:
    """Write a folder of equal JPEGs."""
    folder.mkdir()
    body = image(side)
    for i in range(count):
        (folder / f"{i:06}.jpg").write_bytes(body)
    return folder


def measure(job: Archive, workers: int) -> Row:
    """Measure the seconds until each worker has done a shard, and the images per second after that.

    The first shards include loading the model. Starting Ray is not measured. With 0 workers, this process scores.
    """
    ends: list[float] = []

    def watched(work: Any, tasks: Any) -> Any:
        engine = executors.on_ray(at_once=workers) if workers else executors.one_by_one
        for outcome in engine(work, tasks):
            ends.append(time.perf_counter())
            yield outcome

    with started(workers):
        begin = time.perf_counter()
        job.score(watched)
    first = max(1, workers)
    if len(ends) <= first:
        raise SystemExit(f"{workers} workers need more than {first} shards, got {len(ends)}")
    sizes = [len(shard.paths) for shard in job.shards]
    rate = sizes[0] * (len(ends) - first) / (ends[-1] - ends[first - 1])
    return {
        "workers": workers,
        "warm_up_s": round(ends[first - 1] - begin, 2),
        "total_s": round(ends[-1] - begin, 2),
        "images_per_s": round(rate, 1),
    }


@contextmanager
def started(workers: int) -> Iterator[None]:
    """Start Ray inside the context if there are workers."""
    with executors.session() if workers else nullcontext():
        yield


def content(out: Path) -> dict[str, bytes]:
    store = Store(str(out))
    return {name: store.read(name).to_pybytes() for name in store.names()}


def line(row: Row, base: Row) -> str:
    """Return a row of the table: workers, warm-up, rate, and speedup over one process."""
    who = f"{row['workers']} of Ray" if row["workers"] else "this process"
    times = row["images_per_s"] / base["images_per_s"]
    return f"| {who} | {row['warm_up_s']:.1f} | {row['images_per_s']:.1f} | {times:.2f} |"


def markdown(document: dict[str, Any]) -> Iterator[str]:
    facts = document["machine"]
    yield f"# Bulk scoring into Parquet, {facts['date'][:10]}"
    yield ""
    yield f"{machine_line(facts)}. {document['archive']}; {document['run']}; one thread a worker,"
    yield f"{document['shard_size']} images a shard. Every output has the same bytes."
    yield ""
    yield "| workers | seconds until each has done a shard | images/s after that | x |"
    yield "|---|---:|---:|---:|"
    yield from (line(row, document["rows"][0]) for row in document["rows"])
    if (document["others"] or 0) > 0.1:
        yield from ("", "**Measured while others used the machine: do not trust it.**")


if __name__ == "__main__":
    sys.exit(main())
