"""Start a command once per device, here or on several machines, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from msflow_ext.distributed.ranks import started


def processes_to_start(
    devices: int | None, num_nodes: int | None, rendezvous: str | None, device: str | None
) -> int:
    """Return how many processes to start; 0 if this process trains itself, alone or as one of several.

    Raises:
        ValueError: the flags, whose names these are, contradict each other, the machine or ``torchrun``.
    """
    import torch

    if started():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        machines = int(os.environ.get("WORLD_SIZE", here)) // here
        _check(here, device)
        for flag, value, found, what in (
            ("--devices", devices, here, "processes on each machine"),
            ("--num-nodes", num_nodes, machines, "machines"),
        ):
            if value not in (None, found):
                raise ValueError(
                    f"{flag} is {value}, but torchrun started {found} {what}: leave the flag out"
                )
        return 0
    devices, num_nodes = devices or 1, num_nodes or 1
    if num_nodes > 1 and not rendezvous:
        raise ValueError(
            f"--num-nodes {num_nodes} needs --rendezvous HOST:PORT, one of the machines and a free "
            "port there, the same on all"
        )
    if rendezvous and num_nodes == 1:
        raise ValueError("--rendezvous is for training on several machines and needs --num-nodes")
    _check(devices, device)
    gpus = torch.cuda.device_count()
    if devices > gpus and str(device or ("cuda" if gpus else "cpu")) == "cuda":
        raise ValueError(f"--devices is {devices}, this machine has {gpus} GPUs")
    return devices if devices * num_nodes > 1 else 0


def launch(
    arguments: Sequence[str], devices: int, num_nodes: int | None, rendezvous: str | None
) -> int:
    """Run ``msflow`` with these arguments in ``devices`` processes, and return its exit status.

    If one of them fails, all others are ended; so are all by a signal to this one.

    Raises:
        ChildProcessError: one has ended without a word, such as by a signal; it is named.
        ConnectionError: the machines do not meet, or the one where they met is gone.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("", ".agent.server.api"):  # the second sets a level of its own
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    machines = num_nodes or 1
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=devices,
        run_id="msflow",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",  # any free port
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "msflow_ext", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # and it has said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise ChildProcessError(
            f"process {rank} of {devices * machines} was ended by {name}, and the others with it"
        ) from None
    except RendezvousError as error:
        raise ConnectionError(f"--rendezvous {rendezvous} does not answer: {error}") from None
    except SignalException as error:
        return 2 if error.sigval == signal.SIGINT else 128 + error.sigval
    return 0


def _check(processes: int, device: str | None) -> None:
    if processes > 1 and device and ":" in device:
        raise ValueError(f"--device {device} is one device, for {processes} processes")
