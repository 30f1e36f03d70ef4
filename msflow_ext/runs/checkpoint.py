"""Checkpoints: a model, the optimiser's state and plain values in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msflow_ext.files import replacing

CHECKPOINT = "model.safetensors"  # its name in a run folder
_HEADER = "msflow_ext"  # the key of our JSON in the metadata of a safetensors file
_DIGEST = "sha256"  # the key of the checksum of that JSON and of all tensors; older files have none
_OPTIMIZER = "optimizer."  # begins the names of the tensors that only training needs


def save_checkpoint(
    path: Path,
    header: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a model, perhaps its optimiser's state, and plain JSON values into one safetensors file.

    The checkpoint that was there stays beside it, as :func:`previous`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = model.state_dict()
    for i, moments in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{_OPTIMIZER}{i}.{name}": value for name, value in moments.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    metadata = {_HEADER: text, _DIGEST: _digest(text, plain)}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        if path.exists():
            with replacing(previous(path)) as second:
                try:
                    os.link(path, second)
                except OSError:  # a file system without links
                    shutil.copyfile(path, second)


class Saver:
    """Writes the checkpoint of a training: after every test, and at least once a minute.

    Where that takes longer than a second, it waits until the training has continued for twenty times as long: flows of a
    gigabyte with their optimiser, tested after every epoch, would else be written half of the time.
    """

    SECONDS, SHORT, SHARE = 60.0, 1.0, 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ended, self._took = -math.inf, 0.0

    def is_due(self, *, tested: bool) -> bool:
        """Return whether one is to be written now; ``tested``: after a test."""
        since = time.monotonic() - self._ended
        if self._took > self.SHORT and since < self.SHARE * self._took:
            return False
        return tested or since > self.SECONDS

    def save(self, state: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
        """Write one with :func:`save_checkpoint`, of which ``state`` is the header."""
        began = time.monotonic()
        save_checkpoint(self.path, state, model, optimizer)
        self._ended = time.monotonic()
        self._took = self._ended - began


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept while training goes on."""
    return path.with_suffix(".previous" + path.suffix)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors that :func:`save_checkpoint` wrote; no code in the file is ever run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a checkpoint of this package; it says whether the one
            before it is there. Or its model has a part that this version no longer has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        header, tensors = _read(path)
    except ValueError as error:
        if not previous(path).is_file():
            raise
        offer = f"the one before it is {previous(path).name}: rename it to continue from there"
        raise ValueError(f"{error}; {offer}") from None
    _update(path, header)
    return header, tensors


def _update(path: Path, header: dict[str, Any]) -> None:
    """Change the header that an older version wrote into one of this version.

    Raises:
        ValueError: the model has a part that was removed since.
    """
    config = header.get("config")
    if isinstance(config, dict) and config.pop("position_base", False):
        raise ValueError(
            f"{path} was trained with position_base, a Gaussian at every position behind the flow, which was "
            "removed: train the model again without it"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _HEADER not in metadata:
            raise ValueError(f"{path} is a safetensors file, but no checkpoint of msflow_ext")
        text = metadata[_HEADER]
        # An older file holds the header alone; whatever else stands there must be the checksum.
        if metadata.keys() != {_HEADER} and metadata.get(_DIGEST) != _digest(text, tensors):
            raise ValueError(f"{path} is damaged: its content does not match its checksum")
        header = json.loads(text)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or is not a checkpoint: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no JSON object")
    return header, tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header and of the tensors' names, types, shapes and bytes, whatever their order."""
    whole = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def restore(
    path: Path,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Fill a model, and an optimiser if given, with the tensors of the checkpoint ``path``.

    Raises:
        ValueError: a tensor is missing, is not wanted, or has another shape; it is named.
    """
    moments: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = tensor
        else:
            weights[name] = tensor
    kind, wanted = type(model).__name__, model.state_dict()
    for name, own in wanted.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name}, which {kind} needs")
        if weights[name].shape != own.shape:
            came, want = tuple(weights[name].shape), tuple(own.shape)
            raise ValueError(f"{path}: {name} is {came}, {kind} needs {want}")
    if surplus := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"{path} has {surplus[0]}, which {kind} does not know")
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
