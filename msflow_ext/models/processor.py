"""What this machine's processor multiplies by instructions of its own."""

from __future__ import annotations

import torch


def has_amx() -> bool:
    """Whether it has matrix units for bfloat16."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def has_bfloat16() -> bool:
    """Whether PyTorch convolves in bfloat16 by instructions; by others it is up to 50 times slower than in float32.

    True where PyTorch does not tell.
    """
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())
