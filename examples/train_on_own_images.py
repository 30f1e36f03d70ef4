"""Train MSFlow on photos of good parts, and print the threshold that separates good from defective.

    python examples/train_on_own_images.py normal --abnormal odd --out runs/parts

Some of the good photos are held out from training. Their scores set the threshold: about a share
`--false-alarms` of new good photos will exceed it. Photos of defects are optional. They are only tested.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import msflow_ext as mx


def main() -> None:
    parser = argparse.ArgumentParser(description="Train MSFlow on photos of good parts.")
    parser.add_argument("normal", help="folder of photos of good parts")
    parser.add_argument("--abnormal", help="folder of photos of defects, for testing only")
    parser.add_argument("--out", default="runs/parts", help="run folder to write")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="frozen network")
    parser.add_argument("--image-size", type=int, help="side of the model's input, in pixels")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--hold-out", type=float, default=0.4, help="share of the good photos")
    parser.add_argument("--false-alarms", type=float, default=0.1, help="accepted share")
    args = parser.parse_args()

    preset = mx.training.PRESETS["robust"]["msflow"]  # the settings that did best in our tests
    recipe = replace(
        preset.recipe,
        epochs=args.epochs,
        hold_out=args.hold_out,
        false_alarms=args.false_alarms,
    )
    dataset = mx.open_dataset(None, "folder", normal=args.normal, abnormal=args.abnormal)
    model = mx.MSFlow(args.backbone, image_size=args.image_size, seed=recipe.seed, **preset.model)
    metrics = mx.train(model, dataset, args.out, recipe, progress=True)

    detector = mx.load(args.out)
    print(f"Scores above {detector.threshold:.4f} are defective; see {args.out}/report.html")
    if args.abnormal:
        print(f"AUROC on the test photos: {metrics['image_auroc']:.4f}")


if __name__ == "__main__":
    main()
