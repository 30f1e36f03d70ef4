"""Checkpoints: a model, the optimiser's state and plain values in one safetensors file."""

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

CHECKPOINT = "model.safetensors"  # its name in a run folder
_HEADER = "msflow_ext"  # the key of our JSON in the metadata of a safetensors file
_DIGEST = "sha256"  # the key of the checksum of that JSON and of all tensors; older files have none
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # what the optimiser keeps of a parameter
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


def is_number(value: Any) -> bool:
    """Whether a value of a header is a number that a float can be; NaN and infinity are none."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


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
    from safetensors import safe_open

    try:
        with _utf8_name(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata.get(_HEADER)
        # An older file holds the header alone; whatever else stands there must be the checksum.
        whole = metadata.keys() == {_HEADER} or (
            text is not None and metadata.get(_DIGEST) == _digest(text, tensors)
        )
        header = json.loads(text) if text is not None and whole else {}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes its readers raise nearly anything
        raise ValueError(f"{path} is damaged, or is not a checkpoint: {error}") from None
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but no checkpoint of msflow_ext")
    if not whole:
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no JSON object")
    return header, tensors


@contextmanager
def _utf8_name(path: Path) -> Iterator[str | Path]:
    """A name of a file for readers that take names in UTF-8 only: its own if it is in UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield path


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
    check_tensors(path, tensors, model)
    weights = {name: t for name, t in tensors.items() if not name.startswith(_OPTIMIZER)}
    moments = _moments(path, tensors, optimizer) if optimizer is not None else {}
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def check_tensors(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """ValueError if the weights among the tensors of the checkpoint ``path`` are not those of a model, wherever that is.

    They have its names and shapes, are of real numbers where the model's are, and a permutation is one.
    """
    weights = {name: t for name, t in tensors.items() if not name.startswith(_OPTIMIZER)}
    kind, expected = type(model).__name__, model.state_dict()
    for name, own in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name}, which {kind} needs")
        came = weights[name]
        if came.shape != own.shape:
            raise ValueError(
                f"{path}: {name} is {tuple(came.shape)}, {kind} needs {tuple(own.shape)}"
            )
        if came.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{path}: {name} is {came.dtype}, {kind} needs {own.dtype}")
        if name.rpartition(".")[2].startswith("perm") and not _is_permutation(came):
            raise ValueError(
                f"{path}: {name} must hold every number from 0 to {len(came) - 1} once"
            )
    if surplus := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{path} has {surplus[0]}, which {kind} does not know")


def _is_permutation(tensor: Tensor) -> bool:
    return torch.equal(tensor.sort().values, torch.arange(len(tensor), dtype=tensor.dtype))


def _moments(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The state of an optimiser by the number of the parameter.

    Raises:
        ValueError: it is of other parameters, or has another shape than its parameter.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"{re.escape(_OPTIMIZER)}(\d{{1,9}})\.(\w+)", name):
            i = int(match[1])
            if i >= len(parameters) or tensor.shape not in ((), parameters[i].shape):
                raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, of no parameter")
            moments.setdefault(i, {})[match[2]] = tensor
        elif name.startswith(_OPTIMIZER):
            raise ValueError(f"{path} has {name}, which no optimiser knows")
    if moments and any(moments.get(i, {}).keys() != ADAM for i in range(len(parameters))):
        raise ValueError(f"{path} must hold {', '.join(sorted(ADAM))} of every parameter, or none")
    return moments
