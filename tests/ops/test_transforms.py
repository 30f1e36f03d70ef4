"""Properties of every op under transforms of PyTorch: checkpoints, batched and dual gradients, graphs, fake tensors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.testing import relative_error

Normal = Callable[..., Tensor]

#: Functions of one tensor ``(2, 4, 3, 3)``. They make factors, vectors and kernels inside, so that everything is traced.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "coupling": lambda x: ops.affine_coupling(x[:, :2], x[:, 2:], 3 * x)[1],
    "coupling-log-det": lambda x: ops.affine_coupling(x[:, :2], x[:, 2:], 3 * x)[2],
    "coupling-with-copy": lambda x: ops.affine_coupling_with_copy(x[:, :2], x[:, 2:], 3 * x)[3],
    "coupling-inverse": lambda x: ops.affine_coupling_inverse(x[:, :2], x[:, 2:], 3 * x)[0],
    "coupling-likelihood": lambda x: ops.coupling_log_likelihood(x[:, :2], x[:, 2:], 3 * x),
    "norm": lambda x: ops.channel_norm(x, x[0, :, 0, 0].exp(), x[0, :, 1, 1]),
    "likelihood-map": ops.log_likelihood_map,
    "half-square-norm": ops.half_square_norm,
    "pool": lambda x: ops.pool_and_concatenate([x], (2, 2)),
    "upsample": lambda x: ops.upsample_and_add(x.repeat(1, 1, 2, 2), x),
    "winograd": lambda x: ops.winograd_conv2d(
        x, ops.winograd_weight(x[0, 0].expand(4, 4, 3, 3), 2, torch.float64), x[0, :, 0, 0]
    ),
}

each_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture
def x(native: None, normal: Normal) -> Tensor:
    return normal(2, 4, 3, 3, dtype=torch.float64).requires_grad_()


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.family("gradients")
@each_op
def test_checkpointing_without_reentry_gives_the_same_gradient(x: Tensor, name: str) -> None:
    y: Any = checkpoint(OPS[name], x, use_reentrant=False)
    assert torch.equal(gradient(y, x), gradient(OPS[name](x), x))


@pytest.mark.family("gradients")
@each_op
def test_the_backward_pass_unpacks_a_saved_tensor_once(x: Tensor, name: str) -> None:
    counts = {"packed": 0, "unpacked": 0}

    def counted(key: str) -> Callable[[Tensor], Tensor]:
        def pass_on(t: Tensor) -> Tensor:
            counts[key] += 1
            return t

        return pass_on

    with torch.autograd.graph.saved_tensors_hooks(counted("packed"), counted("unpacked")):
        OPS[name](x).sum().backward()
    assert 0 < counts["unpacked"] <= counts["packed"]


@pytest.mark.family("transforms")
@each_op
def test_batched_gradients_equal_single_ones(x: Tensor, normal: Normal, name: str) -> None:
    y = OPS[name](x)
    upstream = normal(3, *y.shape, dtype=y.dtype)
    (got,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for g, u in zip(got, upstream, strict=True):
        assert relative_error(g, torch.autograd.grad(y, x, u, retain_graph=True)[0]) <= 1e-12


@pytest.mark.family("transforms")
@each_op
def test_a_vectorized_jacobian_equals_the_jacobian(x: Tensor, name: str) -> None:
    jacobian = torch.autograd.functional.jacobian
    got, expected = (jacobian(OPS[name], x.detach(), vectorize=v) for v in (True, False))
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.family("transforms")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@each_op
def test_a_dual_upstream_gradient_keeps_its_tangent(x: Tensor, normal: Normal, name: str) -> None:
    y = OPS[name](x)
    upstream, tangent = normal(2, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, x, u, retain_graph=True)[0] for u in (upstream, tangent)]
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(y, x, forward_ad.make_dual(upstream, tangent))
        for got, want in zip(forward_ad.unpack_dual(dual), expected, strict=True):
            assert got is not None
            assert relative_error(got, want) <= 1e-12


@pytest.mark.family("transforms")
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_op
def test_a_graph_of_make_fx_computes_the_op(
    x: Tensor, normal: Normal, name: str, mode: Any
) -> None:
    x = x.detach()
    graph = make_fx(OPS[name], tracing_mode=mode)(x)
    other = normal(2, 4, 3, 3, dtype=x.dtype)
    assert relative_error(graph(other), OPS[name](other)) <= 1e-12


@pytest.mark.family("transforms")
@each_op
def test_a_graph_before_dispatch_computes_the_op(x: Tensor, normal: Normal, name: str) -> None:
    graph = make_fx(OPS[name], pre_dispatch=True)(x.detach())
    other = normal(2, 4, 3, 3, dtype=x.dtype)
    assert relative_error(graph(other), OPS[name](other)) <= 1e-12


@pytest.mark.family("transforms")
@each_op
def test_fake_tensors_give_fake_results_of_the_right_shape(x: Tensor, name: str) -> None:
    x = x.detach()
    with FakeTensorMode() as mode:
        found = OPS[name](mode.from_tensor(x))
    expected = OPS[name](x)
    assert type(found).__name__ == "FakeTensor"
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.family("transforms")
def test_a_mode_that_only_observes_keeps_the_kernels(x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert _backend.is_native(x)
    assert not _backend.is_transformed(x)


@pytest.mark.family("gradients")
@each_op
def test_autocast_around_the_backward_pass_changes_no_gradient(
    native: None, normal: Normal, name: str
) -> None:
    x = normal(2, 4, 3, 3).requires_grad_()
    function = OPS[name]
    if name == "winograd":
        kernels = ops.winograd_weight(normal(4, 4, 3, 3), 2)
        function = lambda x: ops.winograd_conv2d(x, kernels, x[0, :, 0, 0])  # noqa: E731
    y = function(x)
    (expected,) = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        (got,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(got, expected)


@pytest.mark.family("transforms")
def test_a_backend_holds_only_in_its_thread(native: None) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with ops.backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    before = _backend.forced()
    with ops.backend("native"):
        done.set()
        thread.join()
        assert _backend.forced() == "native"
    assert _backend.forced() == before != "reference"


@pytest.mark.family("transforms")
def test_a_backend_holds_only_in_its_asyncio_task(native: None) -> None:
    async def choose(name: str, waits: int) -> str | None:
        with ops.backend(name):
            for _ in range(waits):
                await asyncio.sleep(0)
            return _backend.forced()

    async def both() -> Any:
        return await asyncio.gather(choose("reference", 3), choose("native", 5))

    before = _backend.forced()
    assert list(asyncio.run(both())) == ["reference", "native"]
    assert _backend.forced() == before


@pytest.mark.family("transforms")
def test_a_compiled_function_follows_the_backend(native: None, normal: Normal) -> None:
    x, graphs = normal(2, 4), []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(ops.half_square_norm, backend=keep, fullgraph=True)
    compiled(x)
    with ops.backend("reference"):
        compiled(x)
    compiled(x)
    assert ["msflow_ext" in code for code in graphs] == [True, False]
