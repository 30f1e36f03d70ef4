"""A result as a picture: in Python, in a file and in a notebook."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import msflow_ext as mx
from msflow_ext.reports import heat_maps


@pytest.fixture(scope="module")
def result(run: Path) -> mx.Result:
    """Of a white square on gray noise, twice as wide as high."""
    pixels = np.random.default_rng(0).integers(90, 110, (32, 64, 3), dtype=np.uint8)
    pixels[8:24, 8:24] = 255
    detector = mx.load(run, "cpu")
    detector.threshold, detector.pixel_threshold = 0.0, 1.0
    (found,) = detector.predict(pixels)
    return found


@pytest.fixture
def failed() -> mx.Result:
    return mx.Result.failed("<b>.png", ValueError("<b>.png is empty"))


def test_the_heat_map_is_that_of_a_report_in_the_aspect_of_the_image(result: mx.Result) -> None:
    picture, shown = result.heat_map(), result.shown()
    assert (picture.mode, picture.size) == ("RGB", (64, 32))
    assert result.colour_range == (0.5, 2.0)  # of the run
    expected = heat_maps.heat_map(shown.image, shown.map, low=0.5, high=2.0, mask=shown.mask)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    bare = replace(result, mask=None).heat_map(alpha=0)
    assert np.array_equal(np.asarray(bare), shown.image)


def test_a_run_that_knows_no_colours_has_those_of_the_map(result: mx.Result) -> None:
    own = replace(result, colours=None)
    assert own.colour_range == heat_maps.colour_range([result.map])
    own.heat_map()


def test_a_picture_is_saved_whole_in_a_folder_that_is_made(
    result: mx.Result, tmp_path: Path
) -> None:
    for name, kind in {"a.png": "PNG", "b.JPG": "JPEG", "c.jpeg": "JPEG", "d.webp": "WEBP"}.items():
        path = result.save(tmp_path / "new" / name)
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == (kind, (64, 32))
    with Image.open(result.save(str(tmp_path / "new" / "a.png"))) as picture:  # again
        assert np.array_equal(np.asarray(picture), np.asarray(result.heat_map()))
    assert len(list((tmp_path / "new").iterdir())) == 4  # and nothing else


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt", ".png"])
def test_another_suffix_is_refused(result: mx.Result, name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    expected = f"path must end in .png, .jpg, .jpeg, .webp, got {path!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        result.save(path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(result: mx.Result, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        result.save(tmp_path / "file" / "x.png")


def test_an_image_that_was_not_scored_has_no_picture(failed: mx.Result, tmp_path: Path) -> None:
    for draw in (
        failed.heat_map,
        lambda: failed.colour_range,
        lambda: failed.save(tmp_path / "x.png"),
    ):
        with pytest.raises(ValueError, match=r"must be of a scored image, got the error: <b>\.png"):
            draw()
    assert not list(tmp_path.iterdir())
    assert failed._repr_html_() == "<p><b>&lt;b&gt;.png</b>: &lt;b&gt;.png is empty</p>"


def test_a_notebook_shows_the_picture_and_the_escaped_name(result: mx.Result) -> None:
    html = replace(result, name='<script>"&', p_value=0.123456, score=1.23456)._repr_html_()
    assert "<b>&lt;script&gt;&quot;&amp;</b>: score 1.23, label 1, p-value 0.123<" in html
    found = re.search(r"data:image/png;base64,([\w+/=]+)", html)
    assert found
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(result.heat_map()))


def test_what_an_interpreter_prints_is_one_short_line(
    result: mx.Result, failed: mx.Result, run: Path
) -> None:
    known = replace(result, name="a.png", score=1.23456, p_value=0.0123456)
    said = "Result('a.png', score=1.23, label=1, p_value=0.0123, size=(32, 64))"
    assert repr(known) == said
    bare = replace(known, label=None, p_value=None)
    assert repr(bare) == "Result('a.png', score=1.23, size=(32, 64))"
    assert repr(failed) == "Result('<b>.png', error='<b>.png is empty')"
    model = "MSFlow('test_efficientnet', image_size=64)"
    detector = mx.load(run, "cpu")
    assert repr(detector) == f"Detector({model}, fit='resize', device='cpu')"
    detector.threshold, detector.false_alarms = 1.23456, 0.05
    end = "threshold=1.23, false_alarms=0.05)"
    assert repr(detector) == f"Detector({model}, fit='resize', device='cpu', {end}"
