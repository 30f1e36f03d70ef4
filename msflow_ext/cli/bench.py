"""The command ``bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msflow_ext.cli.flags import add_threads

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def bench(options: Any) -> int:
    """Measure flows, pipeline and a training step against the alternatives on this machine."""
    from msflow_ext.bench import compare

    for line in compare(options.threads, seconds=options.seconds, tiny=options.tiny):
        print(line, flush=True)
    return 0


def bench_flags(part: ArgumentParser) -> None:
    add_threads(part)
    part.add_argument("--seconds", type=float, default=20.0, help="of timing each comparison")
    part.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works")
