"""Python threads and processes: they may share a model, run beside a kernel, fork after one, and exit during one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from msflow_ext import MSFlow, ops
from msflow_ext.data import Images, Item
from msflow_ext.ops import _backend

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_in_many_threads_gives_bit_identical_results(each_backend: str) -> None:
    options = {"pretrained": False, "blocks": (1, 1, 1), "cond_channels": 8, "seed": 1}
    model = MSFlow("test_efficientnet", image_size=64, **options).eval()
    images = torch.rand(6, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def score(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            found = model(batch)
        return found.score, found.anomaly_map

    expected = [score(batch) for batch in images]

    def score_in_thread(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with ops.backend(each_backend):  # of this thread
            return score(batch)

    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            for one, other in zip(pool.map(score_in_thread, images), expected, strict=True):
                assert all(map(torch.equal, one, other))


def test_a_kernel_releases_the_gil(native: None) -> None:
    z = torch.zeros(1, 1, 30_000_000)
    inside: list[float] = []
    running = threading.Event()

    def work() -> None:
        running.set()
        began = time.perf_counter()
        for _ in range(3):
            ops.half_square_norm(z)
        inside.append(time.perf_counter() - began)

    thread = threading.Thread(target=work)
    thread.start()
    running.wait()
    ticks, last, longest = 0, time.perf_counter(), 0.0
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        ticks, last, longest = ticks + 1, now, max(longest, now - last)
    thread.join()
    assert ticks > 3
    assert longest < inside[0] / 2 + 0.02


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader_start_after_a_kernel_ran(context: str) -> None:
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} on this system")
    ops.half_square_norm(torch.ones(4, 8, 64, 64))
    rng = np.random.default_rng(0)
    items = [Item(str(i), 0, "good", rng.integers(0, 255, (8, 8), np.uint8)) for i in range(4)]
    images = Images(items, 8)
    loader = DataLoader(images, 2, num_workers=1, multiprocessing_context=context)
    for batch, first in zip(loader, (0, 2), strict=True):
        assert torch.equal(batch, torch.stack([images[first], images[first + 1]]))


# A daemon thread inside a kernel would abort the exit, as inside torch's own operators, so it is not tested.
EXIT = """
import threading, torch
from msflow_ext import ops
z = torch.zeros(8, 64, 256, 256)
def work():
    for _ in range(20):
        ops.log_likelihood_map(z)
threading.Thread(target=work).start()
raise SystemExit
"""

FORK = """
import os, torch
from msflow_ext import ops
torch.set_num_threads(1)
z = torch.arange(64 * 1024.).view(1, 4, 128, 128).sin()
before = ops.log_likelihood_map(z)
child = os.fork()
same = torch.equal(ops.log_likelihood_map(z), before)
if not child:
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# The share of the work that the calling thread does: all of it with one thread.
THREADS = """
import time, torch
from msflow_ext import ops
shares = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    z = torch.ones(8, 64, 128, 128)
    here, everywhere = time.thread_time(), time.process_time()
    for _ in range(40):
        ops.log_likelihood_map(z)
    shares.append((time.thread_time() - here) / (time.process_time() - everywhere))
raise SystemExit(0 if shares[0] > 0.95 and shares[1] < 0.8 else f"error: shares {shares}")
"""
SCRIPTS = {"exit-during-a-kernel": EXIT, "fork-after-one": FORK, "threads-as-set": THREADS}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_with_threads_or_forks_exits_cleanly(script: str) -> None:
    if "fork" in script and sys.platform == "win32":
        pytest.skip("no fork on this system")
    if script == THREADS and "threads of torch" not in _backend.STATUS:
        pytest.skip(f"kernels {_backend.STATUS}")
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()
