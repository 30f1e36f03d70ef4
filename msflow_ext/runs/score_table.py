"""The table of scores, ``scores.csv``: a row for each image, written and read back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from msflow_ext.files import write_text
from msflow_ext.runs.csv_cells import csv_line, csv_rows


class Row(NamedTuple):
    """One image in a table of scores; what is not known is empty there, and None here.

    Attributes:
        name: path of the image with its suffix, ``scar/006.png``; the same in the tables of ``train``
            and of ``predict``.
        defect: kind of defect as the data set says, ``good`` where there is none; ``""`` if unknown.
        truth: what the data set says, 0 good, 1 defective.
        score: the larger the more anomalous; None if the image could not be scored.
        verdict: what the model says, 1 if the score is above the threshold, else 0.
        p_value_at_most: the conformal p-value. Of a score above all ``n`` held-out ones it is
            ``1 / (n + 1)``, however large the score: so rare or rarer.
        aupimo: of the anomaly map, for defective images with masks.
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
        ValueError: the score is not finite, or missing without an error that says why.
    """
    if not row.error and (row.score is None or not math.isfinite(row.score)):
        raise ValueError(f"rows: the score of {row.name!r} must be finite, got {row.score}")
    return csv_line(map(_known, row))


def write_scores(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a table of scores, whole or not at all. Names need not be valid Unicode.

    Raises:
        ValueError: as :func:`row_line`.
    """
    write_text(Path(path), csv_line(HEADER) + "".join(map(row_line, rows)))


def read_scores(path: str | Path, size: int | None = None) -> list[Row]:
    """Read a table of scores, or its first ``size`` bytes; also one of an older version.

    There, one column ``label`` was the truth beside a kind of defect, and the verdict elsewhere;
    the names in runs had no suffix.

    Raises:
        ValueError: the file is no such table, or damaged.
    """
    try:
        text = Path(path).read_bytes()[:size].decode("utf-8", "surrogateescape")
        header, *lines = csv_rows(text) or [[]]
        for column in ("name", "score"):
            if column not in header:
                raise ValueError(f"it has no column {column}")
        if any(len(line) != len(header) for line in lines):
            raise ValueError(f"a row has not {len(header)} cells")
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
    """A cell; a number without a value, such as NaN, is empty."""
    if isinstance(value, (str, int)) or value is None:
        return value
    return float(value) if math.isfinite(value) else None
