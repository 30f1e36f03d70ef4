"""Test a model on labeled images: scores, maps, exact metrics and their curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext import metrics
from msflow_ext.data import Images
from msflow_ext.features import Features


@dataclass(frozen=True)
class Truth:
    """Ground truth of a test set.

    Attributes:
        labels: ``(N,)`` bool, True for defective. None if a label is unknown or all are of one class.
        masks: ``(N, S, S)`` bool, True for defective. None if a mask is unknown or all pixels are of
            one class.

    Examples:
        >>> truth = Truth(labels=np.array([False, True]), masks=None)
        >>> measure(truth, np.array([0.1, 0.9]), np.zeros((2, 4, 4))).metrics["image_auroc"]
        1.0
    """

    labels: np.ndarray | None
    masks: np.ndarray | None

    @classmethod
    def of(cls, images: Images) -> Truth:
        """Read the labels and masks of images.

        Raises:
            ValueError: a mask does not fit its image.
        """
        labels = [item.label for item in images.items]
        return cls(_known(labels), _known([images.mask(i) for i in range(len(images))]))


@dataclass(frozen=True)
class Evaluation:
    """Scores, maps and metrics of a test set, in the order of its images.

    Attributes:
        scores: ``(N,)``.
        maps: ``(N, S, S)`` float32. A map covers exactly the image, resized to a square.
        metrics: value of each metric, None where it is undefined, see :func:`evaluate`.
        aupimo: AUPIMO of each image, ``(N,)``, NaN for good ones; None without masks.
        curves: ``pixel_roc`` and ``pro``, if there are masks: false-positive rates, and the rates
            found at them.

    Examples:
        >>> Evaluation(np.zeros(2), np.zeros((2, 4, 4), np.float32), {"image_auroc": None}).curves
        {}
    """

    scores: np.ndarray
    maps: np.ndarray
    metrics: dict[str, float | None]
    aupimo: np.ndarray | None = None
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    predict: Callable[[Sequence[Tensor]], Any],
    features: Features,
    truth: Truth,
    batch_size: int = 8,
) -> Evaluation:
    """Score every image of ``features``, and compare with the ground truth.

    If several processes evaluate together, each scores its share of the images. The first one returns
    the metrics of all images; the others return no metrics.

    Args:
        predict: function of a batch of features, which returns an object with ``score (N,)`` and
            ``anomaly_map (N, S, S)``, such as ``model.predict_features``.
        features: features of the test images.
        truth: ground truth of the same images with fit ``"resize"``. Maps of padded images are
            cropped and resized to it, so that metrics do not depend on the fit.
        batch_size: images per call of ``predict``.

    Returns:
        Scores, maps and metrics. Metrics are fractions: ``image_auroc``,
        ``image_average_precision``, ``image_f1_max``, the same three with ``pixel_``, ``aupro`` and
        ``aupro_0.05`` (up to a false-positive rate of 0.3 and 0.05), and ``aupimo``. A metric is None
        if its labels or masks are. ``aupimo`` needs both: the labels select its normal images.

    Raises:
        FloatingPointError: a score or a map is not finite; the message names its image.

    Examples:
        >>> from msflow_ext import FastFlow
        >>> from msflow_ext.data import Item
        >>> photos = np.random.default_rng(0).integers(0, 255, (2, 64, 64), np.uint8)
        >>> images = Images([Item(str(i), i, "", photo) for i, photo in enumerate(photos)], 64)
        >>> model = FastFlow("test_resnet", image_size=64, pretrained=False, steps=1)
        >>> found = evaluate(model.predict_features, Features(model, images), Truth.of(images))
        >>> found.scores.shape, found.maps.shape
        ((2,), (2, 64, 64))
    """
    ranks = features.ranks
    with ranks.agreed():
        scores, maps = _scored(predict, features, batch_size)
    scores, maps = (ranks.gather(rows, len(features)) for rows in (scores, maps))
    with ranks.agreed():
        if ranks.first:
            return measure(truth, scores, maps)
    return Evaluation(scores, maps, {})


def measure(truth: Truth, scores: np.ndarray, maps: np.ndarray) -> Evaluation:
    """Return the evaluation of given scores and maps, with the metrics of :func:`evaluate`.

    Args:
        truth: ground truth of the images.
        scores: ``(N,)``.
        maps: ``(N, S, S)``.

    Examples:
        >>> masks = np.zeros((2, 4, 4), bool)
        >>> masks[1, :2] = True
        >>> truth = Truth(labels=np.array([False, True]), masks=masks)
        >>> measure(truth, np.array([0.1, 0.9]), masks.astype(np.float32)).metrics["pixel_auroc"]
        1.0
    """
    known = _compare("image", truth.labels, scores) | _compare("pixel", truth.masks, maps)
    known |= dict.fromkeys(("aupro", "aupro_0.05", "aupimo"))
    if truth.masks is None:
        return Evaluation(scores, maps, known)
    curves = {
        "pixel_roc": metrics.roc_curve(truth.masks, maps),
        "pro": metrics.pro_curve(truth.masks, maps),
    }
    known["aupro"] = metrics.area_up_to(0.3, *curves["pro"])
    known["aupro_0.05"] = metrics.area_up_to(0.05, *curves["pro"])
    each = None
    if truth.labels is not None:
        each = metrics.aupimo_per_image(truth.masks, maps, labels=truth.labels)
        known["aupimo"] = float(np.nanmean(each))
    return Evaluation(scores, maps, known, each, curves)


def _scored(
    predict: Callable[[Sequence[Tensor]], Any], features: Features, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores ``(N,)`` and maps ``(N, S, S)`` of this process's share of the images."""
    own, size = features.own.tolist(), features.images.size
    scores, maps = np.empty(len(own)), np.empty((len(own), size, size), np.float32)
    done = 0
    for batch in features.batches(batch_size):
        found = predict(batch)
        here = slice(done, done := done + len(batch[0]))
        scores[here], maps[here] = found.score.cpu(), found.anomaly_map.cpu()
    if features.images.fit == "pad":
        for i, each in zip(own, maps, strict=True):
            cut = torch.from_numpy(each[features.images.box(i)])[None, None]
            each[:] = F.interpolate(cut, size=(size, size), mode="bilinear")[0, 0]
    for i, score, each in zip(own, scores, maps, strict=True):
        if not np.isfinite(each.sum() + score):
            name = features.images.items[i].name
            raise FloatingPointError(f"score or map of image {name} is not finite")
    return scores, maps


def _compare(level: str, truth: np.ndarray | None, found: np.ndarray) -> dict[str, float | None]:
    judges = (metrics.auroc, metrics.average_precision, metrics.f1_max)
    return {
        f"{level}_{judge.__name__}": None if truth is None else judge(truth, found)
        for judge in judges
    }


def _known(values: Sequence[int | np.ndarray | None]) -> np.ndarray | None:
    if not values or any(value is None for value in values):
        return None
    truth = np.array(values, dtype=bool)
    return truth if truth.any() and not truth.all() else None
