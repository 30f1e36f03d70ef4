"""Large images are scored in tiles, without the thresholds of whole images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext.evaluation.calibration import Calibration
from msflow_ext.inference.detector import Detector


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_an_image_of_exactly_one_tile_is_scored_like_a_whole_image(detector):
    image = _noise(64, 64, 3)
    (whole,), (tiled,) = detector.predict(image), detector.predict(image, tile=True)
    assert tiled.score == whole.score
    assert np.array_equal(tiled.map, whole.map)
    assert np.array_equal(tiled.image, whole.image)


@pytest.mark.parametrize("shape", [(64, 65), (100, 150), (128, 128), (30, 40), (20, 130), (1, 1)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 64, 0.25])
def test_with_tiles_map_mask_and_image_have_the_size_of_the_file(
    detector, tmp_path, shape, overlap
):
    Image.fromarray(_noise(*shape)).save(tmp_path / "image.png")
    judging = Detector(detector.model, threshold=0.0, pixel_threshold=0.0)
    (found,) = judging.predict(tmp_path / "image.png", tile=True, overlap=overlap, batch_size=3)
    assert found.mask is not None
    assert found.map.shape == found.mask.shape == shape
    assert found.map.dtype == np.float32
    assert np.array_equal(found.image, np.dstack([_noise(*shape)] * 3))
    assert found.label == int(found.score > 0.0)


def test_the_score_is_the_largest_of_the_tiles_and_their_maps_are_joined(detector):
    image = _noise(64, 192, 3)
    parts = detector.predict([image[:, i : i + 64] for i in (0, 64, 128)])
    (found,) = detector.predict(image, tile=True, overlap=0)
    assert found.score == pytest.approx(max(part.score for part in parts), rel=1e-6)
    expected = np.hstack([part.map for part in parts])
    np.testing.assert_allclose(found.map, expected, rtol=1e-5, atol=1e-6)


def test_images_of_several_sizes_are_scored_in_tiles(detector):
    images = [_noise(64, 64 + 16 * i, 3) for i in range(5)]
    found = detector.predict(images, tile=True, batch_size=2)
    assert [result.name for result in found] == [f"image {i}" for i in range(5)]
    for image, result in zip(images, found, strict=True):
        assert np.array_equal(result.image, image)
        (alone,) = detector.predict(image, tile=True, batch_size=2)
        assert result.score == alone.score


def test_a_tensor_is_cut_into_tiles_like_the_equal_array(detector):
    image = _noise(70, 90, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    (from_array,), (from_tensor,) = (detector.predict(x, tile=True) for x in (image, tensor))
    assert from_tensor.score == from_array.score
    assert np.array_equal(from_tensor.map, from_array.map)
    assert np.array_equal(from_tensor.image, from_array.image)
    for wrong in (torch.zeros(1, 70, 90), torch.zeros(3, 0, 9), torch.zeros(3, 9, 9).byte()):
        with pytest.raises(ValueError, match=r"image 0: a tensor must be \(3, H, W\)"):
            detector.predict(wrong, tile=True)


def test_thresholds_of_whole_images_are_not_used_for_tiles(detector):
    scores = [0.0, 1.0]
    options = {"threshold": 0.5, "pixel_threshold": 0.5, "calibration": Calibration(scores, scores)}
    judging = Detector(detector.model, **options)
    (whole,), (tiled,) = (judging.predict(_noise(64, 64), tile=tile) for tile in (False, True))
    assert None not in (whole.label, whole.p_value)
    assert whole.mask is not None
    assert (tiled.label, tiled.p_value, tiled.mask) == (None, None, None)


@pytest.mark.parametrize("overlap", [-0.1, 1, float("nan")])
def test_an_overlap_out_of_range_is_refused(detector, overlap):
    with pytest.raises(ValueError, match="overlap must be at least 0 and below 1"):
        detector.predict(_noise(64, 64), tile=True, overlap=overlap)
