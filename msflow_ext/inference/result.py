"""The result of one image, in numbers and as a picture."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msflow_ext.data.images import in_aspect, resized
from msflow_ext.errors import sentence
from msflow_ext.files import replacing
from msflow_ext.reports import heat_maps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

#: Suffixes of the files that :meth:`Result.save` writes, and their formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True, repr=False)
class Result:
    """The score, label and anomaly map of one image.

    A detector with fit ``"pad"`` cuts the padding off ``map``, ``mask`` and ``image``. For an image
    scored in tiles, all three have the size ``(H, W)`` of the image.

    Attributes:
        name: path of the image, relative to the folder if the source is one folder; ``image 0``,
            ``image 1``, ... for images without a path.
        score: anomaly score; larger is more anomalous.
        label: 1 if the score exceeds the detector's threshold
            (:func:`msflow_ext.evaluation.calibration.exceeds`), else 0; None without a threshold.
        p_value: conformal p-value in (0, 1], an upper bound on the share of normal images that
            score this high, see :class:`msflow_ext.evaluation.calibration.Calibration`; None if
            training held out no images.
        map: anomaly map ``(S, S)``, float32; larger is more anomalous.
        mask: ``(S, S)``, bool: True where the map exceeds the pixel threshold; None without one.
        image: ``(S, S, 3)``, uint8, RGB: the model's input.
        size: height and width of the image file or array, in pixels.
        error: why the image could not be scored; None if it was scored. With an error, the score
            is NaN, map and image are empty, and the rest is None.
        colours: map values at the dark and at the yellow end of the run's heat maps; None if unknown.

    Examples:
        >>> import msflow_ext as mx
        >>> (result,) = mx.load("runs/mine").predict("photos/large.jpg")
        >>> result.name, result.size, result.map.shape
        ('photos/large.jpg', (90, 160), (64, 64))
        >>> result.heat_map().size  # width and height, with the aspect ratio of the image
        (64, 36)
        >>> result.save("large.png").name
        'large.png'
    """

    name: str
    score: float
    label: int | None
    p_value: float | None
    map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    image: NDArray[np.uint8]
    size: tuple[int, int]
    error: str | None = None
    colours: tuple[float, float] | None = None

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Result({self.name!r}, error={self.error!r})"
        said = {"label": self.label, "p_value": _rounded(self.p_value), "size": self.size}
        known = "".join(f", {key}={value}" for key, value in said.items() if value is not None)
        return f"Result({self.name!r}, score={_rounded(self.score)}{known})"

    @property
    def colour_range(self) -> tuple[float, float]:
        """Return the map values at the dark and at the yellow end of :meth:`heat_map`.

        They are the run's, so that heat maps of several images are comparable. If the run has none,
        they are chosen for this map.

        Raises:
            ValueError: the image could not be scored.
        """
        self._check_scored()
        return self.colours or heat_maps.colour_range([self.map])

    def heat_map(self, *, alpha: float = 0.5) -> Image.Image:
        """Return the anomaly map as colors over the image, with the outline of the mask if there is one.

        Args:
            alpha: opacity from 0 (image only) to 1 (colors only).

        Returns:
            RGB image with the aspect ratio of the original; its longer side is that of the map.

        Raises:
            ValueError: the image could not be scored, or ``alpha`` is outside 0..1.
        """
        low, high = self.colour_range
        shown = self.shown()
        return heat_maps.heat_map(
            shown.image, shown.map, low=low, high=high, alpha=alpha, mask=shown.mask
        )

    def save(self, path: str | Path, *, alpha: float = 0.5) -> Path:
        """Write :meth:`heat_map` to a file completely or not at all; an existing file is replaced.

        Args:
            path: path of the file, which ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``. Missing
                folders are created.
            alpha: see :meth:`heat_map`.

        Returns:
            ``path``.

        Raises:
            ValueError: ``path`` has another suffix, or :meth:`heat_map` raises it.
            OSError: the file cannot be written.
        """
        path = Path(path)
        kind = FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"path must end in {', '.join(FORMATS)}, got {str(path)!r}")
        picture = self.heat_map(alpha=alpha)
        with replacing(path) as temporary:
            picture.save(temporary, kind)
        return path

    def shown(self) -> Result:
        """Return a copy for display: map, mask and image have the aspect ratio of the image file.

        The longer side keeps the length of the map's longer side.
        """
        height, width = in_aspect(*self.size, max(self.map.shape))
        if self.map.shape == (height, width):
            return self
        mask = None if self.mask is None else resized(self.mask, height, width)
        each, image = (resized(values, height, width) for values in (self.map, self.image))
        return replace(self, map=each, mask=mask, image=image)

    @classmethod
    def failed(cls, name: str, error: Exception) -> Result:
        """Return the result of an image that could not be scored."""
        nothing = np.empty((0, 0), np.float32)
        image = np.empty((0, 0, 3), np.uint8)
        return cls(name, math.nan, None, None, nothing, None, image, (0, 0), sentence(error))

    def _check_scored(self) -> None:
        if self.error is not None:
            raise ValueError(f"result must be of a scored image, got the error: {self.error}")

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: the heat map, and below it score, label and p-value."""
        if self.error is not None:
            return f"<p><b>{escape(self.name)}</b>: {escape(self.error)}</p>"
        written = io.BytesIO()
        self.heat_map().save(written, "PNG")
        picture = base64.b64encode(written.getvalue()).decode()
        said = [f"score {_rounded(self.score)}"]
        said += [] if self.label is None else [f"label {self.label}"]
        said += [] if self.p_value is None else [f"p-value {_rounded(self.p_value)}"]
        return (
            f'<figure><img src="data:image/png;base64,{picture}" alt="heat map">'
            f"<figcaption><b>{escape(self.name)}</b>: {', '.join(said)}</figcaption></figure>"
        )


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
