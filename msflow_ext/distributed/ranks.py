"""Training in several processes: shares of a batch, sums over processes, and a common end."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from msflow_ext.errors import ProcessFailed

#: How long a process waits for the others; the longest wait is for the first one's metrics and report.
TIMEOUT = timedelta(minutes=30)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and others set

Value = TypeVar("Value")


class Ranks:
    """The processes that train together, of which this one is number ``rank`` of ``size``.

    All of them call the same methods in the same order. Alone, a process exchanges nothing.

    The gradients are averaged here and not by torch's ``DistributedDataParallel``: shares of a batch
    differ and may be empty, and the mean is to be that of one process.

    Raises:
        ConnectionError: any method, if another process has ended or says nothing for ``TIMEOUT``.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def own(self, images: int) -> Tensor:
        """Return the indices ``(N,)`` int64 of this process's images: every ``size``-th one."""
        return torch.arange(images)[self.rank :: self.size]

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' tensors of one shape."""
        if self.size == 1:
            return part
        whole = part.clone()
        self._call(dist.all_reduce, whole)
        return whole

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor, images: int) -> Tensor:
        """Average gradients and loss over the whole batch; those of this process are means over ``images``.

        Returns:
            the loss; the gradients are changed in place, those of a process with 0 images do not count.
        """
        if self.size == 1:
            return loss
        grads = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        parts = [*grads, loss.detach(), torch.ones_like(loss)]
        flat = self.total(torch.cat([part.reshape(-1) for part in parts]) * images)
        flat /= flat[-1].clone()
        means = flat.split([part.numel() for part in parts])
        for grad, mean in zip(grads, means, strict=False):
            grad.copy_(mean.view(grad.shape))
        return flat[-2]

    def gather(self, rows: np.ndarray, images: int) -> np.ndarray:
        """On the first process the rows of all ``images``, from those of each one's own; else ``rows``."""
        if self.size == 1:
            return rows
        if not self.first:
            if len(rows):
                self._call(dist.send, torch.from_numpy(np.ascontiguousarray(rows)), 0)
            return rows
        whole = np.empty((images, *rows.shape[1:]), rows.dtype)
        whole[:: self.size] = rows
        for other in range(1, min(self.size, images)):
            theirs = torch.from_numpy(np.empty_like(whole[other :: self.size]))
            self._call(dist.recv, theirs, other)
            whole[other :: self.size] = theirs.numpy()
        return whole

    def move(self, tensor: Tensor, source: int, target: int) -> None:
        """Fill the target's tensor with the source's; other processes have nothing to do."""
        if self.rank == source != target:
            self._call(dist.send, tensor, target)
        elif self.rank == target != source:
            self._call(dist.recv, tensor, source)

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value, anything that can be pickled."""
        return self._from(0, value)

    @torch.no_grad()
    def synchronize(self, model: nn.Module) -> None:
        """Give the first process's parameters and buffers to all."""
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            dense = tensor.contiguous()
            self._call(dist.broadcast, dense, 0)
            tensor.copy_(dense)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What fails inside, where nothing may be exchanged, fails on all processes.

        Raises:
            ProcessFailed: where it did not fail itself, or another one speaks for it.
        """
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        speaker = torch.tensor(self.rank if failure else self.size)
        self._call(dist.all_reduce, speaker, dist.ReduceOp.MIN)
        number = int(speaker)
        if number == self.size:
            return
        what, machine = self._from(number, (str(failure), _machine()))
        if failure and number == self.rank:
            raise failure
        raise ProcessFailed(f"process {number} of {self.size}: {what}", machine == _machine())

    def _from(self, rank: int, value: Value) -> Value:
        if self.size == 1:
            return value
        values = [value]
        self._call(dist.broadcast_object_list, values, rank, device=torch.device("cpu"))
        return values[0]

    def _call(self, collective: Callable[..., Any], *args: Any, **options: Any) -> None:
        with _connected(self.rank, self.size):
            collective(*args, **options)


def even_shares(owners: Tensor, size: int) -> list[Tensor]:
    """Return the places in a batch of each of ``size`` processes; their numbers differ by at most one.

    Each takes images of its own, by ``owners (N,)``, as far as they are not too many; so few are moved.
    """
    most = -(-len(owners) // size)
    own = [(owners == rank).nonzero().squeeze(1) for rank in range(size)]
    spare = torch.cat([places[most:] for places in own])
    shares = []
    for places in own:
        room = max(0, most - len(places))
        shares.append(torch.cat((places[:most], spare[:room])))
        spare = spare[room:]
    return shares


def started() -> bool:
    """Return whether this process was started as one of several, by ``torchrun`` or otherwise."""
    if not dist.is_available():
        return False
    return dist.is_initialized() or all(name in os.environ for name in ENVIRONMENT)


def local_rank() -> int:
    """Return the number of this process among those on this machine that were started with it."""
    return int(os.environ.get("LOCAL_RANK", 0)) if started() else 0


def own_device(device: str | torch.device | None) -> str | torch.device | None:
    """Return ``device``, or this process's own GPU where several processes are to use all of them."""
    if started() and str(device or "cuda") == "cuda" and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return device


def join(device: str | torch.device | None = None) -> Ranks:
    """Return the processes that were started with this one, connected; this one alone if there are none.

    Args:
        device: where they compute: what is there is exchanged by NCCL, what is in memory by gloo.

    A group that the caller has made is the caller's to end, by ``torch.distributed.destroy_process_group``;
    one made here is ended before the interpreter is: gloo's threads let go of tensors, which needs it.
    """
    if not started():
        return Ranks()
    if not dist.is_initialized():
        # Torchvision imports it too, and its functions' defaults hold a group that there is then for ever.
        from torch.distributed.nn import functional  # noqa: F401

        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        own = str(own_device(device))
        if own.startswith("cuda"):
            torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo"
        with _connected(rank, size):
            dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _connected(rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises has no better type in common
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ConnectionError(
            f"process {rank} of {size} has lost the others: one has ended, or did not answer within "
            f"{TIMEOUT.total_seconds():.0f} s ({reason})"
        ) from error


def _machine() -> str:
    return os.environ.get("GROUP_RANK", os.uname().nodename if hasattr(os, "uname") else "")
