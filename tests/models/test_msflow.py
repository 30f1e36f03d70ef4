"""MSFlow's head and model: inverse, seeds, precision, compilation, export, and refused arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import FastFlowHead, MSFlowHead, ops
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

CHANNELS, SIZES = (6, 8, 10), ((6, 8), (3, 4), (2, 2))


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> MSFlowHead:
    """Return a small head with parameters that are not the initial ones."""
    options = {"channels": CHANNELS, "blocks": (1, 2, 1), "cond_channels": 4} | options
    head = MSFlowHead(**options, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return head.to(dtype)


def draw(normal: Normal, samples: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(samples, c, *s, dtype=dtype) for c, s in zip(CHANNELS, SIZES, strict=True)]


def test_the_inverse_undoes_the_head(
    each_backend: str, normal: Normal, memory_format: Layout
) -> None:
    head, x = make(), [memory_format(t) for t in draw(normal)]
    out = head(x)
    back = head.inverse(out.z)
    for got, expected in zip(back.z, x, strict=True):
        assert relative_error(got, expected) <= 1e-12
    assert relative_error(back.log_det, -out.log_det) <= 1e-12


def test_log_det_is_that_of_the_jacobian(each_backend: str, normal: Normal) -> None:
    head = make(channels=(4, 4), blocks=(1, 1))
    shapes = ((1, 4, 2, 2), (1, 4, 1, 2))
    flat = normal(16 + 8, dtype=torch.float64)

    def run(flat: Tensor) -> tuple[Tensor, Tensor]:
        parts = [p.view(s) for p, s in zip(flat.tensor_split([16]), shapes, strict=True)]
        out = head(parts)
        return torch.cat([z.flatten() for z in out.z]), out.log_det

    jacobian = torch.autograd.functional.jacobian(lambda x: run(x)[0], flat)
    assert isinstance(jacobian, Tensor)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert relative_error(run(flat)[1], expected[None]) <= 1e-11


def test_latents_have_the_memory_format_of_the_features(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    x = [memory_format(t) for t in draw(normal)]
    for z, t in zip(make()(x).z, x, strict=True):
        assert (z.shape, z.stride()) == (t.shape, t.stride())


def test_loss_and_likelihood_follow_from_latents_and_log_det(normal: Normal) -> None:
    head, x = make(), draw(normal)
    out = head(x)
    nats = torch.stack([0.5 * z.square().flatten(1).sum(1) for z in out.z]).sum(0) - out.log_det
    assert relative_error(head.loss(x), nats.mean()) <= 1e-14
    for got, z in zip(head.log_likelihood(x), out.z, strict=True):
        assert relative_error(got, -0.5 * z.square().mean(1)) <= 1e-14


def test_latents_are_clamped_to_a_million(each_backend: str, normal: Normal) -> None:
    z = make()([1e8 * t for t in draw(normal)]).z
    assert torch.stack([t.detach().abs().max() for t in z]).max() == 1e6


@pytest.mark.parametrize("samples", [0, 1])
def test_any_number_of_images_works(each_backend: str, normal: Normal, samples: int) -> None:
    head, x = make(), draw(normal, 3)
    whole, out = head(x), head([t[:samples] for t in x])
    assert out.log_det.shape == (samples,)
    for got, expected in zip((*out.z, out.log_det), (*whole.z, whole.log_det), strict=True):
        assert relative_error(got, expected[:samples]) <= 1e-12


def test_the_same_seed_gives_the_same_head() -> None:
    first, second, other = (MSFlowHead(CHANNELS, seed=s).state_dict() for s in (7, 7, 8))
    assert all(torch.equal(first[key], second[key]) for key in first)
    differ = {key for key in first if not torch.equal(first[key], other[key])}
    assert {"fusion.perm0", "flows.0.steps.0.perm", "fusion.subnet_1.conv1.weight"} <= differ


def test_a_seeded_head_keeps_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    MSFlowHead(CHANNELS, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    unseeded = MSFlowHead(CHANNELS).state_dict()
    torch.manual_seed(5)
    again = MSFlowHead(CHANNELS).state_dict()
    assert all(torch.equal(unseeded[key], again[key]) for key in unseeded)


def test_bfloat16_is_close_to_float32(
    each_backend: str, normal: Normal, memory_format: Layout
) -> None:
    head = make(dtype=torch.float32)
    x = [memory_format(t) for t in draw(normal, dtype=torch.float32)]
    expected = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(x)
        loss = head.loss(x)
    half = copy.deepcopy(head).bfloat16()
    narrow = half([t.bfloat16() for t in x])
    back = half.inverse(narrow.z)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())
    assert {t.dtype for t in (*mixed.z, mixed.log_det, narrow.log_det)} == {torch.float32}
    assert {t.dtype for t in (*narrow.z, *back.z)} == {torch.bfloat16}
    for out in (mixed, narrow):
        for got, right in zip((*out.z, out.log_det), (*expected.z, expected.log_det), strict=True):
            assert relative_error(got, right) <= 0.03
    for got, right in zip(back.z, x, strict=True):
        assert relative_error(got, right) <= 0.1


def test_a_head_can_train_after_inference_mode(normal: Normal) -> None:
    head, x = make(), draw(normal)
    with torch.inference_mode():
        scored = head.loss(x)
    loss = head.loss(x)
    loss.backward()
    assert torch.equal(loss.detach(), scored)


def test_the_compiled_loss_and_its_gradients_are_those_of_eager(
    native: None, normal: Normal
) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import (
        make_boxed_func,  # pyright: ignore[reportPrivateImportUsage]
    )

    head, x = make(dtype=torch.float32), draw(normal, dtype=torch.float32)
    parameters, graphs = list(head.parameters()), []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    loss = torch.compile(head.loss, fullgraph=True, backend=backend)(x)
    got = [loss, *torch.autograd.grad(loss, parameters)]
    loss = head.loss(x)
    for g, w in zip(got, [loss, *torch.autograd.grad(loss, parameters)], strict=True):
        assert relative_error(g, w) <= 1e-5
    for graph, suffix in zip(graphs, ("", "_backward"), strict=True):
        assert graph.count(f"msflow_ext.coupling{suffix}.default") == 4 + 2 * 3
        assert graph.count(f"msflow_ext.channel_norm{suffix}.default") == 4 + 2
        assert graph.count(f"msflow_ext.square_sums{suffix}.default") == 3


class Scores(nn.Module):
    """Head with tensors as input and output, as an exporter requires."""

    def __init__(self, head: MSFlowHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: list[Tensor]) -> Tensor:
        return ops.aggregate(self.head.log_likelihood(x), 16).log_score


def test_an_exported_head_is_plain_pytorch_for_any_number_of_images(
    native: None, normal: Normal
) -> None:
    scores, x = Scores(make(dtype=torch.float32)), draw(normal, dtype=torch.float32)
    any_number = [{0: torch.export.Dim.DYNAMIC} for _ in x]
    exported = torch.export.export(scores, (x,), dynamic_shapes=(any_number,))
    assert "msflow_ext" not in exported.graph_module.code
    for images in ([f[:1] for f in x], x, [torch.cat((f, f)) for f in x]):
        assert relative_error(exported.module()(images), scores(images)) <= 1e-5


def test_the_optimized_head_is_a_snapshot(normal: Normal, memory_format: Layout) -> None:
    head, x = make(), [memory_format(t) for t in draw(normal)]
    for parameter in head.parameters():
        if parameter.dim() == 4:
            parameter.data = memory_format(parameter.data)
    expected = head(x)
    form = head.optimize()
    head.load_state_dict(make(seed=1).state_dict())
    out = form(x)
    for got, right in zip((*out.z, out.log_det), (*expected.z, expected.log_det), strict=True):
        assert relative_error(got, right) <= 1e-12


@pytest.mark.parametrize("kind", ["msflow", "fastflow"])
def test_likelihoods_of_the_optimized_head_compute_no_log_det(
    normal: Normal, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[bool] = []
    couple = ops.affine_coupling

    def asking(*operands: Any, log_det: bool = True, **options: Any) -> Any:
        asked.append(log_det)
        return couple(*operands, log_det=log_det, **options)

    head: Any = make() if kind == "msflow" else FastFlowHead(CHANNELS, steps=2).double()
    x = draw(normal)
    expected, form = head.log_likelihood(x), head.optimize()
    monkeypatch.setattr(ops, "affine_coupling", asking)
    maps = form.log_likelihood(x)
    assert asked and not any(asked)
    for got, right in zip(maps, expected, strict=True):
        assert relative_error(got, right) <= 1e-12


def test_one_number_of_condition_channels_applies_to_all_scales() -> None:
    for cond_channels in (8, [8]):
        head = MSFlowHead((8, 8), blocks=(1, 1), cond_channels=cond_channels)
        assert head.cond_channels == (8, 8)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one scale": ({"channels": (8,)}, r"channels must have two scales or more, got \(8,\)"),
    "odd channels": ({"channels": (8, 9, 8)}, "channels must be even, because the fusion flow"),
    "no channels": ({"channels": (8, 0, 8)}, r"channels must be even, .* got \(8, 0, 8\)"),
    "too few channels": ({"channels": (2, 2, 2)}, r"channels must sum to 8 or more, got \(2, 2"),
    "blocks missing": (
        {"blocks": (1, 2)},
        r"blocks must have one number per scale \(3\), got \(1, 2\)",
    ),
    "no block": ({"blocks": (1, 0, 1)}, r"blocks must be at least 1 on every scale, got \(1, 0"),
    "conditions missing": (
        {"cond_channels": (4, 4)},
        r"cond_channels must have one number per scale \(3\)",
    ),
    "condition of six": ({"cond_channels": 6}, "cond_channels must be multiples of 4, got"),
    "no condition": ({"cond_channels": (4, 0, 4)}, "cond_channels must be multiples of 4, got"),
    "clamp zero": ({"clamp": 0}, "clamp must be positive and finite, got 0.0"),
    "clamp nan": ({"clamp": math.nan}, "clamp must be positive and finite, got nan"),
    "clamp form": ({"clamp_form": "atan"}, "clamp_form must be '0.2' or 'head', got 'atan'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_out_of_range_are_refused(case: str) -> None:
    bad, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        MSFlowHead(**({"channels": (8, 8, 8), "blocks": (1, 1, 1), "cond_channels": 4} | bad))


UNFIT: dict[str, tuple[Callable[[list[Tensor]], Sequence[Tensor]], str]] = {
    "a scale missing": (lambda x: x[:2], r"must be 3 tensors \(N, C, H, W\), got shapes \[\(2, 6"),
    "no batch": (lambda x: [t[0] for t in x], r"must be 3 tensors \(N, C, H, W\)"),
    "scales swapped": (lambda x: x[::-1], r"must have the same N and channels \(6, 8, 10\), got"),
    "batches differ": (lambda x: [x[0], x[1][:1], x[2]], "must have the same N and channels"),
    "no positions": (lambda x: [*x[:2], x[2][..., :0]], "must have at least one position"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_the_head_refuses_features_and_latents_of_another_shape(normal: Normal, case: str) -> None:
    head, (change, message) = make(), UNFIT[case]
    with pytest.raises(ValueError, match=f"^features {message}"):
        head(change(draw(normal)))
    with pytest.raises(ValueError, match=f"^z {message}"):
        head.inverse(change(draw(normal)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_features_that_are_not_finite_are_refused_by_their_scale(
    each_backend: str, normal: Normal, scale: int, value: float
) -> None:
    head, x = make(), draw(normal)
    x[scale][1, 3, 0, 1] = value
    for function in (head, head.loss, head.log_likelihood):
        with pytest.raises(ValueError, match=f"^features must be finite, scale {scale} has NaN"):
            function(x)
