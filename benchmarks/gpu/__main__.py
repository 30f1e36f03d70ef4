"""Check and measure the kernels and models on a GPU, in ten minutes by default: `python -m benchmarks.gpu`.

The steps, in this order:

* build the kernels for this device and compare them with their references;
* measure the device's copy bandwidth and matmul rate, and each kernel beside a copy of as many bytes;
* measure norm, aggregation, the flows' training step and inference, compared with eager PyTorch, AMP, torch.compile and
  FrEIA's blocks;
* run the CUDA tests and compute-sanitizer.

Each step writes its result to `results/gpu-<device>-<date>.json` when it ends. A run with `--file` resumes that file, and
repeats only the build and the steps that failed. At the end, the results are written into docs/benchmarks.md.
`--file FILE --report` does this without a GPU.
"""

# Import the package only after the step `build`, because it loads the kernels that exist at import.

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu import speed

ROOT = Path(__file__).parents[2]
Measured = dict[str, Any]

# Compare the kernels with their references, only on the GPU, and without the command line, which needs more packages.
CHECK = """
import itertools, torch
from msflow_ext import testing
testing._devices, cases = lambda: [torch.device("cuda")], testing._cases
testing._cases = lambda cuda: itertools.islice(cases(cuda), 0, None, {every})
rows = testing.check()
wrong = [row for row in rows if not row[1] <= row[2]]
print(f"{{len(rows) - len(wrong)}} of {{len(rows)}} agree", *wrong)
raise SystemExit(bool(wrong))
"""
OURS = ("--kernel-name", "kns=msflow")  # check kernels with this part in their mangled names
SANITIZERS: Mapping[str, Sequence[str]] = {
    "memcheck": OURS,
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),  # all kernels, because torch's kernels write what ours read
}
LONGEST = 150  # seconds that the tests, or a tool of the sanitizer, may take


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.report:
        if options.file is None:
            parser().error("--file must be given with --report")
        _report(results.read(options.file))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    today = datetime.now(UTC).date().isoformat()
    file = options.file or results.FOLDER / f"gpu-{results.slug(name)}-{today}.json"
    document: Measured = {"device": name, "date": today}
    if file.exists():
        document = results.read(file)
    measure(document, file, options.steps or list(STEPS), 60 * options.minutes)
    _report(document)
    return int(any("error" in document.get(step, {}) for step in STEPS))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--file", type=Path, help="File of results to resume (default: in benchmarks/results).")
    add("--steps", nargs="*", choices=list(STEPS), help="Steps to run (default: all).")
    add("--minutes", type=float, default=10.0, help="Minutes after which no step begins.")
    text = "Write the results of --file into docs/benchmarks.md, and measure nothing."
    add("--report", action="store_true", help=text)
    return found


def measure(document: Measured, file: Path, steps: Sequence[str], seconds: float) -> None:
    """Run the steps that have no result yet, and write the document after each of them."""
    end = time.monotonic() + seconds
    for step in steps:
        if step != "build" and "error" not in document.get(step, {"error": "not run"}):
            continue
        if "error" in document.get("build", {}) and step != "build":
            break  # without kernels, the reference would be measured
        if time.monotonic() > end:
            print(f"{step}: no time left; resume with --file {file}")
            continue
        start = time.monotonic()
        try:
            document[step] = STEPS[step](document)
        except Exception as error:  # a step that fails must not stop the others
            document[step] = {"error": f"{type(error).__name__}: {error}"}
        document[step]["seconds"] = round(time.monotonic() - start, 1)
        results.write(file, document)
        print(step, json.dumps(document[step])[:2000], flush=True)


def build(_: Measured) -> Measured:
    major, minor = torch.cuda.get_device_capability()
    folder = ROOT / "build" / f"gpu-{major}{minor}"
    pybind11 = _output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    options = ("-DMSFLOW_EXT_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}")
    found = (f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_PREFIX_PATH={pybind11}")
    _output("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options, *found)
    _output("cmake", "--build", str(folder))
    for built in folder.glob("_C*"):
        shutil.copy(built, ROOT / "msflow_ext" / "ops")
    (compiler,) = folder.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
    nvcc = re.findall(r'CUDA_COMPILER_VERSION "(.+)"', compiler.read_text())
    versions = {
        "torch": torch.__version__,
        "cuDNN": torch.backends.cudnn.version(),
        "nvcc": nvcc[0],
    }
    return {"capability": f"{major}.{minor}", "versions": versions}


def check(_: Measured) -> Measured:
    return {"result": _output(sys.executable, "-c", CHECK.format(every=1)).strip()}


def tests(_: Measured) -> Measured:
    places = ("tests/ops", "tests/inference/test_cuda_graphs.py", "tests/models/test_backbone.py")
    # Warnings of other versions of packages must not fail. With pytest-xdist, eight processes share the device.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-k", "cuda or gpu or replay"]
    options += ["-n", "8"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *options, *places]
    found = _ended(command)
    if found is None:
        return {"error": f"stopped after {LONGEST} s"}
    lines = found.stdout.strip().splitlines()
    if found.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"error": (lines or [found.stderr[-1500:]])[-1], "failed": failed[:100]}
    return {"result": lines[-1]}


def sanitize(tool: str, _: Measured) -> Measured:
    """Run the comparison of the kernels under a tool of compute-sanitizer, and return its findings."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        raise FileNotFoundError("compute-sanitizer must be in PATH or in /usr/local/cuda/bin")
    which = SANITIZERS[tool]
    every = 5 if which else 20  # checking torch's kernels too takes longest
    check_some = [sys.executable, "-c", CHECK.format(every=every)]
    command = [program, "--tool", tool, *which, "--error-exitcode", "9", *check_some]
    found = _ended(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if found is None:
        return {"error": f"stopped after {LONGEST} s"}
    return {"error": found.stdout[-1500:]} if found.returncode else {"result": "clean"}


def _timed(step: Callable[[Measured], Measured]) -> Callable[[Measured], Measured]:
    """Return the step, which fails if kernels for this device are missing, so that no reference is timed."""

    @wraps(step)
    def run(document: Measured) -> Measured:
        from msflow_ext.ops import _backend

        problem = _backend.cuda_problem(torch.cuda.current_device())
        if problem is not None:
            raise RuntimeError(problem)
        return step(document)

    return run


TIMED = (
    speed.kernels,
    speed.norm,
    speed.aggregation,
    speed.training,
    speed.inference,
)
STEPS: Mapping[str, Callable[[Measured], Measured]] = {
    **{step.__name__: step for step in (build, check, speed.ceilings, *map(_timed, TIMED), tests)},
    **{tool: partial(sanitize, tool) for tool in SANITIZERS},
}


def _report(document: Measured) -> None:
    from benchmarks.gpu import report

    report.write(document)


def _ended(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command, and return its status and output, or None if it takes too long."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        # Kill its child processes too, because they would slow down the next step.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
