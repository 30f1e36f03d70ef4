"""Train in several processes: divide images, exchange sums and values, and stop together."""

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

#: How long a process waits for the others. The longest wait is for the metrics and the report of the first.
TIMEOUT = timedelta(minutes=30)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun and others

Value = TypeVar("Value")


class Ranks:
    """A group of processes that train together; this one is number ``rank`` of ``size``.

    All processes call the same methods in the same order. A single process exchanges nothing.

    Gradients are averaged here and not by ``DistributedDataParallel``, because the shares of a batch
    differ in size and may be empty, and the mean must equal that of one process.

    Args:
        rank: the number of this process, counted from 0.
        size: the number of processes.

    Raises:
        ConnectionError: by any method, if another process has ended or does not answer within
            ``TIMEOUT``.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """True on the process that writes files and reports."""
        return self.rank == 0

    def own(self, images: int) -> Tensor:
        """Return the indices of this process's images, ``(N,)`` int64: every ``size``-th image."""
        return torch.arange(images)[self.rank :: self.size]

    def total(self, part: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor of one shape."""
        if self.size == 1:
            return part
        whole = part.clone()
        self._call(dist.all_reduce, whole)
        return whole

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor, images: int) -> Tensor:
        """Average gradients, in place, and the loss over the whole batch.

        Args:
            parameters: those whose gradients are averaged.
            loss: this process's mean over ``images`` images, as are its gradients.
            images: size of this process's share. With 0, its values do not count.

        Returns:
            The loss of the whole batch.
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
        """Return the rows of all ``images`` on the first process, and ``rows`` on the others."""
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
        """Copy a tensor from process ``source`` to process ``target``; other processes do nothing."""
        if self.rank == source != target:
            self._call(dist.send, tensor, target)
        elif self.rank == target != source:
            self._call(dist.recv, tensor, source)

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value, which can be any object that can be pickled."""
        return self._from(0, value)

    @torch.no_grad()
    def synchronize(self, model: nn.Module) -> None:
        """Copy the first process's parameters and buffers to all processes."""
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            dense = tensor.contiguous()
            self._call(dist.broadcast, dense, 0)
            tensor.copy_(dense)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Make an error inside the block, which must not exchange data, an error of all processes.

        Raises:
            ProcessFailed: on each process except the first that failed, which raises its own error.
        """
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        first_failed = torch.tensor(self.rank if failure else self.size)
        self._call(dist.all_reduce, first_failed, dist.ReduceOp.MIN)
        number = int(first_failed)
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
    """Divide a batch evenly among ``size`` processes, and return the places in it of each.

    A process keeps as many images that it owns, by ``owners (N,)``, as fit into its share. So few
    images are moved.
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
    """Return whether a launcher such as ``torchrun`` started this process as one of several."""
    if not dist.is_available():
        return False
    return dist.is_initialized() or all(name in os.environ for name in ENVIRONMENT)


def local_rank() -> int:
    """Return the number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if started() else 0


def own_device(device: str | torch.device | None) -> str | torch.device | None:
    """Return ``device``, or this process's GPU if several processes share the GPUs of a machine."""
    if started() and str(device or "cuda") == "cuda" and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return device


def join(device: str | torch.device | None = None) -> Ranks:
    """Connect to the processes that were started with this one, if there are any.

    The caller must end a group that it has made, with ``torch.distributed.destroy_process_group``.
    A group made here is ended before the interpreter, which gloo's threads need to release tensors.

    Args:
        device: where the processes compute. NCCL exchanges CUDA tensors, and gloo CPU tensors.
    """
    if not started():
        return Ranks()
    if not dist.is_initialized():
        # Import this before there is a group, which its default arguments would keep alive. Torchvision imports it too.
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
    except RuntimeError as error:  # the only common type of what torch raises
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ConnectionError(
            f"process {rank} of {size} has lost its connection: another process has ended, or did "
            f"not answer within {TIMEOUT.total_seconds():.0f} s ({reason})"
        ) from error


def _machine() -> str:
    return os.environ.get("GROUP_RANK", os.uname().nodename if hasattr(os, "uname") else "")
