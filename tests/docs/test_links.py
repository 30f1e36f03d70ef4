"""Every link between pages of the documentation, and every file of the repository that a page names, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]
FOLDERS = [path.name for path in ROOT.iterdir() if path.is_dir()]
CODE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def links(text: str) -> set[str]:
    """The targets of the links and pictures of a page, without those on other hosts."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", CODE.sub("", text)))
    return {link for link in found if "://" not in link and not link.startswith("mailto:")}


def anchors(page: Path) -> set[str]:
    """The anchors that headings get, as MkDocs and the forge make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text("utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def broken(page: Path, text: str) -> set[str]:
    """The links of a page that lead nowhere."""
    found = set()
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        at_hand = target.suffix == ".md" and target.is_file()
        if not target.exists() or (anchor and at_hand and anchor not in anchors(target)):
            found.add(link)
    return found


def missing(text: str) -> set[str]:
    """The files in backticks that begin with a folder of the repository and do not exist."""
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", CODE.sub("", text))
    return {
        path
        for path in named
        if path.split("/")[0] in FOLDERS and "NAME" not in path and not (ROOT / path).exists()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not broken(page, text)
    assert not missing(text)


def test_links_and_files_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = """# A page: `of` three links
[there](#a-page-of-three-links) [not](#elsewhere) [no page](none.md) [far](https://example.org/none)
`docs/architecture.md` `docs/none.md` `other/none.md` `[no](link)`
"""
    page.write_text(text, encoding="utf-8")
    assert broken(page, text) == {"#elsewhere", "none.md"}
    assert missing(text) == {"docs/none.md"}
