"""Make one pytest-benchmark test per case and provider of each benchmark file."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="Measure toy sizes as a trial.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test with arguments ``case`` and ``provider`` by the ``cases`` of its module."""
    module: Any = metafunc.module
    if not {"case", "provider"} <= set(metafunc.fixturenames):
        return
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(
                case,
                name,
                marks=[pytest.mark.slow] if provider.slow else [],
                id=f"{case.name}-{name}".replace(" ", "_"),
            )
            for case in module.cases(metafunc.config.getoption("--quick"))
            for name, provider in case.providers.items()
        ],
    )
