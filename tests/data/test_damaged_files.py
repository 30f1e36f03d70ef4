"""A damaged image file is refused with an error that names it."""

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import load_image, load_mask

RNG = np.random.default_rng(0)


def bytes_of(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix):
    whole = bytes_of(tmp_path, suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be decoded: .*"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.png is empty$"),
        (
            b"just some text, no pixels",
            r"bad\.png is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP$",
        ),
        (None, r"bad\.png cannot be decoded: .*decompression bomb"),
    ],
    ids=["empty", "text", "bomb"],
)
def test_an_invalid_image_file_is_refused_by_name(tmp_path, bomb, content, message):
    (tmp_path / "bad.png").write_bytes(bomb if content is None else content)
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / "bad.png", 8)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    content = bytearray(bytes_of(tmp_path, "png"))
    content[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.png cannot be decoded: "):
        load_image(tmp_path / "damaged.png")
