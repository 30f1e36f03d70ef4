"""On a full disk, a command ends with one sentence that names the file, and leaves no partial files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import msflow_ext as mx
from msflow_ext.runs.checkpoint import save_checkpoint

SCRIPT = """
import json, resource, sys
from msflow_ext import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # acts as a full disk for each file
for name, words in json.loads(sys.argv[1]).items():
    print(f"{name} {cli.main(words)}", file=sys.stderr)
"""
LIMITED = pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")


@pytest.fixture(scope="module")
def said(tmp_path_factory, run) -> tuple[Path, list[str]]:
    """Run the commands in one process with limited files, and return their folder and the lines on stderr."""
    folder = tmp_path_factory.mktemp("full")
    model = mx.FastFlow("test_efficientnet", image_size=64, pretrained=False, steps=1)
    header = {"model": "FastFlow", "config": model.config}
    save_checkpoint(folder / "given" / "model.safetensors", header, model)
    shutil.copytree(run, folder / "other")
    given, out = str(folder / "given"), folder / "out"
    commands = {
        "export": ["export", "--run", given, "--format", "torch", "--out", str(out / "m.pt2")],
        "convert": ["convert", given, "--to", "gathierry", "--out", str(out / "m.pt")],
        "compare": ["compare", str(run), str(folder / "other"), "--out", str(out / "page.html")],
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stderr.splitlines()


@LIMITED
@pytest.mark.family("full disks")
@pytest.mark.parametrize(
    ("command", "file"), [("export", "m.pt2"), ("convert", "m.pt"), ("compare", "page.html")]
)
def test_a_full_disk_is_one_sentence_that_names_the_file(said, command, file):
    out, lines = said
    ended = lines.index(f"{command} 2")
    assert lines[ended - 1].startswith(f"msflow: error: {out / file} cannot be written: File too")
    assert not any("Traceback" in line for line in lines)


@LIMITED
@pytest.mark.family("full disks")
def test_a_full_disk_leaves_no_partial_files(said):
    out, _ = said
    assert list(out.rglob("*")) == []
