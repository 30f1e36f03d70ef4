"""Start a command once per device, on one or several machines, with PyTorch's elastic launcher."""

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
    """Return the number of processes to start, or 0 if this process shall train.

    The arguments are the flags of these names.

    Raises:
        ValueError: the flags contradict each other, the machine or ``torchrun``.
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
                    f"{flag} must be {found}, as torchrun started {found} {what}, got {value}. "
                    "Leave the flag out."
                )
        return 0
    devices, num_nodes = devices or 1, num_nodes or 1
    if num_nodes > 1 and not rendezvous:
        raise ValueError(
            f"--num-nodes {num_nodes} needs --rendezvous HOST:PORT, one of the machines and a free "
            "port there. Give the same on all machines."
        )
    if rendezvous and num_nodes == 1:
        raise ValueError("--rendezvous needs --num-nodes, the number of machines that meet there")
    _check(devices, device)
    gpus = torch.cuda.device_count()
    if devices > gpus and str(device or ("cuda" if gpus else "cpu")) == "cuda":
        raise ValueError(
            f"--devices must be at most {gpus}, the number of GPUs of this machine, got {devices}"
        )
    return devices if devices * num_nodes > 1 else 0


def launch(
    arguments: Sequence[str], devices: int, num_nodes: int | None, rendezvous: str | None
) -> int:
    """Run ``msflow`` with these arguments in ``devices`` processes, and return the exit status.

    If one process fails, all processes are stopped. A signal to this process stops them too.

    Raises:
        ChildProcessError: a process was ended by a signal, so that it printed no error.
        ConnectionError: the machines do not meet at the rendezvous, or lose it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("", ".agent.server.api"):  # the second logger sets its own level
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
        if failure.exitcode > 0:  # the process has printed its error
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise ChildProcessError(
            f"process {rank} of {devices * machines} was ended by {name}, so all processes were stopped"
        ) from None
    except RendezvousError as error:
        raise ConnectionError(f"--rendezvous {rendezvous} cannot be reached: {error}") from None
    except SignalException as error:
        return 2 if error.sigval == signal.SIGINT else 128 + error.sigval
    return 0


def _check(processes: int, device: str | None) -> None:
    if processes > 1 and device and ":" in device:
        raise ValueError(
            f"--device must not be a single GPU for {processes} processes, got {device}"
        )
