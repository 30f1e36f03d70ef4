"""In a browser, the page of the service scores dropped and chosen images, and shows results and errors."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msflow_ext import serving
from msflow_ext.inference.detector import Detector
from msflow_ext.inference.result import Result

pytestmark = pytest.mark.family("service")

# An image that the page draws itself, and a file that is not an image.
FILES = """(async () => {{
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 32;
  const drawn = await new Promise(done => canvas.toBlob(done, 'image/png'));
  const data = new DataTransfer();
  data.items.add(new File([drawn], 'plate <b>7</b>.png'));
  data.items.add(new File(['hello'], 'notes.png'));
  {}
}})()"""
DROP = FILES.format(
    "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))"
)
CHOOSE = FILES.format(
    "const f = document.getElementById('files'); f.files = data.files; f.dispatchEvent(new Event('change'))"
)
CARDS = """[...document.querySelectorAll('.card')].map(
  c => [c.className, ...[...c.querySelector('figcaption').children].map(e => e.textContent)])"""
SEEN = """[...document.querySelectorAll('.card .pictures img')].filter(i => i.offsetParent).map(
  i => [i.alt, i.naturalWidth, i.naturalHeight])"""
STATUS = "document.getElementById('status').textContent"


class Judge(Detector):
    """A model that finds the left half of every image defective, with a chosen score."""

    def __init__(self, score: float = 1.25, threshold: float | None = 1.0) -> None:
        pixels = None if threshold is None else 0.5
        super().__init__(None, threshold=threshold, pixel_threshold=pixels, colours=(0.0, 1.0))  # pyright: ignore[reportArgumentType]
        self.score = score

    def predict(self, source: Any, **_: Any) -> list[Result]:
        found = np.zeros((64, 64), np.float32)
        found[:, :32] = 1
        image = np.full((64, 64, 3), 128, np.uint8)
        rare = None if self.threshold is None else 0.02
        return [self._answer(found, image, rare)]

    def _answer(self, found: np.ndarray, image: np.ndarray, rare: float | None) -> Result:
        if self.threshold is None:
            return Result("", self.score, None, rare, found, None, image, (64, 64))
        return Result(
            "", self.score, int(self.score > 1), rare, found, found > 0.5, image, (64, 64)
        )


def cards(browser, count: int = 2) -> list[list[str]]:
    until = time.monotonic() + 20
    while len(found := browser.run(CARDS)) < count:
        assert time.monotonic() < until, found
    return found


REFUSED = ["card not-scored", "notes.png"]
REFUSED += ["not scored: the body is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP"]
EXPECTED = [
    ["card fail", "FAIL", "plate <b>7</b>.png", "score 1.250, p-value 0.020"],
    REFUSED,
]


def choose(layer: str) -> str:
    """Return the script that selects a layer."""
    return f"[...document.querySelectorAll('#layers label')].find(l => l.textContent === '{layer}').click()"


@pytest.mark.parametrize("script", [DROP, CHOOSE], ids=["drop", "choose"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_images_are_scored_and_errors_are_shown(browser, start, script, dark):
    browser.open(start(serving.application(Judge(), name="plates")), dark=dark)
    assert browser.run("document.querySelector('h1').textContent") == "plates"
    browser.run(script)
    assert cards(browser) == EXPECTED
    assert browser.run(STATUS) == "2 images: 1 FAIL, 1 not scored"
    errors = [each for each in browser.errors if "400" not in each]  # the one of the refused file
    assert not errors and len(browser.errors) == 1


def test_pass_and_fail_differ_in_word_border_and_totals(browser, start):
    judge = Judge()
    browser.open(start(serving.application(judge)))
    border = "getComputedStyle(document.querySelector('.card.{}')).borderColor"
    for score in (1.25, 0.5):
        judge.score = score
        browser.run(DROP)
        found = cards(browser, 4 if score == 0.5 else 2)
    assert [each[:2] for each in found[::2]] == [["card fail", "FAIL"], ["card pass", "PASS"]]
    assert browser.run(STATUS) == "4 images: 1 FAIL, 1 PASS, 2 not scored"
    assert browser.run(border.format("fail")) != browser.run(border.format("pass"))
    browser.run("document.getElementById('clear').click()")
    assert (browser.run(CARDS), browser.run(STATUS)) == ([], "")


def test_without_a_threshold_the_page_gives_no_verdict_and_says_how_to_get_one(browser, start):
    browser.open(start(serving.application(Judge(threshold=None))))
    text = browser.run("document.querySelector('header').textContent")
    assert "no threshold" in text and "--hold-out" in text and "cyan" not in text
    browser.run(DROP)
    assert cards(browser)[0] == ["card scored", "plate <b>7</b>.png", "score 1.250"]
    assert browser.run(STATUS) == "2 images: 1 scored, 1 not scored"
    segments = "[...document.querySelectorAll('#layers label')].map(l => l.textContent)"
    assert browser.run(segments) == ["side by side", "image", "heat map"]
    browser.open(start(serving.application(Judge())))
    assert browser.run(segments)[-1] == "outline"
    assert "at most 1, the threshold" in browser.run("document.querySelector('header').textContent")


# A picture of 32 x 32 pixels becomes one of 64 x 32 pixels.
WIDE = DROP.replace("canvas.width = canvas.height = 32", "canvas.width = 64; canvas.height = 32")


def test_an_image_and_its_heat_map_keep_their_aspect_ratio(browser, start):
    browser.open(start(serving.application(Judge())))
    browser.run(WIDE)
    cards(browser)
    name = "plate <b>7</b>.png"
    image, heat, line = ([f"{kind} of {name}", 64, 32] for kind in ("image", "heat map", "outline"))
    assert browser.run(SEEN) == [image, heat]
    for layer, expected in (("image", [image]), ("heat map", [heat]), ("outline", [line])):
        browser.run(choose(layer))
        assert browser.run(SEEN) == expected
        shown = browser.run(
            "(() => { const b = [...document.querySelectorAll('.pictures img')].find(i => i.offsetParent)"
            ".getBoundingClientRect(); return b.width / b.height })()"
        )
        assert shown == pytest.approx(2, rel=0.02)
    pixels = """(async () => { const i = document.querySelector('.card [data-layer="3"] img'); await i.decode();
      const c = document.createElement('canvas').getContext('2d'); c.drawImage(i, 0, 0);
      return [[1, 16], [12, 16], [48, 16]].map(([x, y]) => c.getImageData(x, y, 1, 1).data[1] > 120) })()"""
    assert browser.run(pixels) == [True, False, False]  # cyan only at the edge of the left half


def test_a_picture_is_enlarged_by_click_and_by_key(browser, start):
    browser.open(start(serving.application(Judge())))
    browser.run(DROP)
    cards(browser)
    large = "(d => [d.open, d.querySelector('img').alt])(document.getElementById('large'))"
    browser.run("document.querySelector('.card [data-layer=\"2\"] img').click()")
    assert browser.run(large) == [True, "heat map of plate <b>7</b>.png"]
    assert "<b>7</b>" in browser.run("document.querySelector('#large p').textContent")
    browser.run("document.getElementById('large').click()")
    assert browser.run(large)[0] is False
    assert browser.run("document.querySelector('.card button').tabIndex") == 0


def test_a_format_that_browsers_do_not_support_is_shown_as_decoded(browser, start):
    browser.open(start(serving.application(Judge())))
    written = io.BytesIO()
    Image.new("RGB", (48, 24), (200, 0, 0)).save(written, "TIFF")
    coded = base64.b64encode(written.getvalue()).decode()
    file = f"new File([Uint8Array.from(atob('{coded}'), c => c.charCodeAt(0))], 'a.tif')"
    browser.run(f"take([{file}])")
    assert cards(browser, 1)[0][:3] == ["card fail", "FAIL", "a.tif"]
    assert browser.run(SEEN) == [["image of a.tif", 48, 24], ["heat map of a.tif", 48, 24]]


def test_a_token_is_asked_for_and_sent(browser, start):
    browser.open(start(serving.application(Judge(), "secret")))
    browser.run(DROP)
    refused = cards(browser)
    assert all("Authorization" in texts[2] for texts in refused), (refused, browser.errors)
    browser.run("document.getElementById('clear').click()")
    browser.run("document.getElementById('token').value = 'secret'")
    browser.run(DROP)
    assert cards(browser) == EXPECTED


@pytest.mark.parametrize("path", ["", "docs"])
def test_a_narrow_page_does_not_scroll_sideways(browser, start, path):
    url = start(serving.application(Judge(), name="x" * 200))
    browser.open(f"{url}{path}", width=360)
    width = "document.documentElement.scrollWidth <= innerWidth"
    assert browser.run(width)
    if path == "":
        browser.press("Tab")
        browser.press("Tab")  # past the link to the docs
        assert browser.run("document.activeElement.id") == "files"
        browser.run(DROP.replace("notes.png", "n" * 200))
        cards(browser)
        assert browser.run(width)
    assert not [each for each in browser.errors if "400" not in each]
