"""The columns of a text table are aligned, whatever its cells hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msflow_ext.text_table import text_table

CELL = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=9).map(str.strip)
ROWS = st.integers(1, 4).flatmap(
    lambda columns: st.lists(st.lists(CELL, min_size=columns, max_size=columns), max_size=5)
)


@given(ROWS, st.integers(0, 5))
def test_the_cells_of_a_column_are_aligned(rows: list[list[str]], left: int) -> None:
    lines = text_table(rows, left=left, between=" | ")
    assert len(lines) == len(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells, line in zip(rows, lines, strict=True):
        assert line == line.rstrip()
        begin = 0
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            end = begin + width
            own = slice(begin, begin + len(cell)) if i < left else slice(end - len(cell), end)
            assert line.ljust(end)[own] == cell
            assert not line[begin:end].replace(cell, "", 1).strip()
            begin = end + len(" | ")


def test_columns_are_separated_by_two_spaces_and_aligned_right_by_default() -> None:
    rows = [("images", "good", "crack"), ("train", "209", "0"), ("test", "20", "")]
    assert text_table(rows) == [
        "images  good  crack",
        "train    209      0",
        "test      20",
    ]
    assert text_table([("a", "b", "1"), ("aa", "bb", "10")], left=2) == ["a   b    1", "aa  bb  10"]


def test_no_rows_give_no_lines() -> None:
    assert text_table([]) == []


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows must have the same number of cells, got \[2, 1\]"):
        text_table([("a", "b"), ("c",)])
