"""What a detector says of one image, in numbers and as a picture."""

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
    """What a detector says of one image.

    Attributes:
        name: path of the image; relative to the folder if the source is one folder; ``image 0``,
            ``image 1``, ... if it has none.
        score: the larger the more anomalous.
        label: the verdict, 1 if the score exceeds the detector's threshold
            (:func:`msflow_ext.evaluation.calibration.exceeds`), else 0; None without a threshold.
        p_value: how rare such a score is among normal images at most, in (0, 1], see
            :class:`msflow_ext.evaluation.calibration.Calibration`; None if training held none out.
        map: ``(S, S)`` float32, the larger the more anomalous; the padding of a detector with fit
            ``"pad"`` is cut off, here and below.
        mask: ``(S, S)`` bool, where the map exceeds the pixel threshold; None without one.
        image: ``(S, S, 3)`` uint8, RGB: what the model saw.
        size: of the image itself, ``(H, W)`` in pixels.
        error: why the image could not be scored; None if it was. With an error the score is NaN,
            map and image are empty, and the rest is None.
        colours: map values at the dark and at the yellow end of the run's heat maps; None if the run
            does not say.

    Of an image in tiles, map, mask and image have the image's own size ``(H, W)``.

    Examples:
        >>> import msflow_ext as mx
        >>> (result,) = mx.load("runs/mine").predict("photos/large.jpg")
        >>> result.name, result.size, result.map.shape
        ('photos/large.jpg', (90, 160), (64, 64))
        >>> result.heat_map().size  # in the aspect of the image: width, height
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
        """The map values at the dark and at the yellow end of :meth:`heat_map`.

        They are those of the run, so that heat maps of several images compare, else those of this map.

        Raises:
            ValueError: the image could not be scored.
        """
        self._check_scored()
        return self.colours or heat_maps.colour_range([self.map])

    def heat_map(self, *, alpha: float = 0.5) -> Image.Image:
        """Return the image with its map over it as colour, and the outline of the mask where there is one.

        Args:
            alpha: from 0, the image alone, to 1, the colours alone.

        Returns:
            An RGB image in the aspect of the original; its longer side is as long as that of the map.

        Raises:
            ValueError: the image could not be scored, or ``alpha`` is outside 0..1.
        """
        low, high = self.colour_range
        shown = self.shown()
        return heat_maps.heat_map(
            shown.image, shown.map, low=low, high=high, alpha=alpha, mask=shown.mask
        )

    def save(self, path: str | Path, *, alpha: float = 0.5) -> Path:
        """Write :meth:`heat_map` to a file, which is complete or absent; one that is there is replaced.

        Args:
            path: ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``. Missing folders are made.
            alpha: see :meth:`heat_map`.

        Returns:
            ``path``.

        Raises:
            ValueError: another suffix, or as :meth:`heat_map`. OSError: the file cannot be written.
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
        """Return the result with map, mask and image in the aspect that the image itself has.

        The longer side is as long as that of the map.
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
        """Return what a notebook shows: the heat map, and below it what :meth:`__repr__` says."""
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
