"""Convert checkpoint files from and to other packages."""

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
        source: a run folder or ``.safetensors`` file of ours, or a file of another package, whose format is detected.
        target: file to write, ``.safetensors`` if it shall be ours; an existing one is replaced.
        to: ``"msflow_ext"``, ``"msflow"`` (the authors' code), ``"gathierry"`` or ``"anomalib"`` (their FastFlow).
        options: of :func:`msflow_ext.compat.checkpoints.detectors.read_detector`, where ``source`` is another package's.

    Returns:
        ``target``.

    Raises:
        FileNotFoundError: no ``source``. ValueError: an unknown format, nothing to convert, a model that the format
            cannot hold, a checkpoint that does not fit; keys are named.
    """
    source, target = Path(source), Path(target)
    ours = source.is_dir() or source.suffix == ".safetensors"
    if to not in CHECKPOINT_FORMATS:
        raise ValueError(f"to must be one of {', '.join(CHECKPOINT_FORMATS)}, got {to!r}")
    if ours and to == "msflow_ext":
        raise ValueError(f"{source} is a checkpoint of msflow_ext already")
    if ours and options:
        raise ValueError(
            f"{source} is a checkpoint of msflow_ext, which holds {_listed(options)} itself"
        )
    if (target.suffix == ".safetensors") != (to == "msflow_ext"):
        raise ValueError(
            f"{target}: the suffix .safetensors is for checkpoints of msflow_ext, and only for those"
        )
    model = load(source, "cpu").model if ours else read_detector(source, **options)
    if to == "msflow_ext":
        save_checkpoint(target, {"model": type(model).__name__, "config": model.config}, model)
        return target
    written = io.BytesIO()  # torch.save has no clear message for a full disk
    torch.save(for_peer(model, to), written)
    write_bytes(target, written.getbuffer())
    return target


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(sorted(options))
