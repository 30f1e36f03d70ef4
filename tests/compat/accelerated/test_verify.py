"""A module is compared with the original before it is replaced, without side effects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msflow_ext as mx


@pytest.fixture
def patched(freia, monkeypatch):
    """Return ``patched(name, function)``, which replaces a function of FrEIA's block until the test ends."""

    def patch(name: str, function: Any) -> None:
        monkeypatch.setattr(freia.modules.AllInOneBlock, name, function)

    return patch


def test_a_forward_with_other_results_is_refused_and_the_model_is_unchanged(freia, make, patched):
    chain, good = make.chain(), make.block()
    model = nn.ModuleList([good, chain])
    own = freia.modules.AllInOneBlock.forward

    def worse(self: Any, *args: Any, **options: Any) -> Any:
        (y,), log_det = own(self, *args, **options)
        return (y * (1 + 1e-6),), log_det

    patched("forward", worse)
    with pytest.raises(
        ValueError, match=r"accelerate: 0 must give the same results, .* 1\..e-06; the module is un"
    ):
        mx.accelerate(model)
    assert {type(m).__name__ for m in model.modules()} & {"AllInOneBlock", "SequenceINN"}
    assert not [m for m in model.modules() if type(m).__name__.startswith("Accelerated")]


@pytest.mark.parametrize("wrong", ["inverse", "log_det", "gradient"])
def test_a_wrong_inverse_log_det_or_gradient_is_found(freia, make, patched, wrong):
    own = freia.modules.AllInOneBlock.forward

    def worse(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        (y,), log_det = own(self, x, c, rev, jac)
        if wrong == "inverse" and rev:
            y = y + 1
        if wrong == "log_det":
            log_det = 0.5 * log_det
        if wrong == "gradient":
            y = y.detach() + 0 * y
        return (y,), log_det

    patched("forward", worse)
    with pytest.raises(ValueError, match="must give the same results"):
        mx.accelerate(make.block())


def test_without_verification_only_the_forward_is_compared(freia, make, patched):
    own = freia.modules.AllInOneBlock.forward

    def worse(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        (y,), log_det = own(self, x, c, rev, jac)
        return (y + 1 if rev else y,), log_det

    patched("forward", worse)
    assert mx.accelerate(make.block(), verify=False).replaced == [""]


def test_a_clamp_for_which_both_forms_agree_is_accepted(make):
    for form in ("0.2", "head"):
        block, inputs = make.block(form, affine_clamping=1.0), make.data()
        expected = make.results(block, inputs)
        mx.accelerate(block)
        make.same(make.results(block, inputs), expected)


def test_the_clamp_form_is_found_for_a_subnet_of_zeros(make):
    def zeros(channels_in: int, channels_out: int) -> nn.Module:
        return nn.Conv2d(channels_in, channels_out, 1)

    for form in ("0.2", "head"):
        block, inputs = make.block(form, subnet_constructor=zeros), make.data()
        trained = copy.deepcopy(block)
        nn.init.zeros_(block.subnet.weight)
        nn.init.zeros_(block.subnet.bias)
        mx.accelerate(block)
        block.load_state_dict(trained.state_dict())
        make.same(make.results(block, inputs), make.results(trained, inputs))


class Noticing(nn.Module):
    """Subnet that counts its calls, draws random numbers, and changes a buffer in training."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1)
        self.norm = nn.BatchNorm2d(channels_out)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.dropout(self.norm(self.conv(x)), training=self.training)


def test_the_comparison_neither_runs_nor_changes_the_model(make):
    chain = make.chain(subnet_constructor=Noticing)
    chain(make.data()[0])[0].sum().backward()
    chain[0].eval()
    for m in [chain, *chain, *(part for block in chain for part in block.subnet.modules())]:
        m.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    for p in chain.parameters():
        if p.requires_grad:
            p.register_hook(lambda _: pytest.fail("a gradient was computed"))

    def facts() -> list[Any]:
        tensors = [*chain.parameters(), *chain.buffers(), *(p.grad for p in chain.parameters())]
        found = [None if t is None else (id(t), t._version, t.clone()) for t in tensors]
        return [*found, [m.training for m in chain.modules()], [b.subnet.calls for b in chain]]

    before, numbers = facts(), torch.get_rng_state()
    report = mx.accelerate(chain)
    assert len(report.replaced) == 3 and report.fused
    assert torch.equal(torch.get_rng_state(), numbers)
    for now, then in zip(facts(), before, strict=True):
        if isinstance(then, tuple):
            assert now[:2] == then[:2] and torch.equal(now[2], then[2])
        else:
            assert now == then


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_accelerating_works_in_any_context(make, context):
    chain, inputs = make.chain(), make.data()
    expected = make.results(chain, inputs)
    with context():
        mx.accelerate(chain)
    make.same(make.results(chain, inputs), expected)


def test_a_frozen_model_stays_frozen(make):
    chain, inputs = make.chain().requires_grad_(False), make.data()
    expected, _ = chain(*inputs)
    mx.accelerate(chain)
    assert not any(p.requires_grad for p in chain.parameters())
    torch.testing.assert_close(chain(*inputs)[0], expected, rtol=1e-10, atol=1e-10)


def test_a_block_whose_original_forward_fails_is_kept_with_the_reason(make, patched):
    def broken(self: Any, *args: Any, **options: Any) -> Any:
        raise RuntimeError("out of order")

    block = make.block()
    patched("forward", broken)
    with pytest.raises(ValueError, match="it cannot be run for comparison: out of order"):
        mx.accelerate(block)


def test_a_block_built_for_one_position_is_compared_on_several(freia, make):
    block = make.classes["0.2"]([(6, 1, 1)], subnet_constructor=make.hidden(2)).double()
    x = make.data()
    (expected,), _ = block(x)
    mx.accelerate(block)
    torch.testing.assert_close(block(x)[0][0], expected, rtol=1e-10, atol=1e-10)
