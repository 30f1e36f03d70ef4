"""Lines of CSV whose cells no spreadsheet runs as a formula, and the cells read back from them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

Cell = str | int | float | None

# A spreadsheet runs a cell that begins so as a formula (OWASP, "CSV injection").
_FORMULA = re.compile("'*(\\s*[=+\\-@＝＋－＠]|[\t\r\n])")
_PLAIN = re.compile(r"[\w./ -]*")  # what every reader takes as it is


def csv_line(cells: Iterable[Cell]) -> str:
    r"""Return one line of CSV; :func:`csv_rows` gives the same cells back as text.

    Text that begins with ``=``, ``+``, ``-`` or ``@`` (also after spaces), a tab or a line break is written with an
    apostrophe before it. Text of more than letters, digits, spaces and ``._/-`` stands in quotes.

    >>> csv_line(["=1+1.png", 'a"b', -0.5, None])
    '"\'=1+1.png","a""b",-0.5,\n'
    """
    return ",".join(map(_written, cells)) + "\n"


def csv_rows(text: str) -> list[list[str]]:
    r"""Return the cells of each line that :func:`csv_line` wrote, numbers as text.

    >>> csv_rows('"\'=1+1.png","a""b",-0.5,\n')
    [['=1+1.png', 'a"b', '-0.5', '']]

    Raises:
        ValueError: the text is no CSV.
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from None
    return [[_read(cell) for cell in row] for row in rows]


def whole_lines(content: bytes) -> int:
    """Return how many bytes of CSV are whole lines: a last line that was cut off is not counted.

    A line break inside quotes ends no line.
    """
    end = content.rfind(b"\n") + 1
    while content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    return end


def _written(cell: Cell) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else str(cell)
    text = f"'{cell}" if _FORMULA.match(cell) else cell
    return text if _PLAIN.fullmatch(text) else '"' + text.replace('"', '""') + '"'


def _read(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
