"""Convert weights of gathierry/FastFlow and of anomalib's Fastflow to and from a ``FastFlowHead``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msflow_ext.choices import ClampForm
from msflow_ext.compat.checkpoints.msflow import dense_permutation, read_permutation
from msflow_ext.compat.checkpoints.torch_file import read_torch_file
from msflow_ext.models.fastflow import FastFlowHead

#: The name of the list of flows in each package.
FLOWS = {"gathierry": "nf_flows", "anomalib": "fast_flow_blocks"}

_KEY = re.compile(rf"(?:{'|'.join(FLOWS.values())})\.(\d+)\.module_list\.(\d+)\.(.+)")

#: Names of a subnet's convolutions in anomalib until 2.6.0, which has padding layers before them, and elsewhere.
_PADDED = {"subnet.1": "subnet.0", "subnet.4": "subnet.2"}


def load_fastflow_checkpoint(
    path: str | Path, *, clamp: float = 2.0, clamp_form: ClampForm = "0.2"
) -> FastFlowHead:
    """Load a :class:`~msflow_ext.FastFlowHead` from a checkpoint of gathierry/FastFlow or of anomalib, 0.7 to 2.

    All sizes are read from the file, which is opened without executing code. The frozen backbone in it is ignored.

    Args:
        path: a file of ``torch.save`` or Lightning: a state dict, or a dictionary that holds one as
            ``model_state_dict`` (gathierry) or ``state_dict`` (anomalib).
        clamp, clamp_form: the clamp in training, which the file does not hold.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not such a checkpoint. Missing, unexpected and misshapen keys are named.

    Examples:
        >>> import torch
        >>> from msflow_ext import FastFlowHead
        >>> from msflow_ext.compat import load_fastflow_checkpoint
        >>> from msflow_ext.compat.checkpoints.fastflow import to_peer_state_dict
        >>> head = FastFlowHead((8, 12), steps=2)
        >>> torch.save(to_peer_state_dict(head, "anomalib"), "fastflow.pt")
        >>> load_fastflow_checkpoint("fastflow.pt").channels
        (8, 12)
    """
    content = read_torch_file(path)
    try:
        return head_from_state_dict(content, clamp=clamp, clamp_form=clamp_form)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def unpacked(content: Any) -> dict[str, Tensor]:
    """Return the state dict in a file of either package, without the parts of a Lightning module around ``model``."""
    for name in ("model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"a state dict must be a dictionary, got {type(content).__name__}")
    state = {str(key): value for key, value in content.items()}
    model = {key: value for key, value in state.items() if key.startswith("model.")}
    return model or state


def head_from_state_dict(
    state: Mapping[str, Any], *, clamp: float = 2.0, clamp_form: ClampForm = "0.2"
) -> FastFlowHead:
    """Return a head with the weights of a ``state`` of either package, without those of its backbone.

    Raises:
        ValueError: if keys are missing, unexpected or misshapen. All of them are named.
    """
    state = _flows_and_norms(state)
    sizes = _sizes(state)
    with torch.device("meta"):  # allocate nothing before the shapes are checked
        blank = FastFlowHead(**sizes, clamp=clamp, clamp_form=clamp_form)
        expected = _named(blank, index_permutations=False)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    weights = [key for key in expected if key in state and "w_perm" not in key]
    problems += [
        f"{key} must have shape {tuple(expected[key].shape)}, got {tuple(state[key].shape)}"
        for key in weights
        if state[key].shape != expected[key].shape
    ]
    problems += [
        f"{key} must be floating-point, got {state[key].dtype}"
        for key in weights
        if not state[key].is_floating_point()
    ]
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(problems))
    head = FastFlowHead(**sizes, clamp=clamp, clamp_form=clamp_form)
    own = {}
    for key, value in head.state_dict().items():
        if key.endswith(".perm"):
            own[key] = read_permutation(state, _theirs(key), len(value))
        else:
            own[key] = state[_theirs(key)].view_as(value)
    head.to(state["flows.0.0.global_scale"].dtype)
    head.load_state_dict(own)
    return head


def to_peer_state_dict(
    head: FastFlowHead, package: str = "anomalib", *, index_permutations: bool = False
) -> dict[str, Tensor]:
    """Return the weights of ``head`` as the flows and norms of another package hold them.

    Args:
        head: the head.
        package: ``"gathierry"`` or ``"anomalib"``.
        index_permutations: write permutations as int64 indices, as in FrEIA's master, instead of dense matrices, as in
            FrEIA 0.2 and anomalib.
    """
    if package not in FLOWS:
        raise ValueError(f"package must be one of {', '.join(FLOWS)}, got {package!r}")
    state = _named(head, index_permutations)
    return {
        re.sub(r"^flows\.(\d+)\.", rf"{FLOWS[package]}.\1.module_list.", key): value
        for key, value in state.items()
    }


def _flows_and_norms(content: Any) -> dict[str, Tensor]:
    """Return ``content`` without a backbone, its flows and norms named ``flows.SCALE.STEP.*`` and ``norms.SCALE.*``."""
    found = {}
    for key, value in unpacked(content).items():
        name = key.removeprefix("model.")
        if name.startswith("feature_extractor."):
            continue
        if match := _KEY.fullmatch(name):
            scale, step, rest = match.groups()
            layer, dot, kind = rest.rpartition(".")
            name = f"flows.{scale}.{step}.{_PADDED.get(layer, layer)}{dot}{kind}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} must be a tensor, got {type(value).__name__}")
        if name in found:
            raise ValueError(f"{key} must occur once, got it under the names of two versions")
        found[name] = value
    return found


def _named(head: FastFlowHead, index_permutations: bool) -> dict[str, Tensor]:
    """Return the weights of ``head`` by the names of :func:`_flows_and_norms`, in the shapes of the other packages."""
    state = {}
    like = next(head.parameters())
    for key, value in head.state_dict().items():
        theirs = _theirs(key)
        if not key.endswith(".perm"):
            state[theirs] = value.view(1, -1, 1, 1) if "global" in key else value
            continue
        for name, perm in ((theirs, value), (f"{theirs}_inv", torch.argsort(value))):
            state[name] = perm if index_permutations else dense_permutation(perm, like)
    return state


def _theirs(key: str) -> str:
    return key.replace(".steps.", ".").replace(".perm", ".w_perm")


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the :class:`FastFlowHead` that ``state`` fits."""
    steps: dict[int, int] = {}
    for key in state:
        if match := re.match(r"flows\.(\d+)\.(\d+)\.", key):
            scale, step = map(int, match.groups())
            steps[scale] = max(steps.get(scale, 0), step + 1)
    if not steps or sorted(steps) != list(range(len(steps))) or len(set(steps.values())) != 1:
        raise ValueError(
            f"the state dict must hold flows of one length, got steps by scale {steps}"
        )
    if steps[0] > len(state):
        raise ValueError(
            f"the state dict does not fit: {len(state)} tensors are not {steps[0]} steps"
        )

    def shape(scale: int, step: int, name: str) -> tuple[int, ...]:
        key = f"flows.{scale}.{step}.{name}"
        if key not in state or state[key].dim() != 4:
            raise ValueError(f"the state dict does not fit: {key} is missing or not 4-dimensional")
        return tuple(state[key].shape)

    scales = range(len(steps))
    convolutions = [shape(i, 0, "subnet.0.weight") for i in scales]
    norms = [state.get(f"norms.{i}.weight") for i in scales]
    normed = all(norm is not None and norm.dim() == 3 for norm in norms)
    return {
        "channels": [shape(i, 0, "global_scale")[1] for i in scales],
        "steps": steps[0],
        "hidden_ratio": _ratio(
            [(hidden, conditioning) for hidden, conditioning, *_ in convolutions]
        ),
        "conv3x3_only": steps[0] > 1 and shape(0, 1, "subnet.0.weight")[2] == 3,
        "input_sizes": [tuple(norm.shape[1:]) for norm in norms if norm is not None]
        if normed
        else None,
    }


def _ratio(widths: list[tuple[int, int]]) -> float:
    """Return the shortest decimal number r with ``int(conditioning * r) == hidden`` for all ``widths``."""
    low = max(hidden / conditioning for hidden, conditioning in widths)
    high = min((hidden + 1) / conditioning for hidden, conditioning in widths)
    for digits in range(17):
        ratio = round((low + high) / 2, digits)
        if all(int(conditioning * ratio) == hidden for hidden, conditioning in widths):
            return ratio
    raise ValueError(f"no hidden ratio gives the subnets (hidden, conditioning) channels {widths}")
