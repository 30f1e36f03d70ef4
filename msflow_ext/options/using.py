"""The flags of the commands that use trained runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msflow_ext.options.shared import (
    add_data,
    add_device,
    add_engine,
    add_false_alarms,
    add_out,
    add_precision,
    add_run,
    add_threads,
)
from msflow_ext.shards import MAPS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def evaluate(part: ArgumentParser) -> None:
    add_run(part)
    add_data(part)
    add_precision(part)
    add_device(part)
    add_false_alarms(part)
    part.add_argument(
        "--tune-thresholds",
        action="store_true",
        help="also find the thresholds of the largest F1 on these very images",
    )
    part.add_argument("--out", type=str | None, help="folder for scores.csv and evaluation.json")


def predict(part: ArgumentParser) -> None:
    add_run(part)
    part.add_argument("paths", nargs="+", help="images, and folders with all that is in them")
    part.add_argument(
        "--watch",
        action="store_true",
        help="score images as they arrive in the one folder given, until interrupted",
    )
    part.add_argument(
        "--tile",
        action="store_true",
        help="cut images into tiles of the model's size; no thresholds or p-values of the run",
    )
    part.add_argument("--overlap", type=float, default=0.25, help="share that tiles overlap by")
    add_out(part, "folder for scores.csv, maps/*.png and, of a run with thresholds, masks/*.png")
    add_false_alarms(part)
    part.add_argument("--threshold", type=float | None, help="label by this score instead")
    part.add_argument("--score-only", action="store_true", help="write no maps")
    part.add_argument("--batch-size", type=int, default=8, help="images, or tiles, at a time")
    add_precision(part)
    add_device(part)
    add_threads(part)
    text = "write Parquet into --out, a folder or URI, here or on Ray; the same command goes on with it"
    add_engine(part, default=None, text=text)
    part.add_argument("--maps", choices=MAPS, help="kept in Parquet, as numbers or heat maps")
    part.add_argument("--shard-size", type=int, default=256, help="images in a file of Parquet")


def serve(part: ArgumentParser) -> None:
    add_run(part)
    part.add_argument("--host", default="127.0.0.1", help="to listen at; others need a token")
    part.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    part.add_argument(
        "--token",
        default="",
        help="that requests must bring (default: MSFLOW_TOKEN of the environment, which ps does not show)",
    )
    part.add_argument("--ssl-certfile", type=str | None, help="PEM certificate, for HTTPS")
    part.add_argument("--ssl-keyfile", type=str | None, help="its key, if not in the same file")
    part.add_argument("--max-bytes", type=int, default=32 * 2**20, help="of an image file")
    part.add_argument("--max-pixels", type=int, default=64_000_000, help="of an image")
    part.add_argument("--concurrency", type=int, default=16, help="images at once, waiting or not")
    part.add_argument("--timeout", type=float, default=30.0, help="seconds for an image")
    add_false_alarms(part)
    add_precision(part)
    add_device(part)


def export(part: ArgumentParser) -> None:
    add_run(part)
    formats = ("torch", "aoti", "onnx", "openvino")
    part.add_argument("--format", choices=formats, required=True, help="what to write")
    add_out(part, "new file, .pt2, .onnx or .xml by the format")


def compare(part: ArgumentParser) -> None:
    part.add_argument("runs", nargs="+", help="run folders; differences are from the first")
    part.add_argument("--out", default="comparison.html", help="page to write")


def convert(part: ArgumentParser) -> None:
    part.add_argument("source", help="run folder, .safetensors, or a checkpoint of another package")
    part.add_argument("--to", default="msflow_ext", help="or msflow, gathierry, anomalib")
    add_out(part, "file to write, .safetensors for one of ours")
    part.add_argument("--backbone", type=str | None, help="of a file that does not name its own")
    part.add_argument("--weights", type=str | None, help="file of backbone weights")
    part.add_argument("--image-size", type=int | None, help="side of the square input in pixels")
    part.add_argument("--clamp", type=float | None, help="it was trained with (default: 1.9 or 2)")
    part.add_argument("--clamp-form", type=str | None, help="0.2 or head, by the version of FrEIA")
