"""The command ``convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msflow_ext.cli.flags import (
    add_out,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def convert(options: Any) -> int:
    """Make a checkpoint of another package one of ours, or ours one of theirs."""
    from msflow_ext.compat.convert import convert as write

    names = {"backbone": "backbone", "weights": "pretrained", "image_size": "image_size"}
    names |= {"clamp": "clamp", "clamp_form": "clamp_form"}
    given = {name: options[flag] for flag, name in names.items() if options[flag] is not None}
    print(write(options.source, options.out, options.to, **given))
    return 0


def convert_flags(part: ArgumentParser) -> None:
    part.add_argument("source", help="run folder, .safetensors, or a checkpoint of another package")
    part.add_argument("--to", default="msflow_ext", help="or msflow, gathierry, anomalib")
    add_out(part, "file to write, .safetensors for one of ours")
    part.add_argument("--backbone", type=str | None, help="of a file that does not name its own")
    part.add_argument("--weights", type=str | None, help="file of backbone weights")
    part.add_argument("--image-size", type=int | None, help="side of the square input in pixels")
    part.add_argument("--clamp", type=float | None, help="it was trained with (default: 1.9 or 2)")
    part.add_argument("--clamp-form", type=str | None, help="0.2 or head, by the version of FrEIA")
