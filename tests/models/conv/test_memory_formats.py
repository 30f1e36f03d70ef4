"""A change of memory format keeps the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msflow_ext.models.optimized.head import relaid

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("last", [True, False], ids=["to-channels-last", "to-contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 70, 9, 8), (1, 1, 3, 3), (3, 5, 1, 1), (2, 64, 64, 1), (0, 4, 2, 2)], ids=str
)
def test_another_memory_format_or_dtype_keeps_the_values(
    normal: Normal, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> None:
    x = layout(normal(*shape))
    format = torch.channels_last if last else torch.contiguous_format
    for source in (x, x.to(torch.bfloat16)):
        got = relaid(source, dtype, last)
        assert got.dtype is dtype
        assert got.is_contiguous(memory_format=format)
        assert torch.equal(got, source.to(dtype))
