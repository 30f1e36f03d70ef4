"""Convolutions in training: Winograd's algorithm if it is faster, with the gradients of torch's convolution."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import MSFlowHead
from msflow_ext.models.conv import training as trained_conv
from msflow_ext.models.conv import winograd
from msflow_ext.models.conv.training import TrainedConv2d, laid_out
from msflow_ext.ops.winograd import factor_dtypes
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

F32, BF16 = torch.float32, torch.bfloat16
LARGE = (2, 64, 32, 40)  # enough positions and channels for Winograd's algorithm


@pytest.fixture
def forms(native: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record which algorithm each convolution uses, in order."""
    if not factor_dtypes():
        pytest.skip("no kernels for this processor")
    taken: list[Any] = []
    decide = trained_conv.training_form

    def watch(x: Tensor, conv: nn.Conv2d) -> Any:
        taken.append(decide(x, conv))
        return taken[-1]

    monkeypatch.setattr(trained_conv, "training_form", watch)
    monkeypatch.setattr(winograd, "has_amx", lambda: False)  # with AMX, bfloat16 stays direct
    return taken


def pair(channels: int = 64, results: int = 96, **options: Any) -> tuple[TrainedConv2d, nn.Conv2d]:
    """Return a convolution and torch's with the same weights."""
    torch.manual_seed(0)
    options = {"padding": 1} | options
    ours = TrainedConv2d(channels, results, options.pop("kernel", 3), **options)
    theirs = nn.Conv2d(channels, results, ours.kernel_size[0], **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def derivatives(conv: nn.Conv2d, x: Tensor, *, mixed: bool = False) -> list[Tensor]:
    """Return the result, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=mixed):
        y = conv(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).roll(1, 1)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_result_and_gradients_are_those_of_torch(
    forms: list[Any], normal: Normal, memory: torch.memory_format, bias: bool
) -> None:
    x = normal(*LARGE, dtype=F32).contiguous(memory_format=memory)
    ours, theirs = pair(bias=bias)
    for got, expected in zip(derivatives(ours, x), derivatives(theirs, x), strict=True):
        assert got.dtype is F32
        assert relative_error(got, expected) <= 1e-5
    assert forms == [(4, F32)]


def test_under_autocast_factors_are_bfloat16_and_gradients_are_close(
    forms: list[Any], normal: Normal
) -> None:
    x = normal(*LARGE, dtype=F32)
    ours, theirs = pair()
    exact = derivatives(copy.deepcopy(theirs).double(), x.double())
    for got, expected in zip(derivatives(ours, x, mixed=True), exact, strict=True):
        assert float((got.double() - expected).norm() / expected.norm()) <= 0.01
    assert derivatives(ours, x, mixed=True)[0].dtype is BF16
    assert len(forms) == 2 and None not in forms


def test_derivatives_of_derivatives_are_those_of_torch(forms: list[Any], normal: Normal) -> None:
    x = normal(*LARGE, dtype=F32)

    def penalty(conv: nn.Conv2d) -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((conv(inputs) ** 2).sum(), inputs, create_graph=True)
        return torch.autograd.grad((slope**2).mean(), [inputs, *conv.parameters()])

    ours, theirs = pair()
    for got, expected in zip(penalty(ours), penalty(theirs), strict=True):
        assert relative_error(got, expected) <= 1e-5
    assert forms == [(4, F32)]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_gets_no_gradient(forms: list[Any], normal: Normal, frozen: str) -> None:
    x = normal(*LARGE, dtype=F32).requires_grad_()
    ours, theirs = pair()
    for conv in (ours, theirs):
        conv.get_parameter(frozen).requires_grad_(False)
        conv(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (name == frozen)
        if p.grad is not None and q.grad is not None:
            assert relative_error(p.grad, q.grad) <= 1e-5


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 64, 16, 16), {}),  # too few positions share the weight's transform
        ((2, 16, 32, 40), {"channels": 16}),
        (LARGE, {"padding": 0}),
        (LARGE, {"stride": 2}),
        (LARGE, {"kernel": 1, "padding": 0}),
        (LARGE, {"padding_mode": "reflect"}),
    ],
    ids=str,
)
def test_convolutions_that_stay_direct_are_bit_identical_to_torch(
    forms: list[Any], normal: Normal, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    x = normal(*shape, dtype=F32)
    ours, theirs = pair(**options)
    for got, expected in zip(derivatives(ours, x), derivatives(theirs, x), strict=True):
        assert torch.equal(got, expected)
    assert forms == [None]


def test_without_a_gradient_the_result_is_bit_identical_to_torch(
    forms: list[Any], normal: Normal
) -> None:
    x = normal(*LARGE, dtype=F32)
    ours, theirs = pair()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert forms == [None]


def test_function_transforms_use_the_convolution_of_torch(forms: list[Any], normal: Normal) -> None:
    x, (ours, theirs) = normal(*LARGE, dtype=F32), pair()
    got, expected = (
        torch.func.grad(lambda w, c=c: torch.func.functional_call(c, {"weight": w}, x).sum())(
            ours.weight
        )
        for c in (ours, theirs)
    )
    assert torch.equal(got, expected)
    assert forms == [None]


def test_flows_train_with_winograd_convolutions(forms: list[Any], normal: Normal) -> None:
    torch.manual_seed(0)
    head = MSFlowHead((64, 64, 64), blocks=(1, 1, 1), cond_channels=32)
    features = [normal(1, 64, s, s, dtype=F32) for s in (64, 32, 16)]
    head.loss(features).backward()
    got = [p.grad for p in head.parameters()]
    taken = list(forms)
    head.zero_grad()
    head.double().loss([f.double() for f in features]).backward()
    for g, p in zip(got, head.parameters(), strict=True):
        assert g is not None and p.grad is not None
        assert relative_error(g.double(), p.grad) <= 1e-4
    assert any(taken) and not any(forms[len(taken) :])


def test_results_may_be_changed_in_place(forms: list[Any], normal: Normal) -> None:
    ours, theirs = pair()
    x = normal(*LARGE)
    found, expected = (
        derivatives(nn.Sequential(conv, nn.ReLU(inplace=True)), x)  # type: ignore[arg-type]
        for conv in (ours, theirs)
    )
    assert forms == [(4, F32)]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other.double()) < 1e-4


def test_the_channels_last_copy_of_features_is_recomputed_instead_of_kept(
    forms: list[Any], normal: Normal
) -> None:
    x, conv = normal(*LARGE, dtype=F32), pair()[0]
    made = []

    def halves(x: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        made.append(weakref.ref(x.untyped_storage()))
        return conv(x[:, :64]).sum() + (x[:, 32:] * weight).sum()  # views, as couplings use them

    weight = normal(1, 32, 1, 1, dtype=F32).requires_grad_()
    loss = laid_out(halves, x, conv)
    found = torch.autograd.grad(loss, [conv.weight, weight])
    direct = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).sum()
    expected = torch.autograd.grad(direct + (x[:, 32:] * weight).sum(), [conv.weight, weight])
    for got, right in zip(found, expected, strict=True):
        assert relative_error(got, right) <= 1e-5
    loss = laid_out(halves, x, conv)
    assert made[-1]() is None
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["inference", "differentiable"])
def test_the_copy_of_inference_or_differentiable_features_is_kept(
    forms: list[Any], normal: Normal, kind: str
) -> None:
    with torch.inference_mode(kind == "inference"):
        x = normal(*LARGE, dtype=F32)
    x.requires_grad_(kind == "differentiable")
    conv = pair()[0]
    laid_out(conv, x, conv).square().sum().backward()
    slope, conv.weight.grad = conv.weight.grad, None
    conv(x.clone()).square().sum().backward()
    assert slope is not None and conv.weight.grad is not None
    assert relative_error(slope, conv.weight.grad) <= 1e-6
