"""The command ``export``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msflow_ext.cli.data import open_data, run_settings
from msflow_ext.cli.flags import (
    add_out,
    add_run,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def export_flags(part: ArgumentParser) -> None:
    add_run(part)
    formats = ("torch", "aoti", "onnx", "openvino")
    part.add_argument("--format", choices=formats, required=True, help="what to write")
    add_out(part, "new file, .pt2, .onnx or .xml by the format")


def export(options: Any) -> int:
    """Write a trained model as a graph for torch.export, C++, ONNX Runtime or OpenVINO."""
    import torch

    from msflow_ext.data import Images
    from msflow_ext.export import export as write
    from msflow_ext.inference.detector import load

    detector = load(options.run, "cpu")
    images = None
    with suppress(ImportError, OSError, ValueError):  # without its data, random images must do
        test = open_data(run_settings(Path(options.run))).test
        seen = Images((test[0], test[-1]), detector.model.image_size, detector.fit)
        images = torch.stack([seen[i] for i in range(2)])
    found = write(detector, options.format, options.out, images=images)
    compared = "random images" if images is None else "random and test images"
    texts = ", ".join(f"{difference:.1e} of {name}" for name, difference in found.items())
    print(
        f"{options.out}: differs from the run on {compared} by at most {texts}, relative to the largest value"
    )
    return 0
