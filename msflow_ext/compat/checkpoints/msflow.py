"""Checkpoints of the MSFlow authors' code, in both encodings of the permutation, to and from our head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msflow_ext.compat.checkpoints.torch_file import read_torch_file
from msflow_ext.models.msflow import MSFlowHead

_FUSION = "fusion_flow.module_list"


def load_msflow_checkpoint(
    path: str | Path,
    *,
    clamp: float = 1.9,
    clamp_form: str = "0.2",
    fusion_order: Sequence[int] | None = None,
) -> MSFlowHead:
    """Build an :class:`~msflow_ext.MSFlowHead` from a checkpoint that the MSFlow authors' code wrote.

    Every size is read from the file, which is opened without executing code.

    Args:
        path: file with ``fusion_flow`` and ``parallel_flows``.
        clamp, clamp_form: what the model was trained with; the file does not say.
        fusion_order: the scale of each of the fusion flow's permutations. Only needed where two scales have the
            same number of channels: otherwise the length of a permutation tells.

    Raises:
        FileNotFoundError: no such file. ValueError: not such a checkpoint; keys missing, unexpected or misshapen,
            all named.
    """
    checkpoint = read_torch_file(path)
    try:
        state = flatten_official(checkpoint)
        return head_from_state_dict(
            state, clamp=clamp, clamp_form=clamp_form, fusion_order=fusion_order
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flatten_official(checkpoint: Any) -> dict[str, Tensor]:
    """One state dict with the prefixes ``fusion_flow.`` and ``parallel_flows.<i>.`` from the authors' layout."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint must be a dictionary, got {type(checkpoint).__name__}")
    parts = {"fusion_flow": checkpoint.get("fusion_flow")}
    flows = checkpoint.get("parallel_flows")
    if not isinstance(parts["fusion_flow"], Mapping) or not isinstance(flows, (list, tuple)):
        raise ValueError(
            "an MSFlow checkpoint has 'fusion_flow' and 'parallel_flows', this one has "
            f"{sorted(map(str, checkpoint))}"
        )
    parts |= {f"parallel_flows.{i}": flow for i, flow in enumerate(flows)}
    state = {
        f"{prefix}.{key}": value
        for prefix, part in parts.items()
        if isinstance(part, Mapping)
        for key, value in part.items()
    }
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is no tensor but {type(value).__name__}")
    return state


def head_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    clamp: float = 1.9,
    clamp_form: str = "0.2",
    fusion_order: Sequence[int] | None = None,
) -> MSFlowHead:
    """Our head with the weights of a flat official ``state`` (see :func:`flatten_official`)."""
    blocks = _count(state, r"parallel_flows\.(\d+)\.module_list\.(\d+)\.")
    if not blocks:
        raise ValueError("the state dict holds no key 'parallel_flows.0.module_list.0.*'")
    channels, conds = [], []
    for i in range(len(blocks)):
        first = f"parallel_flows.{i}.module_list.0"
        channels.append(_size(state, f"{first}.global_scale", 1))
        hidden = _size(state, f"{first}.subnet.conv1.weight", 1)
        conds.append(hidden - (channels[-1] - channels[-1] // 2))
    head = MSFlowHead(
        channels, blocks=blocks, cond_channels=conds, clamp=clamp, clamp_form=clamp_form, seed=0
    )
    order = _fusion_order(state, channels, fusion_order)
    expected = to_official_state_dict(head, fusion_order=order)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape and not _is_permutation(key)
    ]
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(problems))
    first = f"{_FUSION}.{len(channels)}.subnet_1.cross_convs.conv1.weight"
    dtype = state[first].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{first} must be floating-point numbers, got {dtype}")
    head.to(dtype)
    head.load_state_dict(_from_official(state, head, order))
    return head


def to_official_state_dict(
    head: MSFlowHead,
    *,
    index_permutations: bool = False,
    fusion_order: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The flat official state dict of ``head``, permutations as dense matrices or, on request, as int64 indices."""
    state = to_official_names(dict(head.state_dict()), head)
    order = range(len(head.channels)) if fusion_order is None else fusion_order
    for module, scale in enumerate(order):
        perm = getattr(head.fusion, f"perm{scale}")
        state[f"{_FUSION}.{module}.perm"] = perm.clone()
        state[f"{_FUSION}.{module}.perm_inv"] = torch.argsort(perm)
    for i, flow in enumerate(head.flows):
        for k, step in enumerate(flow.steps):  # type: ignore[arg-type]
            block = f"parallel_flows.{i}.module_list.{k}"
            perm = step.perm
            for name, p in (("w_perm", perm), ("w_perm_inv", torch.argsort(perm))):
                dense = torch.eye(len(p), dtype=step.global_scale.dtype)[p.cpu()][:, :, None, None]
                state[f"{block}.{name}"] = p.clone() if index_permutations else dense
    return state


def to_official_names(tensors: Mapping[str, Tensor], head: MSFlowHead) -> dict[str, Tensor]:
    """Rename and join our parameters, or their gradients, as the official modules hold them."""
    out = {}
    for i, flow in enumerate(head.flows):
        for k in range(len(flow.steps)):  # type: ignore[arg-type]
            ours, theirs = f"flows.{i}.steps.{k}", f"parallel_flows.{i}.module_list.{k}"
            for name in ("global_scale", "global_offset"):
                out[f"{theirs}.{name}"] = tensors[f"{ours}.{name}"].view(1, -1, 1, 1)
            subnet = f"{ours}.subnet"
            parts = [tensors[f"{subnet}.{name}.weight"] for name in ("conv_x", "conv_cond")]
            out[f"{theirs}.subnet.conv1.weight"] = torch.cat(parts, 1)
            out[f"{theirs}.subnet.conv1.bias"] = tensors[f"{subnet}.conv_cond.bias"]
            for a, b in (("norm", "ln"), ("conv_out", "conv2")):
                for kind in ("weight", "bias"):
                    out[f"{theirs}.subnet.{b}.{kind}"] = tensors[f"{subnet}.{a}.{kind}"]
    for side in ("subnet_1", "subnet_2"):
        ours, theirs = f"fusion.{side}", f"{_FUSION}.{len(head.channels)}.{side}"
        for kind in ("weight", "bias"):
            for name in ("conv1", "conv2", "norm"):
                out[f"{theirs}.cross_convs.{name}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
            for i in range(len(head.channels)):
                s, t = tensors[f"{ours}.conv_out.{i}.{kind}"].chunk(2)
                out[f"{theirs}.conv_s.{i}.{kind}"] = s
                out[f"{theirs}.conv_t.{i}.{kind}"] = t
    return out


def _from_official(
    state: Mapping[str, Tensor], head: MSFlowHead, order: Sequence[int]
) -> dict[str, Tensor]:
    out = {}
    for i, flow in enumerate(head.flows):
        for k, step in enumerate(flow.steps):  # type: ignore[arg-type]
            ours, theirs = f"flows.{i}.steps.{k}", f"parallel_flows.{i}.module_list.{k}"
            for name in ("global_scale", "global_offset"):
                out[f"{ours}.{name}"] = state[f"{theirs}.{name}"].flatten()
            out[f"{ours}.perm"] = read_permutation(state, f"{theirs}.w_perm", step.channels)
            whole = state[f"{theirs}.subnet.conv1.weight"]
            subnet = f"{ours}.subnet"
            out[f"{subnet}.conv_x.weight"] = whole[:, : step.passive]
            out[f"{subnet}.conv_cond.weight"] = whole[:, step.passive :]
            out[f"{subnet}.conv_cond.bias"] = state[f"{theirs}.subnet.conv1.bias"]
            for a, b in (("norm", "ln"), ("conv_out", "conv2")):
                for kind in ("weight", "bias"):
                    out[f"{subnet}.{a}.{kind}"] = state[f"{theirs}.subnet.{b}.{kind}"]
    for module, scale in enumerate(order):
        out[f"fusion.perm{scale}"] = read_permutation(
            state, f"{_FUSION}.{module}.perm", head.channels[scale]
        )
    for side in ("subnet_1", "subnet_2"):
        ours, theirs = f"fusion.{side}", f"{_FUSION}.{len(head.channels)}.{side}"
        for kind in ("weight", "bias"):
            for name in ("conv1", "conv2", "norm"):
                out[f"{ours}.{name}.{kind}"] = state[f"{theirs}.cross_convs.{name}.{kind}"]
            for i in range(len(head.channels)):
                both = [state[f"{theirs}.{name}.{i}.{kind}"] for name in ("conv_s", "conv_t")]
                out[f"{ours}.conv_out.{i}.{kind}"] = torch.cat(both)
    return out


def read_permutation(state: Mapping[str, Tensor], key: str, channels: int) -> Tensor:
    """``perm (channels,)`` int64 from an index or a dense 0/1 matrix, checked to be one, its inverse likewise."""
    found = []
    for name in (key, f"{key}_inv"):
        p = state[name]
        if p.dim() == 4 and p.shape[:2] == (channels, channels):
            matrix = p.flatten(1)
            if not bool(((matrix == 0) | (matrix == 1)).all()):
                raise ValueError(f"{name} is a matrix, but not a hard permutation")
            p = matrix.argmax(1)
        if p.shape != (channels,) or p.is_floating_point() or not _is_one(p, channels):
            raise ValueError(
                f"{name} must be a permutation of {channels} channels as an index or a 0/1 matrix, got "
                f"{state[name].dtype} {tuple(state[name].shape)}"
            )
        found.append(p.long())
    if not torch.equal(found[1], torch.argsort(found[0])):
        raise ValueError(f"{key}_inv is not the inverse of {key}")
    return found[0]


def _is_one(p: Tensor, channels: int) -> bool:
    return torch.equal(p.sort().values.long(), torch.arange(channels, device=p.device))


def _fusion_order(
    state: Mapping[str, Tensor], channels: Sequence[int], given: Sequence[int] | None
) -> list[int]:
    """The scale of each permutation module."""
    sizes = [_size(state, f"{_FUSION}.{j}.perm", 0) for j in range(len(channels))]
    if given is None:
        if len(set(channels)) != len(channels):
            raise ValueError(
                f"channels {tuple(channels)} repeat, so the file does not tell which permutation of the fusion flow "
                "belongs to which scale: pass fusion_order"
            )
        given = [channels.index(s) if s in channels else -1 for s in sizes]
    order = list(given)
    if sorted(order) != list(range(len(channels))) or [channels[i] for i in order] != sizes:
        raise ValueError(
            f"the fusion flow's permutations have {sizes} channels, which does not fit scales with {list(channels)}"
            f" in the order {order}"
        )
    return order


def _count(keys: Iterable[str], pattern: str) -> list[int]:
    """How many blocks each scale has, counting up from 0 without a gap; keys beyond a gap are not expected."""
    found = {tuple(map(int, match.groups())) for key in keys if (match := re.match(pattern, key))}
    blocks = []
    while (len(blocks), 0) in found:
        scale = len(blocks)
        blocks.append(next(k for k in range(len(found) + 1) if (scale, k) not in found))
    return blocks


def _size(state: Mapping[str, Tensor], key: str, dim: int) -> int:
    if key not in state:
        raise ValueError(f"the state dict does not fit: missing {key}")
    if state[key].dim() <= dim:
        raise ValueError(f"the state dict does not fit: {key} is {tuple(state[key].shape)}")
    return state[key].size(dim)


def _is_permutation(key: str) -> bool:
    return key.rsplit(".", 1)[-1].removesuffix("_inv") in ("perm", "w_perm")
