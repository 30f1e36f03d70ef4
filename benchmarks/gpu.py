"""Everything that only a GPU can show, by one command, ten minutes by default: `python -m benchmarks.gpu`. Not run on a GPU yet.

Builds the kernels for this device, checks them against their references, runs the CUDA tests and compute-sanitizer,
measures the device's copy bandwidth and matmul rate, the kernels beside a copy of as many bytes, then norm, aggregation,
the flows' training step and inference against eager PyTorch, AMP, torch.compile and FrEIA's blocks. Each step is written
to `results/<device>-<date>.json` as it ends; started again with `--file`, what is there is not repeated. At the end the
README says what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report, gpu_speed

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="results to go on with")
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), help="all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="no step begins after them")
    options = parser.parse_args(arguments)
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
        if step in document and "error" not in document[step]:
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
    gpu_report.write(document)
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
        shutil.copy(built, ROOT / "msflow_ext")
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
    places = ("tests/ops", "tests/test_graphs.py", "tests/models/test_backbone.py")
    chosen = (*places, "-k", "cuda or gpu or graph or replay")
    said = _output(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    return {"result": said.strip().splitlines()[-1]}


def sanitizer(_: Measured) -> Measured:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        raise FileNotFoundError("no compute-sanitizer on the path, nor in /usr/local/cuda/bin")
    results: Measured = {}
    for kind, which in SANITIZERS.items():
        command = [tool, "--tool", kind, *which, "--error-exitcode", "9"]
        try:
            done = subprocess.run(
                [*command, sys.executable, "-c", CHECK.format(every=5)],
                cwd=ROOT,
                env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            results[kind] = "not ended after 120 s"
        else:
            results[kind] = "clean" if done.returncode == 0 else done.stdout[-1500:]
    if set(results.values()) != {"clean"}:
        results["error"] = "not all clean"
    return results


STEPS: Mapping[str, Callable[[Measured], Measured]] = {
    step.__name__: step
    for step in (
        build,
        check,
        tests,
        gpu_speed.ceilings,
        gpu_speed.kernels,
        gpu_speed.norm,
        gpu_speed.aggregation,
        gpu_speed.training,
        gpu_speed.inference,
        sanitizer,
    )
}


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
