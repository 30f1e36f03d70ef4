"""Score images with a trained model, however they come: a file, a folder, an array."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import msflow_ext
from msflow_ext.checkpoint import CHECKPOINT, read_checkpoint, restore
from msflow_ext.data import Images, Item
from msflow_ext.data.images import Box
from msflow_ext.data.items import SUFFIXES
from msflow_ext.decisions import Calibration
from msflow_ext.features import decoded


@dataclass(frozen=True)
class Result:
    """What a detector says of one image.

    Attributes:
        name: path of the image, in a folder relative to it; ``image 0``, ``image 1``, ... if it has none.
        score: the larger the more anomalous.
        label: 1 if the score exceeds the detector's threshold, else 0; None without a threshold.
        p_value: how rare such a score is among normal images, in (0, 1], see
            :class:`msflow_ext.decisions.Calibration`; None if training held none out.
        map: ``(S, S)`` float32, the larger the more anomalous; the padding of a detector with fit
            ``"pad"`` is cut off, here and below.
        mask: ``(S, S)`` bool, where the map exceeds the pixel threshold; None without one.
        image: ``(S, S, 3)`` uint8, RGB: what the model saw.
    """

    name: str
    score: float
    label: int | None
    p_value: float | None
    map: np.ndarray
    mask: np.ndarray | None
    image: np.ndarray


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    false_alarms: float | None = None,
) -> Detector:
    """Load a detector from a run folder, or from a checkpoint file.

    It has thresholds if its training held normal images out (``Recipe(hold_out=...)``).

    Args:
        path: what training wrote; an unfinished run gives the model of its last checkpoint.
        device: where to compute; by default on the GPU if there is one.
        false_alarms: share of normal images that may exceed the thresholds; by default the recipe's.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint, or a damaged one; ``false_alarms`` for a model without held-out
            images, or with too few of them.
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    header, tensors = read_checkpoint(path)
    kind = getattr(msflow_ext, str(header.get("model")), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{path} holds a model {header.get('model')!r}, unknown to this version")
    try:
        model = kind(**header["config"], pretrained=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration builds no {kind.__name__}: {error}") from error
    restore(path, tensors, model)
    recipe, held_out = header.get("recipe", {}), header.get("calibration")
    if false_alarms is not None and not held_out:
        raise ValueError(f"{path} knows no rate of false alarms: its training held no images out")
    calibration = Calibration(**held_out) if held_out else None
    rate = recipe.get("false_alarms") if false_alarms is None else false_alarms
    return Detector(
        model.eval().to(pick_device(device)),
        threshold=calibration.threshold(rate) if calibration else None,
        pixel_threshold=calibration.pixel_threshold(rate) if calibration else None,
        calibration=calibration,
        colours=header.get("colours"),
        fit=recipe.get("fit", "resize"),
    )


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """``device``, or the GPU if there is one, else the CPU; ValueError if it is not here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not available: {reason}") from None


class Detector:
    """A trained model that takes images as they come.

    Args:
        model: as training made it.
        threshold: images that score higher are labelled 1; None for no labels.
        pixel_threshold: pixels above it make the mask; None for no masks.
        calibration: what held-out normal images scored, for p-values; None for none.
        colours: the range of map values that the run's heat maps show; None if not known.
        fit: how images become square, see :class:`msflow_ext.data.Images`.
    """

    def __init__(
        self,
        model: Any,
        *,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
        calibration: Calibration | None = None,
        colours: Sequence[float] | None = None,
        fit: str = "resize",
    ) -> None:
        self.model = model
        self.threshold = threshold
        self.pixel_threshold = pixel_threshold
        self.calibration = calibration
        self.colours = colours
        self.fit = fit

    def predict(self, source: Any, *, batch_size: int = 8, workers: int = 2) -> list[Result]:
        """Score one image or many.

        Args:
            source: a file; a folder, searched with all its folders; a PIL image; an array ``(H, W)``
                or ``(H, W, 3)`` as :func:`msflow_ext.data.load_image` takes it; a float tensor
                ``(3, S, S)`` or ``(N, 3, S, S)``, RGB in 0..1, of the model's size; or an iterable of these.
            batch_size: images per call of the model.
            workers: threads that decode images.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: a file that is no image, a folder without images, a wrong shape.
            TypeError: a source of another type.
            FloatingPointError: a score or a map is not finite; its image is named.
        """
        return list(self.stream(source, batch_size=batch_size, workers=workers))

    def stream(self, source: Any, *, batch_size: int = 8, workers: int = 2) -> Iterator[Result]:
        """As :meth:`predict`, one result after the other: of a large folder, little is in memory."""
        if batch_size < 1 or workers < 1:
            raise ValueError(
                f"batch_size and workers must be 1 or more, got {batch_size}, {workers}"
            )
        names: deque[str] = deque()

        def chunks() -> Iterator[list[tuple[str, Any]]]:
            images = _images_of(source)
            while chunk := list(islice(images, batch_size)):
                names.extend(name for name, _ in chunk)
                yield chunk

        device = next(self.model.parameters()).device
        for chunk in decoded(self._decode, chunks(), workers):
            with torch.inference_mode():
                found = self.model(torch.stack([pixels for pixels, _ in chunk]).to(device))
            maps = found.anomaly_map.float().cpu().numpy()
            for (pixels, box), score, each in zip(chunk, found.score.tolist(), maps, strict=True):
                image = to_pixels(pixels)
                yield self._result(names.popleft(), score, each[box], image[box])

    def _decode(self, named: tuple[str, Any]) -> tuple[Tensor, Box]:
        """The square that the model sees, and where in it the image is."""
        name, image = named
        size = self.model.image_size
        if not isinstance(image, Tensor):
            images = Images((Item(name, None, "", image),), size, self.fit)
            return images[0], images.box(0)
        if image.shape != (3, size, size) or not image.is_floating_point():
            raise ValueError(
                f"{name}: a tensor must be (3, {size}, {size}) of floating point, "
                f"got {tuple(image.shape)} of {image.dtype}"
            )
        return image.float(), (slice(0, size), slice(0, size))

    def _result(self, name: str, score: float, each: np.ndarray, image: np.ndarray) -> Result:
        if not np.isfinite(each.sum() + score):
            raise FloatingPointError(f"score or map of image {name} is not finite")
        label = None if self.threshold is None else int(score > self.threshold)
        mask = None if self.pixel_threshold is None else each > self.pixel_threshold
        p_value = None if self.calibration is None else self.calibration.p_value(score)
        return Result(name, score, label, p_value, each, mask, image)


def to_pixels(image: Tensor) -> np.ndarray:
    """``(3, H, W)`` float in 0..1 as ``(H, W, 3)`` uint8."""
    return (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def _images_of(source: Any, numbers: Iterator[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every image in ``source`` with its name: a path, an array or a tensor."""
    from PIL import Image

    numbers = count() if numbers is None else numbers
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        folder = Path(source)
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"{folder} holds no images ({', '.join(s[1:] for s in SUFFIXES)})")
        yield from ((path.relative_to(folder).as_posix(), path) for path in found)
    elif isinstance(source, (str, Path)):
        yield str(source), Path(source)
    elif isinstance(source, Image.Image):
        yield f"image {next(numbers)}", _pixels(source)
    elif isinstance(source, (np.ndarray, Tensor)) and source.ndim != 4:
        yield f"image {next(numbers)}", source
    elif isinstance(source, Iterable):
        for one in source:
            yield from _images_of(one, numbers)
    else:
        raise TypeError(
            "source must be a path, a PIL image, an array, a tensor or an iterable of these, "
            f"got {type(source).__name__}"
        )


def _pixels(image: Any) -> np.ndarray:
    """A PIL image as an array that :func:`msflow_ext.data.load_image` reads without loss."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return np.asarray(upright).astype(np.uint16)
    return np.asarray(upright if upright.mode in ("I", "F") else upright.convert("RGBA"))
