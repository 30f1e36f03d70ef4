"""The examples in the docstrings of the package give the results that they print."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import msflow_ext
from msflow_ext import ops

PACKAGE = Path(msflow_ext.__file__).parent
ELSEWHERE = PACKAGE / "compat/anomalib.py"  # tests/compat/test_anomalib.py gives it its images
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != ELSEWHERE and ">>> " in path.read_text("utf-8")
]
NEEDS = {
    "msflow_ext.compat.accelerate": "FrEIA",
    "msflow_ext.compat.torchmetrics": "torchmetrics",
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.usefixtures("folder", "one_thread")
@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_examples_give_the_printed_results(name: str) -> None:
    if package := NEEDS.get(name):
        pytest.importorskip(package)
    torch.manual_seed(0)
    found = doctest.testmod(import_module(name))
    assert found.failed == 0
    assert found.attempted > 0


def test_every_public_op_has_an_example() -> None:
    functions = [getattr(ops, name) for name in ops.__all__ if name[0].islower()]
    without = [each.__name__ for each in functions if ">>> " not in (each.__doc__ or "")]
    assert not without
