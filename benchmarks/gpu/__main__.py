"""Check and measure on a GPU by one command, in ten minutes by default: `python -m benchmarks.gpu`.

The steps, in this order:

* build the kernels for this device and check them against their references;
* measure the device's copy bandwidth and matmul rate, and each kernel beside a copy of as many bytes;
* measure norm, aggregation, the flows' training step and inference, compared with eager PyTorch, AMP, torch.compile and
  FrEIA's blocks;
* run the CUDA tests and compute-sanitizer.

Each step writes its result to `results/gpu-<device>-<date>.json` when it ends. A run with `--file` continues that file and
repeats only the build and steps that failed. At the end the results go into docs/benchmarks.md; `--file FILE --report` repeats
this without a GPU.
"""

# The package is imported only after the step `build`: it loads the kernels that it finds.

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

# Every kernel against its reference on the GPU alone; without the command line, whose parser a machine may lack.
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
OURS = ("--kernel-name", "kns=msflow")  # what the sanitizer looks at, by a part of the mangled name
SANITIZERS: Mapping[str, Sequence[str]] = {
    "memcheck": OURS,
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),  # at all kernels: torch's write what ours read
}
LONGEST = 150  # seconds of the tests, and of each of the sanitizer's tools


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.report:
        if options.file is None:
            parser().error("--report needs --file")
        _report(results.read(options.file))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
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
    add("--file", type=Path, help="file of results to continue (default: in benchmarks/results)")
    add("--steps", nargs="*", choices=list(STEPS), help="steps to run (default: all)")
    add("--minutes", type=float, default=10.0, help="no step begins after so many minutes")
    add(
        "--report",
        action="store_true",
        help="only write the results of --file into docs/benchmarks.md",
    )
    return found


def measure(document: Measured, file: Path, steps: Sequence[str], seconds: float) -> None:
    """Run the steps that have no result yet, and write the document after each of them."""
    end = time.monotonic() + seconds
    for step in steps:
        if step != "build" and "error" not in document.get(step, {"error": "not run"}):
            continue
        if "error" in document.get("build", {}) and step != "build":
            break  # or the reference would be measured
        if time.monotonic() > end:
            print(f"{step}: no time left; continue with --file {file}")
            continue
        start = time.monotonic()
        try:
            document[step] = STEPS[step](document)
        except Exception as error:  # one step that fails must not cost the others
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
    # Other versions of other packages may warn; eight processes share the device where pytest-xdist is installed.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-k", "cuda or gpu or replay"]
    options += ["-n", "8"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *options, *places]
    found = _ended(command)
    if found is None:
        return {"error": f"not ended after {LONGEST} s"}
    lines = found.stdout.strip().splitlines()
    if found.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"error": (lines or [found.stderr[-1500:]])[-1], "failed": failed[:100]}
    return {"result": lines[-1]}


def sanitize(tool: str, _: Measured) -> Measured:
    """Return what one of compute-sanitizer's tools says of the kernels' check."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        raise FileNotFoundError("no compute-sanitizer on the path, nor in /usr/local/cuda/bin")
    which = SANITIZERS[tool]
    every = 5 if which else 20  # to look at all kernels takes longest
    check_some = [sys.executable, "-c", CHECK.format(every=every)]
    command = [program, "--tool", tool, *which, "--error-exitcode", "9", *check_some]
    found = _ended(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if found is None:
        return {"error": f"not ended after {LONGEST} s"}
    return {"error": found.stdout[-1500:]} if found.returncode else {"result": "clean"}


def _timed(step: Callable[[Measured], Measured]) -> Callable[[Measured], Measured]:
    """Return the step, if kernels for this device were built: never the reference's times."""

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
    """Return what a command said; None if it takes too long."""
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
        # With what it has started, which would slow the next.
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
