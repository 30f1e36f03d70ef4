"""Table of scores, ``scores.csv``, with a row for each image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from msflow_ext.files import write_text
from msflow_ext.runs.csv_cells import csv_line, csv_rows


class Row(NamedTuple):
    """Row of one image in a table of scores. Unknown values are None, and empty cells in the file.

    Attributes:
        name: path of the image with its suffix, such as ``scar/006.png``. It is the same in the tables
            of ``train`` and ``predict``.
        defect: kind of defect in the data set, ``good`` for none; ``""`` if unknown.
        truth: class in the data set, 0 for good, 1 for defective.
        score: larger for more anomalous images; None if the image could not be scored.
        verdict: decision of the model, 1 if the score is above the threshold, else 0.
        p_value_at_most: upper bound of the conformal p-value. For a score above all ``n`` held-out
            scores it is ``1 / (n + 1)``, however large the score is.
        aupimo: AUPIMO of the anomaly map, for defective images with masks.
        error: why there is no score; ``""`` if there is one.
    """

    name: str
    defect: str = ""
    truth: int | None = None
    score: float | None = None
    verdict: int | None = None
    p_value_at_most: float | None = None
    aupimo: float | None = None
    error: str = ""


HEADER = Row._fields


def row_line(row: Row) -> str:
    """Return a row as a line of the table.

    Raises:
        ValueError: the score is not finite, or is missing without an error.
    """
    if not row.error and (row.score is None or not math.isfinite(row.score)):
        raise ValueError(f"score of {row.name!r} must be finite, got {row.score}")
    return csv_line(map(_known, row))


def write_scores(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a table of scores, completely or not at all. Names need not be valid Unicode.

    Raises:
        ValueError: as in :func:`row_line`.
    """
    write_text(Path(path), csv_line(HEADER) + "".join(map(row_line, rows)))


def read_scores(path: str | Path, size: int | None = None) -> list[Row]:
    """Read a table of scores, or its first ``size`` bytes.

    Tables of older versions are read too. Their column ``label`` is the truth in rows with a kind of
    defect, and the verdict in others. Their names in runs have no suffix.

    Raises:
        ValueError: the file is damaged, or is not a table of scores.
    """
    try:
        text = Path(path).read_bytes()[:size].decode("utf-8", "surrogateescape")
        header, *lines = csv_rows(text) or [[]]
        for column in ("name", "score"):
            if column not in header:
                raise ValueError(f"it has no column {column}")
        if any(len(line) != len(header) for line in lines):
            raise ValueError(f"all rows must have {len(header)} cells")
        return [_row(dict(zip(header, line, strict=True))) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _row(cells: dict[str, str]) -> Row:
    if "label" in cells:
        cells["truth" if cells.get("defect") else "verdict"] = cells["label"]
    rate = cells.get("p_value_at_most", cells.get("p_value", ""))
    return Row(
        cells["name"],
        cells.get("defect", ""),
        _class(cells.get("truth", "")),
        _number(cells["score"]),
        _class(cells.get("verdict", "")),
        _number(rate),
        _number(cells.get("aupimo", "")),
        cells.get("error", ""),
    )


def _class(cell: str) -> int | None:
    if cell not in ("", "0", "1"):
        raise ValueError(f"truth and verdict must be 0, 1 or empty, got {cell!r}")
    return int(cell) if cell else None


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _known(value: str | float | None) -> str | int | float | None:
    """Return the content of a cell, which is empty for NaN and infinity."""
    if isinstance(value, (str, int)) or value is None:
        return value
    return float(value) if math.isfinite(value) else None
