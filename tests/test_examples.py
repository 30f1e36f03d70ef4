"""The examples in the docstrings of ops, flows, features and metrics give the results that they print."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

from msflow_ext import ops

MODULES = ("activations", "features", "flows", "metrics", "testing")
OPS = (f"ops.{module.name}" for module in pkgutil.iter_modules(ops.__path__))


@pytest.mark.parametrize("name", [*MODULES, *(name for name in OPS if name != "ops._C")])
def test_examples_give_the_printed_results(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(import_module(f"msflow_ext.{name}")).failed == 0


def test_every_public_op_has_an_example() -> None:
    functions = [getattr(ops, name) for name in ops.__all__ if name[0].islower()]
    without = [each.__name__ for each in functions if ">>> " not in (each.__doc__ or "")]
    assert not without
