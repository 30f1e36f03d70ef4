"""Score images with a trained model: files, folders, arrays and tensors."""

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

#: Errors that a single image can cause: it is damaged, missing, too large or of another type, or scores NaN.
OF_ONE_IMAGE = (ArithmeticError, MemoryError, OSError, TypeError, ValueError)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    false_alarms: float | None = None,
    precision: Precision | None = None,
) -> Detector:
    """Load a detector from a run folder or a checkpoint file.

    It has thresholds if training held out normal images (``Recipe(hold_out=...)``).

    Args:
        path: run folder or checkpoint file. An unfinished run gives the model of its last checkpoint.
        device: device to compute on. Default: the GPU if there is one, else the CPU.
        false_alarms: share of normal images that may exceed the thresholds. Default: the recipe's.
        precision: ``"float32"`` or ``"bfloat16"`` for an optimized model, ``model.optimize(dtype)``:
            its first call is slower, later calls are faster. Default: the model as it was trained.

    Raises:
        FileNotFoundError: ``path`` has no checkpoint.
        ValueError: ``path`` is not a checkpoint or is damaged; ``false_alarms`` is given but training
            held out no images, or too few; ``precision`` is unknown.

    Examples:
        >>> detector = load("runs/mine")
        >>> [result.name for result in detector.predict("photos")]
        ['large.jpg', 'small.png']
        >>> sensitive = load("runs/mine", false_alarms=0.3)  # finds more defects, and more false alarms
        >>> sensitive.threshold <= detector.threshold
        True
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    stored = read_stored(path)
    if false_alarms is not None and not stored.calibration:
        raise ValueError(
            f"false_alarms must be None for {path}, got {false_alarms:g}: its training held out no "
            "images. Train with --hold-out SHARE (Recipe(hold_out=...)) for thresholds"
        )
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
    """A trained model with its thresholds, which scores images of any size and source.

    Several threads may use one detector at once.

    On a GPU, repeated batch shapes are replayed as CUDA graphs
    (:class:`msflow_ext.inference.cuda_graphs.Replayed`; not run on a GPU yet). A replay uses new
    weights, but it ignores later changes of settings such as ``model.score``.

    Args:
        model: trained model, such as :class:`msflow_ext.MSFlow`.
        threshold: images with a larger score get label 1; None for no labels.
        pixel_threshold: pixels with a larger map value form the mask; None for no masks.
        calibration: scores of held-out normal images, for p-values; None for no p-values.
        colours: range of map values that the run's heat maps show; None if unknown.
        false_alarms: share of normal images that may exceed the thresholds; None if unknown.
        fit: how an image becomes square, ``"resize"`` or ``"pad"``, see :class:`msflow_ext.data.Images`.

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

        With ``tile=True``, an image is not resized. It is cut into overlapping square tiles of the
        model's input size ``S``, and padded with black where a side is shorter than ``S``. The
        image's score is the largest score of its tiles. Its map has the image's size and joins the
        maps of the tiles (:func:`msflow_ext.inference.tiling.stitch`).

        Tiles show objects at the scale of the file, so train the model on crops of that scale. The
        thresholds and p-values of a calibrated detector hold for whole images only: for tiles,
        label, mask and p-value are None. To use other thresholds for tiles, set them, and set
        ``calibration`` to None.

        Args:
            source: a file; a folder, searched with its subfolders; a PIL image; an array ``(H, W)``
                or ``(H, W, 3)`` in RGB order (OpenCV uses BGR), see
                :func:`msflow_ext.data.load_image`; a float tensor ``(3, S, S)`` or
                ``(N, 3, S, S)``, RGB in 0..1 (with ``tile=True``, of any size); or an iterable of
                these. Patterns such as ``"*.png"`` are not expanded.
            batch_size: images, or tiles of one image, per call of the model.
            workers: threads that decode images.
            tile: cut images into tiles instead of resizing them.
            overlap: minimum overlap of neighboring tiles, as a share of their side; 0 <= overlap < 1.
            on_error: ``"stop"`` raises the error of the first image that cannot be scored;
                ``"skip"`` returns a result with this ``error`` and continues.

        Returns:
            A result per image, in the order of ``source``.

        Raises:
            FileNotFoundError: a file or folder does not exist.
            ValueError: a file is not an image, a folder has no images, a shape or ``overlap`` is
                wrong, or a tensor has values outside 0..1.
            TypeError: ``source``, ``batch_size`` or ``workers`` has another type.
            FloatingPointError: a score or a map is not finite; the message names the image.

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
        """Yield each decoded image's result, or its error; the images are scored as one batch."""
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
        """Return scores and maps ``(N, S, S)`` of images ``(3, S, S)``."""
        if self._replayed.model is not self.model:
            self._replayed = Replayed(self.model)
        scores, maps = self._replayed(torch.stack(images), self._device())
        return scores.tolist(), maps.float().numpy()

    def _device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def _tiled(self, name: str, image: Any, overlap: int, batch_size: int) -> Result:
        """Return the result of an image ``(3, H, W)`` from tiles that overlap by ``overlap`` pixels."""
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
        """Return the model's square input, the image's place in it, and the image's own size."""
        name, image = named
        size = self.model.image_size
        if not isinstance(image, Tensor):
            pixels = np.array(load_image(image))
            images = Images((Item(name, None, "", pixels),), size, self.fit)
            return images[0], images.box(0), pixels.shape[:2]
        if image.shape != (3, size, size) or not image.is_floating_point():
            raise ValueError(
                f"{name}: a tensor must have shape (3, {size}, {size}) and a floating point dtype, "
                f"got {tuple(image.shape)} and {image.dtype}"
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
    """Return the result of ``work``, or the error that its image caused."""
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
