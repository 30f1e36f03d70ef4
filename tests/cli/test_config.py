"""Configuration files work from any folder, and crafted ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from msflow_ext import cli
from msflow_ext.cli.config import LARGEST, read_config, with_whole_paths
from msflow_ext.cli.data import run_settings

pytestmark = pytest.mark.usefixtures("one_thread")


def bomb(levels: int = 9) -> str:
    """Return YAML whose nested aliases expand to 9**9 words."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join([*lines, f"layout: *a{levels - 1}", "data: x", ""])


CRAFTED = {
    "bomb": (bomb(), r"line 1, column 5: anchors, aliases and tags must not be used here"),
    "bomb of keys": ("? &a [x]\n: *a\n", "line 1, column 3: anchors"),
    "merged": ("data: x\nrest: &r {layout: folder}\n<<: *r\n", "line 2, column 7: anchors"),
    "python": ("data: !!python/object/apply:os.system [echo]\n", "line 1, column 7: anchors"),
    "tag": ("data: !!str x\n", "line 1, column 7: anchors"),
    "deep": ("data: " + "[" * 20_000, "is nested too deeply"),
    "deep keys": ("data: " + "{a: " * 5_000, "is nested too deeply|line 1"),
    "large": ("data: x\n" + "# more\n" * LARGEST, f"must have at most {LARGEST} bytes"),
    "no such date": ("data: x\ncategory: 2024-13-45\n", ""),
    "long number": ("data: x\nsplit_seed: " + "9" * 5000, ""),
    "not text": ("data: \0", ""),
}


@pytest.mark.family("crafted files")
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_configuration_file_is_refused_by_every_command(tmp_path, run, fails, name):
    text, sentence = CRAFTED[name]
    file, out = tmp_path / "config.yaml", str(tmp_path / "out")
    file.write_text(text)
    (tmp_path / "model.safetensors").symlink_to(run / "model.safetensors")
    evaluate = fails("evaluate", "--run", str(tmp_path), "--device", "cpu")
    train = fails("train", "--config", str(file), "--out", out)
    for said in (evaluate, train) if sentence else (evaluate,):
        assert str(file) in said
        assert len(said) < 1000 + len(str(tmp_path))
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            read_config(str(file))
        with pytest.raises(ValueError, match=sentence):
            run_settings(tmp_path)


@pytest.mark.family("run files")
def test_a_run_and_its_configuration_work_from_another_folder(
    data, tmp_path, monkeypatch, train_command
):
    out = tmp_path / "run"
    monkeypatch.chdir(data.parent)
    assert cli.main(train_command(Path(data.name), out)) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["data"] == str(data)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--run", "run", "--device", "cpu"]) == 0
    again = ["train", "--config", "run/config.yaml", "--device", "cpu", "--out", "again"]
    assert cli.main(again) == 0
    first, second = (json.loads((r / "metrics.json").read_text()) for r in (out, Path("again")))
    assert first["losses"] == second["losses"]
    assert first["data"]["sha256"] == second["data"]["sha256"]


@pytest.mark.family("run files")
def test_relative_paths_in_a_configuration_file_start_from_its_folder(tmp_path, monkeypatch):
    file = tmp_path / "settings" / "a.yaml"
    file.parent.mkdir()
    monkeypatch.chdir(tmp_path)

    def options(text: str, *more: str) -> dict[str, object]:
        file.write_text(text)
        return vars(cli.parser().parse(["train", "--config", "settings/a.yaml", *more]))

    here = str(file.parent)
    found = options("data: ../plates\nnormal: good\nmasks: m\nweights: w.pth\nout: runs/x\n")
    assert found["data"] == str(tmp_path / "plates")
    assert (found["normal"], found["masks"]) == ("good", "m"), "in the folder data"
    assert (found["weights"], found["out"]) == (f"{here}/w.pth", f"{here}/runs/x")
    found = options("normal: good\nabnormal: /bad\nout: x\n", "--out", "y")
    assert (found["normal"], found["abnormal"]) == (f"{here}/good", "/bad")
    assert found["out"] == "y", "the command line comes first"
    assert options("data: elpv\nout: x\n")["data"] == "elpv"
    assert options("data: ./elpv\nout: x\n")["data"] == f"{here}/elpv"


@pytest.mark.family("run files")
def test_settings_with_absolute_paths_do_not_change():
    whole = {"data": None, "normal": "/a/b", "csv": "list.csv", "weights": None, "epochs": 3}
    assert with_whole_paths(whole, Path("/elsewhere")) == whole
