"""Tables of text: cells in columns that are aligned, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], *, left: int = 1, between: str = "  ") -> list[str]:
    """Pad the cells of each column to one width and join them; return a line per row.

    >>> rows = [("images", "good", "crack"), ("train", "209", "0"), ("test", "20", "63")]
    >>> print("\\n".join(text_table(rows)))
    images  good  crack
    train    209      0
    test      20     63

    Args:
        rows: cells, as many in every row; a header is a row like any other.
        left: how many columns, counted from the first, are aligned to the left; the others, to the right.
        between: what stands between two columns.

    Raises:
        ValueError: the rows have different numbers of cells.
    """
    rows = list(rows)
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows must have one number of cells, got {[len(row) for row in rows]}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return between.join(cells).rstrip()

    return [line(row) for row in rows]


def one_line(text: str) -> str:
    r"""Escape what cannot be printed: line breaks, and what a name holds that is not Unicode.

    >>> print(one_line("a\nb.png"))
    a\nb.png
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
