"""Convert checkpoint files between msflow_ext and other packages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from msflow_ext.choices import CHECKPOINT_FORMATS, CheckpointFormat
from msflow_ext.compat.checkpoints.detectors import for_peer, read_detector
from msflow_ext.files import write_bytes
from msflow_ext.inference.detector import load
from msflow_ext.runs.checkpoint import save_checkpoint


def convert(
    source: str | Path, target: str | Path, to: CheckpointFormat = "msflow_ext", **options: Any
) -> Path:
    """Write the checkpoint ``source`` as ``target`` in another format.

    Args:
        source: a run folder or ``.safetensors`` file of msflow_ext, or a checkpoint of another package, whose format
            is detected.
        target: file to write, ``.safetensors`` for msflow_ext. An existing file is replaced.
        to: ``"msflow_ext"``, ``"msflow"`` (reference implementation), or ``"gathierry"`` or ``"anomalib"`` (their
            FastFlow).
        options: arguments of :func:`msflow_ext.compat.checkpoints.detectors.read_detector`, if ``source`` is from
            another package.

    Returns:
        ``target``.

    Raises:
        FileNotFoundError: if ``source`` does not exist.
        ValueError: if the format is unknown or equal to that of ``source``, cannot hold the model, or the checkpoint
            does not fit. Its keys are named.
    """
    source, target = Path(source), Path(target)
    ours = source.is_dir() or source.suffix == ".safetensors"
    if to not in CHECKPOINT_FORMATS:
        raise ValueError(f"to must be one of {', '.join(CHECKPOINT_FORMATS)}, got {to!r}")
    if ours and to == "msflow_ext":
        raise ValueError(f"to must be another format, got msflow_ext, the format of {source}")
    if ours and options:
        raise ValueError(
            f"{_listed(options)} must not be given for {source}, a checkpoint of msflow_ext"
        )
    if (target.suffix == ".safetensors") != (to == "msflow_ext"):
        raise ValueError(
            f"target must end in .safetensors for msflow_ext, and only then, got {target} for {to}"
        )
    model = load(source, "cpu").model if ours else read_detector(source, **options)
    if to == "msflow_ext":
        save_checkpoint(target, {"model": type(model).__name__, "config": model.config}, model)
        return target
    written = io.BytesIO()  # torch.save reports a full disk poorly, write_bytes in one sentence
    torch.save(for_peer(model, to), written)
    write_bytes(target, written.getbuffer())
    return target


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(sorted(options))
