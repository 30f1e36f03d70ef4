"""Score images with a trained model, however they come: a file, a folder, an array."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msflow_ext.choices import ON_ERROR, PRECISIONS, Fit, OnError, Precision
from msflow_ext.data import Images, Item, load_image
from msflow_ext.data.images import Box, to_pixels
from msflow_ext.data.prefetch import decoded
from msflow_ext.data.sources import Named, Source, images_of, own_size
from msflow_ext.evaluation.calibration import Calibration, exceeds
from msflow_ext.hardware import pick_device
from msflow_ext.inference import tiling
from msflow_ext.inference.cuda_graphs import Replayed
from msflow_ext.inference.result import Result
from msflow_ext.inference.stored import read_stored
from msflow_ext.models.base import AnomalyModel, refuse_range
from msflow_ext.runs.checkpoint import CHECKPOINT

#: What a single image may cause: damaged, vanished, too large, of another type, a score of NaN.
OF_ONE_IMAGE = (ArithmeticError, MemoryError, OSError, TypeError, ValueError)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    false_alarms: float | None = None,
    precision: Precision | None = None,
) -> Detector:
    """Load a detector from a run folder, or from a checkpoint file.

    It has thresholds if its training held normal images out (``Recipe(hold_out=...)``).

    Args:
        path: what training wrote; an unfinished run gives the model of its last checkpoint.
        device: where to compute; by default on the GPU if there is one.
        false_alarms: share of normal images that may exceed the thresholds; by default the recipe's.
        precision: ``"float32"`` or ``"bfloat16"`` for the prepacked form, ``model.optimize(dtype)``, of
            which the first call is slower and the others are faster; by default the model as it trained.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint, or a damaged one; ``false_alarms`` for a model without held-out
            images, or with too few of them; another ``precision``.

    Examples:
        >>> detector = load("runs/mine")
        >>> [result.name for result in detector.predict("photos")]
        ['large.jpg', 'small.png']
        >>> stricter = load("runs/mine", false_alarms=0.2)  # fewer normal images are labelled 1
        >>> stricter.threshold >= detector.threshold
        True
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    stored = read_stored(path)
    if false_alarms is not None and not stored.calibration:
        raise ValueError(f"{path} knows no rate of false alarms: its training held no images out")
    calibration = stored.calibration
    rate: Any = stored.false_alarms if false_alarms is None else false_alarms
    model = stored.model.eval().to(pick_device(device))
    return Detector(
        model if precision is None else model.optimize(getattr(torch, precision)),
        threshold=calibration.threshold(rate) if calibration else None,
        pixel_threshold=calibration.pixel_threshold(rate) if calibration else None,
        calibration=calibration,
        colours=stored.colours,
        false_alarms=rate if calibration else None,
        fit=stored.fit,
    )


class Detector:
    """A trained model that takes images as they come; several threads may use one at once.

    On a GPU, batches of a shape that comes again are replayed as a CUDA graph (:class:`msflow_ext.inference.cuda_graphs.Replayed`;
    not run on a GPU yet), which shows later changes of weights only, not of settings such as ``model.score``.

    Args:
        model: as training made it.
        threshold: images that score higher are labelled 1; None for no labels.
        pixel_threshold: pixels above it make the mask; None for no masks.
        calibration: what held-out normal images scored, for p-values; None for none.
        colours: the range of map values that the run's heat maps show; None if not known.
        false_alarms: share of normal images that may exceed the thresholds; None if not known.
        fit: how images become square, see :class:`msflow_ext.data.Images`.

    Examples:
        >>> import msflow_ext as mx
        >>> model = mx.MSFlow("test_efficientnet", image_size=64, pretrained=False)
        >>> Detector(model.eval(), threshold=1.5)
        Detector(MSFlow('test_efficientnet', image_size=64), fit='resize', device='cpu', threshold=1.5)
    """

    def __init__(
        self,
        model: AnomalyModel,
        *,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
        calibration: Calibration | None = None,
        colours: Sequence[float] | None = None,
        false_alarms: float | None = None,
        fit: Fit = "resize",
    ) -> None:
        self.model = model
        self.threshold = threshold
        self.pixel_threshold = pixel_threshold
        self.calibration = calibration
        self.colours = colours
        self.false_alarms = false_alarms
        self.fit: Fit = fit
        self._replayed = Replayed(model)

    def __repr__(self) -> str:
        config = self.model.config
        known = {"threshold": self.threshold, "false_alarms": self.false_alarms}
        said = "".join(f", {key}={value:.3g}" for key, value in known.items() if value is not None)
        model = f"{type(self.model).__name__}({config['backbone']!r}, image_size={self.model.image_size})"
        return f"Detector({model}, fit={self.fit!r}, device={str(self._device())!r}{said})"

    def predict(
        self,
        source: Source,
        *,
        batch_size: int = 8,
        workers: int = 2,
        tile: bool = False,
        overlap: float = 0.25,
        on_error: OnError = "stop",
    ) -> list[Result]:
        """Score one image or many.

        With ``tile``, an image is not resized but cut into squares of the model's size ``S``, which
        overlap. Its score is the largest of theirs; its map, of the image's own size, joins theirs
        (:func:`msflow_ext.inference.tiling.stitch`). A side below ``S`` is filled up with black. The model
        then sees things as large as they are in the file: it should have been trained on pieces of
        that scale. Thresholds and p-values of a calibrated detector are of whole images and do not
        hold for tiles: label, mask and p-value are None. To judge tiles by thresholds of your own,
        set these, and ``calibration`` to None.

        Args:
            source: a file; a folder, searched with all its folders; a PIL image; an array ``(H, W)``
                or ``(H, W, 3)`` in the order RGB (OpenCV's are BGR), as
                :func:`msflow_ext.data.load_image` takes it; a float tensor ``(3, S, S)`` or
                ``(N, 3, S, S)``, RGB in 0..1, of the model's size, or with ``tile`` of any; or an
                iterable of these. Patterns such as ``"*.png"`` are not expanded.
            batch_size: images, or tiles of one image, per call of the model.
            workers: threads that decode images.
            tile: whether to cut images into tiles.
            overlap: of neighbouring tiles, as a share of their side, at least; 0 <= overlap < 1.
            on_error: ``"stop"`` to raise the error of the first image that cannot be scored, or
                ``"skip"`` to give it a result with this ``error`` and to continue.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: a file that is no image, a folder without images, a wrong shape or overlap,
                a tensor outside 0..1.
            TypeError: a source, ``batch_size`` or ``workers`` of another type.
            FloatingPointError: a score or a map is not finite; its image is named.

        Examples:
            >>> (large,) = load("runs/mine").predict("photos/large.jpg", tile=True)
            >>> large.map.shape, large.label
            ((90, 160), None)
        """
        options = {"batch_size": batch_size, "workers": workers, "tile": tile, "overlap": overlap}
        return list(self.stream(source, **options, on_error=on_error))

    def stream(
        self,
        source: Source,
        *,
        batch_size: int = 8,
        workers: int = 2,
        tile: bool = False,
        overlap: float = 0.25,
        on_error: OnError = "stop",
    ) -> Iterator[Result]:
        """Score images as :meth:`predict` does, and yield one result after the other.

        Only a few batches are in memory, however large a folder is, and ``source`` may be endless.
        Arguments and errors are those of :meth:`predict`; an error of an image is raised in its turn.

        Examples:
            >>> detector = load("runs/mine")
            >>> for result in detector.stream("photos", batch_size=1):
            ...     print(result.save(f"maps/{result.name}").name)
            large.jpg
            small.png
        """
        _check_count("batch_size", batch_size)
        _check_count("workers", workers)
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        shared = tiling.pixels_of(overlap, self.model.image_size)
        names: deque[str] = deque()

        def chunks(size: int) -> Iterator[list[Named]]:
            images = images_of(source)
            while chunk := list(islice(images, size)):
                names.extend(name for name, _ in chunk)
                yield chunk

        decode = partial(_caught, own_size if tile else self._decode)
        for chunk in decoded(decode, chunks(1 if tile else batch_size), workers):
            batch = [(names.popleft(), image) for image in chunk]
            tiled = ((name, _caught(self._tiled, name, x, shared, batch_size)) for name, x in batch)
            for name, found in tiled if tile else self._whole(batch):
                if not isinstance(found, Exception):
                    yield found
                elif on_error == "stop":
                    raise found
                else:
                    yield Result.failed(name, found)

    def _whole(self, batch: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The result of each decoded image, or its error; the images are scored together."""
        images = [image for _, image in batch if not isinstance(image, Exception)]
        scores, maps = self._score([pixels for pixels, *_ in images]) if images else ((), ())
        scored = iter(zip(scores, maps, strict=True))
        for name, image in batch:
            if isinstance(image, Exception):
                yield name, image
                continue
            (pixels, box, size), (score, each) = image, next(scored)
            seen = to_pixels(pixels)[box]
            yield name, _caught(self._result, name, score, each[box], seen, size)

    def _score(self, images: list[Tensor]) -> tuple[list[float], np.ndarray]:
        """Scores and maps ``(N, S, S)`` of images ``(3, S, S)``."""
        if self._replayed.model is not self.model:
            self._replayed = Replayed(self.model)
        scores, maps = self._replayed(torch.stack(images), self._device())
        return scores.tolist(), maps.float().numpy()

    def _device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def _tiled(self, name: str, image: Any, overlap: int, batch_size: int) -> Result:
        """The result of an image ``(3, H, W)``, from tiles that overlap by so many pixels."""
        if isinstance(image, Exception):
            raise image
        if image.is_floating_point():
            refuse_range(image, f"{name}: a tensor")
        side = self.model.image_size
        whole, inside = tiling.padded(image, side)
        height, width = whole.shape[1:]
        boxes = tiling.grid(height, width, side, overlap)
        scores: list[float] = []

        def tiles() -> Iterator[tuple[Box, np.ndarray]]:
            for first in range(0, len(boxes), batch_size):
                chunk = boxes[first : first + batch_size]
                found, maps = self._score([tiling.cut(whole, box) for box in chunk])
                scores.extend(found)
                yield from zip(chunk, maps, strict=True)

        joined = tiling.stitch(tiles(), height, width)[inside]
        judged = self.calibration is None
        size = image.shape[1], image.shape[2]
        return self._result(name, float(np.max(scores)), joined, to_pixels(image), size, judged)

    def _decode(self, named: tuple[str, Any]) -> tuple[Tensor, Box, tuple[int, int]]:
        """The square that the model sees, where in it the image is, and the image's own size."""
        name, image = named
        size = self.model.image_size
        if not isinstance(image, Tensor):
            pixels = np.array(load_image(image))
            images = Images((Item(name, None, "", pixels),), size, self.fit)
            return images[0], images.box(0), pixels.shape[:2]
        if image.shape != (3, size, size) or not image.is_floating_point():
            raise ValueError(
                f"{name}: a tensor must be (3, {size}, {size}) of floating point, "
                f"got {tuple(image.shape)} of {image.dtype}"
            )
        refuse_range(image, f"{name}: a tensor")
        return image.float(), (slice(0, size), slice(0, size)), (size, size)

    def _result(
        self,
        name: str,
        score: float,
        each: np.ndarray,
        image: np.ndarray,
        size: tuple[int, int],
        judged: bool = True,
    ) -> Result:
        if not np.isfinite(each.sum() + score):
            raise FloatingPointError(f"score or map of image {name} is not finite")
        colours = None if self.colours is None else (self.colours[0], self.colours[1])
        if not judged:
            return Result(name, score, None, None, each, None, image, size, colours=colours)
        label = None if self.threshold is None else int(exceeds(score, self.threshold))
        mask = None if self.pixel_threshold is None else exceeds(each, self.pixel_threshold)
        p_value = None if self.calibration is None else self.calibration.p_value(score)
        return Result(name, score, label, p_value, each, mask, image, size, colours=colours)


def _caught(work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work gives, or the error that its image causes."""
    try:
        return work(*arguments)
    except OF_ONE_IMAGE as error:
        return error


def _check_count(name: str, value: Any) -> None:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
