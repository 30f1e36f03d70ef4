"""Images of all common encodings decode to RGB."""

import os
from io import BytesIO
from threading import Event

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import decoding, load_image, load_mask
from msflow_ext.data.decoding import load_bytes

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
BITS = RNG.random((6, 9)) < 0.4


def repeated(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def palette_image():
    image = Image.fromarray(GRAY % 4)
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50, 60, 70, 230])
    return image


PALETTE = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50], [60, 70, 230]], np.uint8)[GRAY % 4]

LOSSLESS = {
    "RGB.png": (Image.fromarray(RGB), RGB),
    "RGB.bmp": (Image.fromarray(RGB), RGB),
    "RGB.tiff": (Image.fromarray(RGB), RGB),
    "gray.png": (Image.fromarray(GRAY), repeated(GRAY)),
    "one-bit.png": (Image.fromarray(BITS), repeated(BITS * np.uint8(255))),
    "palette.png": (palette_image(), PALETTE),
    "palette.bmp": (palette_image(), PALETTE),
    "RGBA.png": (Image.fromarray(np.dstack([RGB, ALPHA])), RGB),
    "LA.png": (Image.fromarray(np.dstack([GRAY, ALPHA])), repeated(GRAY)),
    "16-bit.png": (Image.fromarray(SIXTEEN), repeated(np.rint(SIXTEEN / 257))),
    "16-bit.tif": (Image.fromarray(SIXTEEN), repeated(np.rint(SIXTEEN / 257))),
    "black-CMYK.tif": (Image.new("CMYK", (9, 6), (0, 0, 0, 255)), np.zeros((6, 9, 3))),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_file_of_this_mode_decodes_to_its_colors(tmp_path, name):
    image, expected = LOSSLESS[name]
    image.save(tmp_path / name)
    decoded = load_image(tmp_path / name)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_a_palette_with_transparent_entries_keeps_its_colors(tmp_path):
    palette_image().save(tmp_path / "p.png", transparency=b"\x00\x80\xff\x10")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "p.png")), PALETTE)
    nearest = Image.fromarray(GRAY % 4).resize((9, 9), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(load_mask(tmp_path / "p.png", 9), np.asarray(nearest) > 0)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_lossy_file_decodes_to_about_its_colors(tmp_path, suffix):
    Image.new("RGB", (16, 12), (200, 100, 50)).save(tmp_path / f"i.{suffix}")
    decoded = np.asarray(load_image(tmp_path / f"i.{suffix}")).astype(int)
    assert decoded.shape == (12, 16, 3)
    assert np.abs(decoded - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_the_exif_orientation_is_applied(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "i.png", exif=exif)
    expected = np.rot90(RGB, turns)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "i.png")), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GRAY, repeated(GRAY)),
        (RGB, RGB),
        (np.dstack([RGB, ALPHA]), RGB),
        (BITS, repeated(BITS * 255)),
        (SIXTEEN, repeated(np.rint(SIXTEEN / 257))),
        (RGB[:, ::-1], RGB[:, ::-1]),
    ],
    ids=["gray", "rgb", "rgba", "bool", "uint16", "mirrored"],
)
def test_an_array_is_shown_as_a_file_would_be(array, expected):
    np.testing.assert_array_equal(np.asarray(load_image(array)), expected)


def encoded(image: Image.Image, kind: str) -> bytes:
    content = BytesIO()
    image.save(content, kind)
    return content.getvalue()


def test_bytes_decode_as_a_file_does_up_to_the_limit_of_pixels():
    content = encoded(Image.fromarray(RGB), "PNG")
    np.testing.assert_array_equal(np.asarray(load_bytes(content, 54)), RGB)
    with pytest.raises(ValueError, match="9x6 pixels are more than 53"):
        load_bytes(content, 53)


OTHER_KINDS = {  # the first bytes of each format
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n",
    "ppm": b"P6 1 1 255 abc",
    "gif": b"GIF89a" + bytes(20),
    "npy": b"\x93NUMPY\x01\x00" + bytes(20),
    "jp2": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(20),
    "dcm": bytes(128) + b"DICM" + bytes(20),
    "fits": b"SIMPLE  =                    T" + bytes(60),
}


@pytest.mark.family("image files")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_file_format_is_refused_whatever_its_suffix(tmp_path, kind):
    (tmp_path / "part.png").write_bytes(OTHER_KINDS[kind])
    sentence = "is not an image of the formats PNG, JPEG, BMP, TIFF, WEBP"
    with pytest.raises(ValueError, match=rf"part\.png {sentence}"):
        load_image(tmp_path / "part.png")
    with pytest.raises(ValueError, match=rf"part\.png {sentence}"):
        load_mask(tmp_path / "part.png", 8)
    with pytest.raises(ValueError, match=f"the body {sentence}"):
        load_bytes(OTHER_KINDS[kind], 100)


@pytest.mark.family("image files")
def test_no_program_is_started_for_a_file(tmp_path, monkeypatch):
    """Pillow passes EPS files to Ghostscript, whatever their suffix."""
    for program in ("gs", "gswin64c", "gswin32c"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "part.png").write_bytes(OTHER_KINDS["eps"])
    for read in (load_image, lambda file: load_mask(file, 8)):
        with pytest.raises(ValueError, match="is not an image"):
            read(tmp_path / "part.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.family("image files")
def test_16_bit_colors_keep_their_high_byte(tmp_path):
    cv2 = pytest.importorskip("cv2")
    deep = RNG.integers(0, 65536, (6, 9, 4), dtype=np.uint16)
    for channels in (3, 4):
        cv2.imwrite(str(tmp_path / "deep.png"), deep[..., :channels])
        expected = deep[..., 2::-1] >> 8
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "deep.png")), expected)


SEVERAL = {
    "pages.tif": {"compression": "raw"},
    "frames.webp": {"lossless": True},
    "frames.png": {},
    "pictures.jpg": {"format": "MPO"},
}


@pytest.mark.family("image files")
def test_the_first_of_several_images_is_read_and_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decoding, "_logged", Event())
    first, second = Image.new("L", (16, 16), 200), Image.new("L", (16, 16), 50)
    for name, options in SEVERAL.items():
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert decoding.decode(tmp_path / name).images == 2
        assert abs(np.asarray(load_image(tmp_path / name)).astype(int) - 200).max() <= 1
    (record,) = caplog.records
    assert "pages.tif holds 2 images, of which the first is read" in record.getMessage()


@pytest.mark.family("image files")
def test_a_pattern_is_not_expanded(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(
        FileNotFoundError, match=r"\*\.png is not a file; patterns are not expanded"
    ):
        load_image(tmp_path / "*.png")


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png is not a file"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (
            np.zeros((4, 4), np.float32),
            TypeError,
            r"bool, uint8 or uint16, got float32\. Convert floats in 0\.\.1 with \(255",
        ),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.uint16), ValueError, r"\(4, 4, 3\) of uint16"),
        (np.zeros((0, 4), np.uint8), ValueError, r"\(0, 4\)"),
    ],
)
def test_an_array_of_another_shape_or_dtype_is_refused(array, error, message):
    with pytest.raises(error, match=message):
        load_image(array)
