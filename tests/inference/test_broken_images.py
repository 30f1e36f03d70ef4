"""An image that cannot be scored stops a prediction, or gets a result with its error, as ``on_error`` says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext.inference.detector import Detector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("broken images")]
GOOD = ("b.png", "d.png", "f.png")
BROKEN = {"a.png": b"\x89PNG\r\n\x1a\n", "c.png": b"", "e.png": b"no image", "g.png": None}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Good and broken images in turn; ``g.png`` is truncated. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(GOOD):
        noise = np.random.default_rng(i).integers(0, 255, (64, 70), np.uint8)
        Image.fromarray(noise).save(folder / name)
    whole = (folder / "b.png").read_bytes()
    for name, content in BROKEN.items():
        (folder / name).write_bytes(whole[:-2000] if content is None else content)
    return folder


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("tile", [False, True])
def test_every_image_has_a_result_and_good_ones_have_their_score(
    detector, photos, batch_size, tile
):
    results = detector.predict(photos, batch_size=batch_size, tile=tile, on_error="skip")
    assert [result.name for result in results] == sorted([*GOOD, *BROKEN])
    for result in results:
        assert (result.error is None) == (result.name in GOOD)
        if result.error is None:
            (alone,) = detector.predict(photos / result.name, tile=tile)
            assert result.score == pytest.approx(alone.score, rel=1e-5)
            assert np.allclose(result.map, alone.map, rtol=1e-4, atol=1e-5)
        else:
            assert str(photos / result.name) in result.error
            assert math.isnan(result.score)
            assert (result.label, result.p_value, result.mask) == (None, None, None)
            assert (result.map.shape, result.image.shape) == ((0, 0), (0, 0, 3))


@pytest.mark.parametrize("tile", [False, True])
def test_by_default_the_first_error_is_raised_after_the_results_before_it(detector, photos, tile):
    found = detector.stream([photos / "b.png", photos / "e.png", photos / "d.png"], tile=tile)
    assert next(found).name.endswith("b.png")
    with pytest.raises(ValueError, match=r"e\.png is not an image"):
        next(found)


def test_an_image_deleted_during_the_prediction_has_an_error(detector, photos, tmp_path):
    gone = tmp_path / "gone.png"
    gone.write_bytes((photos / "b.png").read_bytes())

    def source() -> Iterator[Path]:
        yield photos / "b.png"
        yield gone
        gone.unlink()
        yield photos / "d.png"

    first, lost, last = detector.predict(source(), batch_size=4, on_error="skip")
    assert lost.error == f"{gone} is not a file"
    assert first.error is last.error is None


@pytest.mark.parametrize("where", ["score", "map"])
def test_a_score_or_map_that_is_not_finite_is_an_error_of_its_image_only(
    detector, photos, monkeypatch, where
):
    score = Detector._score

    def spoilt(self, images):
        scores, maps = score(self, images)
        if where == "score":
            scores[1] = math.nan
        else:
            maps[1, 3, 4] = math.inf
        return scores, maps

    monkeypatch.setattr(Detector, "_score", spoilt)
    paths = [photos / name for name in GOOD]
    results = detector.predict(paths, on_error="skip")
    wrong = f"score or map of image {paths[1]} is not finite"
    assert [result.error for result in results] == [None, wrong, None]
    with pytest.raises(FloatingPointError, match="is not finite"):
        detector.predict(paths)


def test_an_array_or_tensor_of_another_dtype_or_shape_is_an_error_of_its_image(detector):
    sources = [np.zeros((4, 4)), torch.zeros(3, 9, 9), np.zeros((64, 64), np.uint8)]
    first, second, third = detector.predict(sources, on_error="skip")
    assert first.error is not None and "got float64" in first.error
    assert second.error is not None and "image 1: a tensor must have shape" in second.error
    assert third.error is None


def test_errors_that_concern_no_single_image_are_always_raised(detector, photos, tmp_path):
    with pytest.raises(TypeError, match="source must be a path"):
        detector.predict([photos / "b.png", 7], on_error="skip")
    with pytest.raises(ValueError, match="holds no images"):
        detector.predict(tmp_path, on_error="skip")
    with pytest.raises(ValueError, match="on_error must be one of skip, stop, got 'ignore'"):
        detector.predict(photos, on_error="ignore")


@pytest.mark.family("score tables")
@pytest.mark.parametrize("option", ["batch_size", "workers"])
@pytest.mark.parametrize("value", [2.0, "2", None, np.float32(1)])
def test_a_count_that_is_not_a_whole_number_is_refused(detector, photos, option, value):
    with pytest.raises(TypeError, match=f"{option} must be a whole number, got "):
        detector.predict(photos / "b.png", **{option: value})
    assert len(detector.predict(photos / "b.png", **{option: np.int64(1)})) == 1


@pytest.mark.family("score tables")
def test_images_of_the_same_name_in_two_folders_are_named_with_their_folder(detector, tmp_path):
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    left, right = tmp_path / "left", tmp_path / "right"
    names = [result.name for result in detector.predict([left, str(right)])]
    assert names == [f"{left}/0.png", f"{right}/0.png"]
    assert [result.name for result in detector.predict(left)] == ["0.png"]
