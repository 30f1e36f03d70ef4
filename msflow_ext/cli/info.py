"""The command ``info``."""

from __future__ import annotations

import json
from typing import Any


def info(options: Any) -> int:
    """Print the installed versions, and the backend of each op with the reason for it."""
    from msflow_ext import testing

    print(json.dumps(testing.info(), indent=2))
    if not options.check:
        return 0
    rows = testing.check()
    wrong = [row for row in rows if not row[1] <= row[2]]
    for case, error, bound in wrong:
        print(f"WRONG {case}: relative error {error:.1e}, tolerance {bound:.1e}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} kernel runs agree with their reference")
    return 1 if wrong else 0


def info_flags(part: Any) -> None:
    text = "Compare every kernel with its reference; the exit status is 1 if one is wrong."
    part.add_argument("--check", action="store_true", help=text)
