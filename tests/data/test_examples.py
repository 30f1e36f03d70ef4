"""The examples in the docstrings of the data's public names run."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name", ["data", *(f"data.{part}" for part in ("check", "dataset", "decoding", "images"))]
)
def test_the_examples_of_the_docstrings_run(name):
    failed, tried = doctest.testmod(import_module(f"msflow_ext.{name}"))
    assert failed == 0
    assert tried >= 3
