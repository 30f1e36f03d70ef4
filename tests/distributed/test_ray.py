"""On Ray, trainings and bulk scores equal those of one process, even if workers are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext import cli
from msflow_ext.distributed import executors
from msflow_ext.inference.archive import job
from msflow_ext.inference.archive.parquet import Store
from msflow_ext.runs.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed"),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="workers are found in /proc"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start one Ray for all these tests: commands use a running one."""
    with pytest.MonkeyPatch.context() as patch:
        # Workers import from the folder where Ray starts: beside the sources, these would hide the installed package.
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with executors.session() as module:
            yield module


@contextmanager
def killing(count: int) -> Iterator[list[int]]:
    """Kill ``count`` workers with SIGKILL, each as soon as it runs a task; yield their process ids."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while len(killed) < count and not done.wait(0.01):
            for pid in working():
                if pid not in killed and len(killed) < count:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def working() -> list[int]:
    """Return the ids of the workers of this process's Ray that run a task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"ray::_on_worker" in (folder / "cmdline").read_bytes():
                raylet = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                driver = Path("/proc", raylet, "stat").read_text().rpartition(")")[2].split()[1]
                found += [int(folder.name)] * (int(driver) == os.getpid())
    return found


def outcomes(work: Callable[[Any], Any], count: int, **options: Any) -> dict[int, Any]:
    found = executors.on_ray(**options)(work, range(count))
    return {task: (result, error) for task, result, error in found}


def test_a_task_returns_its_result_or_error_and_runs_in_the_working_folder(
    ray, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def work(task: int) -> tuple[int, str, int]:
        if task == 1:
            raise OSError(28, "No space left on device", "a/b")

        return task, os.getcwd(), torch.get_num_threads()

    found = outcomes(work, 3, at_once=2)
    assert found[2] == ((2, str(tmp_path), 1), None)
    result, error = found[1]
    assert result is None
    assert isinstance(error, OSError) and error.errno == 28
    assert "in work" in str(error.__cause__)  # the worker's traceback


def test_a_task_whose_worker_dies_is_repeated_a_few_times(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "RETRIES", 2)
    monkeypatch.chdir(tmp_path)

    def work(task: int) -> int:
        attempts = len(list(Path().glob(f"{task}-*")))
        Path(f"{task}-{attempts}").touch()
        if task == 0 or (task == 1 and attempts < 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    found = outcomes(work, 3)
    assert [found[task] for task in (1, 2)] == [(1, None), (2, None)]
    assert isinstance(found[0][1], executors.TaskLost)
    assert str(found[0][1]) == "its worker died 3 times"


def test_a_task_that_needs_more_than_the_machine_is_refused(ray):
    with pytest.raises(ValueError, match=r"a task needs 4096 CPUs, 0 GPUs \(--cpus-per-task"):
        outcomes(str, 1, cpus=4096)


def test_an_address_without_a_cluster_is_refused_within_the_timeout(ray, monkeypatch):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 3.0)
    began = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"--address 127\.0\.0\.1:1: no cluster answered within 3 s"
    ):
        outcomes(str, 1, address="127.0.0.1:1")
    assert time.monotonic() - began < 30


# ---- bulk scores ----


@pytest.fixture(scope="module")
def run(untrained_run) -> Path:
    return untrained_run()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(60):
        image = np.random.default_rng(i).integers(0, 255, (48, 80), np.uint8)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    (folder / "010.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def predict(run: Path, photos: Path, out: Path, *more: str) -> list[str]:
    chosen = ["predict", "--run", str(run), str(photos), "--out", str(out), "--threads", "1"]
    return [*chosen, "--device", "cpu", "--shard-size", "5", "--maps", "array", *more]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_bulk_scores_are_the_same_files_when_workers_are_killed(ray, run, photos, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    assert cli.main(predict(run, photos, tmp_path / "here", "--engine", "local")) == 1
    with killing(2) as killed:
        status = cli.main(predict(run, photos, tmp_path / "there", "--engine", "ray"))
    assert status == 1
    assert "010.png is not an image" in capsys.readouterr().err
    assert len(killed) == 2
    assert len(written(tmp_path / "here")) == 2 + 60 / 5
    assert written(tmp_path / "there") == written(tmp_path / "here")


@pytest.mark.slow
def test_a_worker_may_die_before_and_after_a_shard_gets_its_name(ray, run, photos, tmp_path):
    pytest.importorskip("pyarrow")

    def dying(work: Callable[[Any], Any], tasks: Any) -> Any:
        def once(shard: Any) -> Any:
            mark = tmp_path / f"mark-{shard.number}"
            first = not mark.exists()
            mark.touch()
            if first and shard.number == 1:
                Store._sync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
            result = work(shard)
            if first and shard.number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return executors.on_ray()(once, tasks)

    options: dict[str, Any] = {"shard_size": 12, "device": "cpu", "threads": 1}
    for name, engine in (("here", executors.one_by_one), ("there", dying)):
        wrong = job.prepare(run, photos, tmp_path / name, **options).score(engine)
        assert [Path(path).name for path, _ in wrong] == ["010.png"]
    assert len(written(tmp_path / "there")) == 2 + 60 / 12
    assert written(tmp_path / "there") == written(tmp_path / "here")


@pytest.mark.slow
def test_the_command_starts_ray_and_leaves_no_process(run, photos, tmp_path):
    pytest.importorskip("pyarrow")
    mark = uuid4().hex
    command = [sys.executable, "-m", "msflow_ext", *predict(run, photos, tmp_path / "out")]
    done = subprocess.run(
        [*command, "--engine", "ray", "--tasks-at-once", "1"],
        cwd=tmp_path,  # beside the sources, these would hide the installed package
        env={**os.environ, "MSFLOW_TEST_MARK": mark},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == f"60 images: {tmp_path / 'out'}\n"
    assert "010.png is not an image" in done.stderr
    assert done.stderr.splitlines()[-1] == "1 of 60 have no score, see column error"
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                left.append((process / "cmdline").read_bytes())
    assert not left


# ---- trainings ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write three categories in the layout of MVTec AD, one with a damaged image."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i, name in enumerate(["train/good"] * 4 + ["test/good"] * 2 + ["test/square"] * 2):
        pixels = rng.integers(90, 110, (64, 64), dtype=np.uint8)
        mask = np.zeros((64, 64), bool)
        mask[8:32, 16:40] = name == "test/square"
        pixels[mask] = 255
        places = {f"plate/{name}/{i}.png": pixels}
        places |= {f"plate/ground_truth/square/{i}_mask.png": mask} if mask.any() else {}
        for place, content in places.items():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / place)
    shutil.copytree(root / "plate", root / "cup")
    shutil.copytree(root / "plate", root / "bowl")
    broken = root / "bowl/train/good/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return root


def results(out: Path, category: str) -> dict[str, Any]:
    """Return everything in a run that must not depend on where it was trained."""
    header, tensors = read_checkpoint(out / category / "model.safetensors")
    metrics = json.loads((out / category / "metrics.json").read_text())
    del header["seconds"], metrics["seconds"]
    bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    scores = (out / category / "scores.csv").read_bytes()
    return {"header": header, "bits": bits, "metrics": metrics, "scores": scores}


@pytest.mark.slow
def test_trainings_on_ray_and_in_one_process_agree_bit_for_bit(ray, data, tmp_path, capsys):

    def train(engine: str, *more: str) -> list[str]:
        chosen = ["train", "--data", str(data), "--layout", "mvtec", "--category", "all"]
        chosen += ["--backbone", "efficientnet_lite0", "--image-size", "64", "--device", "cpu"]
        chosen += ["--epochs", "3", "--eval-every", "1", "--threads", "1", "--engine", engine]
        return [*chosen, "--out", str(tmp_path / engine), *more]

    assert cli.main(train("local")) == 2
    one_by_one = capsys.readouterr()
    with killing(2) as killed:
        assert cli.main(train("ray")) == 2
    assert len(killed) == 2
    at_once = capsys.readouterr()
    for printed, engine in ((one_by_one, "local"), (at_once, "ray")):
        last = printed.err.splitlines()[-1]
        assert f"1 of 3 runs failed; the first is {tmp_path / engine}/bowl: " in last
        assert "0.png" in last
    lines = [p.out.splitlines()[-5:-1] for p in (one_by_one, at_once)]
    assert lines[0] == lines[1]
    assert (tmp_path / "ray/table.csv").read_bytes() == (tmp_path / "local/table.csv").read_bytes()
    for category in ("cup", "plate"):
        assert results(tmp_path / "ray", category) == results(tmp_path / "local", category)
    assert cli.main(train("ray")) == 2
    assert "--resume continues" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray/cup").rglob("*")}
    assert cli.main(train("ray", "--resume")) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_engine_ray_is_refused_for_a_single_training(data, tmp_path, capsys):
    chosen = ["train", "--data", str(data), "--layout", "mvtec", "--category", "cup"]
    assert cli.main([*chosen, "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "--engine must be local for a single training, got ray" in capsys.readouterr().err
