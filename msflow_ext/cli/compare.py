"""The command ``compare``."""

from __future__ import annotations

from typing import Any


def compare(options: Any) -> int:
    """Compare finished runs on the same test images: metrics, settings, and images they disagree on."""
    from msflow_ext.reports import comparison
    from msflow_ext.runs.results import read_runs

    runs = read_runs(options.runs)
    comparison.write_comparison(options.out, runs)
    print("\n".join((*comparison.lines(runs), "", options.out)))
    return 0


def compare_flags(part: Any) -> None:
    part.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="Run folders to compare; differences are relative to the first.",
    )
    part.add_argument(
        "--out", default="comparison.html", metavar="FILE", help="HTML page to write."
    )
