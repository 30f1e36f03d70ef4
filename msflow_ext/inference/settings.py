"""The settings that scores depend on: which detector, which batches, which tiles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from msflow_ext.choices import Precision
from msflow_ext.inference.detector import Detector, load
from msflow_ext.inference.result import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """The settings of ``msflow predict`` that scores, labels and maps depend on.

    Attributes:
        batch_size, tile, overlap: see :meth:`msflow_ext.inference.Detector.predict`.
        precision, false_alarms: see :func:`msflow_ext.load`.
        threshold: images with a larger score get label 1; None for the run's threshold.

    Raises:
        ValueError: ``false_alarms`` is given with ``tile``: a run has rates of whole images only.
    """

    batch_size: int = 8
    tile: bool = False
    overlap: float = 0.25
    precision: Precision | None = None
    threshold: float | None = None
    false_alarms: float | None = None

    def __post_init__(self) -> None:
        if self.tile and self.false_alarms is not None:
            raise ValueError(
                f"--false-alarms must not be given with --tile, got {self.false_alarms:g}: the rate "
                "holds for whole images only. Use --threshold SCORE for tiles"
            )

    def load(self, run: str, device: str | None = None) -> Detector:
        """Load the detector of a run; for tiles without its thresholds, which hold for whole images."""
        detector = load(run, device, false_alarms=self.false_alarms, precision=self.precision)
        if self.tile and detector.calibration:
            log.info(
                "the run's thresholds hold for whole images: tiles get no label, p-value or mask"
            )
            detector.threshold = detector.pixel_threshold = detector.calibration = None
        if self.threshold is not None:
            detector.threshold = self.threshold
        return detector

    def stream(self, detector: Detector, source: Any, **options: Any) -> Iterator[Result]:
        """Yield the results one by one, see :meth:`msflow_ext.inference.Detector.stream`."""
        chosen = {"batch_size": self.batch_size, "tile": self.tile, "overlap": self.overlap}
        return detector.stream(source, **chosen, **options)
