"""Properties of every op: deterministic, independent of batch and threads; graphs, exports and function transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]
Function = Callable[..., tuple[Tensor, ...]]

F32, F64 = torch.float32, torch.float64


def narrowed(x: Tensor) -> Tensor:
    """Return the tensor in the half precision that ops accept with float32."""
    return x.to({F32: torch.bfloat16}.get(x.dtype, x.dtype))


def couple(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    perm = torch.arange(len(scale) - 1, -1, -1, device=scale.device)
    return ops.affine_coupling(x1, x2, a, scale, offset, perm, limit=3.0, split=2)


def couple_bare(x1: Tensor, x2: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    return ops.affine_coupling(x1, x2, a, clamp_form="atan")


def uncouple(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor) -> Any:
    return ops.affine_coupling_inverse(x1, x2, a, scale, offset)


def couple_with_copy(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor) -> Any:
    options: Any = {"limit": 3.0, "split": 2}
    *results, copy = ops.affine_coupling_with_copy(x1, x2, narrowed(a), scale, offset, **options)
    return *results, copy.to(x2.dtype)


def couple_without_log_det(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor) -> Any:
    return ops.affine_coupling(x1, x2, a, scale, offset, limit=3.0, split=2, log_det=False)[:2]


def couple_likelihood(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor) -> Any:
    return (ops.coupling_log_likelihood(x1, x2, a, scale, offset, limit=3.0),)


def norm(x: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor) -> tuple[Tensor, ...]:
    return (ops.channel_norm(x, weight, bias, bias_map),)


def likelihoods(z: Tensor) -> tuple[Tensor, ...]:
    return ops.log_likelihood_map(z), ops.half_square_norm(z)


def pool(x: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
    return (ops.pool_and_concatenate([x, x2], (2, 2)),)


def upsample(x: Tensor, low: Tensor) -> tuple[Tensor, ...]:
    return (ops.upsample_and_add(x, low),)


def upsample_onto_float32(x: Tensor, low: Tensor) -> tuple[Tensor, ...]:
    return (ops.upsample_and_add(x, narrowed(low)).to(x.dtype),)


def convolve(x: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    values = ops.winograd_weight(weight, 4, offset.dtype)
    return (ops.winograd_conv2d(x, values, offset),)


def aggregate(*maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.aggregate(maps, 24)
    return tuple(getattr(result, field.name) for field in fields(result))


def mean_aggregate(*maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.mean_aggregate(maps, 24)
    return result.score, result.anomaly_map


# Op, names of its operands, and the registered op that a compiled graph must contain (None: plain PyTorch).
OPS: dict[str, tuple[Function, tuple[str, ...], str | None]] = {
    "coupling": (couple, ("x1", "x2", "a", "scale", "offset"), "msflow_ext.coupling"),
    "coupling-bare": (couple_bare, ("x1", "x2", "a"), "msflow_ext.coupling"),
    "coupling-inverse": (uncouple, ("x1", "x2", "a", "scale", "offset"), None),
    "coupling-with-copy": (
        couple_with_copy,
        ("x1", "x2", "a", "scale", "offset"),
        "msflow_ext.coupling_with_copy",
    ),
    "coupling-without-log-det": (
        couple_without_log_det,
        ("x1", "x2", "a", "scale", "offset"),
        "msflow_ext.coupling_results",
    ),
    "coupling-likelihood": (couple_likelihood, ("x1", "x2", "a", "scale", "offset"), None),
    "norm": (norm, ("x", "scale", "offset", "map"), "msflow_ext.channel_norm"),
    "likelihoods": (likelihoods, ("x",), "msflow_ext.square_sums"),
    "pool": (pool, ("x", "x2"), "msflow_ext.pool_and_concatenate"),
    "upsample": (upsample, ("x", "low"), "msflow_ext.upsample_and_add"),
    "upsample-onto-float32": (
        upsample_onto_float32,
        ("x", "low"),
        "msflow_ext.upsample_and_add",
    ),
    "winograd": (convolve, ("x", "weight", "offset"), None),
    "aggregate": (aggregate, ("maps", "small maps"), None),
    "mean-aggregate": (mean_aggregate, ("maps", "small maps"), None),
}
REGISTERED = [name for name, (_, _, registered) in OPS.items() if registered]


def make(
    normal: Normal,
    name: str,
    dtype: torch.dtype = F32,
    size: tuple[int, int] = (3, 5),
    layout: Layout = Tensor.contiguous,
    channels: tuple[int, int] = (4, 3),
    n: int = 3,
) -> list[Tensor]:
    c1, c2 = channels
    operands = {
        "x1": layout(normal(n, c1, *size, dtype=dtype)),
        "x2": layout(normal(n, c2, *size, dtype=dtype)),
        "a": layout(6 * normal(n, 2 * c2, *size, dtype=dtype)),
        "x": layout(normal(n, c1 + c2, *size, dtype=dtype)),
        "low": layout(normal(n, c1 + c2, 2, 2, dtype=dtype)),
        "map": layout(normal(1, c1 + c2, *size, dtype=dtype)),
        "scale": normal(c1 + c2, dtype=dtype).exp(),
        "offset": normal(c1 + c2, dtype=dtype),
        "weight": normal(c1 + c2, c1 + c2, 3, 3, dtype=dtype),
        "maps": -normal(n, *size, dtype=dtype).square(),
        "small maps": -normal(n, 2, 3, dtype=dtype).square(),
    }
    return [operands[key] for key in OPS[name][1]]


def differentiate(function: Function, operands: list[Tensor]) -> list[Tensor]:
    """Return results, and gradients of the sum of their squares."""
    leaves = [t.detach().requires_grad_() for t in operands]
    results = function(*leaves)
    total = torch.stack([r.square().sum() for r in results]).sum()
    return [*(r.detach() for r in results), *torch.autograd.grad(total, leaves)]


def run_kernels(name: str, operands: list[Tensor]) -> list[Tensor]:
    """Return the results of an op, and its gradients if a kernel computes them."""
    function, _, registered = OPS[name]
    return differentiate(function, operands) if registered else list(function(*operands))


class Op(nn.Module):
    """Function as a module, which exporters need."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return self.function(*operands)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_deterministic(
    native: None, normal: Normal, name: str, memory_format: Layout, two_threads: None
) -> None:
    operands = make(normal, name, size=(96, 80), layout=memory_format)
    first, second = (run_kernels(name, operands) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", REGISTERED)
def test_results_can_be_changed_in_place(
    native: None, normal: Normal, name: str, layout: str
) -> None:
    order = getattr(torch, layout)
    operands = make(normal, name, layout=lambda t: t.contiguous(memory_format=order))
    function = OPS[name][0]

    def doubled(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * r for r in function(*leaves))

    def in_place(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(r.mul_(2) for r in function(*leaves))

    for one, other in zip(
        differentiate(in_place, operands), differentiate(doubled, operands), strict=True
    ):
        assert one.equal(other)


@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_the_number_of_threads_bit_for_bit(
    native: None, normal: Normal, name: str, memory_format: Layout, two_threads: None
) -> None:
    if "threads of torch" not in _backend.STATUS:
        pytest.skip(f"kernels {_backend.STATUS}")
    operands = make(normal, name, size=(96, 80), layout=memory_format)
    two = run_kernels(name, operands)
    torch.set_num_threads(1)
    one = run_kernels(name, operands)
    assert all(map(torch.equal, two, one))


@pytest.mark.parametrize("name", OPS)
def test_the_deterministic_mode_of_torch_changes_no_bit(
    native: None, normal: Normal, name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = make(normal, name, size=(13, 17), layout=layout)
    if name == "winograd" and operands[0].is_cuda:
        pytest.skip("on a GPU the products of PyTorch need cuBLAS configured for this")
    expected = run_kernels(name, operands)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN
    torch.use_deterministic_algorithms(True)
    try:
        found = run_kernels(name, operands)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("whole_packets", [False, True])
def test_results_do_not_depend_on_the_batch_bit_for_bit(
    native: None, normal: Normal, name: str, layout: Layout, whole_packets: bool
) -> None:
    function, keys, _ = OPS[name]
    shape: Any = {"size": (13, 17)}
    if whole_packets:
        shape = {"size": (8, 8), "channels": (16, 16), "n": 9}
    operands = make(normal, name, layout=layout, **shape)
    if name == "winograd" and operands[0].is_cuda:
        pytest.skip("on a GPU the products are PyTorch's")
    batched = [key in ("x1", "x2", "a", "x", "low", "maps", "small maps") for key in keys]
    leaves = [t.detach().requires_grad_() for t in operands]
    whole = list(function(*leaves))
    upstream = [r.detach().cos() for r in whole]
    differentiable = name != "winograd"  # its gradients are those of torch's convolutions
    inputs = [t for t, b in zip(leaves, batched, strict=True) if b]
    whole += torch.autograd.grad(whole, inputs, upstream) if differentiable else ()
    for k in range(len(whole[0])):
        single = [
            (t.detach()[k : k + 1] if b else t.detach()).requires_grad_()
            for t, b in zip(leaves, batched, strict=True)
        ]
        results = list(function(*single))
        inputs = [t for t, b in zip(single, batched, strict=True) if b]
        if differentiable:
            results += torch.autograd.grad(results, inputs, [u[k : k + 1] for u in upstream])
        for got, expected in zip(results, whole, strict=True):
            assert torch.equal(got[0], expected[k])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_pass_the_checks_of_torch(
    native: None, normal: Normal, name: str, memory_format: Layout
) -> None:
    operands = [t.requires_grad_() for t in make(normal, name, layout=memory_format)]
    narrow = {"coupling-with-copy": 2, "upsample-onto-float32": 1}.get(name)
    if narrow is not None:
        operands[narrow] = narrowed(operands[narrow].detach()).requires_grad_()
    perm = torch.arange(6, -1, -1, device=operands[0].device)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "coupling": (torch.ops.msflow_ext.coupling, (*operands, perm, 2.0, "0.2", 3.0, 2)),
        "coupling-bare": (
            torch.ops.msflow_ext.coupling,
            (*operands, None, None, None, 1.9, "atan", float("inf"), 4),
        ),
        "coupling-without-log-det": (
            torch.ops.msflow_ext.coupling_results,
            (*operands, perm, 2.0, "0.2", 3.0, 2),
        ),
        "coupling-with-copy": (
            torch.ops.msflow_ext.coupling_with_copy,
            (*operands, perm, 2.0, "0.2", 3.0, 2),
        ),
        "norm": (torch.ops.msflow_ext.channel_norm, (*operands, True, 1e-5)),
        "likelihoods": (torch.ops.msflow_ext.square_sums, tuple(operands)),
        "pool": (torch.ops.msflow_ext.pool_and_concatenate, (*operands, *[None] * 6, 2, 2)),
        "upsample": (torch.ops.msflow_ext.upsample_and_add, tuple(operands)),
        "upsample-onto-float32": (torch.ops.msflow_ext.upsample_and_add, tuple(operands)),
    }
    op, arguments = calls[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", OPS)
def test_a_compiled_graph_calls_the_kernels_and_gives_the_same_results(
    native: None, normal: Normal, name: str
) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import (
        make_boxed_func,  # pyright: ignore[reportPrivateImportUsage]
    )

    function, _, registered = OPS[name]
    code: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        code.append(graph.code)
        return make_boxed_func(graph.forward)

    operands = make(normal, name)
    torch.compiler.reset()
    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    got, expected = differentiate(compiled, operands), differentiate(function, operands)
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= tolerance(F32, 64)
    forward, backward = code
    assert (f"{registered}.default" in forward) == (registered is not None)
    assert (f"{registered}_backward.default" in backward) == (registered is not None)
    assert registered or "msflow_ext" not in forward + backward


@pytest.mark.parametrize("name", REGISTERED)
def test_a_compiled_graph_supports_other_sizes_and_layouts(
    native: None, normal: Normal, name: str
) -> None:
    function = OPS[name][0]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((3, 5), (4, 7)):
        for layout in (
            Tensor.contiguous,
            lambda x: x.contiguous(memory_format=torch.channels_last),
        ):
            operands = make(normal, name, size=size, layout=layout)
            got, expected = differentiate(compiled, operands), differentiate(function, operands)
            for g, w in zip(got, expected, strict=True):
                assert relative_error(g, w) <= tolerance(F32, 64)


@pytest.mark.parametrize("name", OPS)
def test_an_exported_graph_is_plain_pytorch(native: None, normal: Normal, name: str) -> None:
    operands = make(normal, name)
    exported = torch.export.export(Op(OPS[name][0]), tuple(operands))
    assert "msflow_ext" not in exported.graph_module.code
    got, expected = exported.module()(*operands), OPS[name][0](*operands)
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= tolerance(F32, 64)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_a_traced_graph_is_plain_pytorch(native: None, normal: Normal, name: str) -> None:
    function = OPS[name][0]
    traced: Any = torch.jit.trace(function, tuple(make(normal, name)))
    assert "_Eager" not in str(traced.graph)
    others = make(normal, name)
    for g, w in zip(traced(*others), function(*others), strict=True):
        assert relative_error(g, w) <= tolerance(F32, 64)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_function_transforms_work(native: None, normal: Normal, name: str) -> None:
    function = OPS[name][0]
    operands = make(normal, name, F64)

    def total(*operands: Tensor) -> Tensor:
        return torch.stack([r.square().sum() for r in function(*operands)]).sum()

    everything = tuple(range(len(operands)))
    gradients = torch.func.grad(total, argnums=everything)(*operands)
    for got, expected in zip(
        gradients, differentiate(function, operands)[-len(operands) :], strict=True
    ):
        assert relative_error(got, expected) <= 1e-12
    tangents = tuple(normal(*t.shape, dtype=F64) for t in operands)
    slope = torch.func.jvp(total, tuple(operands), tangents)[1]
    expected = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
    assert relative_error(slope, expected) <= 1e-12
    stacked = [torch.stack((t, 0.5 * t)) for t in operands]
    one, half = function(*operands), function(*(0.5 * t for t in operands))
    for got, w1, w2 in zip(torch.func.vmap(function)(*stacked), one, half, strict=True):
        assert relative_error(got, torch.stack((w1, w2))) <= 1e-12
