"""Training survives kill -9 at any moment, and a damaged checkpoint is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from msflow_ext.runs import checkpoint
from msflow_ext.runs.checkpoint import previous, read_checkpoint, restore, save_checkpoint

KILLS = int(os.environ.get("MSFLOW_KILLS", "5"))
SEED = int(os.environ.get("MSFLOW_SEED", "0"))


def _results(run: Path) -> dict[str, Any]:
    """Return the results of a run that must not depend on interruptions: everything but durations."""
    header, tensors = read_checkpoint(run / "model.safetensors")
    metrics = json.loads((run / "metrics.json").read_text())
    del header["seconds"], metrics["seconds"]
    bits = {name: t.numpy().tobytes() for name, t in tensors.items()}
    maps = {path.name: path.read_bytes() for path in run.glob("maps/*.png")}
    scores = (run / "scores.csv").read_bytes()
    return {"header": header, "bits": bits, "metrics": metrics, "scores": scores, "maps": maps}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which starts processes fast")
def test_a_training_killed_at_random_moments_is_bit_identical_to_an_undisturbed_one(tmp_path):
    script = Path(__file__).with_name("killed_training.py")
    command = [sys.executable, str(script), str(tmp_path), str(KILLS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert len(kills) == KILLS
    expected = _results(tmp_path / "undisturbed")
    assert len(expected["maps"]) == 4
    runs = sorted(tmp_path.glob("run*"))
    assert {name for name, _ in kills} <= {run.name for run in runs}
    for run in runs:
        assert _results(run) == expected
        assert sorted(p.name for p in run.iterdir()) == sorted(
            p.name for p in (tmp_path / "undisturbed").iterdir()
        )


@pytest.fixture
def saved(tmp_path) -> Path:
    """Write two checkpoints of a small model with its optimizer, and return the path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).double())
    adam = torch.optim.Adam(model.parameters())
    path = tmp_path / "model.safetensors"
    for epoch in (1, 2):
        model[1](model[0](torch.ones(2, 7)).double()).sum().backward()
        adam.step()
        save_checkpoint(path, {"epoch": epoch, "losses": [0.25] * epoch}, model, adam)
    return path


def test_a_checkpoint_truncated_at_any_byte_is_refused_and_the_previous_one_offered(saved):
    whole = saved.read_bytes()
    offer = r"model\.safetensors is damaged.*the one before it is model\.previous\.safetensors"
    for size in range(len(whole)):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=offer):
            read_checkpoint(saved)
    previous(saved).replace(saved)
    assert read_checkpoint(saved)[0]["epoch"] == 1


def test_a_changed_checkpoint_is_refused_unless_its_content_is_the_same(saved):
    whole, rng = saved.read_bytes(), random.Random(SEED)
    header, tensors = read_checkpoint(saved)
    length = 8 + int.from_bytes(whole[:8], "little")
    flips = [(at, 1 << rng.randrange(8)) for at in range(len(whole))]
    flips += [(rng.randrange(length), rng.randrange(1, 256)) for _ in range(2000)]
    refused = 0
    for at, bits in flips:
        changed = bytearray(whole)
        changed[at] ^= bits
        saved.write_bytes(changed)
        try:
            found, content = read_checkpoint(saved)
        except ValueError as error:
            refused += str(saved) in str(error)
        else:  # white space was replaced by other white space
            assert at < length
            assert found == header
            assert all(torch.equal(content[name], t) for name, t in tensors.items())
    assert refused > 0.99 * len(flips)


def test_a_checkpoint_of_an_older_version_without_a_checksum_is_read(tmp_path):
    model = nn.Linear(2, 2)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, {"msflow_ext": '{"epoch": 3}'})
    header, tensors = read_checkpoint(path)
    assert header == {"epoch": 3}
    restore(path, tensors, model)


def test_a_header_that_is_not_an_object_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"msflow_ext": "[1]"})
    with pytest.raises(ValueError, match="its header is not a JSON object"):
        read_checkpoint(path)


def test_checkpoints_that_take_long_are_written_less_often(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now))

    def save(seconds: float, epoch: int) -> None:
        def write(*_: Any) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr(checkpoint, "save_checkpoint", write)
        saver.save({"epoch": epoch}, nn.Linear(1, 1), None)

    saver = checkpoint.Saver(tmp_path / "model.safetensors")
    assert saver.is_due(tested=False), "after the first epoch"
    save(0.9, 1)
    assert saver.is_due(tested=True) and not saver.is_due(tested=False)
    now += 61
    assert saver.is_due(tested=False)
    save(5.0, 2)
    now += 99
    assert not saver.is_due(tested=True) and not saver.is_due(tested=False)
    now += 2
    assert saver.is_due(tested=True) and saver.is_due(tested=False)
