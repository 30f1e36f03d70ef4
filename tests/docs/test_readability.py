"""README and the pages of the documentation are easy to read: short sentences, common words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

textstat = pytest.importorskip("textstat", reason="textstat is not installed")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GRADE = 11.0  # of Flesch and Kincaid: years of school
WORDS = 30  # of a sentence

#: What is no prose, in the order in which it is taken out.
NO_PROSE = (
    r"\A---\n.*?\n---\n",  # front matter
    r"^( *)(```|~~~).*?^\1\2 *$",  # code
    r"<!--.*?-->",
    r"^#[^\n]*$",  # headings
    r"^ *\|[^\n]*$",  # tables
    r"^ *(:::|!!!|\?\?\?|--8<--)[^\n]*$",  # directives of MkDocs
    r"\{%.*?%\}",
    r"!\[[^]]*\]\([^)]*\)",  # pictures
    r"</?[a-z][^>]*>",
)


def prose(text: str) -> list[str]:
    """Return the sentences of a page in Markdown, in order; the words of links stay, and code counts as one word."""
    for pattern in NO_PROSE:
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[([^]]*)\](?:\([^)]*\)|\[[^]]*\])", r"\1", text)
    text = re.sub(r"`+[^`]+`+", "code", text)
    text = re.sub(
        r"^ *(?:[*+-]|\d+\.|>) +", "\n\n", text, flags=re.MULTILINE
    )  # each item by itself
    text = re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", text)
    text = re.sub(r"(?<=\d)[.,](?=\d)", "", text)
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\s*\n", text))
    sentences = (re.split(r"(?<=[.!?])[\"')]?\s+(?=[\"'(]?[A-Zc\d])", each) for each in paragraphs)
    return [each for parts in sentences for each in parts if words(each)]


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if any(map(str.isalnum, word))]


def grade(sentences: list[str]) -> float:
    """The Flesch-Kincaid grade; a sentence without a full stop, such as an item of a list, counts as one."""
    ended = (re.sub(r"[.!?:;,]*$", ".", each.rstrip("\"')*_")) for each in sentences)
    return float(textstat.flesch_kincaid_grade(" ".join(ended)))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_needs_no_more_than_eleven_years_of_school(page: Path) -> None:
    sentences = prose(page.read_text(encoding="utf-8"))
    if sum(map(len, map(words, sentences))) < 100:
        pytest.skip("hardly any prose")
    hard = sorted(sentences, key=lambda each: grade([each]))[-3:]
    assert grade(sentences) <= GRADE, "the hardest sentences: " + " | ".join(hard)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_sentence_has_more_than_thirty_words(page: Path) -> None:
    sentences = prose(page.read_text(encoding="utf-8"))
    long = [f"{len(words(each))}: {each}" for each in sentences if len(words(each)) > WORDS]
    assert not long, "\n".join(long)


def test_what_is_no_prose_is_not_read() -> None:
    page = """---
title: a page
---
# A heading of many words that are not counted

First sentence with [a link](https://example.org/very/long) and `some code`. It is 5.1 times
as fast. `second` begins the third!

| a table | of cells |
|---|---|

<!-- a comment -->
* **An item** without an end
* Another one.

```sh
msflow train
```
![A picture](picture.png)
"""
    assert prose(page) == [
        "First sentence with a link and code.",
        "It is 51 times as fast.",
        "code begins the third!",
        "An item without an end",
        "Another one.",
    ]


def test_hard_and_long_sentences_are_found() -> None:
    easy = ["You train it on good photos.", "It finds bad parts."]
    hard = ["Multidimensional regularisation characteristically necessitates reparametrisation."]
    assert grade(easy) < 5 < GRADE < grade(hard)
    assert len(words("One - two, `three` 4.")) == 4
