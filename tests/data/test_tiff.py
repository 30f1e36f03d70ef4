"""A TIFF file of any layout decodes to the pixels that were written, or is refused by name."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import load_image, load_mask, tiff
from msflow_ext.data.decoding import load_bytes

tifffile = pytest.importorskip("tifffile")

pytestmark = pytest.mark.family("image files")

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 21, 37  # not multiples of the tile size
REFUSED = (
    r"cannot be read: TIFF with .* is not supported\. Save it as PNG, or as TIFF of 8 or 16 unsig"
)

COMPRESSIONS = (None, "zlib", "lzw", "packbits", "zstd", "lzma")
TILES = (None, (16, 16))
ORDERS = ("<", ">")
PLANES = ("contig", "separate")


def pixels(dtype, samples, planes="contig"):
    """Return random pixels ``(H, W, samples)``, and the array to write."""
    kind = np.dtype(dtype)
    shape = HEIGHT, WIDTH, samples
    if kind.kind == "f":
        values = RNG.random(shape).astype(kind)
    elif kind.kind == "b":
        values = RNG.random(shape) < 0.5
    else:
        info = np.iinfo(kind)
        values = RNG.integers(info.min, info.max, shape, kind, endpoint=True)
    if samples == 1:
        return values, values[..., 0]
    return values, np.moveaxis(values, -1, 0) if planes == "separate" else values


def written(array, **options):
    content = io.BytesIO()
    tifffile.imwrite(content, array, metadata=None, **options)
    return content.getvalue()


def shown(values, photometric):
    """Convert uint8 or uint16 values to RGB by the documented rules, without Pillow."""
    if values.dtype == bool:
        values = values * np.uint8(255)
    if values.dtype == np.uint16:
        gray = values.shape[2] == 1
        values = np.rint(values / 257) if gray else values >> 8
    values = values.astype(int)
    if photometric == "miniswhite":
        values = 255 - values
    if photometric == "separated":
        black = 255 - values[..., 3:]
        return black - np.rint(values[..., :3] * black / 255)
    colors = values[..., :1] if values.shape[2] < 3 else values[..., :3]
    return np.broadcast_to(colors, (HEIGHT, WIDTH, 3))


READ = [  # dtype, photometric interpretation, samples, planes
    ("bool", "minisblack", 1, "contig"),
    ("bool", "miniswhite", 1, "contig"),
    ("uint8", "minisblack", 1, "contig"),
    ("uint8", "minisblack", 2, "contig"),
    ("uint8", "miniswhite", 1, "contig"),
    ("uint8", "rgb", 3, "contig"),
    ("uint8", "rgb", 4, "contig"),
    ("uint8", "rgb", 3, "separate"),
    ("uint8", "rgb", 4, "separate"),
    ("uint8", "separated", 4, "contig"),
    ("uint8", "separated", 4, "separate"),
    ("uint16", "minisblack", 1, "contig"),
    ("uint16", "rgb", 3, "contig"),
    ("uint16", "rgb", 4, "contig"),
    ("uint16", "separated", 4, "contig"),
]


def options_of(photometric, samples, planes):
    options = {"photometric": photometric}
    if samples > 1:
        options["planarconfig"] = planes
    if samples == (4 if photometric == "rgb" else 2):
        options["extrasamples"] = [2]  # alpha, not premultiplied
    return options


@pytest.mark.parametrize(("dtype", "photometric", "samples", "planes"), READ)
def test_a_supported_layout_keeps_its_pixels_in_every_compression_tiling_and_byte_order(
    dtype, photometric, samples, planes
):
    values, array = pixels(dtype, samples, planes)
    for compression, tile, order in itertools.product(COMPRESSIONS, TILES, ORDERS):
        how = {"compression": compression, "tile": tile, "byteorder": order}
        content = written(array, **how, **options_of(photometric, samples, planes))
        found = np.asarray(load_bytes(content, HEIGHT * WIDTH)).astype(int)
        off = np.abs(found - shown(values, photometric)).max()
        assert off <= (photometric == "separated"), how  # the product of two levels is rounded


DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "float16",
    "float32",
    "float64",
]
PHOTOMETRIC = ("minisblack", "miniswhite", "rgb", "separated", "linear_raw", "cielab", "logluv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_other_layout_is_refused_with_its_description(dtype):
    refused = 0
    for photometric, samples, planes in itertools.product(PHOTOMETRIC, range(1, 6), PLANES):
        if (dtype, photometric, samples, planes) in READ or (samples == 1 and planes == "separate"):
            continue
        _, array = pixels(dtype, samples, planes)
        for compression, tile in ((None, None), (None, (16, 16)), ("zlib", None)):
            try:
                options = options_of(photometric, samples, planes)
                content = written(array, compression=compression, tile=tile, **options)
            except ValueError:  # tifffile cannot write such a file
                continue
            with pytest.raises(ValueError, match=f"^the body {REFUSED}"):
                load_bytes(content, HEIGHT * WIDTH)
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    ("array", "options", "described"),
    [
        (pixels("int16", 1)[1], {}, r"1 x int16 a pixel \(gray, one plane, compression 1\)"),
        (pixels("float16", 1)[1], {}, r"1 x float16 a pixel \(gray"),
        (pixels("float32", 1)[1], {}, r"1 x float32 a pixel \(gray"),
        (
            pixels("uint16", 3, "separate")[1],
            {"photometric": "rgb"},
            r"3 x uint16 a pixel \(RGB, separate planes, compression 1\)",
        ),
        (pixels("uint16", 1)[1], {"photometric": "miniswhite"}, r"\(gray, white is zero, one pl"),
        (pixels("uint16", 1)[1] // 16, {"bitspersample": 12}, "1 x uint12 a pixel"),
        (
            pixels("uint8", 4)[1],
            {"photometric": "rgb", "extrasamples": [1]},
            r"4 x uint8 a pixel \(RGB, one plane, compression 1, premultiplied alpha\)",
        ),
        (pixels("uint8", 3)[1], {"photometric": "rgb", "compression": "jpeg2000"}, "ssion 34712"),
        (pixels("uint8", 3)[1], {"photometric": "ycbcr"}, "YCbCr, one plane, compression 1"),
        (
            pixels("uint8", 1)[1],
            {"photometric": "palette", "colormap": np.arange(3 * 256).reshape(3, 256) % 256},
            "palette",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_file_is_described(tmp_path, array, options, described):
    path = tmp_path / "part.tif"
    if "colormap" in options:
        options = {**options, "colormap": options["colormap"].astype(np.uint16)}
    path.write_bytes(written(array, **{"photometric": "minisblack", **options}))
    for read in (load_image, lambda file: load_mask(file, 8)):
        with pytest.raises(ValueError, match=rf"part\.tif cannot be read: TIFF with .*{described}"):
            read(path)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_gray_of_few_bits_spans_black_to_white(bits, photometric):
    levels = RNG.integers(0, 2**bits, (HEIGHT, WIDTH), np.uint8)
    content = written(levels, photometric=photometric, bitspersample=bits)
    gray = levels.astype(int) * (255 // (2**bits - 1))
    found = np.asarray(load_bytes(content, HEIGHT * WIDTH))[..., 0]
    np.testing.assert_array_equal(found, 255 - gray if photometric == "miniswhite" else gray)


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("tile", TILES)
def test_a_palette_of_16_bits_is_looked_up(compression, tile):
    _, array = pixels("uint8", 1)
    colors = RNG.integers(0, 65536, (3, 256), np.uint16)
    how = {"photometric": "palette", "colormap": colors, "compression": compression}
    found = np.asarray(load_bytes(written(array, tile=tile, **how), HEIGHT * WIDTH))
    np.testing.assert_array_equal(found, np.moveaxis(colors[:, array] >> 8, 0, -1))


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("tile", TILES)
def test_jpeg_inside_is_read_as_another_library_reads_it(photometric, tile):
    pytest.importorskip("imagecodecs")
    ramp = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    array = np.dstack([ramp, ramp.T.reshape(HEIGHT, WIDTH), 255 - ramp])
    content = written(array, photometric=photometric, compression="jpeg", tile=tile)
    expected = tifffile.imread(io.BytesIO(content)).astype(int)
    found = np.asarray(load_bytes(content, HEIGHT * WIDTH)).astype(int)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_fax_keeps_its_bits(tmp_path, compression, photometric):
    bits = pixels("bool", 1)[1]
    path = tmp_path / "fax.tif"
    Image.fromarray(bits).save(path, compression=compression, tiffinfo={262: photometric})
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].photometric == photometric
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0] > 0, bits)


@pytest.mark.parametrize("order", ORDERS)
def test_a_bigtiff_is_read_or_refused(order):
    values, array = pixels("uint8", 3)
    content = written(array, photometric="rgb", bigtiff=True, byteorder=order)
    if order == ">":
        with pytest.raises(ValueError, match=r"is not an image of the formats|cannot be decoded"):
            load_bytes(content, HEIGHT * WIDTH)
    else:
        found = np.asarray(load_bytes(content, HEIGHT * WIDTH))
        np.testing.assert_array_equal(found, values)
    deep = written(pixels("int16", 1)[1], photometric=1, bigtiff=True, byteorder=order)
    with pytest.raises(ValueError, match=f"{REFUSED}"):
        load_bytes(deep, HEIGHT * WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(orientation):
    values, array = pixels("uint8", 3)
    turned = [(274, 3, 1, orientation, True)]
    content = written(array, photometric="rgb", extratags=turned)
    flipped = values[:, ::-1] if orientation in (2, 4, 5, 7) else values
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    found = np.asarray(load_bytes(content, HEIGHT * WIDTH))
    np.testing.assert_array_equal(found, np.rot90(flipped, turns))


def test_a_dangling_tag_does_not_hide_an_unsupported_layout():
    content = bytearray(written(pixels("uint16", 3, "separate")[1], photometric="rgb"))
    bits = content.index(
        bytes((2, 1, 3, 0))
    )  # the tag of bits per sample: three numbers, stored elsewhere in the file
    content[bits + 8 : bits + 12] = (2**31).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"cannot be (read: TIFF|decoded)"):
        load_bytes(bytes(content), HEIGHT * WIDTH)


@pytest.mark.parametrize(
    "content",
    [
        b"MM+\0\0\0\xff\xff\x1c\x01"
        + bytes(8),  # a BigTIFF whose tags lie beyond the end of any file
        b"II+\0\x08\0\0\0" + b"\xff" * 8,
        b"II*\0" + b"\xff" * 4,
    ],
)
def test_tags_that_lie_beyond_any_file_are_refused(content, tmp_path):
    (tmp_path / "a.tif").write_bytes(content)
    for read in (lambda: load_bytes(content, 100), lambda: load_image(tmp_path / "a.tif")):
        with pytest.raises(ValueError, match=r"TIFF|cannot be decoded|is not an image"):
            read()


@pytest.mark.parametrize("tag", [258, 259, 262, 277, 284, 320, 338, 339])
def test_a_tag_without_values_counts_as_missing(tag):
    entries = {258: 1, 262: 1} | {tag: 0}  # number of values of each tag
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content += b"".join(struct.pack("<HHII", each, 3, count, 1) for each, count in entries.items())
    assert tiff.read_tags(io.BytesIO(content)) == {each: (1,) for each in entries if each != tag}
    with pytest.raises(ValueError, match=r"TIFF|cannot be decoded|is not an image"):
        load_bytes(content, HEIGHT * WIDTH)
