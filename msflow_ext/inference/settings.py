"""How images are scored: by which detector, and in what batches."""

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
        batch_size, tile, overlap: as :meth:`msflow_ext.inference.Detector.predict` takes them.
        precision, false_alarms: as :func:`msflow_ext.load` takes them.
        threshold: images that score higher are labelled 1; None for the run's.

    Raises:
        ValueError: ``false_alarms`` for tiles, of which a run knows no rate.
    """

    batch_size: int = 8
    tile: bool = False
    overlap: float = 0.25
    precision: Precision | None = None
    threshold: float | None = None
    false_alarms: float | None = None

    def __post_init__(self) -> None:
        if self.tile and self.false_alarms is not None:
            raise ValueError("--false-alarms is of whole images and says nothing of tiles (--tile)")

    def load(self, run: str, device: str | None = None) -> Detector:
        """The detector of a run; for tiles without the thresholds of the run, which are of whole images."""
        detector = load(run, device, false_alarms=self.false_alarms, precision=self.precision)
        if self.tile and detector.calibration:
            log.info(
                "the run's thresholds are of whole images: tiles get no label, p-value or mask"
            )
            detector.threshold = detector.pixel_threshold = detector.calibration = None
        if self.threshold is not None:
            detector.threshold = self.threshold
        return detector

    def stream(self, detector: Detector, source: Any, **options: Any) -> Iterator[Result]:
        """Results one after the other, see :meth:`msflow_ext.inference.Detector.stream`."""
        chosen = {"batch_size": self.batch_size, "tile": self.tile, "overlap": self.overlap}
        return detector.stream(source, **chosen, **options)
