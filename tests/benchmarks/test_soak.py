"""Thousands of calls leak neither memory nor open files; ``benchmarks/campaigns/soak.py`` runs longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Run in a separate process, whose memory other tests do not change.
SCRIPT = """
import json, sys
sys.path.insert(1, sys.argv[1])
import torch
from benchmarks.campaigns import soak
torch.set_num_threads(1)
found = soak.soak(getattr(soak, sys.argv[2])(), int(sys.argv[3]), 60.0)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("calls", "count"), [("op_calls", 8_000), ("predictions", 30)])
def test_many_calls_leak_neither_memory_nor_files(calls: str, count: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[2]), calls, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["open_files_growth"] <= 0
    assert found["resident_growth_bytes"] < 8e6
