"""Files that ``torch.save`` wrote, read without executing code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_torch_file(path: str | Path) -> Any:
    """What the file holds, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or it holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable torch checkpoint: {reason}") from error
