"""Run many tasks: one after the other in this process, or in parallel on Ray."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch

#: A task, its result, and the error if it failed.
Outcome = tuple[Any, Any, Exception | None]
#: Runs ``work(task)`` for each task and yields outcomes as they are ready. Must be closed after use.
Engine = Callable[[Callable[[Any], Any], Iterable[Any]], Generator[Outcome, None, None]]

RETRIES = 5  # for a task whose worker died
QUEUE = 1000  # most tasks that are submitted to Ray at a time
STORE_BYTES = 100 * 2**20  # size of Ray's shared memory; results are small
CONNECT_SECONDS = 30.0
_CONNECT = """
import ray, sys
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit(str(error.__cause__ or error))
"""

log = logging.getLogger(__name__)


class TaskLost(RuntimeError):  # noqa: N818  (the name says what happened)
    """Raised when the workers of a task died repeatedly, or the engine gave up the task."""


def one_by_one(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Outcome, None, None]:
    """Run tasks in this process, one after the other: the engine ``local``."""
    for task in tasks:
        result, error = None, None
        try:
            result = work(task)
        except Exception as failure:
            error = failure
        yield task, result, error


def on_ray(
    address: str | None = None,
    *,
    at_once: int | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
) -> Engine:
    """Return the engine ``ray``, which runs tasks in parallel worker processes.

    A task is repeated if its worker dies. ``work`` and the tasks are pickled. Workers use this
    process's working folder. The folder, and all files that tasks name, must exist on every machine.
    PyTorch uses ``cpus`` threads.

    Args:
        address: a running cluster, ``HOST:PORT`` or ``auto``. By default, the Ray that this process
            is connected to. If there is none, one is started on this machine and stopped after the
            tasks.
        at_once: most tasks that run at the same time. By default, as many as there is room for.
        cpus, gpus: number of each that one task reserves.

    Raises:
        ValueError: a number is too small or, when tasks begin, larger than the machine allows.
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: when tasks begin, no cluster answers at ``address`` within 30 seconds.
    """
    for name, value, least in (("at_once", at_once, 1), ("cpus", cpus, 1), ("gpus", gpus, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if find_spec("ray") is None:
        raise ModuleNotFoundError("engine ray needs ray: pip install 'msflow-ext[ray]'")

    def run(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Outcome, None, None]:
        with session(address) as ray:
            _check_room(ray, address, {"CPU": cpus, "GPU": gpus})
            remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_on_worker)
            folder, waiting, running = os.getcwd(), iter(tasks), {}
            try:
                while True:
                    for task in islice(waiting, (at_once or QUEUE) - len(running)):
                        running[remote.remote(work, task, folder, cpus)] = task
                    if not running:
                        return
                    (ready,), _ = ray.wait(list(running), num_returns=1)
                    yield running.pop(ready), *_result(ray, ready)
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

    return run


@contextmanager
def session(address: str | None = None) -> Iterator[Any]:
    """Connect to Ray and yield its module. Processes that are started here end with the block."""
    # Turn off usage reports, and advice about variables that this package does not set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if (
        address is None and "ray" not in sys.modules
    ):  # which reads these variables when it is imported
        # Ray listens on all interfaces and runs any task it receives, so accept tasks of this process only.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if address is None and ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        local = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        ray.init("local", **quiet, **local)
    else:
        _check_address(address)
        ray.init(address, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise a ConnectionError if no cluster answers, checked in a process that a timeout can stop."""
    command = [sys.executable, "-c", _CONNECT, address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CONNECT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        reason = f"no cluster answered within {CONNECT_SECONDS:.0f} seconds"
        raise ConnectionError(f"--address {address}: {reason}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["Ray exited without a message"])[-1]
        raise ConnectionError(f"--address {address}: {last}")


def _check_room(ray: Any, address: str | None, required: dict[str, float]) -> None:
    """Raise a ValueError if no machine has room for a task. For a cluster, which may grow, warn."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(n, 0) >= count for n, count in required.items()) for node in nodes):
        return
    most = {name: max(node.get(name, 0) for node in nodes) for name in required}
    texts = (
        ", ".join(f"{each.get(name, 0):g} {name}s" for name in required)
        for each in (required, most)
    )
    sentence = "a task needs {} (--cpus-per-task, --gpus-per-task), but the largest machine has {}"
    if address is None:
        raise ValueError(sentence.format(*texts))
    log.warning("%s: tasks wait for a larger machine", sentence.format(*texts))


def _on_worker(work: Callable[[Any], Any], task: Any, folder: str, threads: int) -> Any:
    os.chdir(folder)
    torch.set_num_threads(threads)
    return work(task)


def _result(ray: Any, reference: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(reference), None
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, Exception):
            return None, TaskLost(str(error))
        error.cause.__cause__ = error  # which holds the traceback as text
        return None, error.cause
    except ray.exceptions.WorkerCrashedError:
        return None, TaskLost(f"its worker died {RETRIES + 1} times")
    except ray.exceptions.RayError as error:
        return None, TaskLost(f"Ray gave up the task: {str(error).strip().splitlines()[0]}")
