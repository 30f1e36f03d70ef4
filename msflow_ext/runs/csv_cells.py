"""CSV lines that no spreadsheet runs as formulas, written and read back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

Cell = str | int | float | None

# A spreadsheet runs a cell that begins like this as a formula (OWASP, "CSV injection").
_FORMULA = re.compile("'*(\\s*[=+\\-@＝＋－＠]|[\t\r\n])")
_PLAIN = re.compile(r"[\w./ -]*")  # needs no quotes for any reader


def csv_line(cells: Iterable[Cell]) -> str:
    r"""Return one line of CSV, from which :func:`csv_rows` reads the same cells as text.

    Text that begins with ``=``, ``+``, ``-`` or ``@`` (also after spaces), a tab or a line break gets an apostrophe before
    it. Text is quoted if it has other characters than letters, digits, spaces and ``._/-``.

    Examples:
        >>> csv_line(["=1+1.png", 'a"b', -0.5, None])
        '"\'=1+1.png","a""b",-0.5,\n'
    """
    return ",".join(map(_written, cells)) + "\n"


def csv_rows(text: str) -> list[list[str]]:
    r"""Return the cells of each line that :func:`csv_line` wrote, as text.

    Raises:
        ValueError: the text is not CSV.

    Examples:
        >>> csv_rows('"\'=1+1.png","a""b",-0.5,\n')
        [['=1+1.png', 'a"b', '-0.5', '']]
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"it is not CSV: {error}") from None
    return [[_read(cell) for cell in row] for row in rows]


def whole_lines(content: bytes) -> int:
    """Return the number of bytes of CSV in complete lines, without a truncated last line.

    A line break inside quotes does not end a line.
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
