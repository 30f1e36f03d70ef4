"""``msflow convert`` writes files that load, and refuses what it cannot convert with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import msflow_ext as mx
from msflow_ext import cli
from msflow_ext.runs.checkpoint import save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL: dict[str, Any] = {"image_size": 64, "pretrained": False, "seed": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a folder with checkpoints ``msflow`` and ``fastflow`` and ``backbone`` weights; tests must not write to it."""
    folder = tmp_path_factory.mktemp("files")
    reference = {"padding_mode": "reflect", "standardize": False}
    models: dict[str, Any] = {
        "msflow": mx.MSFlow("resnet18", blocks=(1, 1, 1), **reference, **SMALL),
        "fastflow": mx.FastFlow("resnet18", steps=2, **SMALL),
    }
    for name, model in models.items():
        header = {"model": type(model).__name__, "config": model.config}
        save_checkpoint(folder / f"{name}.safetensors", header, model)
    torch.save(models["msflow"].backbone.network.state_dict(), folder / "backbone.pth")
    return folder


@pytest.mark.parametrize(
    ("name", "to", "flags"),
    [
        ("msflow", "msflow", ["--backbone", "resnet18", "--image-size", "64", "--weights"]),
        ("fastflow", "gathierry", ["--backbone", "resnet18"]),
        ("fastflow", "anomalib", []),
    ],
)
def test_a_checkpoint_converts_to_another_format_and_back(files, tmp_path, capsys, name, to, flags):
    ours, theirs, again = (
        files / f"{name}.safetensors",
        tmp_path / "a.pt",
        tmp_path / "a.safetensors",
    )
    flags = [*flags, str(files / "backbone.pth")] if "--weights" in flags else flags
    assert cli.main(["convert", str(ours), "--to", to, "--out", str(theirs)]) == 0
    assert cli.main(["convert", str(theirs), "--out", str(again), *flags]) == 0
    assert capsys.readouterr().out.split() == [str(theirs), str(again)]
    first, second = (mx.load(path, "cpu").model for path in (ours, again))
    assert second.config == first.config
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        if name == "fastflow" or not key.startswith("backbone."):
            assert torch.equal(value, second.state_dict()[key]), key


def test_a_checkpoint_converts_from_one_package_to_another(files, tmp_path):
    ours, one, other = files / "fastflow.safetensors", tmp_path / "a.pt", tmp_path / "b.ckpt"
    assert cli.main(["convert", str(ours), "--to", "gathierry", "--out", str(one)]) == 0
    flags = ["--to", "anomalib", "--backbone", "resnet18"]
    assert cli.main(["convert", str(one), "--out", str(other), *flags]) == 0
    first = torch.load(one, weights_only=True)["model_state_dict"]
    second = torch.load(other, weights_only=True)["state_dict"]
    for key, value in first.items():
        assert torch.equal(value, second["model." + key.replace("nf_flows", "fast_flow_blocks")])


def test_flags_set_the_clamp_that_a_file_lacks(files, tmp_path):
    theirs, again = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    source = str(files / "fastflow.safetensors")
    assert cli.main(["convert", source, "--to", "gathierry", "--out", str(theirs)]) == 0
    flags = ["--backbone", "resnet18", "--clamp", "1.5", "--clamp-form", "head"]
    assert cli.main(["convert", str(theirs), "--out", str(again), *flags]) == 0
    config = mx.load(again, "cpu").model.config
    assert (config["clamp"], config["clamp_form"]) == (1.5, "head")


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("absent.pt", [], "absent.pt cannot be read: no such file"),
        ("absent.safetensors", ["--to", "msflow"], "no such checkpoint"),
        ("msflow.safetensors", [], "to must be another format, got msflow_ext"),
        (
            "msflow.safetensors",
            ["--to", "freia"],
            "to must be one of msflow_ext, msflow, gathierry",
        ),
        (
            "msflow.safetensors",
            ["--to", "anomalib"],
            "model must be a FastFlow for anomalib, got MSFlow",
        ),
        (
            "msflow.safetensors",
            ["--to", "msflow", "--clamp", "1"],
            "clamp must not be given for",
        ),
        ("backbone.pth", [], "the state dict must hold flows"),
        ("model_a.checkpoint.pt", ["--weights", "absent.pth"], "absent.pth"),
        ("model_a.checkpoint.pt", ["--backbone", "nothing"], "nothing"),
        ("model_a.checkpoint.pt", ["--clamp", "-1"], "clamp must be positive and finite, got -1.0"),
        ("model_a.checkpoint.pt", ["--clamp-form", "1"], "--clamp-form must be one of 0.2, head"),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_refused_with_one_sentence(
    files, tmp_path, capsys, source, arguments, message
):
    folder = GOLDEN if source.startswith("model_a") else files
    to_ours = "--to" not in arguments
    out = tmp_path / ("out.safetensors" if to_ours else "out.pt")
    assert cli.main(["convert", str(folder / source), "--out", str(out), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msflow: error: ") and message in line
    assert not out.exists()


@pytest.mark.parametrize(("to", "name"), [("msflow_ext", "out.pt"), ("msflow", "out.safetensors")])
def test_only_files_of_msflow_ext_end_in_safetensors(files, tmp_path, capsys, to, name):
    source = (
        GOLDEN / "model_a.checkpoint.pt" if to == "msflow_ext" else files / "msflow.safetensors"
    )
    assert cli.main(["convert", str(source), "--to", to, "--out", str(tmp_path / name)]) == 2
    assert "target must end in .safetensors for msflow_ext, and only" in capsys.readouterr().err
