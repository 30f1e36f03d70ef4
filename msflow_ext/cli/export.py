"""The command ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from msflow_ext.choices import EXPORT_FORMATS
from msflow_ext.cli.data import open_data, run_settings
from msflow_ext.cli.flags import add_choice, add_out, add_run


def export(options: Any) -> int:
    """Write a trained model as a graph for torch.export, C++, ONNX Runtime or OpenVINO."""
    import torch

    from msflow_ext.data import Images
    from msflow_ext.export import BY_DEFAULT
    from msflow_ext.export import export as write
    from msflow_ext.inference.detector import load

    detector = load(options.run, "cpu")
    images = None
    with suppress(ImportError, OSError, ValueError):  # without its data, use random images only
        test = open_data(run_settings(Path(options.run))).test
        seen = Images((test[0], test[-1]), detector.model.image_size, detector.fit)
        images = torch.stack([seen[i] for i in range(2)])
    found = write(detector, options.format, options.out, images=images)
    compared = "random images" if images is None else "random and test images"
    default = {name: found[name] for name in found if name.endswith(BY_DEFAULT)}
    exact = {name: found[name] for name in found if name not in default}
    hint = " with INFERENCE_PRECISION_HINT f32" if default else ""
    print(
        f"{options.out}: differs from the run on {compared} by at most {_listed(exact)}{hint}, "
        "relative to the largest value"
    )
    if default:
        print(
            f"without that hint, OpenVINO's default: at most {_listed(default)} "
            "(bfloat16 on CPUs that support it)"
        )
    return 0


def _listed(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{each:.1e} of {name}" for name, each in differences.items())


def export_flags(part: Any) -> None:
    add_run(part)
    add_choice(part, "--format", EXPORT_FORMATS, "Format of the graph file.", required=True)
    add_out(
        part, "File to write: .pt2 for torch and aoti, .onnx for onnx, .xml for openvino.", "FILE"
    )
