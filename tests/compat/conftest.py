"""Provide blocks of other packages: those of the installed FrEIA, and of its master."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msflow_ext.testing import relative_error


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws permutations with numpy


@pytest.fixture(scope="session")
def freia() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings have invalid escapes
        return pytest.importorskip("FrEIA")


@pytest.fixture(scope="session")
def anomalib() -> Callable[[str], ModuleType]:
    """Return ``anomalib(name)``, which imports a module of anomalib."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("FrEIA", "anomalib.models"):
            pytest.importorskip(package)
    return lambda name: importlib.import_module(f"anomalib.{name}")


@pytest.fixture(scope="session")
def master(freia: ModuleType) -> type[Any]:
    """Return FrEIA's block as in its master: hard permutations as an index, a divided clamp, a check of sizes."""
    block: Any = freia.modules.AllInOneBlock

    class Master(block):
        def __init__(self, dims_in: Any, *args: Any, permute_soft: bool = False, **options: Any):
            super().__init__(dims_in, *args, permute_soft=permute_soft, **options)
            if not permute_soft and not self.householder:
                for name in ("w_perm", "w_perm_inv"):
                    index = getattr(self, name).flatten(1).argmax(1)
                    setattr(self, name, nn.Parameter(index, False))
                self.permute_function = lambda x, p: x[:, p]

        def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            s, t = (0.1 * a).split(x.shape[1], 1)
            s = self.clamp * torch.tanh(s / self.clamp)
            if self.GIN:
                s = s - s.mean(self.sum_dims, keepdim=True)
            y = (x - t) * torch.exp(-s) if rev else x * torch.exp(s) + t
            return y, (-1) ** rev * s.sum(self.sum_dims)

        def _permute(self, x: Tensor, rev: bool = False) -> Any:
            return super()._permute(x, rev)

        def _pre_permute(self, x: Tensor, rev: bool = False) -> Any:
            return super()._pre_permute(x, rev)

        def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
            if tuple(x[0].shape[1:]) != tuple(self.dims_in[0]):
                raise RuntimeError(f"expected {self.dims_in[0]}, got {tuple(x[0].shape[1:])}")
            return super().forward(x, c, rev=rev, jac=jac)

    return Master


SIZES = (4, 3, 2)


class Hidden:
    """Constructor of a subnet with one hidden layer for data with ``rank`` sizes after the channels."""

    def __init__(self, rank: int, hidden: int = 8) -> None:
        self.rank, self.hidden = rank, hidden

    def __call__(self, channels_in: int, channels_out: int) -> nn.Module:
        if self.rank == 0:
            layers = [nn.Linear(channels_in, self.hidden), nn.Linear(self.hidden, channels_out)]
        else:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.rank - 1]
            layers = [
                conv(channels_in, self.hidden, 3, padding=1),
                conv(self.hidden, channels_out, 3, padding=1),
            ]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def disturbed(module: nn.Module) -> nn.Module:
    """Return ``module`` in float64 with random changes of its trained parameters."""
    with torch.no_grad():
        for p in module.double().parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass
class Maker:
    """Maker of float64 flows with random parameters, and of their results.

    Attributes:
        classes: the block's class by its clamp form: that of the installed FrEIA and of its master.
        chain_class: FrEIA's ``SequenceINN``.
    """

    classes: dict[str, type[Any]]
    chain_class: type[Any]
    hidden: ClassVar[Any] = Hidden

    def block(
        self, form: str = "0.2", channels: int = 6, rank: int = 2, cond: Any = (), **options: Any
    ) -> Any:
        options.setdefault("subnet_constructor", Hidden(rank))
        sizes = SIZES[:rank]
        dims = [(channels, *sizes)], [(c, *sizes) for c in cond]
        return disturbed(self.classes[form](*dims, **options))

    def chain(
        self, form: str = "0.2", blocks: int = 3, channels: int = 6, cond: int = 0, **options: Any
    ) -> Any:
        """Return a chain of blocks for maps of 4 x 3 with ``cond`` channels of a condition."""
        options.setdefault("subnet_constructor", Hidden(2))
        given = {"cond": 0, "cond_shape": (cond, 4, 3)} if cond else {}
        chain = self.chain_class(channels, 4, 3)
        for _ in range(blocks):
            chain.append(self.classes[form], **given, **options)
        return disturbed(chain)

    @staticmethod
    def data(channels: int = 6, rank: int = 2, cond: Any = (), batch: int = 3) -> list[Tensor]:
        """Return ``x`` and conditions."""
        return [normal(batch, c, *SIZES[:rank]) for c in (channels, *cond)]

    @staticmethod
    def results(module: Any, inputs: list[Tensor], rev: bool = False) -> dict[str, Tensor]:
        """Return the results of a block or a chain, and the gradients of a weighted sum of them."""
        x, *c = (t.clone().requires_grad_() for t in inputs)
        module.zero_grad()
        chain = hasattr(module, "module_list")
        y, log_det = module(x if chain else [x], c, rev=rev)
        y = y if chain else y[0]
        weight = torch.arange(float(y.numel())).cos().view_as(y).to(y)
        ((y * weight).sum() + (log_det * weight.flatten()[: len(log_det)]).sum()).backward()
        found = {"y": y.detach(), "log_det": log_det.detach(), "grad_x": x.grad}
        found |= {f"grad_c{i}": t.grad for i, t in enumerate(c)}
        found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
        return {key: t for key, t in found.items() if t is not None}

    @staticmethod
    def same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-10) -> None:
        """Assert that tensors agree within ``bound``, relative to the largest magnitude or 1."""
        assert got.keys() == expected.keys()
        for key, want in expected.items():
            assert got[key].dtype is want.dtype, key
            assert relative_error(got[key], want) <= bound, key


@pytest.fixture(scope="session")
def make(freia: ModuleType, master: type[Any]) -> Maker:
    classes = {"0.2": freia.modules.AllInOneBlock, "head": master}
    return Maker(classes, freia.framework.SequenceINN)
