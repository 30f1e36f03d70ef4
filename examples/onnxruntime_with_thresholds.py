"""Score photos with an exported run, without PyTorch and without msflow_ext.

    msflow export --run runs/parts --format onnx --out parts.onnx
    python examples/onnxruntime_with_thresholds.py parts.onnx photos

Copy this file to where the model runs. It needs onnxruntime, NumPy and Pillow only. Image size, fit and
thresholds come from the metadata of the exported file. The scores are those of `mx.load(run).predict`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path: Path, side: int, fit: str) -> np.ndarray:
    """Return the photo as the model expects it, `(1, 3, side, side)` in 0..1."""
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    longer = max(photo.size)
    size = [side if fit == "resize" else max(1, round(side * n / longer)) for n in photo.size]
    square = Image.new("RGB", (side, side))
    corner = [(side - n) // 2 for n in size]
    square.paste(photo.resize((size[0], size[1]), Image.Resampling.LANCZOS), (corner[0], corner[1]))
    return np.asarray(square, np.float32).transpose(2, 0, 1)[None] / 255


def main() -> None:
    parser = argparse.ArgumentParser(description="Score photos with an exported run.")
    parser.add_argument("model", help="file that `msflow export --format onnx` wrote")
    parser.add_argument("photos", type=Path, help="folder of photos")
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    side, fit = int(facts["image_size"]), facts["fit"]
    threshold, pixel_threshold = (json.loads(facts[f"{x}threshold"]) for x in ("", "pixel_"))
    if threshold is None:
        parser.error(f"{args.model} has no thresholds: train with --hold-out, and export again")
    for path in sorted(path for path in args.photos.iterdir() if path.is_file()):
        outputs = session.run(["score", "anomaly_map"], {"images": prepare(path, side, fit)})
        (score,), anomaly_map = np.asarray(outputs[0]), np.asarray(outputs[1])
        verdict = "defective" if score > threshold else "good"
        area = (anomaly_map > pixel_threshold).mean()  # with fit pad, of the padded square
        print(f"{path.name}: {verdict}, score {score:.6g}, {area:.1%} of the area is anomalous")


if __name__ == "__main__":
    main()
