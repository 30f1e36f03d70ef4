"""The page of questions and errors quotes errors that the package still raises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import msflow_ext

PAGE = Path(__file__).parents[2] / "docs" / "faq.md"
SOURCES = sorted(Path(msflow_ext.__file__).parent.rglob("*.py"))
QUOTED = [
    fragment.strip()
    for quoted in re.findall(r"\*\*([^*]+)\*\*", PAGE.read_text("utf-8"))
    for code in re.findall(r"`([^`]+)`", quoted)
    if " " in code and not code.startswith("-")
    for fragment in code.split("...")
    if fragment.strip()
]


@pytest.fixture(scope="module")
def sources() -> str:
    """The package's sources; texts that are split over lines are joined."""
    text = "\n".join(path.read_text("utf-8") for path in SOURCES)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("fragment", QUOTED)
def test_a_quoted_error_is_raised_by_the_package(fragment: str, sources: str) -> None:
    assert fragment in sources


def test_the_page_quotes_errors() -> None:
    assert len(QUOTED) > 8
