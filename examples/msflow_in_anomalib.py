"""Train, test and predict with MSFlow in anomalib's Engine.

    python examples/msflow_in_anomalib.py normal odd --epochs 100

Engine, data module, metrics and visualizer are anomalib's. Only the model is from msflow_ext.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anomalib.data import Folder
from anomalib.engine import Engine

from msflow_ext.compat.anomalib import MSFlow


def main() -> None:
    parser = argparse.ArgumentParser(description="Train MSFlow in anomalib's Engine.")
    parser.add_argument("normal", type=Path, help="folder of photos of good parts")
    parser.add_argument("abnormal", type=Path, help="folder of photos of defects")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="frozen network")
    parser.add_argument("--image-size", type=int, help="side of the model's input, in pixels")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", default="results", help="folder for anomalib's results")
    args = parser.parse_args()

    data = Folder(
        "parts",
        normal_dir=args.normal.absolute(),
        abnormal_dir=args.abnormal.absolute(),
        train_batch_size=8,
        num_workers=0,
    )
    engine = Engine(max_epochs=args.epochs, default_root_dir=args.out, logger=False)
    model = MSFlow(args.backbone, image_size=args.image_size)
    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data)
    print({name: round(value, 4) for name, value in metrics.items()})
    batches: Any = engine.predict(model, datamodule=data)
    for batch in batches:
        for path, score, label in zip(
            batch.image_path, batch.pred_score, batch.pred_label, strict=True
        ):
            print(f"{Path(path).name}: {'defective' if label else 'good'}, score {score:.4f}")


if __name__ == "__main__":
    main()
