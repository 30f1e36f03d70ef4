"""Everything that only a GPU can show, by one command, ten minutes by default: `python -m benchmarks.gpu`. Not run on a GPU yet.

Builds the kernels for this device, checks them against their references, measures the device's copy bandwidth and matmul
rate, the kernels beside a copy of as many bytes, then norm, aggregation, the flows' training step and inference against
eager PyTorch, AMP, torch.compile and FrEIA's blocks; at last the CUDA tests and compute-sanitizer. Each step is written
to `results/<device>-<date>.json` as it ends; started again with `--file`, what is there is not repeated, but for the build.
At the end the README says what was found; `--file FILE --report` does that again, anywhere.
"""

# gpu_report imports the package, and with it the kernels that it finds: only after the step `build`.

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
from datetime import datetime, timezone
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_speed

ROOT = Path(__file__).parents[1]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="results to go on with")
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), help="all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="no step begins after them")
    parser.add_argument("--report", action="store_true", help="only write --file into the README")
    options = parser.parse_args(arguments)
    if options.report and options.file is None:
        parser.error("--report needs --file")
    if options.report:
        _report(json.loads(options.file.read_text()))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    today = datetime.now(timezone.utc).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = options.file or ROOT / "benchmarks" / "results" / f"{slug}-{today}.json"
    document: Measured = (
        json.loads(file.read_text()) if file.exists() else {"device": name, "date": today}
    )
    end = time.monotonic() + 60 * options.minutes
    for step in options.steps or STEPS:
        if step != "build" and "error" not in document.get(step, {"error": "not run"}):
            continue
        if "error" in document.get("build", {}) and step != "build":
            break  # or the reference would be measured
        if time.monotonic() > end:
            print(f"{step}: no time left; go on with --file {file}")
            continue
        start = time.monotonic()
        try:
            document[step] = STEPS[step](document)
        except Exception as error:  # one step that fails must not cost the others
            document[step] = {"error": f"{type(error).__name__}: {error}"}
        document[step]["seconds"] = round(time.monotonic() - start, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(step, json.dumps(document[step])[:2000], flush=True)
    _report(document)
    return int(any("error" in document.get(step, {}) for step in STEPS))


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
    """What one of compute-sanitizer's tools says of the kernels' check."""
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
    """The step, if kernels for this device were built: never the reference's times."""

    @wraps(step)
    def run(document: Measured) -> Measured:
        from msflow_ext.ops import _backend

        problem = _backend.cuda_problem(torch.cuda.current_device())
        if problem is not None:
            raise RuntimeError(problem)
        return step(document)

    return run


TIMED = (
    gpu_speed.kernels,
    gpu_speed.norm,
    gpu_speed.aggregation,
    gpu_speed.training,
    gpu_speed.inference,
)
STEPS: Mapping[str, Callable[[Measured], Measured]] = {
    **{
        step.__name__: step
        for step in (build, check, gpu_speed.ceilings, *map(_timed, TIMED), tests)
    },
    **{tool: partial(sanitize, tool) for tool in SANITIZERS},
}


def _report(document: Measured) -> None:
    from benchmarks import gpu_report

    gpu_report.write(document)


def _ended(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str] | None:
    """What a command said; None if it takes too long."""
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
