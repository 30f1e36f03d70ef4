"""Fixtures of the tests of models."""

from __future__ import annotations

import pytest
from torch import Tensor


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialize transformers without timm's truncated normal, which takes seconds."""

    def fill(tensor: Tensor, mean: float, std: float, *_: float) -> Tensor:
        return tensor.normal_(mean, std)

    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", fill, raising=False)
