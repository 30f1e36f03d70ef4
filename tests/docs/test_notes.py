"""The notes keep their form: every entry has the same four lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTES = Path(__file__).parents[2] / "docs" / "notes"
LINES = ["Change", "Expected", "Measured", "Decision"]


@pytest.mark.parametrize("page", ["accuracy", "cpu", "cuda", "training", "winograd"])
def test_an_entry_says_change_expectation_measurement_and_decision(page: str) -> None:
    text = (NOTES / f"{page}.md").read_text(encoding="utf-8").partition("\n## Tables\n")[0]
    _, *entries = re.split(r"^### ", text, flags=re.MULTILINE)
    wrong = [
        entry.splitlines()[0]
        for entry in entries
        if re.findall(r"^\* \*\*(\w+):\*\* \S", entry, re.MULTILINE) != LINES
    ]
    assert entries
    assert wrong == []
