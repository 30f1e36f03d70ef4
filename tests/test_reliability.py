"""The table of fault families in RELIABILITY.md lists the tests that exist."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
families = runpy.run_path(str(ROOT / "docs" / "families.py"))


def test_every_family_has_a_test() -> None:
    assert [family for family, found in families["tests"]().items() if not found] == []


def test_the_table_of_families_is_up_to_date() -> None:
    page = (ROOT / "tests" / "RELIABILITY.md").read_text(encoding="utf-8")
    assert page == families["page"](), "run python docs/families.py"


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.family('masks')\ndef test_a(): ...",
        "@pytest.mark.slow\n@pytest.mark.family('masks')\ndef test_a(): ...",
        "@pytest.mark.family('masks')\nclass TestAll:\n    def test_a(self): ...",
        "pytestmark = pytest.mark.family('masks')\ndef test_a(): ...",
        "pytestmark = [pytest.mark.slow, pytest.mark.family('masks')]\ndef test_a(): ...",
    ],
)
def test_every_form_of_mark_is_found(text: str) -> None:
    module = families["ast"].parse(text)
    assert list(families["_marked"](module)) == [("masks", "test_a")]
