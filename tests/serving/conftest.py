"""What the tests of the service share: the checkpoint that they serve."""

from __future__ import annotations

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
