"""Measure `msflow serve` under several clients on this machine: `python -m benchmarks.campaigns.serving`."""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import msflow_ext as mx
from benchmarks import report, results
from msflow_ext.bench import machine
from msflow_ext.runs.checkpoint import save_checkpoint

PAGE = Path(__file__).parents[2] / "tests" / "RELIABILITY.md"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    facts, before = machine.facts(), machine.others_now()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or toy(Path(scratch))
        with service(run) as url:
            measured = drive(url, options.clients, options.seconds, image(options.side))
    row = {
        "run": str(options.run or "efficientnet_lite0 at 192 px, untrained"),
        "clients": options.clients,
        "image": f"JPEG, {options.side}x{options.side}",
        "others": before,
        **measured,
    }
    for name, value in row.items():
        print(f"{name:>16}  {value}")
    document = {"machine": facts, "serving": row}
    print(results.write(options.file or results.file_for(facts, "serving"), document))
    if options.file is None:
        report.update(PAGE, "serving", "\n".join(markdown(document)))
        print(PAGE)
    return 1 if row["errors"] else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.campaigns.serving", description=__doc__
    )
    add = found.add_argument
    add("--run", type=Path, help="Run folder (default: an untrained model).")
    add("--seconds", type=float, default=60.0, help="Duration of the measurement, in seconds.")
    text = "Number of clients, each of which sends its requests one after another."
    add("--clients", type=int, default=8, help=text)
    add("--side", type=int, default=512, help="Side of the image that clients send, in pixels.")
    add("--file", type=Path, help="File to write (default: in benchmarks/results).")
    return found


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """Yield the table of tests/RELIABILITY.md."""
    row = document["serving"]
    errors = ", ".join(f"{count} {name}" for name, count in row["errors"].items()) or "none"
    growth = "unknown" if row["growth_mb"] is None else f"{row['growth_mb']:+.1f} MB"
    memory = "" if row["begin_mb"] is None else f" of {row['begin_mb']:.0f} MB"
    yield f"{report.machine_line(document['machine'])}; {row['run']}; {row['image']}."
    yield ""
    yield "| clients | seconds | images | images/s | p50 | p99 | longest | errors | memory grew by |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---|---:|"
    times = " | ".join(f"{row[name]:.0f} ms" for name in ("p50_ms", "p99_ms", "max_ms"))
    counts = (
        f"{row['clients']} | {row['seconds']:.0f} | {row['images']} | {row['images_per_s']:.1f}"
    )
    yield f"| {counts} | {times} | {errors} | {growth}{memory} |"


def toy(folder: Path) -> Path:
    """Write a run with random weights, which do not change the times."""
    model = mx.MSFlow("efficientnet_lite0", image_size=192, pretrained=False, seed=0)
    header = {"model": "MSFlow", "config": model.config, "colours": [0.0, 1.0]}
    save_checkpoint(folder / "model.safetensors", header, model)
    return folder


def image(side: int) -> bytes:
    """Return smooth noise as a JPEG, which takes about as long to decode as a photo."""
    noise = np.random.default_rng(0).integers(0, 255, (side // 8 + 1, side // 8 + 1, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(written, "JPEG")
    return written.getvalue()


@contextmanager
def service(run: Path) -> Iterator[str]:
    """Run ``msflow serve`` in a separate process, and yield its address."""
    command = [sys.executable, "-m", "msflow_ext", "serve", "--run", str(run), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "MSFLOW_TOKEN"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        log = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,))
        try:
            if found is None:
                raise SystemExit(f"the service did not start: {line}{process.stderr.read()}")
            log.start()
            yield found[0]
        finally:
            process.terminate()
            if log.ident is not None:
                log.join()  # read the whole log before the pipe is closed
    if process.returncode:
        raise SystemExit(f"the service ended with status {process.returncode}")


@dataclass
class Tally:
    """Times and errors that all clients add to."""

    milliseconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def drive(url: str, clients: int, seconds: float, body: bytes) -> dict[str, Any]:
    """Measure latency, throughput, errors and memory of the service, after a warm-up of one second."""
    _ask(url, clients, 1.0, body)
    memory = resident_mb(url)
    start = time.perf_counter()
    tally = _ask(url, clients, seconds, body)
    took, end = time.perf_counter() - start, resident_mb(url)
    if len(tally.milliseconds) < 2:
        raise SystemExit(f"fewer than two images were scored: {dict(tally.errors)}")
    hundredths = statistics.quantiles(tally.milliseconds, n=100, method="inclusive")
    return {
        "seconds": round(took, 1),
        "images": len(tally.milliseconds),
        "images_per_s": round(len(tally.milliseconds) / took, 2),
        "p50_ms": round(hundredths[49], 1),
        "p99_ms": round(hundredths[98], 1),
        "max_ms": round(max(tally.milliseconds), 1),
        "errors": dict(tally.errors),
        "begin_mb": memory,
        "growth_mb": None if memory is None or end is None else round(end - memory, 1),
    }


def resident_mb(url: str) -> float | None:
    """Return the resident memory of the service from its metrics, or None if unknown."""
    text = httpx.get(f"{url}metrics").text
    found = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
    return round(float(found[1]) / 1e6, 1) if found else None


def _ask(url: str, clients: int, seconds: float, body: bytes) -> Tally:
    tally, end = Tally(), time.perf_counter() + seconds

    def one() -> None:
        with httpx.Client(timeout=60) as client:
            while (start := time.perf_counter()) < end:
                try:
                    answer = client.post(f"{url}predict", content=body)
                    problem = "" if answer.status_code == 200 else str(answer.status_code)
                except httpx.HTTPError as error:
                    problem = type(error).__name__
                if problem:
                    tally.errors[problem] += 1
                else:
                    tally.milliseconds.append((time.perf_counter() - start) * 1e3)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


if __name__ == "__main__":
    sys.exit(main())
