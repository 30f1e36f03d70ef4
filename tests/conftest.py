"""Fixtures of all tests: random tensors, memory layouts, backends, the comparison with the reference, golden values."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from msflow_ext import MSFlow, ops
from msflow_ext.ops import _backend
from msflow_ext.runs.checkpoint import save_checkpoint
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]
Operands = Sequence[Tensor | None]
Golden = tuple[dict[str, Tensor], dict[str, Any]]


def pytest_configure(config: pytest.Config) -> None:
    # Without kernels the tests run on the reference, which warns once.
    config.addinivalue_line("filterwarnings", "ignore:msflow_ext runs its slower reference")
    # The same tests run on the CUDA kernels without a GPU: see tests/cuda_emulator.
    if os.environ.get("MSFLOW_EXT_EMULATED"):
        _backend.emulate()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The tests of the ops run on every device of this machine; Winograd has kernels for the CPU only.
    path = metafunc.definition.path
    on_devices = path.parent.name == "ops" and path.name != "test_winograd.py"
    if on_devices and "normal" in metafunc.fixturenames and torch.cuda.is_available():
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``untrained_run(**header)``: it makes a folder with the checkpoint of a small model, read-only for tests."""

    def save(**header: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8}
            model = MSFlow("test_efficientnet", image_size=64, seed=1, **options)
        header = {"model": "MSFlow", "config": model.config, **header}
        save_checkpoint(folder / "model.safetensors", header, model)
        return folder

    return save


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of ``normal``: the CPU, in tests of the ops also CUDA if there is a GPU."""
    return torch.device(getattr(request, "param", "cpu"))


@pytest.fixture
def normal(device: torch.device) -> Normal:
    """Return ``normal(*shape, dtype=float32)``: standard normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run the module on one thread: a tiny model is slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native() -> Iterator[None]:
    """Run the test on compiled kernels, or skip it without them."""
    if _backend.C is None:
        pytest.skip(f"kernels {_backend.STATUS}")
    with ops.backend("native"):
        yield


@pytest.fixture(params=["native", "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the kernels and on their reference."""
    if request.param == "native" and _backend.C is None:
        pytest.skip(f"kernels {_backend.STATUS}")
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def equals_reference(native: None, normal: Normal) -> Callable[..., None]:
    """Return ``check(function, operands, terms)``: it compares kernels with the float64 reference.

    It compares the results, then the gradients of all floating-point operands, on the same rounded operands and upstream
    gradients. ``terms`` holds how many numbers each of them sums.
    """

    def check(
        function: Callable[..., Sequence[Tensor]],
        operands: Operands,
        terms: Sequence[int],
        layout: Layout = Tensor.contiguous,
    ) -> None:
        got = list(function(*(leaves := _leaves(operands))))
        upstream = [normal(*r.shape, dtype=r.dtype) for r in got]
        upstream = [layout(u) if u.dim() > 1 else u for u in upstream]
        got += torch.autograd.grad(got, _floating(leaves), upstream)
        with ops.backend("reference"):
            expected = list(function(*(leaves := _leaves(operands, torch.float64))))
            upstream = [u.double() for u in upstream]
            expected += torch.autograd.grad(expected, _floating(leaves), upstream)
        for i, (g, w, n) in enumerate(zip(got, expected, terms, strict=True)):
            error, bound = relative_error(g, w), tolerance(g.dtype, n)
            assert error <= bound, f"tensor {i} of {len(got)}: {error:.2e} over {bound:.2e}"

    return check


def _leaves(operands: Operands, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Return copies of the operands as leaves of a graph."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype).requires_grad_()
        for t in operands
    ]


def _floating(operands: Operands) -> list[Tensor]:
    return [t for t in operands if t is not None and t.is_floating_point()]


def channels_last(x: Tensor) -> Tensor:
    """Return the tensor in channels_last, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cut_out(x: Tensor) -> Tensor:
    """Return the tensor as a slice: channels 1 to C of a tensor with C + 2."""
    return _with_margins(x).contiguous()[:, 1:-1]


def cut_out_channels_last(x: Tensor) -> Tensor:
    """Return the tensor as a slice of a channels_last tensor."""
    return channels_last(_with_margins(x))[:, 1:-1]


def _with_margins(x: Tensor) -> Tensor:
    margin = x.new_full((x.size(0), 1, *x.shape[2:]), 9.0)
    return torch.cat((margin, x, margin), 1)


def transposed(x: Tensor) -> Tensor:
    """Return the tensor with all dimensions stored in reverse order: positions have no common stride."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Layout] = {
    "contiguous": Tensor.contiguous,
    "channels-last": channels_last,
    "cut-out": cut_out,
    "cut-out-channels-last": cut_out_channels_last,
    "transposed": transposed,
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    """Return a function that stores a tensor (N, C, *) in one of the layouts that kernels support."""
    return LAYOUTS[request.param]


@pytest.fixture(params=["contiguous", "channels-last"])
def memory_format(request: pytest.FixtureRequest) -> Layout:
    """Return a function that stores a tensor (N, C, *) in one of the two memory formats of PyTorch."""
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., str]]:
    """Return ``start(application, limits)``: it serves until the module's tests end, and returns the address."""
    from msflow_ext.serving import Limits, Server

    with ExitStack() as stack:

        def begin(application: Any, limits: Limits | None = None) -> str:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = Server(application, listening, limits or Limits())
            thread = threading.Thread(target=server.run)
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listening.getsockname()[1]}/"

        yield begin


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Return ``golden(name)``: it reads tensors and description from ``tests/golden``."""
    folder = Path(__file__).parent / "golden"

    @cache
    def read(name: str) -> Golden:
        meta = json.loads((folder / f"{name}.json").read_text())
        return load_file(folder / f"{name}.safetensors"), meta

    def copy(name: str) -> Golden:
        tensors, meta = read(name)
        return {key: t.clone() for key, t in tensors.items()}, meta

    return copy
