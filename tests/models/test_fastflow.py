"""FastFlow: sizes of the paper's presets, inverse, loss, arguments, and backbones of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import FastFlow, FastFlowHead, MSFlow, ops
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

F32, F64 = torch.float32, torch.float64

CHANNELS, SIZES = (8, 11), [(6, 5), (3, 3)]


def make(dtype: torch.dtype = F64, *, scramble: bool = True, **options: Any) -> FastFlowHead:
    """Return a small head whose scales, offsets and norms are not the initial ones."""
    arguments = {"steps": 3, "input_sizes": SIZES, "seed": 0, **options}
    head = FastFlowHead(CHANNELS, **arguments).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters() if scramble else ():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return head


def draw(normal: Normal, n: int = 2, dtype: torch.dtype = F64) -> list[Tensor]:
    return [normal(n, c, *size, dtype=dtype) for c, size in zip(CHANNELS, SIZES, strict=True)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# Blocks or maps, strides, size of the images, parameters of flows and of LayerNorms.
PRESETS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int, int]] = {
    "resnet18": ((1, 2, 3), (4, 8, 16), 256, 4_657_408, 917_504),
    "wide_resnet50_2": ((1, 2, 3), (4, 8, 16), 256, 41_337_856, 3_670_016),
    "deit_base_distilled_patch16_384": ((7,), (16,), 384, 7_074_500, 0),
    "cait_m48_448": ((40,), (16,), 448, 7_074_500, 0),
}


@pytest.mark.parametrize("backbone", PRESETS)
def test_presets_have_the_papers_sizes(backbone: str) -> None:
    indices, strides, size, flows, norms = PRESETS[backbone]
    with torch.device("meta"):
        model = FastFlow(backbone, pretrained=False)
    assert model.backbone.out_indices == indices
    assert model.backbone.strides == strides
    assert model.image_size == size
    assert (count(model.head.flows), count(model.head.norms)) == (flows, norms)
    assert count(model) == flows + norms
    kernels = [step.subnet[0].kernel_size[0] for step in model.head.flows[0].steps]
    assert kernels[:4] == ([3, 3, 3, 3] if backbone == "resnet18" else [3, 1, 3, 1])


@pytest.mark.parametrize(
    ("backbone", "ratio"),
    [("efficientnet_lite0", 2), ("mobilenetv3_small_050", 2), ("resnet34", 1)],
)
def test_subnets_of_narrow_pyramids_are_twice_as_wide(backbone: str, ratio: int) -> None:
    with torch.device("meta"):
        model = FastFlow(backbone, pretrained=False)
    for flow, channels in zip(model.head.flows, model.backbone.channels, strict=True):
        widths = {step.subnet[0].out_channels for step in flow.steps}
        assert widths == {ratio * (channels - channels // 2)}
    assert model.config["hidden_ratio"] == ratio


@pytest.mark.parametrize("form", ["0.2", "head"])
@pytest.mark.parametrize("conv3x3_only", [True, False], ids=["3x3", "alternating"])
def test_the_inverse_undoes_the_flows(
    each_backend: str, normal: Normal, conv3x3_only: bool, form: str
) -> None:
    head = make(conv3x3_only=conv3x3_only, clamp_form=form)
    x = draw(normal)
    out = head(x)
    back = head.inverse(out.z)
    for got, right in zip(back.z, head.normalize(x), strict=True):
        assert relative_error(got, right) <= 1e-10
    assert relative_error(back.log_det, -out.log_det) <= 1e-10


def test_log_det_is_that_of_the_jacobian_of_the_flows(each_backend: str, normal: Normal) -> None:
    head = FastFlowHead((4, 3), steps=2, seed=0).double()
    x = [normal(1, 4, 2, 2, dtype=F64), normal(1, 3, 1, 2, dtype=F64)]

    def whole(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in x])
        z = head([p.view_as(t) for p, t in zip(parts, x, strict=True)]).z
        return torch.cat([t.flatten() for t in z])

    flat = torch.cat([t.flatten() for t in x])
    jacobian: Any = torch.autograd.functional.jacobian(whole, flat)
    assert relative_error(head(x).log_det[0], torch.linalg.slogdet(jacobian)[1]) <= 1e-10


def test_the_loss_is_the_sum_over_scales_of_the_mean_negative_log_likelihood(
    each_backend: str, normal: Normal
) -> None:
    head, x = make(), draw(normal, 3)
    expected = torch.zeros((), dtype=F64)
    for i in range(2):
        alone = FastFlowHead(CHANNELS[i : i + 1], steps=3, input_sizes=SIZES[i : i + 1]).double()
        alone.flows[0].load_state_dict(head.flows[i].state_dict())
        alone.norms[0].load_state_dict(head.norms[i].state_dict())
        out = alone(x[i : i + 1])
        expected = expected + (0.5 * out.z[0].square().sum((1, 2, 3)) - out.log_det).mean()
    assert relative_error(head.loss(x), expected) <= 1e-12


def test_a_new_norm_standardizes_each_image_over_channels_and_positions(normal: Normal) -> None:
    head = make(scramble=False)
    for x in head.normalize([5 * t + 3 for t in draw(normal)]):
        for image in x.detach():
            assert abs(float(image.mean())) <= 1e-10
            assert float(image.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_likelihoods_do_not_depend_on_the_rest_of_the_batch(normal: Normal, native: None) -> None:
    head, x = make(F32), draw(normal, 3, F32)
    whole = head.log_likelihood(x)
    for got, right in zip(head.log_likelihood([t[1:2] for t in x]), whole, strict=True):
        assert relative_error(got, right[1:2]) <= 1e-5


def test_training_lowers_the_loss_and_reaches_every_parameter(normal: Normal) -> None:
    head, x = make(F32, scramble=False), draw(normal, 8, F32)
    adam = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = head.loss(x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())


def test_a_seed_fixes_permutations_and_weights_and_keeps_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = (FastFlowHead((6,), steps=2, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(
        first["flows.0.steps.0.subnet.0.weight"], other["flows.0.steps.0.subnet.0.weight"]
    )


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
def test_the_optimized_head_is_a_snapshot_with_the_same_inputs_and_outputs(
    normal: Normal, normed: bool
) -> None:
    head = make(input_sizes=SIZES if normed else None)
    x = draw(normal)
    x[0] = x[0].contiguous(memory_format=torch.channels_last)
    expected = head(x)
    form = head.optimize()
    with torch.no_grad():
        for p in [*head.parameters(), *head.buffers()]:
            p.zero_()
    out = form(x)
    for got, right in zip((*out.z, out.log_det), (*expected.z, expected.log_det), strict=True):
        assert relative_error(got, right) <= 1e-12
    assert [z.stride() for z in out.z] == [t.stride() for t in x]


def test_the_optimized_head_in_bfloat16_is_close_to_float32(normal: Normal) -> None:
    head, x = make(F32, scramble=False), draw(normal, dtype=F32)
    maps = head.optimize(torch.bfloat16).log_likelihood(x)
    for got, right in zip(maps, head.log_likelihood(x), strict=True):
        assert got.dtype is F32
        assert relative_error(got, right) <= 0.03


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"channels": ()}, r"channels must have one scale or more, .* got \(\)"),
    "one channel": ({"channels": (4, 1)}, r"of 2 channels or more, got \(4, 1\)"),
    "no step": ({"steps": 0}, "steps must be at least 1, got 0"),
    "no hidden channel": (
        {"channels": (8, 4), "hidden_ratio": 0.3},
        "hidden_ratio must leave at least 1 of a subnet's 2 input channels, got 0.3",
    ),
    "ratio nan": (
        {"hidden_ratio": float("nan")},
        "hidden_ratio must be above 0 and finite, got nan",
    ),
    "clamp": ({"clamp": 0}, "clamp must be positive and finite, got 0.0"),
    "clamp form": ({"clamp_form": "atan"}, "clamp_form must be '0.2' or 'head', got 'atan'"),
    "sizes": ({"input_sizes": [(4, 4)]}, r"for each of 2 scales, got \[\(4, 4\)\]"),
    "empty size": ({"input_sizes": [(4, 4), (0, 4)]}, r"got \[\(4, 4\), \(0, 4\)\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_of_the_head_that_do_not_fit_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        FastFlowHead(**{"channels": (8, 8), **options})


@pytest.mark.parametrize("kind", [FastFlow, MSFlow])
def test_backbones_and_sizes_that_do_not_fit_are_refused_by_both_models(kind: type) -> None:
    with pytest.raises(ValueError, match=r"got 'resnet81': did you mean resnet18"):
        kind("resnet81", pretrained=False)
    with pytest.raises(
        ValueError, match=r"image_size must be a multiple of 16 for deit_tiny_patch"
    ):
        kind("deit_tiny_patch16_224", pretrained=False, image_size=230)
    too_small = {FastFlow: r"H and W at least 32 for resnet18, got \(1, 3, 16, 16\)"}
    message = too_small.get(
        kind, "image_size must give maps of at least 3 x 3 at stride 16 of resnet18, got 16"
    )
    with pytest.raises(ValueError, match=message):
        kind("resnet18", pretrained=False, image_size=16)


def test_msflow_refuses_maps_smaller_than_its_pooling() -> None:
    with pytest.raises(
        ValueError, match=r"maps of at least 3 x 3 at stride 16 .* which gives 2 x 2"
    ):
        MSFlow("test_resnet", pretrained=False, image_size=32)
    MSFlow("test_resnet", pretrained=False, image_size=33)


def test_features_that_do_not_fit_are_refused(normal: Normal) -> None:
    head, x = make(), draw(normal)
    with pytest.raises(ValueError, match=r"features must be 2 tensors \(N, C, H, W\)"):
        head(x[:1])
    with pytest.raises(ValueError, match=r"the same N and channels \(8, 11\)"):
        head([x[0][:, :7], x[1]])
    message = r"features must have the sizes \[\(6, 5\), \(3, 3\)\] of the LayerNorms, got \[\(5"
    with pytest.raises(ValueError, match=message):
        head([x[0].mT, x[1]])
    with pytest.raises(ValueError, match=r"z must have the sizes .* of the LayerNorms"):
        head.inverse([x[0].mT, x[1]])
    x[1][1, 2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="features must be finite, scale 1 has NaN or infinity"):
        head(x)


# Backbone, size of the images, sizes of the maps, whether there are trainable norms.
BACKBONES: dict[str, tuple[str, int, list[int], bool]] = {
    "cnn": ("test_resnet", 64, [16, 8, 4], True),
    "nhwc": ("test_mambaout", 64, [16, 8, 4], True),
    "vit": ("test_vit", 64, [4], False),
    "shrinking": ("test_maxvit", 64, [16, 8, 4], True),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_the_score_is_the_mean_likelihood_over_scales(case: str) -> None:
    name, size, sides, normed = BACKBONES[case]
    model = FastFlow(name, image_size=size, pretrained=False, steps=2, seed=0).eval()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = model.features(images)
    assert [f.shape[-1] for f in features] == sides
    assert (len(model.head.norms) > 0) is normed
    got = model(images)
    likelihood = model.head.log_likelihood(features)
    expected = ops.mean_aggregate(likelihood, size)
    assert torch.equal(got.anomaly_map, expected.anomaly_map)
    assert torch.equal(got.score, got.anomaly_map.amax((1, 2)))
    assert torch.equal(got.image_map, got.anomaly_map)
    assert [tuple(m.shape) for m in got.log_likelihood] == [(2, side, side) for side in sides]
    assert relative_error(model.loss(images), model.head.loss(features)) <= 1e-5
    form = model.optimize()
    assert relative_error(form(images).anomaly_map, got.anomaly_map) <= 1e-4


def test_the_log_and_nll_scores_are_those_of_aggregate() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    options = {"image_size": 64, "steps": 1, "top_k": 0.1}
    model = FastFlow("test_resnet", pretrained=False, **options)
    features = model.features(images)
    expected = ops.aggregate(model.head.log_likelihood(features), 64, top_k=0.1)
    maps = model.predict_features(features).anomaly_map
    for name, score in (("log", expected.log_score), ("nll", expected.nll_score)):
        model.score = name
        got = model.predict_features(features)
        assert torch.equal(got.score, score)
        assert torch.equal(got.anomaly_map, maps)


@pytest.mark.parametrize("case", BACKBONES)
def test_the_config_builds_the_model_again(case: str) -> None:
    name, size, _, _ = BACKBONES[case]
    options = {"hidden_ratio": 0.5, "conv3x3_only": True, "clamp": 1.5, "standardize": True}
    model = FastFlow(name, image_size=size, pretrained=False, steps=1, **options)
    again = FastFlow(**model.config, pretrained=False)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, size, size)
    assert torch.equal(again(images).anomaly_map, model(images).anomaly_map)


def test_statistics_standardize_the_features() -> None:
    model = FastFlow("test_resnet", image_size=64, pretrained=False, steps=1, standardize=True)
    images = torch.rand(4, 3, 64, 64)
    features = model.features(images)
    moments = [(f.mean((0, 2, 3)), f.std((0, 2, 3))) for f in features]
    model.set_statistics([m for m, _ in moments], [s for _, s in moments])
    for f in model.features(images):
        torch.testing.assert_close(f.mean((0, 2, 3)), torch.zeros(f.size(1)), atol=1e-4, rtol=0)


def test_the_default_image_size_is_that_of_the_transformer_or_256_pixels() -> None:
    assert FastFlow("test_vit", pretrained=False, steps=1).image_size == 160
    assert FastFlow("test_resnet", pretrained=False, steps=1).image_size == 256
    assert MSFlow("test_vit", pretrained=False, blocks=(1, 1)).image_size == 160


def test_msflow_reads_three_depths_of_a_transformer_without_pooling() -> None:
    model = MSFlow("test_vit", image_size=64, pretrained=False, blocks=(1, 1, 1), seed=0).eval()
    assert model.backbone.out_indices == (0, 2, 3)
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    assert [tuple(f.shape) for f in features] == [(2, 64, 4, 4)] * 3
    out = model.head(features)
    for got, right in zip(model.head.inverse(out.z).z, features, strict=True):
        assert relative_error(got, right) <= 1e-4
    model.loss(images).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    got, form = model(images), model.optimize()(images)
    assert relative_error(form.anomaly_map, got.anomaly_map) <= 1e-3
    again = MSFlow(**model.config, pretrained=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images).score, got.score)


def test_msflow_reads_the_chosen_maps() -> None:
    model = MSFlow("test_resnet", pretrained=False, blocks=(1, 1), out_indices=(2, 4))
    assert model.backbone.strides == (8, 32)
    assert model.config["out_indices"] == [2, 4]
