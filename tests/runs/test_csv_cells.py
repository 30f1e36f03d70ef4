"""Cells of CSV are read back unchanged, and no spreadsheet runs one as a formula."""

from __future__ import annotations

import csv
import io
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msflow_ext.runs.csv_cells import csv_line, csv_rows, whole_lines

pytestmark = pytest.mark.family("score tables")
TEXT = st.text(st.characters() | st.sampled_from("'=+-@\t\r\n\",; \x85\u2028\udcff"), max_size=8)
DANGEROUS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", " =1")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=4))
@example([["'=1", "''=1"], ["a\r", "\r\n"], ["it's", " '=1"], ['"', '""']])
def test_any_text_is_read_back_unchanged(rows):
    assert csv_rows("".join(map(csv_line, rows))) == rows


def test_file_names_that_are_not_unicode_are_read_back_unchanged():
    name = os.fsdecode(b"Gr\xf6\xdfe\r.png")
    content = csv_line([name, 1]).encode("utf-8", "surrogateescape")
    ((read, _),) = csv_rows(content.decode("utf-8", "surrogateescape"))
    assert os.fsencode(read) == b"Gr\xf6\xdfe\r.png"


@pytest.mark.parametrize("text", [*DANGEROUS, *(f"'{text}" for text in DANGEROUS)])
def test_text_never_begins_like_a_formula_and_numbers_are_unchanged(text):
    line = csv_line([text, -0.5, None])
    ((cell, number, nothing),) = csv.reader(io.StringIO(line, newline=""))
    assert cell == f"'{text}"
    assert (number, nothing) == ("-0.5", "")


@pytest.mark.parametrize("text", ["a;=1+1", "a\t=1+1", "a|b", "a\rb", "a\u2028b"])
def test_a_cell_with_a_separator_of_another_program_is_quoted(text):
    assert csv_line([text]) == f'"{text}"\n'


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(["a\nb", "c"])
def test_a_truncated_last_line_is_omitted(names):
    lines = [csv_line([name, 1]).encode("utf-8", "surrogatepass") for name in names]
    content = b"".join(lines)
    for end in range(len(content) + 1):
        whole = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
        assert whole_lines(content[:end]) == max([0, *(n for n in whole if n <= end)])


def test_text_that_is_not_csv_is_refused():
    with pytest.raises(ValueError, match="it is not CSV"):
        csv_rows('"a"b\n')
