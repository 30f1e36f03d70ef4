"""docs/deploy.md agrees with the service."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from starlette.routing import Route

import msflow_ext as mx
from msflow_ext import cli
from msflow_ext.serving import Limits, application
from msflow_ext.serving.answers import Answer

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    """Return the code in the first column of the table below a heading."""
    section = PAGE.partition(f"\n{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table
    return [c for row in table[0].splitlines() for c in re.findall("`([^`]+)`", row.split("|")[1])]


def test_the_page_describes_every_field_of_an_answer():
    assert sorted(first_cells("### The answer")) == sorted(Answer.model_fields)


def test_the_page_lists_every_path_of_the_service():
    service = application(mx.inference.Detector(None))  # pyright: ignore[reportArgumentType]
    routes = [route for route in service.routes if isinstance(route, Route)]
    paths = {f"{method} {route.path}" for route in routes for method in route.methods or ()}
    assert set(first_cells("## HTTP")) == paths


def test_the_page_lists_every_limit_with_its_default():
    options = vars(cli.parser().parse(["serve", "--run", "runs/mine"]))
    shown = dict(re.findall(r"^\| `--([\w-]+)` \| (\d+) \|", PAGE, re.MULTILINE))
    limits = {name.replace("_", "-"): options[name] for name in vars(Limits())}
    assert {name: float(value) for name, value in shown.items()} == limits
