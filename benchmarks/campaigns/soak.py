"""Measure the growth of memory and open files over many calls: ``python -m benchmarks.campaigns.soak``."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from msflow_ext import MSFlow, ops
from msflow_ext.inference.detector import Detector


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Return the number of open file descriptors of this process (Linux)."""
    return len(os.listdir("/proc/self/fd"))


def op_calls() -> Iterator[Callable[[], Any]]:
    """Yield calls of all ops in turns, without end."""
    x, vector = torch.randn(2, 8, 6, 6), torch.ones(16)
    maps = [-x[:, 0].square()]
    factors = ops.winograd_weight(torch.randn(8, 8, 3, 3), 2)
    calls: list[Callable[[], Any]] = [
        lambda: ops.affine_coupling(x, x, torch.cat((x, x), 1), vector, vector),
        lambda: ops.affine_coupling_inverse(x, x, torch.cat((x, x), 1), vector, vector),
        lambda: ops.channel_norm(x, vector[:8], vector[:8]),
        lambda: ops.half_square_norm(x),
        lambda: ops.pool_and_concatenate([x, x], (2, 2)),
        lambda: ops.upsample_and_add(x, x[..., :3, :3]),
        lambda: ops.aggregate(maps, 12),
        lambda: ops.winograd_conv2d(x, factors, vector[:8]),
        lambda: ops.winograd_weight_grad(x, x),
    ]
    while True:
        yield from calls


def predictions() -> Iterator[Callable[[], Any]]:
    """Yield predictions of the same four images, without end."""
    options = {"pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8, "seed": 1}
    detector = Detector(MSFlow("test_efficientnet", image_size=64, **options).eval())
    images = torch.rand(4, 3, 64, 64)
    while True:
        yield lambda: detector.predict(images)


def soak(calls: Iterator[Callable[[], Any]], count: int, seconds: float) -> dict[str, Any]:
    """Call until ``count`` calls or ``seconds`` have passed, and measure the growth after a tenth as a warm-up."""
    began, done = time.monotonic(), 0
    samples: list[tuple[int, int, int]] = []  # calls, bytes, files

    def share() -> float:
        return max(done / count, (time.monotonic() - began) / seconds)

    while share() < 1:
        next(calls)()
        done += 1
        if share() >= (len(samples) + 1) / 10:
            gc.collect()
            samples.append((done, resident_bytes(), open_files()))
    (_, first, files), (_, last, files_last) = samples[0], samples[-1]
    return {
        "calls": done,
        "seconds": round(time.monotonic() - began, 1),
        "resident_growth_bytes": last - first,
        "open_files_growth": files_last - files,
        "samples": samples,
    }


def main() -> None:
    from msflow_ext.bench.machine import facts

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaigns.soak", description=__doc__
    )
    parser.add_argument("--calls", type=int, default=2_000_000, help="Number of calls of ops.")
    parser.add_argument("--minutes", type=float, default=20, help="Minutes of predictions.")
    chosen = parser.parse_args()
    machine = facts()
    found = {
        "machine": machine,
        "ops": soak(op_calls(), chosen.calls, float("inf")),
        "predict": soak(predictions(), 10**12, 60 * chosen.minutes),
    }
    print(results.write(results.file_for(machine, "soak"), found))
    print(found["ops"], found["predict"])


if __name__ == "__main__":
    main()
