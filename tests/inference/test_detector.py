"""A detector gives the same result for an image from any source."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from msflow_ext import cli
from msflow_ext.data import Images, Item
from msflow_ext.evaluation.calibration import exceeds
from msflow_ext.evaluation.evaluator import Truth, evaluate, measure
from msflow_ext.features import Features
from msflow_ext.inference.detector import Detector, load
from msflow_ext.reports.heat_maps import read_panels
from msflow_ext.runs.checkpoint import read_checkpoint


def test_every_kind_of_source_gives_the_same_result(detector, folder):
    path = folder / "square" / "0.png"
    (expected,) = detector.predict(path)
    image, pixels = Image.open(path), np.asarray(Image.open(path))
    (tensor,) = Images((Item("0", None, "", path),), 64)
    sources = [
        str(path),
        image,
        pixels,
        np.dstack([pixels] * 3),
        tensor,
        tensor[None],
        [path],
        iter([image]),
    ]
    for source in sources:
        (result,) = detector.predict(source)
        assert result.score == pytest.approx(expected.score, rel=1e-6)
        np.testing.assert_allclose(result.map, expected.map, rtol=1e-5, atol=1e-6)
        assert np.array_equal(result.image, np.dstack([pixels] * 3))


def test_a_folder_is_searched_with_its_subfolders_and_names_are_relative_to_it(detector, folder):
    (folder / "notes.txt").write_text("no image")
    results = detector.predict(folder, batch_size=4)
    names = [f"{kind}/{i}.png" for kind in ("good", "square") for i in range(3)]
    assert [r.name for r in results] == names
    assert [
        r.name for r in detector.predict([folder / "good" / "0.png", np.zeros((9, 9), bool)])
    ] == [
        str(folder / "good" / "0.png"),
        "image 0",
    ]
    single = [detector.predict(folder / r.name)[0].score for r in results]
    assert [r.score for r in results] == pytest.approx(single, rel=1e-5)


def test_a_stream_reads_at_most_two_batches_ahead(detector):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros((8, 8), np.uint8)

    stream = detector.stream(endless(), batch_size=2)
    assert [next(stream).name for _ in range(3)] == ["image 0", "image 1", "image 2"]
    assert len(taken) <= 6
    stream.close()


@pytest.mark.family("value ranges")
@pytest.mark.parametrize("tile", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize(
    ("scale", "shift", "told"),
    [(255, 0, "0..255"), (2, -1, "-1..1"), (1, 0.01, "0.01..1.01"), (4.4, -2.1, "-2.1..2.3")],
)
def test_a_tensor_outside_0_to_1_is_refused_with_its_range(detector, tile, scale, shift, told):
    image = torch.linspace(0, 1, 64 * 64).view(64, 64).expand(3, 64, 64)
    assert len(detector.predict(image, tile=tile)) == 1
    with pytest.raises(ValueError, match=rf"^image 1: a tensor must be RGB in 0\.\.1, got {told}$"):
        detector.predict([image, image * scale + shift], tile=tile)


@pytest.mark.family("value ranges")
def test_a_tile_of_nan_is_refused_before_it_is_scored(detector):
    with pytest.raises(ValueError, match=r"image 0: a tensor must be .* got nan\.\.nan"):
        detector.predict(torch.full((3, 80, 80), torch.nan), tile=True)


def test_labels_and_masks_need_thresholds(detector, folder):
    plain = detector.predict(folder)
    assert {(r.label, r.mask) for r in plain} == {(None, None)}
    middle = float(np.median([r.score for r in plain]))
    level = float(np.median([r.map for r in plain]))
    judging = Detector(detector.model, threshold=middle, pixel_threshold=level)
    for result in judging.predict(folder):
        assert result.label == int(result.score > middle)
        assert result.mask is not None
        assert result.mask.dtype == bool
        assert np.array_equal(result.mask, exceeds(result.map, level))
        assert np.mean(result.mask != (result.map > level)) < 0.01


def test_a_score_or_a_pixel_that_equals_its_threshold_is_normal(detector, folder):
    (plain,) = detector.predict(image := folder / "good" / "0.png")
    largest = float(plain.map.max())
    at = Detector(detector.model, threshold=plain.score, pixel_threshold=largest)
    (result,) = at.predict(image)
    assert result.label == 0
    assert result.mask is not None and not result.mask.any()
    below = Detector(detector.model, threshold=plain.score - 1e-3, pixel_threshold=largest - 1e-3)
    (result,) = below.predict(image)
    assert result.label == 1
    assert result.mask is not None and result.mask.any()
    assert np.array_equal(result.mask, exceeds(plain.map, largest - 1e-3))


@pytest.mark.family("thresholds")
def test_an_image_that_set_the_threshold_is_good_at_any_batch_size(detector, folder):
    alone = detector.predict(folder, batch_size=1)
    for size in (2, 3, 4, 6):
        together = detector.predict(folder, batch_size=size)
        for one, other in [*zip(alone, together, strict=True), *zip(together, alone, strict=True)]:
            at = Detector(detector.model, threshold=one.score, pixel_threshold=float(one.map.max()))
            judged = at._result("", other.score, other.map, other.image, other.size)
            assert judged.label == 0
            assert judged.mask is not None and not judged.mask.any()


def test_results_have_the_documented_types(detector, folder):
    (result,) = detector.predict(folder / "good" / "0.png")
    assert isinstance(result.score, float)
    assert result.map.shape == (64, 64)
    assert result.map.dtype == np.float32
    assert result.image.shape == (64, 64, 3)
    assert result.image.dtype == np.uint8


def test_palette_16_bit_and_rotated_images_are_equal_from_file_and_from_pillow(detector, tmp_path):
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 255, (64, 48), dtype=np.uint8))
    turned = gray.getexif()
    turned[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65535, (64, 64), dtype=np.uint16))
    for name, image, exif in (
        ("palette.png", gray.convert("P"), None),
        ("alpha.png", gray.convert("LA"), None),
        ("deep.png", deep, None),
        ("turned.png", gray, turned),
    ):
        image.save(tmp_path / name, exif=exif or b"")
        from_file, from_pillow = detector.predict([tmp_path / name, Image.open(tmp_path / name)])
        assert np.array_equal(from_file.image, from_pillow.image), name


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("missing.png", FileNotFoundError, "missing.png is not a file"),
        (torch.zeros(3, 32, 32), ValueError, r"image 0: a tensor must have shape \(3, 64, 64\)"),
        (
            torch.zeros(3, 64, 64, dtype=torch.uint8),
            ValueError,
            "a floating point dtype, got .*uint8",
        ),
        (np.zeros((4, 4)), TypeError, "must be bool, uint8 or uint16, got float64"),
        (Image.new("I", (4, 4)), TypeError, "must be bool, uint8 or uint16, got int32"),
        (Image.new("F", (4, 4)), TypeError, "must be bool, uint8 or uint16, got float32"),
        (
            torch.full((3, 64, 64), float("nan")),
            ValueError,
            r"image 0: a tensor must be RGB in 0\.\.1, got nan",
        ),
        (7, TypeError, "source must be a path, .* got int"),
        (b"\x89PNG", TypeError, "source must be a path, .* got bytes"),
        ([io.BytesIO(b"\x89PNG")], TypeError, "source must be a path, .* got BytesIO"),
        ({"photo.png": 1}, TypeError, "source must be a path, .* got dict"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(detector, source, error, sentence):
    with pytest.raises(error, match=sentence):
        detector.predict(source)


def test_an_empty_folder_and_a_broken_image_are_named(detector, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no images"):
        detector.predict(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"broken\.png"):
        detector.predict(tmp_path)


def test_a_checkpoint_file_loads_like_its_folder(run, detector):
    alone = load(run / "model.safetensors", device="cpu")
    image = np.zeros((64, 64), np.uint8)
    assert alone.predict(image)[0].score == detector.predict(image)[0].score
    assert alone.colours == detector.colours == [0.5, 2.0]


def _damaged(run: Path, folder: Path, edit) -> Path:
    header, tensors = read_checkpoint(run / "model.safetensors")
    edit(header, tensors)
    save_file(tensors, folder / "model.safetensors", {"msflow_ext": json.dumps(header)})
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda h, t: t.pop("head.fusion.perm0"), "lacks head.fusion.perm0, which MSFlow needs"),
        (lambda h, t: t.update(extra=torch.zeros(1)), "has extra, which MSFlow does not know"),
        (
            lambda h, t: t.update({"head.fusion.perm0": torch.zeros(3)}),
            r"head.fusion.perm0 must have shape .* for MSFlow, got \(3,\)",
        ),
        (
            lambda h, t: h.update(model="Oracle"),
            "must hold a model MSFlow or FastFlow, got 'Oracle'",
        ),
        (
            lambda h, t: h["config"].update(colour="red"),
            "its configuration does not build MSFlow: .*colour",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_itself_and_the_reason(run, tmp_path, edit, sentence):
    path = _damaged(run, tmp_path, edit)
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path, device="cpu")
    assert str(path) in str(caught.value)


def test_a_truncated_or_other_checkpoint_is_refused_by_name(run, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such checkpoint"):
        load(tmp_path)
    whole = (run / "model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="but no checkpoint of msflow_ext"):
        load(tmp_path)


def test_an_unavailable_device_is_named(run):
    with pytest.raises(ValueError, match="device 'abacus' is not available"):
        load(run, device="abacus")


def test_the_metrics_of_a_perfect_detector_are_1_and_unknown_ones_none(items):
    images = Images(items, 64)
    truth = Truth.of(images)
    assert truth.labels is not None
    assert truth.masks is not None
    perfect = measure(truth, truth.labels.astype(float), truth.masks.astype(np.float32))
    assert list(perfect.metrics.values()) == pytest.approx([1.0] * 9)
    unknown = measure(Truth(None, None), np.zeros(6), np.zeros((6, 64, 64)))
    assert set(unknown.metrics.values()) == {None}
    assert perfect.metrics.keys() == unknown.metrics.keys()
    good = Truth.of(Images(items[:3], 64))
    assert good.labels is None
    assert good.masks is None
    all_defective = measure(Truth.of(Images(items[3:], 64)), np.ones(3), np.ones((3, 64, 64)))
    assert all_defective.metrics["aupimo"] is None
    assert all_defective.metrics["aupro"] == pytest.approx(0.15)


def test_evaluation_keeps_the_order_of_the_images(detector, items):
    images = Images(items, 64)
    features = Features(detector.model, images, cache="off")
    found = evaluate(detector.model.predict_features, features, Truth.of(images), batch_size=4)
    expected = detector.predict(images[i] for i in range(len(images)))
    assert found.scores == pytest.approx([r.score for r in expected], rel=1e-5)
    np.testing.assert_allclose(found.maps, [r.map for r in expected], rtol=1e-4, atol=1e-5)


def test_the_padding_is_cut_off_map_mask_and_image(detector):
    wide = np.random.default_rng(0).integers(90, 110, (32, 128), dtype=np.uint8)
    padding = Detector(detector.model, fit="pad", pixel_threshold=0.0)
    (result,) = padding.predict(wide)
    square = Images([Item("wide", None, "", wide)], 64, "pad")
    (whole,) = detector.predict(square[0])
    assert result.mask is not None
    assert result.map.shape == result.mask.shape == (16, 64)
    assert result.image.shape == (16, 64, 3)
    assert result.image.min() > 80
    assert np.array_equal(result.map, whole.map[24:40])
    assert result.score == whole.score


def test_an_evaluation_stretches_the_maps_of_padded_images_to_the_masks(detector):
    rng = np.random.default_rng(0)
    items = [
        Item(str(i), 0, "good", rng.integers(90, 110, shape, dtype=np.uint8))
        for i, shape in enumerate([(32, 128), (64, 64), (90, 60)])
    ]
    features = Features(detector.model, Images(items, 64, "pad"))
    found = evaluate(detector.model.predict_features, features, Truth(None, None))
    cut = Detector(detector.model, fit="pad").predict(item.image for item in items)
    for stretched, each in zip(found.maps, cut, strict=True):
        rows = np.linspace(0, 63, len(each.map)).round().astype(int)
        columns = np.linspace(0, 63, each.map.shape[1]).round().astype(int)
        assert stretched.shape == (64, 64)
        np.testing.assert_allclose(
            stretched[rows][:, columns], each.map, atol=0.1 * float(np.ptp(each.map))
        )
    np.testing.assert_allclose(found.maps[1], cut[1].map, rtol=1e-5)


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


@pytest.mark.parametrize("option", ["batch_size", "workers"])
@pytest.mark.parametrize("tile", [False, True])
def test_a_batch_size_or_workers_of_0_are_refused(detector, option, tile):
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option} must be 1 or more, got 0"):
        detector.predict(_noise(64, 64), tile=tile, **options)


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
def test_threads_that_share_a_detector_get_bit_identical_results(run, precision):
    images = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(6)]
    alone = load(run, device="cpu", precision=precision)
    expected = [alone.predict(image)[0] for image in images]
    shared = load(run, device="cpu", precision=precision)  # its first calls are concurrent, too
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda image: shared.predict(image)[0], images * 4))
    for result, other in zip(found, expected * 4, strict=True):
        assert result.score == other.score
        assert np.array_equal(result.map, other.map)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_an_optimized_model_scores_almost_the_same(run, detector, folder, precision, error):
    optimized = load(run, device="cpu", precision=precision)
    assert type(optimized.model.head) is not type(detector.model.head)
    for result, expected in zip(optimized.predict(folder), detector.predict(folder), strict=True):
        assert result.map.dtype == np.float32
        assert result.score == pytest.approx(expected.score, rel=error)
        assert np.abs(result.map - expected.map).max() <= error * np.abs(expected.map).max()


def test_an_unknown_precision_is_refused(run):
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'int8'"):
        load(run, precision="int8")  # pyright: ignore[reportArgumentType]


@pytest.mark.family("pages")
@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_a_shown_result_has_the_aspect_ratio_of_its_image(detector, fit):
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, :45] = 255
    other = Detector(detector.model, pixel_threshold=0.0, fit=fit)
    (result,) = other.predict(image)
    assert result.size == (30, 90)
    shown = result.shown()
    assert shown.map.shape == shown.image.shape[:2] == (21, 64)
    assert shown.mask is not None
    assert shown.mask.shape == (21, 64)
    assert shown.image[:, :28].min() > 200 > 50 > shown.image[:, 36:].max()
    assert (shown.name, shown.score) == (result.name, result.score)
    assert result.map.shape == ((64, 64) if fit == "resize" else (21, 64))


@pytest.mark.family("pages")
def test_heat_maps_have_the_aspect_ratio_of_their_images(run, tmp_path):
    Image.new("RGB", (90, 30)).save(tmp_path / "wide.png")
    given = ["--run", str(run), str(tmp_path / "wide.png"), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", *given]) == 0
    (picture,) = (tmp_path / "out" / "maps").iterdir()
    assert [panel.size for panel in read_panels(picture)] == [(64, 21)] * 2
