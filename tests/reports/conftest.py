"""Fixtures that write a report and read it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msflow_ext.reports import run_report

GRAY = np.full((24, 24, 3), 120, np.uint8)
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """A parsed page: checks that tags are closed in order, and keeps each text with its tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self, tag: str, **expected: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and expected.items() <= a.items()]

    def within(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]


@pytest.fixture(scope="session")
def a_run() -> Callable[..., run_report.ReportedRun]:
    """Return ``a_run(seconds=1.0)``: three good and three defective images of two kinds, with one mistake of each class."""
    return _a_run


@pytest.fixture(scope="session")
def page_of() -> Callable[[run_report.ReportedRun, Path], tuple[Page, str]]:
    """Return ``page_of(a_run(), folder)``: a run's report, parsed and as text."""
    return _page_of


def _a_run(**changes: Any) -> run_report.ReportedRun:
    picture = (GRAY, np.linspace(0.0, 2.0, 24 * 24).reshape(24, 24), None)
    run = run_report.ReportedRun(
        title="brick",
        metrics={"image_auroc": 0.98765, "pixel_auroc": 0.5, "aupro": None},
        best={"image_auroc": 0.99, "pixel_auroc": 0.6, "aupro": None},
        epochs=3,
        seconds=125.0,
        names=["good/0", "good/1", "good/2", "scar/0", "scar/1", "blob/0"],
        defects=["good", "good", "good", "scar", "scar", "blob"],
        labels=[0, 0, 0, 1, 1, 1],
        scores=[0.1, 0.6, 0.2, 0.5, 0.9, 0.8],
        losses=[1.0, 0.5, 0.25],
        pictures=[picture] * 6,
        colours=(0.1, 2.0),
        facts={
            "recipe": {"blocks": (2, 5, 8), "bf16": False, "padding_mode": None, "lr": 1e-4},
            "versions": {"torch": "2.15.0"},
        },
    )
    return dataclasses.replace(run, **changes)


def _page_of(run: run_report.ReportedRun, folder: Path) -> tuple[Page, str]:
    run_report.write_report(folder / "report.html", run)
    html = (folder / "report.html").read_text("utf-8")
    return Page(html), html
