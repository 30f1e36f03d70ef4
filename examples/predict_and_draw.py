"""Score a folder of photos with a trained run, and save a heat map of each.

    python examples/predict_and_draw.py runs/parts photos --out heat_maps

A heat map lays the anomaly map over the photo. The outline marks the area above the pixel threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msflow_ext as mx


def main() -> None:
    parser = argparse.ArgumentParser(description="Score photos, and save their heat maps.")
    parser.add_argument("run", help="run folder that a training wrote")
    parser.add_argument("photos", help="folder of photos, searched with all its folders")
    parser.add_argument("--out", type=Path, default="heat_maps", help="folder to write")
    args = parser.parse_args()

    detector = mx.load(args.run)
    verdicts = {None: "no threshold", 0: "good", 1: "defective"}
    for result in detector.stream(args.photos, on_error="skip"):
        if result.error:
            print(f"{result.name}: not scored: {result.error}")
            continue
        path = result.save(args.out / f"{result.name}.png")
        print(f"{result.name}: {verdicts[result.label]}, score {result.score:.4f}, {path}")


if __name__ == "__main__":
    main()
