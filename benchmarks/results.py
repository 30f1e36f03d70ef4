"""The files of results: one JSON document per machine and day, a row per case and number of threads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ACCURACY, BULK, SERVING, SOAK = "accuracy-", "bulk-", "serving-", "soak-"


def file_for(facts: dict[str, Any]) -> Path:
    """Where rows of this machine and day belong: processors of one name may have other instructions."""
    widest = facts["flags"][-1:]
    name = " ".join((facts["cpu"], *widest, f"{facts['cores']}c", facts["date"][:10]))
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def times() -> list[dict[str, Any]]:
    """All documents of times, by the date inside; accuracies and the like have files of their own."""
    others = (ACCURACY, BULK, SERVING, SOAK)
    paths = (path for path in FOLDER.glob("*.json") if not path.name.startswith(others))
    return sorted(map(read, paths), key=lambda document: document["machine"]["date"])


def newest() -> dict[str, Any]:
    """The times that were measured last."""
    found = times()
    if not found:
        raise SystemExit(f"no results in {FOLDER}: run python -m benchmarks first")
    return found[-1]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def add(path: Path, facts: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row, in the place of an older one of the same case and threads; each says its commit and date."""
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
