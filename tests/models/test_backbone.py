"""Backbones are frozen, and their features equal timm's, for convolutional networks and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.models.backbone import Backbone
from msflow_ext.testing import relative_error


def images(size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_features_equal_those_of_timm_for_normalized_images():
    backbone = Backbone("resnet18", pretrained=False)
    reference: Any = timm.create_model("resnet18").eval()
    reference.load_state_dict(backbone.network.state_dict(), strict=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        x = (images() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        x = reference.maxpool(reference.act1(reference.bn1(reference.conv1(x))))
        expected = [
            x := layer(x) for layer in (reference.layer1, reference.layer2, reference.layer3)
        ]
    torch.testing.assert_close(backbone(images()), expected)
    assert backbone.channels == (64, 128, 256)
    assert backbone.strides == (4, 8, 16)


@pytest.mark.parametrize(
    ("name", "last"), [("test_resnet", "layer2"), ("tf_efficientnet_lite0", "blocks.2")]
)
def test_nothing_after_the_last_index_is_built(name, last):
    backbone = Backbone(name, out_indices=(1, 2), pretrained=False)
    assert list(backbone.network.state_dict())[-1].startswith(f"{last}.")
    assert len(backbone(images())) == 2


def test_reflect_padding_mirrors_the_input_of_every_convolution_larger_than_one():
    backbone = Backbone("resnet18", pretrained=False, padding_mode="reflect").double()
    net: Any = backbone.network

    def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
        pad = layer.kernel_size[0] // 2
        x = F.pad(x, (pad, pad, pad, pad), mode="reflect") if pad else x
        return F.conv2d(x, layer.weight, stride=layer.stride)

    x = (images(65, torch.float64) - backbone.mean) / backbone.std
    x = F.max_pool2d(net["bn1"](conv(net["conv1"], x)).relu(), 3, stride=2, padding=1)
    expected = []
    for layer in ("layer1", "layer2", "layer3"):
        for block in net[layer]:
            y = block.bn1(conv(block.conv1, x)).relu()
            y = block.bn2(conv(block.conv2, y))
            if block.downsample is not None:
                x = block.downsample[1](conv(block.downsample[0], x))
            x = (x + y).relu()
        expected.append(x)
    torch.testing.assert_close(backbone(images(65, torch.float64)), expected)


def test_reflect_padding_is_refused_if_layers_pad_by_themselves():
    message = r"must be 'zeros' for efficientnet_lite0, got 'reflect'.*Conv2dSame"
    with pytest.raises(ValueError, match=message):
        Backbone("efficientnet_lite0", padding_mode="reflect")


def test_a_backbone_stays_frozen_in_training():
    model = nn.Sequential(Backbone("test_resnet", pretrained=False)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = model(images().requires_grad_())
    assert not any(module.training for module in model[0].modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(f.requires_grad for f in features)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_mean_and_std_move_with_the_module_but_not_into_checkpoints():
    backbone = Backbone("efficientnet_lite0", pretrained=False).double()
    assert not {"mean", "std"} & backbone.state_dict().keys()
    assert backbone.mean.dtype == torch.float64
    assert (backbone.mean * 255).flatten().tolist() == pytest.approx([127] * 3)
    assert (backbone.std * 255).flatten().tolist() == pytest.approx([128] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_have_the_dtype_of_the_module(dtype):
    backbone = Backbone("test_resnet", pretrained=False).to(dtype)
    for given in (torch.float32, torch.float64, torch.bfloat16):
        assert {f.dtype for f in backbone(images(dtype=given))} == {dtype}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, "floating-point.*torch.uint8"),
        ([[0.5]], TypeError, "floating-point.*list"),
        (torch.zeros(3, 64, 64), ValueError, r"\(N, 3, H, W\).*got \(3, 64, 64\)"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"\(N, 3, H, W\).*got \(2, 1, 64, 64\)"),
        (torch.zeros(2, 3, 64, 31), ValueError, r"at least 32 for test_resnet.*\(2, 3, 64, 31\)"),
    ],
    ids=["integers", "no-tensor", "one-image", "gray", "small"],
)
def test_images_that_do_not_fit_are_refused(given, error, message):
    backbone = Backbone("test_resnet", pretrained=False)
    with pytest.raises(error, match=message):
        backbone(given)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_the_smallest_images_work(padding_mode):
    backbone = Backbone("test_resnet", pretrained=False, padding_mode=padding_mode)
    assert [f.shape[-1] for f in backbone(images(2 * backbone.strides[-1]))] == [8, 4, 2]


# Name, image size, tokens before the patch tokens.
TRANSFORMERS = {
    "vit": ("test_vit", (64, 96), 1),
    "deit": ("deit_tiny_distilled_patch16_224", (48, 32), 2),
    "cait": ("cait_xxs24_224", (32, 48), 1),
    "dinov2": ("vit_small_patch14_reg4_dinov2", (42, 28), 5),
    "dinov3": ("vit_small_patch16_dinov3", (48, 32), 5),
    "eva": ("eva02_tiny_patch14_224", (28, 42), 1),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_a_transformer_returns_its_normalized_patch_tokens_as_maps(case):
    name, size, prefix = TRANSFORMERS[case]
    whole: Any = timm.create_model(name).eval()
    last = len(whole.blocks) - 1
    backbone = Backbone(name, out_indices=(last,), image_size=size, pretrained=False)
    assert (backbone.is_flat, backbone.image_size) == (True, size)
    if case == "cait":
        whole = timm.create_model(name, img_size=size).eval()
    else:
        whole.set_input_size(img_size=size)
    own = {k.removeprefix("model."): v for k, v in backbone.network.state_dict().items()}
    assert not whole.load_state_dict(own, strict=False).unexpected_keys
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        tokens = whole.forward_features((x - backbone.mean) / backbone.std)[:, prefix:]
    height, width = (side // backbone.strides[0] for side in size)
    (feature,) = backbone(x)
    assert feature.shape == (2, backbone.channels[0], height, width)
    torch.testing.assert_close(feature, tokens.mT.reshape(2, -1, height, width))


@pytest.mark.usefixtures("quick")
def test_a_transformer_with_a_shrinking_grid_returns_the_maps_of_its_stages():
    name = "swin_tiny_patch4_window7_224"
    stages: Any = timm.create_model(name, features_only=True, out_indices=(0, 1, 2)).eval()
    backbone = Backbone(name, pretrained=False)
    own = {k.removeprefix("model."): v for k, v in backbone.network.state_dict().items()}
    stages.load_state_dict({k.replace("layers.", "layers_", 1): v for k, v in own.items()})
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = [f.movedim(-1, 1) for f in stages((x - backbone.mean) / backbone.std)]
    torch.testing.assert_close(backbone(x), expected)
    assert not backbone.is_flat
    assert (backbone.channels, backbone.strides) == ((96, 192, 384), (4, 8, 16))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "count", "indices"),
    [
        ("resnet18", None, (1, 2, 3)),
        ("resnet18", 1, (1,)),
        ("test_convnext", 2, (0, 1)),
        ("test_mambaout", None, (0, 1, 2)),
        ("levit_128s", None, (0, 1, 2)),
        ("test_vit", None, (3,)),
        ("test_vit", 3, (0, 2, 3)),
        ("vit_tiny_patch16_224", None, (7,)),
        ("vit_tiny_patch16_224", 3, (2, 4, 7)),
    ],
)
def test_a_backbone_chooses_maps_from_stride_4_on_or_blocks_down_to_two_thirds(
    name, count, indices
):
    assert Backbone(name, out_indices=count, pretrained=False).out_indices == indices


def test_a_transformer_is_cut_after_its_last_block_and_ends_with_its_norm():
    backbone = Backbone("test_vit", out_indices=(0, 2), pretrained=False)
    network: Any = backbone.network
    assert len(network.model.blocks) == 3
    assert not [key for key in network.state_dict() if "head" in key]
    for feature in backbone(images(160)):
        torch.testing.assert_close(feature.mean(1), torch.zeros(2, 10, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "sizes"), [("test_vit", (64, 96)), ("test_mambaout", (64, 96)), ("test_resnet", 64)]
)
def test_grids_are_the_sizes_of_the_maps(name, sizes):
    backbone = Backbone(name, image_size=sizes, pretrained=False)
    height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
    grids = [(f.size(2), f.size(3)) for f in backbone(torch.rand(1, 3, height, width))]
    assert backbone.grids(sizes) == grids


def test_a_transformer_refuses_images_of_another_size():
    backbone = Backbone("test_vit", image_size=(64, 96), pretrained=False)
    message = r"\(N, 3, H, W\) with \(H, W\) = \(64, 96\) for test_vit, got \(2, 3, 96, 64\)"
    with pytest.raises(ValueError, match=message):
        backbone(torch.rand(2, 3, 96, 64))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_an_optimized_transformer_returns_the_same_maps(monkeypatch, dtype, bound):
    monkeypatch.setattr("msflow_ext.models.optimized.backbone.has_bfloat16", lambda: True)
    backbone = Backbone("test_vit", image_size=64, pretrained=False)
    x = torch.rand(2, 3, 64, 64)
    (feature,) = backbone.optimize(64, dtype)(x)
    (right,) = backbone(x)
    assert feature.dtype is dtype
    assert float((feature - right).abs().max()) <= bound


def test_a_backbone_in_float64_is_optimized_to_float32():
    backbone = Backbone("test_efficientnet", pretrained=False)
    x = torch.rand(2, 3, 64, 64)
    for feature, right in zip(backbone.double().optimize(64)(x), backbone(x), strict=True):
        assert feature.dtype is torch.float32
        assert relative_error(feature, right) <= 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_backbone_on_a_gpu_is_optimized_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    backbone = Backbone("test_efficientnet", pretrained=False).cuda()
    x = torch.rand(2, 3, 64, 64, device="cuda")
    for feature, right in zip(backbone.optimize(64)(x), backbone(x), strict=True):
        assert relative_error(feature, right) <= 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet19"},
            "must be a model of timm .*, got 'resnet19': did you mean resnet1[08]",
        ),
        ({"name": "resnet18.nothing_in1k"}, r"timm .*, got 'resnet18\.nothing_in1k'"),
        (
            {"name": "levit_128s", "out_indices": (1, 3)},
            r"must be feature maps of backbone levit_128s, got \(1, 3\)",
        ),
        ({"name": "test_vit", "out_indices": (6,)}, r"maps of backbone test_vit, got \(6,\)"),
        ({"name": "test_vit", "out_indices": 5}, "maps of backbone test_vit, got 5 .it has 6."),
        ({"out_indices": 5}, "maps of backbone test_resnet, got 5 .it has 5."),
        ({"out_indices": 0}, "out_indices must be 1 map or more, got 0"),
        ({"out_indices": (1, 9)}, r"maps of backbone test_resnet, got \(1, 9\)"),
        (
            {"out_indices": (2, 1)},
            r"out_indices must be increasing numbers from 0 up, got \(2, 1\)",
        ),
        ({"out_indices": (-1,)}, r"out_indices must be increasing.*got \(-1,\)"),
        ({"out_indices": ()}, r"out_indices must be increasing.*got \(\)"),
        ({"padding_mode": "circular"}, "padding_mode must be .*'circular'"),
        (
            {"name": "test_vit", "padding_mode": "reflect"},
            "must be 'zeros' for test_vit, got 'reflect': it has no padded convolutions",
        ),
        ({"image_size": 0}, "image_size must be from 1 to 16384 pixels, got 0"),
        ({"name": "test_vit", "image_size": 100}, r"multiple of 16 for test_vit, got \(100, 100\)"),
        (
            {"name": "levit_128s", "image_size": 256},
            r"must be \(224, 224\), the only size of levit_128s, got \(256, 256\)",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**{"name": "test_resnet", "pretrained": False, **arguments})


def test_a_backbone_that_is_inaccurate_in_bfloat16_stays_in_float32_and_warns(caplog):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = Backbone("efficientnet_lite0")
    forms = [network.optimize(64, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert "features of efficientnet_lite0 err by 3% in bfloat16" in caplog.text
    for one, other in zip(*(form(images) for form in forms), strict=True):
        assert one.dtype is torch.float32
        assert one.equal(other)

    caplog.clear()
    (found,) = {
        f.dtype
        for f in Backbone("test_resnet", pretrained=False).optimize(64, torch.bfloat16)(images)
    }
    assert found is torch.bfloat16
    assert not caplog.text


def test_a_transformer_stays_in_float32_on_a_processor_without_bfloat16(monkeypatch):
    images = torch.rand(1, 3, 64, 64)
    transformer = Backbone("test_vit", pretrained=False, image_size=64)
    for has, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(
            "msflow_ext.models.optimized.backbone.has_bfloat16", lambda has=has: has
        )
        form = transformer.optimize(64, torch.bfloat16)
        assert {f.dtype for f in form(images)} == {dtype}
