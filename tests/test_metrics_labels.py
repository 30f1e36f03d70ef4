"""Properties of AUPIMO with labels: normal images are those labelled 0, not those whose mask is empty."""

import numpy as np
import pytest
import torch

from msflow_ext import metrics

BOUNDS = 1e-3, 0.5


def maps_and_masks():
    """Return masks and maps of four images with tied scores; the last image has no defect."""
    rng = np.random.default_rng(0)
    masks = rng.random((4, 7, 6)) < 0.2
    masks[3] = False
    return masks, (rng.integers(-4, 5, masks.shape) / 2 + masks).astype(np.float32)


@pytest.mark.family("masks")
def test_the_normal_images_of_aupimo_are_those_labelled_0():
    masks, maps = maps_and_masks()
    labels = masks.any((1, 2))
    masks, maps = np.append(masks, masks[3:], 0), np.append(maps, maps[3:] + 99, 0)
    labelled = np.append(labels, True)  # a defective image without a mask
    expected = metrics.aupimo_per_image(masks[:4], maps[:4], BOUNDS)
    for each in (labelled, labelled.tolist(), torch.from_numpy(labelled).float()):
        found = metrics.aupimo_per_image(masks, maps, BOUNDS, each)
        np.testing.assert_array_equal(found, [*expected, np.nan])
    assert metrics.aupimo(masks, maps, BOUNDS, labelled) == metrics.aupimo(
        masks[:4], maps[:4], BOUNDS
    )
    assert metrics.aupimo(masks, maps, BOUNDS) < metrics.aupimo(masks, maps, BOUNDS, labelled)
    np.testing.assert_array_equal(
        metrics.aupimo_per_image(masks[:4], maps[:4], BOUNDS, labels), expected
    )


@pytest.mark.family("masks")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 0], r"labels must have shape \(4,\) and hold only 0 and 1, got \[1 1 0\]"),
        ([2, 1, 1, 0], r"labels must have shape \(4,\) and hold only 0 and 1, got"),
        ([0, 1, 1, 0], r"masks of images labelled 0 must be empty, got a defect in image 0"),
        ([1, 1, 1, 1], "maps must include a normal image for aupimo, got none"),
    ],
)
def test_aupimo_refuses_labels_that_do_not_fit(labels, message):
    masks, maps = maps_and_masks()
    with pytest.raises(ValueError, match=message):
        metrics.aupimo(masks, maps, labels=labels)
