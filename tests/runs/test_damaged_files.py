"""Files with random damage are read, or refused with documented exceptions."""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from msflow_ext import cli
from msflow_ext.cli.data import DATA, open_data, run_settings
from msflow_ext.data import load_image, load_mask, open_dataset
from msflow_ext.runs.checkpoint import read_checkpoint, save_checkpoint

SECONDS = float(os.environ.get("MSFLOW_FUZZ_SECONDS", "0.4"))


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Return the content with a few bytes changed, removed, repeated or inserted; sometimes truncated."""
    content = bytearray(whole)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 16])
        kind = rng.randrange(4)
        if kind == 0 and at < len(content):
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at : at + size]
        elif kind == 2:
            content[at:at] = content[at : at + size]
        else:
            content[at:at] = rng.choice([b'"', b",", b"\n", b"\0", b"../", b"\xff" * 4, b"9" * 20])
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def checkpoint(path: Path) -> bytes:
    torch.manual_seed(0)
    save_checkpoint(path / "seed.safetensors", {"epoch": 1}, nn.Linear(3, 2))
    return (path / "seed.safetensors").read_bytes()


def table(path: Path) -> bytes:
    for name in ("a", "b", "c"):
        (path / f"{name}.png").write_bytes(picture("png"))
    return b"path,label,split\na.png,good,train\nb.png,good,test\nc.png,scar,test\n"


def read_table(file: Path) -> None:
    found = open_dataset(str(file.parent), layout="folder", csv=file.name)
    for item in (*found.train, *found.test):
        assert isinstance(item.image, Path)
        assert item.image.resolve().is_relative_to(file.parent.resolve())


def recipe(_: Path) -> bytes:
    return b"""category: a,b
epochs: 3
lr: 0.001
seeds: [1, 2]
blocks: [1, 2, 3]
standardize: true
fit: pad
out_indices: [1, 2, 3]
backbone: test_efficientnet
"""


def read_recipe(file: Path) -> None:
    """Run a training with these flags, which must end because its data is missing."""
    out = ("--data", str(file.parent / "none"), "--out", str(file.parent / "run"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["train", "--config", str(file), *out]) == 2
    assert "msflow: error: " in said.getvalue()
    assert "Traceback" not in said.getvalue()
    raise ValueError(f"{file}: {said.getvalue()}")


def settings(path: Path) -> bytes:
    """Return the settings of a run that describe its data."""
    table(path)
    (path / "list.csv").write_bytes(table(path))
    given = {"data": str(path), "layout": "folder", "csv": "list.csv", "split_seed": 0}
    return yaml.safe_dump({**dict.fromkeys(DATA), **given}).encode()


def read_settings(file: Path) -> None:
    try:
        open_data(run_settings(file.parent))
    except cli.FAILURES as error:
        raise ValueError(f"{file}: {error}") from None


READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], object]]] = {
    "model.safetensors": (checkpoint, read_checkpoint),
    "list.csv": (table, read_table),
    "train.yaml": (recipe, read_recipe),
    "config.yaml": (settings, read_settings),
    **{f"image.{kind}": (lambda _, k=kind: picture(k), load_image) for kind in ("png", "bmp")},
    **{f"image.{kind}": (lambda _, k=kind: picture(k), load_image) for kind in ("tiff", "webp")},
    "mask.png": (lambda _: picture("png"), lambda file: load_mask(file, 8)),
    "image.jpeg": (lambda _: picture("jpeg"), load_image),
}


@pytest.mark.filterwarnings("ignore")  # decoders warn if they repair a file
@pytest.mark.parametrize("name", READERS)
def test_a_file_with_random_damage_is_read_or_refused(tmp_path, name):
    make, read = READERS[name]
    whole, file, rng = make(tmp_path), tmp_path / name, random.Random(name)
    until, done, refused = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < until:
        file.write_bytes(mutated(whole, rng))
        done += 1
        try:
            read(file)
        except (ValueError, FileNotFoundError) as error:
            refused += str(file.parent) in str(error)
    print(f"{name}: {done} files, {refused} refused by name")
    assert refused > 0


@pytest.mark.parametrize("value", [3.5, [], ["mvtec"], {"a": 1}], ids=str)
@pytest.mark.parametrize("name", DATA)
def test_settings_of_another_type_are_refused(tmp_path, name, value):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(settings(tmp_path)), name: value}))
    with pytest.raises(ValueError, match=rf"config\.yaml: {name} must be (str|int), got "):
        run_settings(tmp_path)
