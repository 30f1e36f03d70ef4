"""The command ``bench``."""

from __future__ import annotations

from typing import Any

from msflow_ext.cli.flags import add_threads
from msflow_ext.cli.parser import number


def bench(options: Any) -> int:
    """Measure flows, the whole pipeline and a training step against alternatives on this machine."""
    from msflow_ext.bench import compare

    for line in compare(options.threads, seconds=options.seconds, tiny=options.tiny):
        print(line, flush=True)
    return 0


def bench_flags(part: Any) -> None:
    add_threads(part)
    part.add_argument(
        "--seconds",
        type=number,
        default=20.0,
        metavar="SECONDS",
        help="Measuring time of each comparison, in seconds.",
    )
    part.add_argument("--tiny", action="store_true", help="Measure toy sizes, to try the command.")
