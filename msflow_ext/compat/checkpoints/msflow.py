"""Convert checkpoints of the MSFlow reference implementation to and from an ``MSFlowHead``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msflow_ext.choices import ClampForm
from msflow_ext.compat.checkpoints.torch_file import read_torch_file
from msflow_ext.models.msflow_head import MSFlowHead

_FUSION = "fusion_flow.module_list"


def load_msflow_checkpoint(
    path: str | Path,
    *,
    clamp: float = 1.9,
    clamp_form: ClampForm = "0.2",
    fusion_order: Sequence[int] | None = None,
) -> MSFlowHead:
    """Load an :class:`~msflow_ext.MSFlowHead` from a checkpoint of the MSFlow reference implementation.

    All sizes are read from the file, which is opened without executing code.

    Args:
        path: a file with ``fusion_flow`` and ``parallel_flows``.
        clamp, clamp_form: the clamp in training, which the file does not hold.
        fusion_order: the scale of each of the fusion flow's permutations. Only needed if two scales have the same
            number of channels, because otherwise the lengths of the permutations determine it.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not such a checkpoint. Missing, unexpected and misshapen keys are named.

    Examples:
        >>> import torch
        >>> import msflow_ext as mx
        >>> from msflow_ext.compat import load_msflow_checkpoint
        >>> from msflow_ext.compat.checkpoints.detectors import for_peer
        >>> reference = {"standardize": False, "padding_mode": "reflect"}
        >>> model = mx.MSFlow("resnet18", pretrained=False, blocks=(1, 1, 1), **reference)
        >>> torch.save(for_peer(model, "msflow"), "msflow.pt")
        >>> load_msflow_checkpoint("msflow.pt").channels
        (64, 128, 256)
    """
    checkpoint = read_torch_file(path)
    try:
        state = flatten_checkpoint(checkpoint)
        return head_from_state_dict(
            state, clamp=clamp, clamp_form=clamp_form, fusion_order=fusion_order
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flatten_checkpoint(checkpoint: Any) -> dict[str, Tensor]:
    """Return one state dict with the prefixes ``fusion_flow.`` and ``parallel_flows.<i>.`` from a checkpoint."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint must be a dictionary, got {type(checkpoint).__name__}")
    parts = {"fusion_flow": checkpoint.get("fusion_flow")}
    flows = checkpoint.get("parallel_flows")
    if not isinstance(parts["fusion_flow"], Mapping) or not isinstance(flows, (list, tuple)):
        raise ValueError(
            "an MSFlow checkpoint must hold 'fusion_flow' and 'parallel_flows', got "
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
            raise ValueError(f"{key} must be a tensor, got {type(value).__name__}")
    return state


def head_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    clamp: float = 1.9,
    clamp_form: ClampForm = "0.2",
    fusion_order: Sequence[int] | None = None,
) -> MSFlowHead:
    """Return a head with the weights of a flat reference ``state`` (see :func:`flatten_checkpoint`)."""
    blocks = _count(state, r"parallel_flows\.(\d+)\.module_list\.(\d+)\.")
    if not blocks:
        raise ValueError("the state dict must hold keys 'parallel_flows.0.module_list.0.*'")
    channels, conds = [], []
    for i in range(len(blocks)):
        first = f"parallel_flows.{i}.module_list.0"
        channels.append(_size(state, f"{first}.global_scale", 1))
        hidden = _size(state, f"{first}.subnet.conv1.weight", 1)
        conds.append(hidden - (channels[-1] - channels[-1] // 2))
    options = {"blocks": blocks, "cond_channels": conds, "clamp": clamp, "clamp_form": clamp_form}
    order = _fusion_order(state, channels, fusion_order)
    with torch.device("meta"):  # allocate nothing before the shapes are checked
        blank = MSFlowHead(channels, **options, seed=0)
        expected = to_reference_state_dict(blank, fusion_order=order)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} must have shape {tuple(value.shape)}, got {tuple(state[key].shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape and not _is_permutation(key)
    ]
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(problems))
    first = f"{_FUSION}.{len(channels)}.subnet_1.cross_convs.conv1.weight"
    dtype = state[first].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{first} must be floating-point numbers, got {dtype}")
    head = MSFlowHead(channels, **options, seed=0).to(dtype)
    head.load_state_dict(_from_reference(state, head, order))
    return head


def to_reference_state_dict(
    head: MSFlowHead,
    *,
    index_permutations: bool = False,
    fusion_order: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Return the flat reference state dict of ``head``, with permutations as dense matrices or int64 indices."""
    own = dict(head.state_dict())
    state = to_reference_names(own, head)
    order = range(len(head.channels)) if fusion_order is None else fusion_order
    like = next(head.parameters())
    for ours, theirs in _permutation_names(head, order):
        as_index = index_permutations or theirs.startswith(_FUSION)
        for name, perm in ((theirs, own[ours]), (f"{theirs}_inv", own[ours].argsort())):
            state[name] = perm.clone() if as_index else dense_permutation(perm, like)
    return state


def to_reference_names(tensors: Mapping[str, Tensor], head: MSFlowHead) -> dict[str, Tensor]:
    """Return the parameters of ``head``, or their gradients, with the names and shapes of the reference modules."""
    out: dict[str, Tensor] = {}
    for pair in _pairs(head):
        whole = torch.cat([tensors[name] for name in pair.ours], pair.dim)
        out.update(zip(pair.theirs, whole.chunk(len(pair.theirs), pair.dim), strict=True))
    return {k: t.view(1, -1, 1, 1) if _is_per_channel(k) else t for k, t in out.items()}


def _from_reference(
    state: Mapping[str, Tensor], head: MSFlowHead, order: Sequence[int]
) -> dict[str, Tensor]:
    state = {k: t.flatten() if _is_per_channel(k) else t for k, t in state.items()}
    own, out = head.state_dict(), {}
    for pair in _pairs(head):
        whole = torch.cat([state[name] for name in pair.theirs], pair.dim)
        sizes = [own[name].size(pair.dim) for name in pair.ours]
        out.update(zip(pair.ours, whole.split(sizes, pair.dim), strict=True))
    for ours, theirs in _permutation_names(head, order):
        out[ours] = read_permutation(state, theirs, len(own[ours]))
    return out


class _Pair(NamedTuple):
    """Names of tensors here and in the reference; concatenated along ``dim``, both sides are the same tensor."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    dim: int = 0

    def prefixed(self, ours: str, theirs: str) -> _Pair:
        """Return the pair with a prefix on each side."""
        return _Pair(
            tuple(f"{ours}.{name}" for name in self.ours),
            tuple(f"{theirs}.{name}" for name in self.theirs),
            self.dim,
        )


_KINDS = ("weight", "bias")
_STEP = (
    _Pair(("global_scale",), ("global_scale",)),
    _Pair(("global_offset",), ("global_offset",)),
    _Pair(("subnet.conv_x.weight", "subnet.conv_cond.weight"), ("subnet.conv1.weight",), dim=1),
    _Pair(("subnet.conv_cond.bias",), ("subnet.conv1.bias",)),
    *(_Pair((f"subnet.norm.{kind}",), (f"subnet.ln.{kind}",)) for kind in _KINDS),
    *(_Pair((f"subnet.conv_out.{kind}",), (f"subnet.conv2.{kind}",)) for kind in _KINDS),
)


def _pairs(head: MSFlowHead) -> Iterator[_Pair]:
    """Yield every parameter of ``head`` by both names."""
    for ours, theirs in _steps(head):
        yield from (pair.prefixed(ours, theirs) for pair in _STEP)
    fusion = f"{_FUSION}.{len(head.channels)}"
    for side in ("subnet_1", "subnet_2"):
        pairs = _cross_scale_pairs(len(head.channels))
        yield from (pair.prefixed(f"fusion.{side}", f"{fusion}.{side}") for pair in pairs)


def _cross_scale_pairs(scales: int) -> Iterator[_Pair]:
    """Yield every parameter of a subnet of the fusion flow by both names."""
    for kind in _KINDS:
        for name in ("conv1", "conv2", "norm"):
            yield _Pair((f"{name}.{kind}",), (f"cross_convs.{name}.{kind}",))
        for i in range(scales):
            yield _Pair((f"conv_out.{i}.{kind}",), (f"conv_s.{i}.{kind}", f"conv_t.{i}.{kind}"))


def _permutation_names(head: MSFlowHead, order: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield every permutation of ``head`` by both names, those of the fusion flow in the reference's ``order``."""
    for ours, theirs in _steps(head):
        yield f"{ours}.perm", f"{theirs}.w_perm"
    for module, scale in enumerate(order):
        yield f"fusion.perm{scale}", f"{_FUSION}.{module}.perm"


def _steps(head: MSFlowHead) -> Iterator[tuple[str, str]]:
    """Yield every step of every scale by both names."""
    for i, blocks in enumerate(head.blocks):
        for k in range(blocks):
            yield f"flows.{i}.steps.{k}", f"parallel_flows.{i}.module_list.{k}"


def dense_permutation(perm: Tensor, like: Tensor) -> Tensor:
    """Return the 0/1 matrix ``(C, C, 1, 1)`` of an index ``perm (C,)``, with the dtype and device of ``like``."""
    return torch.eye(len(perm)).to(like)[perm][:, :, None, None]


def _is_per_channel(key: str) -> bool:
    """Return whether the reference has ``(1, C, 1, 1)`` for a tensor ``(C,)`` here."""
    return key.endswith((".global_scale", ".global_offset"))


def read_permutation(state: Mapping[str, Tensor], key: str, channels: int) -> Tensor:
    """Return ``perm (channels,)`` int64 from an index or a dense 0/1 matrix, after checking it and its inverse."""
    found = []
    for name in (key, f"{key}_inv"):
        p = state[name]
        if p.dim() == 4 and p.shape[:2] == (channels, channels):
            matrix = p.flatten(1)
            if not bool(((matrix == 0) | (matrix == 1)).all()):
                raise ValueError(f"{name} must be a matrix of zeros and ones, got other numbers")
            p = matrix.argmax(1)
        if p.shape != (channels,) or p.is_floating_point() or not _is_one(p, channels):
            raise ValueError(
                f"{name} must be a permutation of {channels} channels as an index or a 0/1 matrix, got "
                f"{state[name].dtype} {tuple(state[name].shape)}"
            )
        found.append(p.long())
    if not torch.equal(found[1], torch.argsort(found[0])):
        raise ValueError(f"{key}_inv must be the inverse of {key}")
    return found[0]


def _is_one(p: Tensor, channels: int) -> bool:
    return torch.equal(p.sort().values.long(), torch.arange(channels, device=p.device))


def _fusion_order(
    state: Mapping[str, Tensor], channels: Sequence[int], given: Sequence[int] | None
) -> list[int]:
    """Return the scale of each permutation module."""
    sizes = [_size(state, f"{_FUSION}.{j}.perm", 0) for j in range(len(channels))]
    if given is None:
        if len(set(channels)) != len(channels):
            raise ValueError(
                f"fusion_order must be given, because scales share numbers of channels: {tuple(channels)}"
            )
        given = [channels.index(s) if s in channels else -1 for s in sizes]
    order = list(given)
    if sorted(order) != list(range(len(channels))) or [channels[i] for i in order] != sizes:
        raise ValueError(
            f"fusion_order must order scales with {list(channels)} channels as permutations with {sizes} channels, "
            f"got {order}"
        )
    return order


def _count(keys: Iterable[str], pattern: str) -> list[int]:
    """Return the number of blocks of each scale, counted from 0 to the first gap."""
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
        raise ValueError(
            f"{key} must have more than {dim} dimensions, got shape {tuple(state[key].shape)}"
        )
    return state[key].size(dim)


def _is_permutation(key: str) -> bool:
    return key.rsplit(".", 1)[-1].removesuffix("_inv") in ("perm", "w_perm")
