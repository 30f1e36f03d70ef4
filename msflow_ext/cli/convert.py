"""The command ``convert``."""

from __future__ import annotations

from typing import Any

from msflow_ext.choices import CHECKPOINT_FORMATS, CLAMP_FORMS
from msflow_ext.cli.flags import add_choice, add_out
from msflow_ext.cli.parser import number, whole


def convert(options: Any) -> int:
    """Convert a checkpoint from another package to msflow_ext, or from msflow_ext to another package."""
    from msflow_ext.compat.convert import convert as write

    names = {"backbone": "backbone", "weights": "pretrained", "image_size": "image_size"}
    names |= {"clamp": "clamp", "clamp_form": "clamp_form"}
    chosen = vars(options)
    given = {name: chosen[flag] for flag, name in names.items() if chosen[flag] is not None}
    print(write(options.source, options.out, options.to, **given))
    return 0


def convert_flags(part: Any) -> None:
    part.add_argument(
        "source",
        metavar="SOURCE",
        help="Run folder, .safetensors file, or checkpoint of another package to convert.",
    )
    add_choice(
        part,
        "--to",
        CHECKPOINT_FORMATS,
        "Package whose checkpoint format to write.",
        default="msflow_ext",
    )
    add_out(part, "Checkpoint file to write; .safetensors for msflow_ext.", "FILE")
    group = part.add_argument_group("settings that checkpoints of other packages lack")
    group.add_argument("--backbone", metavar="NAME", help="Backbone of the model.")
    group.add_argument("--weights", metavar="FILE", help="File of backbone weights.")
    group.add_argument(
        "--image-size",
        type=whole,
        metavar="PIXELS",
        help="Side of the model's square input in pixels.",
    )
    group.add_argument(
        "--clamp",
        type=number,
        metavar="X",
        help="Alpha of the soft clamp of the trained model; by default 1.9 for MSFlow, 2 for FastFlow.",
    )
    text = "Form of the soft clamp: 0.2 for FrEIA 0.2 and before, head for later versions."
    add_choice(group, "--clamp-form", CLAMP_FORMS, text)
