"""Make the pictures of the README from a run: ``python docs/pictures.py RUN``, with Chromium on the PATH.

The run: ``msflow train --data textures --category brick --backbone efficientnet_lite0 --preset robust --epochs 40 --out RUN``
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
SHOWN = ("scar-000", "blob-003", "perlin-005")  # of the heat maps of the run
GAP = 6  # pixels between them
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
WINDOW = "1280,1780"


def main() -> int:
    run = Path(sys.argv[1])
    for name, picture in (("robust", heat_maps(run)), ("report", report(run / "report.html"))):
        path = IMAGES / f"{name}.png"
        picture.save(path, optimize=True)
        print(path, path.stat().st_size)
    return 0


def heat_maps(run: Path) -> Image.Image:
    """Some heat maps of a run, one below the other: each beside its image and the true outline."""
    rows = [Image.open(run / "maps" / f"{name}.png").convert("RGB") for name in SHOWN]
    width, height = rows[0].size
    whole = Image.new("RGB", (width, len(rows) * (height + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * (height + GAP)))
    return whole


def report(page: Path) -> Image.Image:
    """Return what a browser shows of a report."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        options = (*flags, f"--window-size={WINDOW}", f"--screenshot={shot}")
        subprocess.run(
            (browser, *options, page.resolve().as_uri()), check=True, capture_output=True
        )
        return Image.open(shot).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
