"""Several processes train the same model as one, and none waits for another that has ended."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from msflow_ext import cli
from msflow_ext.distributed import launch
from msflow_ext.distributed.ranks import Ranks, even_shares
from msflow_ext.runs.checkpoint import read_checkpoint
from msflow_ext.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).with_name("training_together.py")
CASES = ("uneven", "often-empty", "always-empty", "standardized")
TIMEOUT = 240.0  # seconds; a few are enough on a quiet machine


@pytest.fixture(scope="module")
def script() -> Any:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory) -> Path:
    """Train in one process, in ``single``, and in two, in ``pair``; tests must not write to the folder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "single").mkdir()
    (folder / "pair").mkdir()
    script.run_all(folder / "single", Ranks())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    pair = [
        subprocess.Popen(
            [*command, str(rank), "2"],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in pair:
        _, stderr = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, stderr
    return folder


def assert_same(run: Path, other: Path, relative: float = 1e-10) -> None:
    """Assert that parameters, scores and metrics differ by rounding only."""
    (state, found), (_, expected) = (read_checkpoint(r / "model.safetensors") for r in (run, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            scale = float(tensor.abs().max()) or 1.0
            error = float((found[name] - tensor).abs().max()) / scale
            assert error <= relative, (name, error)
    one, two = (json.loads((r / "metrics.json").read_text()) for r in (run, other))
    assert one["losses"] == pytest.approx(two["losses"], rel=relative)
    for part in ("evaluations", "baseline", "decisions"):
        assert flat(one.get(part)) == pytest.approx(flat(two.get(part)), rel=1e-6)
    rows, others = ((r / "scores.csv").read_text().splitlines() for r in (run, other))
    assert len(rows) == len(others) == 1 + 5
    for row, other_row in zip(rows[1:], others[1:], strict=True):
        assert row.split(",")[:3] == other_row.split(",")[:3]
        score = pytest.approx(float(other_row.split(",")[3]), rel=max(relative, 1e-7))
        assert float(row.split(",")[3]) == score
    assert state["epoch"] == len(one["losses"])
    assert {p.name for p in run.rglob("*")} == {p.name for p in other.rglob("*")}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return all numbers in nested dictionaries and lists, by their paths."""
    if not isinstance(value, dict | list):
        return {name: -1 if value is None else value} if not isinstance(value, str) else {}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in parts for k, v in flat(part, f"{name}.{key}").items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_same_model_as_one(folder, script, case):
    assert set(CASES) == set(script.CASES)
    exact = 1e-5 if case == "standardized" else 1e-10  # its statistics are kept in float32
    assert_same(folder / "pair" / case, folder / "single" / case, exact)


def test_one_process_resumes_an_interrupted_run_of_two(folder, script, tmp_path):
    shutil.copytree(folder / "pair" / "interrupted", tmp_path / "interrupted")
    assert read_checkpoint(tmp_path / "interrupted/uneven/model.safetensors")[0]["epoch"] == 2
    (tmp_path / "interrupted/uneven/features-training-1.cache").touch()  # as after kill -9
    script.run_case("uneven", tmp_path / "interrupted", Ranks(), resume=True)
    assert_resumed(tmp_path / "interrupted/uneven", folder / "single/uneven")


def test_two_processes_resume_an_interrupted_run_of_one(folder):
    assert_resumed(folder / "pair/resumed/uneven", folder / "single/uneven")


def assert_resumed(run: Path, other: Path) -> None:
    (_, found), (_, expected) = (read_checkpoint(r / "model.safetensors") for r in (run, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)
    one, two = (json.loads((r / "metrics.json").read_text()) for r in (run, other))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-10)
    assert not list(run.glob("*.cache"))


def test_an_error_in_one_process_stops_both_with_its_message(folder):
    first, second = (
        json.loads((folder / "pair" / f"failures-{rank}.json").read_text()) for rank in range(2)
    )
    single = json.loads((folder / "single" / "failures-0.json").read_text())
    stopped = first["infinite_loss"]
    assert stopped.startswith(
        "TrainingDiverged: training stopped in epoch 2: the loss is inf in step 1"
    )
    assert stopped == single["infinite_loss"].replace("/single/", "/pair/")
    assert second["infinite_loss"] == stopped.replace(
        "TrainingDiverged: ", "ProcessFailed: process 0 of 2: "
    )
    assert "broken.png is empty" in second["broken_image"]
    assert second["broken_image"].startswith("ValueError: ")
    assert first["broken_image"].startswith("ProcessFailed: process 1 of 2: ")
    assert (
        "data must be the same on all processes, got train 7 on the first and train 6 on process 1"
        in second["other_data"]
    )
    assert (
        first["too_few"] == "ValueError: processes must not outnumber the 1 training images, got 2"
    )
    assert not list((folder / "pair").rglob("*.cache"))


def test_a_single_process_exchanges_and_changes_nothing():
    ranks, loss = Ranks(), torch.ones(())
    parameter = nn.Parameter(torch.ones(2))
    assert ranks.average([parameter], loss, 3) is loss
    assert parameter.grad is None
    assert ranks.total(loss) is loss
    assert ranks.broadcast(parameter) is parameter
    with pytest.raises(KeyError), ranks.agreed():
        raise KeyError


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_shares_of_a_batch_are_even_and_complete(size):
    owners = torch.tensor([4, 1, 3, 8, 6, 0, 2, 12]) % size
    shares = even_shares(owners, size)
    assert sorted(torch.cat(shares).tolist()) == list(range(8))
    assert max(map(len, shares)) == -(-8 // size)
    own = sum(int((owners[places] == rank).sum()) for rank, places in enumerate(shares))
    most = -(-8 // size)
    assert own == sum(min(most, int((owners == rank).sum())) for rank in range(size))
    assert sorted(torch.cat([Ranks(r, size).own(8) for r in range(size)]).tolist()) == list(
        range(8)
    )


def test_parts_of_a_batch_have_the_noise_of_the_whole_batch():
    recipe, whole = Recipe(noise=0.5), torch.zeros(3, 2, 4, 4)
    ((expected,),) = recipe.disturbed(0, [[whole]])
    for places in (torch.tensor([2]), torch.tensor([0, 1])):
        ((part,),) = recipe.disturbed(0, [[whole[places]]], [(places, 3)])
        assert torch.equal(part, expected[places])


# ---- the command line ----


@pytest.fixture(scope="module")
def plates(tmp_path_factory) -> Path:
    """Write a category ``plate`` in the layout of MVTec AD, with one defective image."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [f"train/good/{i}" for i in range(5)] + ["test/good/0", "test/hole/0"]
    for name in (*names, "ground_truth/hole/0_mask"):
        path = root / "plate" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(90, 110, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels // 100 * 255 if "mask" in name else pixels).save(path)
    return root


def command(plates: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(plates), "--layout", "mvtec", "--category", "plate"]
    small = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--blocks", "1", "1", "1"]
    device = ["--device", "cpu", "--threads", "1"]
    return ["train", *data, *small, *device, "--batch-size", "2", "--out", str(out), *more]


def start(arguments: list[str], cwd: Path, *launcher: str) -> subprocess.Popen[str]:
    launcher = launcher or (sys.executable, "-m", "msflow_ext")
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_devices_trains_in_that_many_processes_and_one_reports(plates, tmp_path):
    process = start(command(plates, tmp_path / "run", "--epochs", "1", "--devices", "2"), tmp_path)
    printed, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, stderr
    assert printed.count("mvtec plate") == 1
    assert stderr.count("features of 5 + 2 images") == stderr.count("report.html") == 1
    assert (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "scores.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("flag", ["--layout", "--category"])  # parsed, and read from the folder
def test_under_torchrun_an_error_of_all_processes_is_printed_once(plates, tmp_path, flag):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "msflow_ext"]
    wrong = command(plates, tmp_path / "run", "--epochs", "1", flag, "nonsense")
    _, stderr = (process := start(wrong, tmp_path, *launcher)).communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert stderr.count("msflow: error: ") == stderr.count("got 'nonsense'") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are found by /proc")
def test_no_thread_of_gloo_outlives_its_process_group(tmp_path):
    """A thread that releases a tensor while the interpreter ends would abort the process."""
    lines = (
        "import atexit, os",
        "threads = lambda: [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]",
        "atexit.register(lambda: print(sum('gloo' in name for name in threads())))",  # runs last
        "from msflow_ext.distributed.ranks import join",
        "join()",
        "print(sum('gloo' in name for name in threads()))",
        "import torchvision",  # as backbones do
    )
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={**os.environ, **one},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    before, after = map(int, ended.stdout.split())
    assert before > 0 == after == ended.returncode, ended.stderr


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by /proc")
def test_a_killed_process_is_named_and_the_others_are_stopped(plates, tmp_path):
    run = tmp_path / "run"
    process = start(command(plates, run, "--epochs", "100000", "--devices", "2"), tmp_path)
    try:
        wait_until(lambda: (run / "model.safetensors").exists() or process.poll() is not None)
        ranks = {rank_of(child): child for child in children(process.pid)}
        began = time.monotonic()
        os.kill(ranks["1"], signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert time.monotonic() - began < 60
    assert process.returncode == 2
    assert "msflow: error: process 1 of 2 was ended by SIGKILL" in stderr
    wait_until(lambda: not Path(f"/proc/{ranks['0']}").exists())
    assert read_checkpoint(run / "model.safetensors")[0]["epoch"] > 0


def test_a_process_reports_that_the_others_have_ended(tmp_path):
    """No launcher stops the process here, as under some schedulers."""
    lines = (
        "import sys, torch, torch.distributed as dist; from msflow_ext.distributed.ranks import join",
        "store, rank = sys.argv[1:]",
        "dist.init_process_group('gloo', init_method=f'file://{store}', rank=int(rank), world_size=2)",
        "ranks = join(); print('met', flush=True)",
        "while True: ranks.total(torch.ones(1))",
    )
    program = [sys.executable, "-c", "\n".join(lines), str(tmp_path / "store")]
    one, other = (start([rank], tmp_path, *program) for rank in "01")
    try:
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "met\n"
        other.kill()
        _, stderr = one.communicate(timeout=TIMEOUT)
    finally:
        for process in (one, other):
            process.kill()
            process.communicate()
    assert (
        "ConnectionError: process 0 of 2 has lost its connection: another process has ended"
        in stderr
    )


def wait_until(fulfilled: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text().split()]


def rank_of(process: int) -> str | None:
    pairs = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((pair[5:] for pair in pairs if pair.startswith("RANK=")), None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--devices", "0"], "--devices must be a whole number of 1 or more, got '0'"),
        (["--num-nodes", "-1"], "--num-nodes must be a whole number of 1 or more, got '-1'"),
        (["--num-nodes", "2"], "--num-nodes 2 needs --rendezvous HOST:PORT"),
        (["--rendezvous", "here:1"], "--rendezvous needs --num-nodes, the number of machines"),
        (
            ["--devices", "2", "--device", "cuda:0"],
            "--device must not be a single GPU for 2 processes, got cuda:0",
        ),
    ],
)
def test_contradicting_flags_are_refused(plates, tmp_path, capsys, flags, sentence):
    assert cli.main(command(plates, tmp_path / "run", *flags)) == 2
    assert capsys.readouterr().err.startswith(f"msflow: error: {sentence}")
    assert not (tmp_path / "run").exists()


def test_more_devices_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.processes_to_start(2, None, None, None) == 2
    with pytest.raises(
        ValueError, match=r"--devices must be at most 2, the number of GPUs .*, got 3"
    ):
        launch.processes_to_start(3, None, None, "cuda")
    assert launch.processes_to_start(3, None, None, "cpu") == 3
    assert launch.processes_to_start(None, None, None, None) == 0


def test_flags_that_contradict_torchrun_are_refused(monkeypatch):
    addresses = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    numbers = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (addresses | numbers).items():
        monkeypatch.setenv(name, value)
    assert launch.processes_to_start(2, 2, None, "cpu") == 0
    with pytest.raises(
        ValueError, match=r"--devices must be 2, as torchrun started 2 processes on each .*, got 3"
    ):
        launch.processes_to_start(3, None, None, "cpu")
    with pytest.raises(
        ValueError, match="--num-nodes must be 2, as torchrun started 2 machines, got 3"
    ):
        launch.processes_to_start(None, 3, None, "cpu")
