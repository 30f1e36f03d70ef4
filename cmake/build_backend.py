"""Build backend: scikit-build-core's, whose output is kept in the package for ``msflow info`` where nothing compiles.

The overrides in pyproject.toml say when a wheel without kernels is made; it takes the file along.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

LOG = Path("msflow_ext/ops/compile_log.txt")


def build_wheel(*arguments: Any, **options: Any) -> str:
    try:
        with _recorded():
            return _build.build_wheel(*arguments, **options)
    finally:
        LOG.unlink(missing_ok=True)


def build_editable(*arguments: Any, **options: Any) -> str:
    with _recorded():
        wheel = _build.build_editable(*arguments, **options)
    if not wheel.endswith("none-any.whl"):  # otherwise the package in the tree keeps it
        LOG.unlink(missing_ok=True)
    return wheel


@contextmanager
def _recorded() -> Iterator[None]:
    """Write what this process and its children print into the file, and show it meanwhile."""
    ended = threading.Event()
    outputs = {fd: os.dup(fd) for fd in (1, 2)}

    def show() -> None:
        with LOG.open("rb") as shown:
            while not ended.wait(0.1):
                os.write(outputs[1], shown.read())
            os.write(outputs[1], shown.read())

    sys.stdout.flush()
    sys.stderr.flush()
    with LOG.open("wb") as log:
        showing = threading.Thread(target=show)
        showing.start()
        try:
            for fd in outputs:
                os.dup2(log.fileno(), fd)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, output in outputs.items():
                os.dup2(output, fd)
            ended.set()
            showing.join()
            for output in outputs.values():
                os.close(output)
