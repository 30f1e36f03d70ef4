"""Crafted checkpoints of other packages are refused before anything larger than the file is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import FastFlowHead, MSFlowHead
from msflow_ext.compat import load_fastflow_checkpoint, load_msflow_checkpoint
from msflow_ext.compat.checkpoints.fastflow import to_peer_state_dict
from msflow_ext.compat.checkpoints.msflow import to_reference_state_dict
from msflow_ext.compat.checkpoints.torch_file import read_torch_file

pytestmark = pytest.mark.family("crafted files")
State = dict[str, Any]


def fastflow() -> State:
    return to_peer_state_dict(FastFlowHead((8, 12), steps=2))


def msflow() -> State:
    flat = to_reference_state_dict(MSFlowHead((8, 12), blocks=(1, 1), cond_channels=4))
    flows = [
        {k.partition(f"flows.{i}.")[2]: v for k, v in flat.items() if f"flows.{i}." in k}
        for i in (0, 1)
    ]
    fusion = {k.removeprefix("fusion_flow."): v for k, v in flat.items() if k.startswith("fusion")}
    return {"fusion_flow": fusion, "parallel_flows": flows}


def with_step(number: int) -> Callable[[State], Any]:
    name = f"fast_flow_blocks.0.module_list.{number}.global_scale"
    return lambda state: state.update({name: torch.ones(1, 8, 1, 1)})


def scaled(size: int) -> Callable[[State], Any]:
    name = "fast_flow_blocks.0.module_list.0.global_scale"
    return lambda state: state.update({name: torch.ones(1, size, 1, 1)})


def widened(size: int) -> Callable[[State], Any]:
    scale = {"module_list.0.global_scale": torch.ones(1, size, 1, 1)}
    return lambda state: state["parallel_flows"][0].update(scale)


def conditioned(size: int) -> Callable[[State], Any]:
    weight = {"module_list.0.subnet.conv1.weight": torch.ones(4, size, 1, 1)}
    return lambda state: state["parallel_flows"][0].update(weight)


def test_the_unchanged_checkpoints_load(tmp_path):
    for make, load in ((fastflow, load_fastflow_checkpoint), (msflow, load_msflow_checkpoint)):
        torch.save(make(), tmp_path / "a.pt")
        assert load(tmp_path / "a.pt").channels == (8, 12)


@pytest.mark.parametrize(
    ("make", "load", "change"),
    [
        (fastflow, load_fastflow_checkpoint, with_step(10**9)),
        (fastflow, load_fastflow_checkpoint, with_step(10**30)),
        (fastflow, load_fastflow_checkpoint, scaled(10**6)),
        (msflow, load_msflow_checkpoint, widened(10**6)),
        (msflow, load_msflow_checkpoint, conditioned(4 * 10**6)),
    ],
)
def test_a_size_that_contradicts_other_tensors_is_refused(tmp_path, make, load, change):
    state = make()
    change(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: "):
        load(tmp_path / "a.pt")


def nested(levels: int) -> list[Any]:
    """Return lists that each hold the next one nine times, which are small in a file but huge to traverse."""
    found: list[Any] = [torch.zeros(1)]
    for _ in range(levels):
        found = [found] * 9
    return found


def test_a_shared_part_is_checked_once(tmp_path):
    torch.save(nested(30), tmp_path / "a.pt")
    assert len(read_torch_file(tmp_path / "a.pt")) == 9


@pytest.mark.parametrize("shape", [(10**9,), (4, 10**12)])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, shape):
    tensor: Tensor = torch.zeros(1).expand(shape)
    torch.save({"state_dict": {"a": [tensor]}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is stored as fewer numbers"):
        read_torch_file(tmp_path / "a.pt")
