"""Fixtures of the service's tests: a checkpoint, and the command in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from msflow_ext.evaluation.calibration import Calibration


@pytest.fixture(scope="package")
def run(untrained_run) -> Path:
    """The checkpoint of an untrained model with thresholds."""
    values = np.linspace(-1e3, 0, 20)
    return untrained_run(
        colours=[0.5, 2.0],
        recipe={"false_alarms": 0.1},
        calibration=vars(Calibration.of(values, values[:, None, None])),
    )


@pytest.fixture
def command(run) -> Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """Return ``command("--grace", "1")``, which starts the service and yields its process and address."""
    return partial(_command, run)


@contextmanager
def _command(
    run: Path, *flags: str, token: str = "", script: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    words = ["-c", script] if script else ["-m", "msflow_ext"]
    words += ["serve", "--run", str(run), "--port", "0", "--device", "cpu", *flags]
    with subprocess.Popen(
        [sys.executable, "-W", "error", *words],
        cwd=run,  # away from the sources, which would shadow the installed package
        env={**os.environ, "OMP_NUM_THREADS": "1", "MSFLOW_TOKEN": token},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        line = process.stderr.readline()
        found = re.search(r"https?://127\.0\.0\.1:\d+/", line)
        try:
            assert found, line + process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()
