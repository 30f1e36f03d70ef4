"""In a browser the page of the service scores what is dropped or chosen, and shows heat map, label and refusals."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from msflow_ext import serving
from msflow_ext.inference.detector import Detector, Result

# A picture that the page itself draws, and a file that is none.
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
CARDS = "[...document.querySelectorAll('.card figcaption')].map(c => [...c.children].map(e => e.textContent))"
PICTURE = "(() => {{ const i = document.querySelector('.card img'); return {}; }})()"


class Alarmed(Detector):
    """A model that finds the left half of every image defective."""

    def __init__(self) -> None:
        super().__init__(None, colours=(0.0, 1.0))

    def predict(self, source: Any, **_: Any) -> list[Result]:
        found = np.zeros((64, 64), np.float32)
        found[:, :32] = 1
        image = np.full((64, 64, 3), 128, np.uint8)
        return [Result("", 1.25, 1, 0.02, found, found > 0.5, image, image.shape[:2])]


def cards(browser) -> list[list[str]]:
    until = time.monotonic() + 20
    while len(found := browser.run(CARDS)) < 2:
        assert time.monotonic() < until, found
    return found


WANTED = [
    ["notes.png", "the body is not an image of the kinds PNG, JPEG, BMP, TIFF, WEBP"],
    ["plate <b>7</b>.png", "defective", "score 1.250, p-value 0.020"],
]


@pytest.mark.parametrize("script", [DROP, CHOOSE], ids=["drop", "choose"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_images_are_scored_and_refusals_are_shown(browser, start, script, dark):
    browser.open(start(serving.application(Alarmed(), name="plates")), dark=dark)
    assert browser.run("document.querySelector('h1').textContent") == "plates"
    browser.run(script)
    assert cards(browser) == WANTED
    assert browser.run("document.getElementById('status').textContent") == "done"
    browser.run(PICTURE.format("i.decode()"))
    assert browser.run(PICTURE.format("[i.naturalWidth, i.naturalHeight]")) == [64, 64]
    errors = [each for each in browser.errors if "400" not in each]  # the refusal's own
    assert not errors and len(browser.errors) == 1


def test_a_token_is_asked_for_and_sent(browser, start):
    browser.open(start(serving.application(Alarmed(), "secret")))
    browser.run(DROP)
    refused = cards(browser)
    assert all("Authorization" in texts[1] for texts in refused), (refused, browser.errors)
    browser.run("document.getElementById('cards').replaceChildren()")
    browser.run("document.getElementById('token').value = 'secret'")
    browser.run(DROP)
    assert cards(browser) == WANTED


def test_keys_reach_the_choice_of_files_and_a_narrow_page_does_not_scroll_sideways(browser, start):
    browser.open(start(serving.application(Alarmed(), name="x" * 200)), width=360)
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "files"
    width = "document.documentElement.scrollWidth <= innerWidth"
    assert browser.run(width)
    browser.run(DROP)
    cards(browser)
    assert browser.run(width)
