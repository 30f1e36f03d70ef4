"""Test a model on labelled images: scores, maps, exact metrics and the curves behind them."""

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
    """What is known of a test set: ``labels (N,)`` and ``masks (N, S, S)``, bool.

    Each is None where one of them is unknown, or all are of one class: then nothing can be measured.
    """

    labels: np.ndarray | None
    masks: np.ndarray | None

    @classmethod
    def of(cls, images: Images) -> Truth:
        """Read all masks; ValueError if one does not fit its image."""
        labels = [item.label for item in images.items]
        return cls(_known(labels), _known([images.mask(i) for i in range(len(images))]))


@dataclass(frozen=True)
class Evaluation:
    """Scores ``(N,)``, maps ``(N, S, S)`` float32 and metrics of a test set, in the order of its images.

    A map is of the whole image and nothing else, as are the images and masks of fit ``"resize"``.
    Of a set with masks also the AUPIMO of each image, ``(N,)`` with NaN for the good ones, and the
    curves ``pixel_roc`` and ``pro``, each rates of false positives and what is found at them.
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
    """Score every image of ``features`` and compare with the truth.

    Args:
        predict: from features to something with ``score (N,)`` and ``anomaly_map (N, S, S)``,
            such as the ``predict_features`` of a model.
        truth: of the same images with fit ``"resize"``. Of padded images the maps are cut back and
            stretched to the square, so that an image counts the same whatever its fit and aspect.

    The metrics are fractions: ``image_auroc``, ``image_average_precision``, ``image_f1_max``, the
    same three for ``pixel``, ``aupro`` and ``aupro_0.05`` (up to a false-positive rate of 0.3 and
    0.05), and ``aupimo``; None where the truth is, ``aupimo`` also without labels of both classes:
    its normal images are those labelled so, whatever their masks hold.
    Of several processes each scores its own images, and the first one measures them all; the others
    return theirs without metrics.

    Raises:
        FloatingPointError: a score or a map is not finite; its image is named.
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
    """The evaluation of scores and maps that are there."""
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
    """Scores ``(N,)`` and maps ``(N, S, S)`` of this process's own images."""
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
