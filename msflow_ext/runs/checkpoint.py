"""Checkpoints: a model, the optimizer's state and plain values in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msflow_ext.files import replacing

CHECKPOINT = "model.safetensors"  # name of the file in a run folder
_HEADER = "msflow_ext"  # key of the header, JSON, in the metadata of the file
_DIGEST = "sha256"  # key of the checksum of header and tensors; files of older versions have none
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # Adam's state of a parameter
_OPTIMIZER = "optimizer."  # prefix of the optimizer's tensors, which only training needs


def save_checkpoint(
    path: Path,
    header: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a model, the state of its optimizer if given, and plain JSON values to one safetensors file.

    An existing checkpoint is kept beside the new one, see :func:`previous`.

    Raises:
        OSError: the file cannot be written.
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
                except OSError:  # the file system has no hard links
                    shutil.copyfile(path, second)


class Saver:
    """Writer of a training's checkpoints: after every test, and at least once a minute.

    If writing takes longer than a second, the next checkpoint waits until training has continued for twenty times as
    long. A model of a gigabyte, tested after every epoch, could otherwise spend half of its time on writing.
    """

    SECONDS, SHORT, SHARE = 60.0, 1.0, 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ended, self._took = -math.inf, 0.0

    def is_due(self, *, tested: bool) -> bool:
        """Return whether a checkpoint is due; ``tested`` says that the epoch has been tested."""
        since = time.monotonic() - self._ended
        if self._took > self.SHORT and since < self.SHARE * self._took:
            return False
        return tested or since > self.SECONDS

    def save(self, state: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
        """Write a checkpoint with the header ``state``, see :func:`save_checkpoint`."""
        began = time.monotonic()
        save_checkpoint(self.path, state, model, optimizer)
        self._ended = time.monotonic()
        self._took = self._ended - began


def previous(path: Path) -> Path:
    """Return the path of the checkpoint before the one at ``path``, which is kept during training."""
    return path.with_suffix(".previous" + path.suffix)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors that :func:`save_checkpoint` wrote. Reading runs no code from the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or is not a checkpoint of this package; the message offers the previous
            checkpoint if there is one. Or its model has a part that this version no longer supports.
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


def is_number(value: Any) -> bool:
    """Return whether a value of a header is a number in the range of a float, which excludes NaN and infinity."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _update(path: Path, header: dict[str, Any]) -> None:
    """Update the header of an older version in place.

    Raises:
        ValueError: the model has a part that this version no longer supports.
    """
    config = header.get("config")
    if isinstance(config, dict) and config.pop("position_base", False):
        raise ValueError(
            f"{path} was trained with position_base, a per-position Gaussian after the flow, which was removed: "
            "train the model again without it"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    try:
        with _utf8_name(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata.get(_HEADER)
        # A file of an older version has only the header. Any other metadata must be the checksum.
        whole = metadata.keys() == {_HEADER} or (
            text is not None and metadata.get(_DIGEST) == _digest(text, tensors)
        )
        header = json.loads(text) if text is not None and whole else {}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make its readers raise nearly anything
        raise ValueError(f"{path} is damaged, or is not a checkpoint: {error}") from None
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but no checkpoint of msflow_ext")
    if not whole:
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is not a JSON object")
    return header, tensors


@contextmanager
def _utf8_name(path: Path) -> Iterator[str | Path]:
    """Yield a name of a file for readers that require UTF-8: the path itself, or that of an open descriptor."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield path


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and of the names, dtypes, shapes and bytes of the tensors, in sorted order."""
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
    """Load the tensors of the checkpoint ``path`` into a model, and into an optimizer if given.

    Raises:
        ValueError: a tensor is missing, is unexpected, or has another shape; the message names it.
    """
    check_tensors(path, tensors, model)
    weights = {name: t for name, t in tensors.items() if not name.startswith(_OPTIMIZER)}
    moments = _moments(path, tensors, optimizer) if optimizer is not None else {}
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def check_tensors(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that the weights of the checkpoint ``path`` are those of a model, on any device.

    Raises:
        ValueError: a name, a shape or a kind of dtype differs, or a permutation is not one.
    """
    weights = {name: t for name, t in tensors.items() if not name.startswith(_OPTIMIZER)}
    kind, expected = type(model).__name__, model.state_dict()
    for name, own in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name}, which {kind} needs")
        found = weights[name]
        if found.shape != own.shape:
            raise ValueError(
                f"{path}: {name} must have shape {tuple(own.shape)} for {kind}, got {tuple(found.shape)}"
            )
        if found.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{path}: {name} must be {own.dtype} for {kind}, got {found.dtype}")
        if name.rpartition(".")[2].startswith("perm") and not _is_permutation(found):
            raise ValueError(
                f"{path}: {name} must hold every number from 0 to {len(found) - 1} once"
            )
    if surplus := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{path} has {surplus[0]}, which {kind} does not know")


def _is_permutation(tensor: Tensor) -> bool:
    return torch.equal(tensor.sort().values, torch.arange(len(tensor), dtype=tensor.dtype))


def _moments(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """Return the state of an optimizer by the index of the parameter.

    Raises:
        ValueError: a tensor belongs to no parameter, or has another shape than its parameter.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"{re.escape(_OPTIMIZER)}(\d{{1,9}})\.(\w+)", name):
            i = int(match[1])
            if i >= len(parameters) or tensor.shape not in ((), parameters[i].shape):
                raise ValueError(
                    f"{path}: {name} must fit a parameter, got shape {tuple(tensor.shape)}"
                )
            moments.setdefault(i, {})[match[2]] = tensor
        elif name.startswith(_OPTIMIZER):
            raise ValueError(f"{path} has {name}, which the optimizer does not know")
    if moments and any(moments.get(i, {}).keys() != ADAM for i in range(len(parameters))):
        raise ValueError(f"{path} must hold {', '.join(sorted(ADAM))} of all parameters or of none")
    return moments
