"""What the README and the docstrings show runs as it stands there, on a run and photos of that name."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext import cli
from msflow_ext.evaluation import calibration
from msflow_ext.inference import detector

pytestmark = pytest.mark.usefixtures("one_thread")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TRAIN = "train --layout folder --normal normal --abnormal odd --hold-out 0.5 --false-alarms 0.4 --out runs/mine"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The lines of the README that begin with a command of ours, without their comments."""
    lines = "\n".join(blocks("sh")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith("msflow ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with ``runs/mine``, trained on ``normal/`` and tested on ``odd/`` too, and two photos."""
    folder, rng = tmp_path_factory.mktemp("guide"), np.random.default_rng(0)
    sizes = {f"normal/{i}.png": (64, 64) for i in range(10)}
    sizes |= {f"odd/{i}.png": (64, 64) for i in range(3)}
    sizes |= {"photos/large.jpg": (90, 160), "photos/small.png": (64, 64)}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(90, 110, size, dtype=np.uint8)).save(folder / name)
    small = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*TRAIN.split(), *small, "--device", "cpu"]) == 0
    return folder


def test_the_examples_of_the_docstrings_give_what_they_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for module in (detector, calibration):
        runner = doctest.DocTestRunner()
        for example in doctest.DocTestFinder().find(module):
            runner.run(example)
        assert runner.failures == 0
        assert runner.tries >= 3


def test_the_readme_predicts_with_a_trained_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    paragraphs = "".join(blocks("python")).split("\n\n")
    shown = [each for each in paragraphs if re.match(r"import |\w*detector\b", each)]
    assert any("mx.load(" in each for each in shown)
    exec("\n".join(shown), {})
    assert capsys.readouterr().out.startswith("large.jpg ")


def test_the_readme_reads_a_report(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (shown,) = (block for block in blocks("python") if "scores.csv" in block)
    exec(shown, named := {})
    auroc, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"image_auroc [01]\.\d+", auroc)
    assert "'detected'" in last
    detected = named["decisions"]["on_test"]["detected"]
    assert len(named["missed"]) == round(3 * (1 - detected))
    assert len(named["rows"]) > 3


def test_the_readme_builds_a_flow_on_a_subnet_of_its_own():
    (shown,) = (block for block in blocks("python") if "class Subnet" in block)
    exec(shown, named := {})
    x, found, flow = named["x"], named["found"], named["flow"]
    assert found.score.shape == (2,) and found.anomaly_map.shape == (2, 128, 128)
    torch.testing.assert_close(named["again"], x, rtol=0, atol=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_have_the_flags_that_it_gives_them(command, capsys):
    words = command.split()[1:]
    name = [word for word in words[:2] if word in ("data", "check") or word in cli.COMMANDS]
    with pytest.raises(SystemExit) as ended:
        cli.main([*name, "--help"])
    assert ended.value.code == 0
    known = capsys.readouterr().out
    for flag in re.findall(r"--[a-z-]+", command):
        assert re.search(rf"{flag}\b(?!-)", known), flag
