"""An evaluation compares the scores and maps of all images with their labels and masks."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import metrics
from msflow_ext.data import Images, Item
from msflow_ext.evaluation import Truth, evaluate, measure
from msflow_ext.features import Features

SIZE = 16


class Brightness(nn.Module):
    """Model whose map is the red channel, and whose score is the sum of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))

    def features(self, images: Tensor) -> list[Tensor]:
        return [images[:, :1]]


def predict(features: Sequence[Tensor]) -> SimpleNamespace:
    (levels,) = features
    assert not torch.is_grad_enabled()
    return SimpleNamespace(score=levels.sum((1, 2, 3)), anomaly_map=levels[:, 0])


def noisy(count: int, *, good: int) -> Images:
    """Return images of noise; all but the first few have a brighter, marked square."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(count):
        image, mask = rng.integers(0, 160, (SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), bool)
        mask[4:10, 3:9] = i >= good
        image[mask] += np.uint8(60)
        items.append(Item(str(i), int(i >= good), "scar" if i >= good else "good", image, mask))
    return Images(items, SIZE)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("cache", ["memory", "off"])
def test_scores_and_maps_are_in_the_order_of_the_images(batch_size, cache):
    images = noisy(7, good=3)
    features = Features(Brightness(), images, cache=cache)
    found = evaluate(predict, features, Truth.of(images), batch_size)
    maps = np.stack([images[i][0].numpy() for i in range(7)])
    np.testing.assert_array_equal(found.maps, maps)
    np.testing.assert_allclose(found.scores, maps.sum((1, 2)), rtol=1e-5)
    assert found.maps.dtype == np.float32
    assert found.metrics == measure(Truth.of(images), found.scores, found.maps).metrics


def test_every_metric_equals_that_of_its_function():
    images = noisy(8, good=4)
    truth = Truth.of(images)
    assert truth.labels is not None and truth.masks is not None
    np.testing.assert_array_equal(truth.labels, [False] * 4 + [True] * 4)
    assert (truth.labels.dtype, truth.masks.dtype) == (bool, bool)
    scores = np.random.default_rng(1).random(8)
    maps = np.stack([images[i][0].numpy() for i in range(8)])
    found = measure(truth, scores, maps)
    assert found.metrics == pytest.approx(
        {
            "image_auroc": metrics.auroc(truth.labels, scores),
            "image_average_precision": metrics.average_precision(truth.labels, scores),
            "image_f1_max": metrics.f1_max(truth.labels, scores),
            "pixel_auroc": metrics.auroc(truth.masks, maps),
            "pixel_average_precision": metrics.average_precision(truth.masks, maps),
            "pixel_f1_max": metrics.f1_max(truth.masks, maps),
            "aupro": metrics.aupro(truth.masks, maps),
            "aupro_0.05": metrics.aupro(truth.masks, maps, 0.05),
            "aupimo": metrics.aupimo(truth.masks, maps),
        },
        rel=1e-12,
    )
    assert len(set(found.metrics.values())) == 9
    np.testing.assert_array_equal(found.aupimo, metrics.aupimo_per_image(truth.masks, maps))
    for name, curve in (("pixel_roc", metrics.roc_curve), ("pro", metrics.pro_curve)):
        for ours, expected in zip(found.curves[name], curve(truth.masks, maps), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_without_masks_only_image_metrics_are_computed():
    images = noisy(6, good=3)
    labels = Truth.of(images).labels
    found = measure(Truth(labels, None), np.arange(6.0), np.zeros((6, SIZE, SIZE), np.float32))
    known = {name for name, value in found.metrics.items() if value is not None}
    assert known == {"image_auroc", "image_average_precision", "image_f1_max"}
    assert (found.aupimo, found.curves) == (None, {})


@pytest.mark.family("masks")
@pytest.mark.parametrize("mask", ["narrow", "empty"])
def test_a_defective_image_is_never_a_normal_image_of_aupimo(mask):
    """A narrow mask counts, and an empty one excludes the image."""
    items = list(noisy(8, good=4).items)
    marks = np.zeros((SIZE * 11, SIZE * 11), bool)
    marks[20:150, 17] = mask == "narrow"
    image = np.full(marks.shape, 255, np.uint8)  # the highest values of all images
    images = Images([*items, Item("scratch", 1, "scar", image, marks)], SIZE)
    truth = Truth.of(images)
    maps = np.stack([images[i][0].numpy() for i in range(9)])
    found, rest = measure(truth, maps.mean((1, 2)), maps), Images(items, SIZE)
    expected = measure(Truth.of(rest), maps[:8].mean((1, 2)), maps[:8])
    assert found.aupimo is not None and expected.aupimo is not None
    np.testing.assert_array_equal(found.aupimo[:8], expected.aupimo)
    assert np.isnan(found.aupimo[8]) if mask == "empty" else found.aupimo[8] == 1


def test_images_of_one_class_have_no_ground_truth():
    good, defective = (Truth.of(noisy(3, good=count)) for count in (3, 0))
    assert (good.labels, good.masks, defective.labels) == (None, None, None)
    assert defective.masks is not None  # its pixels are of both classes


def test_one_unknown_label_or_mask_makes_all_unknown():
    known, unlabeled = noisy(4, good=2).items, Item("x", None, "", np.zeros((4, 4), np.uint8))
    unmarked = Item("y", 1, "scar", np.zeros((4, 4), np.uint8))
    truth = Truth.of(Images([*known, unlabeled], SIZE))
    assert (truth.labels, truth.masks) == (None, None)
    truth = Truth.of(Images([*known, unmarked], SIZE))
    np.testing.assert_array_equal(truth.labels, [False, False, True, True, True])
    assert truth.masks is None
    truth = Truth.of(Images([], SIZE))
    assert (truth.labels, truth.masks) == (None, None)


@pytest.mark.parametrize("where", ["score", "map"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_error_names_the_image_with_a_score_or_map_that_is_not_finite(where, value):
    images = noisy(5, good=2)

    def failing(features: Sequence[Tensor]) -> SimpleNamespace:
        found = predict(features)
        bright = images[3][0].sum()
        row = (found.score - bright).abs().argmin()
        if (found.score[row] - bright).abs() < 1e-3:
            (found.score if where == "score" else found.anomaly_map[:, 2, 5])[row] = value
        return found

    features = Features(Brightness(), images, cache="off")
    with pytest.raises(FloatingPointError, match="score or map of image 3 is not finite"):
        evaluate(failing, features, Truth.of(images), batch_size=2)


def test_the_map_of_a_padded_image_is_cropped_to_the_image():
    image = np.random.default_rng(0).integers(100, 255, (8, SIZE), np.uint8)
    images = Images([Item("wide", 0, "good", image)], SIZE, fit="pad")
    found = evaluate(predict, Features(Brightness(), images), Truth(None, None))
    levels = torch.from_numpy(image / 255)[None, None].float()
    expected = F.interpolate(levels, size=(SIZE, SIZE), mode="bilinear")[0]
    np.testing.assert_allclose(found.maps, expected, atol=1e-6)
