"""Format tables of text with aligned columns, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], *, left: int = 1, between: str = "  ") -> list[str]:
    """Pad the cells of each column to one width, and return a line per row.

    Args:
        rows: rows with the same number of cells. A header is a row like any other.
        left: number of columns, from the first, that are aligned left. The others are aligned right.
        between: text between two columns.

    Raises:
        ValueError: the rows have different numbers of cells.

    Examples:
        >>> rows = [("images", "good", "crack"), ("train", "209", "0"), ("test", "20", "63")]
        >>> print("\\n".join(text_table(rows)))
        images  good  crack
        train    209      0
        test      20     63
    """
    rows = list(rows)
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"rows must have the same number of cells, got {[len(row) for row in rows]}"
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return between.join(cells).rstrip()

    return [line(row) for row in rows]


def one_line(text: str) -> str:
    r"""Escape characters that cannot be printed: line breaks, and bytes of a name that are not Unicode.

    Examples:
        >>> print(one_line("a\nb.png"))
        a\nb.png
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
