"""Files of results: one JSON document per machine and day, with a row per case and number of threads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
KINDS = ("accuracy", "bulk", "gpu", "serving", "soak")  # documents of other results than times


def file_for(facts: dict[str, Any], kind: str = "") -> Path:
    """Return the file for results of this machine and day.

    Args:
        facts: the machine. Its widest instruction set is part of the name, because processors of one name may differ.
        kind: one of ``KINDS``, or empty for times.
    """
    widest = facts["flags"][-1:]
    name = " ".join((kind, facts["cpu"], *widest, f"{facts['cores']}c", facts["date"][:10]))
    return FOLDER / f"{slug(name)}.json"


def slug(name: str) -> str:
    """Return lower-case letters and digits of a name, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def times() -> list[dict[str, Any]]:
    """Return all documents of times in the order of their dates."""
    others = tuple(f"{kind}-" for kind in KINDS)
    paths = (path for path in FOLDER.glob("*.json") if not path.name.startswith(others))
    return sorted(map(read, paths), key=lambda document: document["machine"]["date"])


def newest() -> dict[str, Any]:
    """Return the times that were measured last.

    Raises:
        SystemExit: if there are none.
    """
    found = times()
    if not found:
        raise SystemExit(f"{FOLDER} has no results; run python -m benchmarks first")
    return found[-1]


def read(path: Path) -> dict[str, Any]:
    """Return the document at ``path``."""
    # Files written before December 2026 have another name of the reference implementation.
    return json.loads(path.read_text().replace('"official', '"reference'))


def write(path: Path, document: dict[str, Any]) -> Path:
    """Write a document, and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def add(path: Path, facts: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row with its commit and date, or replace the row of the same case and threads."""
    rows = read(path)["rows"] if path.exists() else []
    keys = [(old["case"], old["threads"]) for old in rows]
    key = (row["case"], row["threads"])
    place = keys.index(key) if key in keys else len(rows)
    rows[place : place + 1] = [{**row, "commit": facts["commit"], "date": facts["date"]}]
    lines = ",\n  ".join(json.dumps(each) for each in rows)
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(f'{{"machine": {json.dumps(facts)},\n "rows": [\n  {lines}\n ]}}\n')
    part.replace(path)
