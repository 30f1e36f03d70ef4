"""The compiled CUDA kernels do not spill registers, and the most used ones move 16 bytes at a time."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def load() -> Any:
    """Import ``benchmarks/gpu/cuda_kernels.py``, which is not part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu" / "cuda_kernels.py"
    spec = importlib.util.spec_from_file_location("cuda_kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_kernels = load()
MODULE = cuda_kernels.module()

pytestmark = [
    pytest.mark.skipif(MODULE is None, reason="no CUDA kernels are built"),
    pytest.mark.skipif(cuda_kernels.cuobjdump() is None, reason="no cuobjdump"),
]

# Kernels that read or write whole tensors, and the accesses that must be wide; kernels of means only read.
HOT = {
    r"(forward|inverse|backward)_(contiguous|channels_last)": {"LDG", "STG"},
    r"means_(contiguous|channels_last)": {"LDG"},
    r"square_sums_(contiguous|channels_last)": {"LDG"},
    r"upsampleI": {"STG"},
    r"resampleI.*Li[248]ELb0E": {
        "LDG",
        "STG",
    },  # in packets; other kernels access neighboring elements
}


@cache
def kernels() -> list[Any]:
    assert MODULE is not None
    return cuda_kernels.kernels(MODULE)


@cache
def wide(architecture: str) -> dict[str, set[str]]:
    assert MODULE is not None
    return cuda_kernels.wide_accesses(MODULE, architecture)


def test_no_kernel_spills_or_has_a_stack() -> None:
    assert kernels()
    assert [k for k in kernels() if k.stack or k.local] == []


def test_a_block_fits_into_the_limits_of_every_gpu() -> None:
    assert max(k.shared for k in kernels()) <= 24 * 1024
    assert max(k.registers for k in kernels()) <= 65536 // 256


@pytest.mark.parametrize("kernel", HOT)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_hot_kernels_move_16_bytes_at_a_time(architecture: str, kernel: str) -> None:
    if architecture not in {k.architecture for k in kernels()}:
        pytest.skip(f"not built for {architecture}")
    found = {name: w for name, w in wide(architecture).items() if re.search(kernel, name)}
    assert found
    assert {name: w for name, w in found.items() if not w >= HOT[kernel]} == {}
