"""Everything that only a GPU can show, in one file, ten minutes by default: `python -m benchmarks.gpu`. Not run on a GPU yet.

Builds the kernels for this device, checks them against their references, runs the CUDA tests and compute-sanitizer,
measures the device's copy bandwidth and matmul rate, then the kernels, the flows' training step and inference against
eager PyTorch, AMP, torch.compile and FrEIA's blocks. Each step is written to `results/<device>-<date>.json` as it ends;
started again with `--file`, what is there is not repeated.
"""

from __future__ import annotations

import argparse
import copy
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
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
CHANNELS, BLOCKS, SIZES = (256, 512, 1024), (2, 5, 8), (64, 32, 16)  # wide_resnet50_2 at 512 px
Measured = dict[str, Any]
Run = Callable[[], Any]


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
    return int(any("error" in document.get(step, {}) for step in STEPS))


# ---- is it right ----


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
    return {"capability": f"{major}.{minor}", "torch": torch.__version__}


def check(_: Measured) -> Measured:
    said = _output(sys.executable, "-m", "msflow_ext", "info", "--check")
    return {"result": said.strip().splitlines()[-1]}


def tests(_: Measured) -> Measured:
    places = ("tests/ops", "tests/test_graphs.py", "tests/models/test_backbone.py")
    chosen = (*places, "-k", "cuda or gpu or graph or replay")
    said = _output(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    return {"result": said.strip().splitlines()[-1]}


def sanitizer(_: Measured) -> Measured:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        return {"skipped": "no compute-sanitizer"}
    code = (
        "import itertools, torch; from msflow_ext import testing as t; "
        "t._devices = lambda: [torch.device('cuda')]; cases = t._cases; "
        "t._cases = lambda cuda: itertools.islice(cases(cuda), 0, None, 5); "
        "assert all(e <= b for _, e, b in t.check())"
    )
    results = {}
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        done = subprocess.run(
            [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        results[kind] = "clean" if done.returncode == 0 else done.stdout[-1500:]
    return results


# ---- how fast is it ----


def ceilings(_: Measured) -> Measured:
    """Copy bandwidth in GB/s, reads and writes counted, and the dense bf16 matmul rate in TFLOP/s."""
    source = torch.empty(2**28, device="cuda")
    copy_ms = _time({"copy": lambda: source.clone()})["copy"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul_ms = _time({"matmul": lambda: a @ a})["matmul"]
    return {
        "copy_gbs": round(2 * source.nbytes / copy_ms / 1e6, 1),
        "matmul_tflops": round(2 * 8192**3 / matmul_ms / 1e9, 1),
    }


def kernels(document: Measured) -> Measured:
    """Each kernel at batch 8: ms, GB/s of the bytes it must move, and that as a share of the copy bandwidth."""
    rows: Measured = {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for c, size in zip(CHANNELS, SIZES, strict=True):
                cases = _kernel_cases(c, size, dtype, layout)
                times = _time({name: run for name, (_, run) in cases.items()})
                for name, (moved, _) in cases.items():
                    gbs = moved / times[name] / 1e6
                    share = gbs / document["ceilings"]["copy_gbs"] if "ceilings" in document else 0
                    key = f"{name} {c}x{size}x{size} {str(dtype)[6:]} {str(layout)[6:]}"
                    rows[key] = {"ms": times[name], "gbs": round(gbs), "share": round(share, 3)}
    return rows


def _kernel_cases(
    c: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, tuple[int, Run]]:
    """Bytes to move and a call, by name."""
    from msflow_ext import ops

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, device="cuda").to(dtype)
        return x.contiguous(memory_format=layout) if x.dim() == 4 else x

    half, hidden = c // 2, c // 2 + 64
    x1, x2, a = (normal(8, d, size, size) for d in (half, half, c))
    scale, offset = torch.rand(c, device="cuda") + 0.5, torch.randn(c, device="cuda")
    vectors = (scale, offset, torch.randperm(c, device="cuda"))
    x, bias_map = normal(8, hidden, size, size), normal(1, hidden, size, size).float()
    weight, bias = torch.randn(hidden, device="cuda"), torch.randn(hidden, device="cuda")
    leaves = [t.detach().requires_grad_() for t in (x1, x2, a)]
    l1, l2, l3 = leaves
    y = ops.affine_coupling(l1, l2, l3, *vectors)
    upstream = [torch.ones_like(t) for t in y]
    n = x1.nbytes
    return {
        "coupling forward": (6 * n, lambda: ops.affine_coupling(x1, x2, a, *vectors)),
        "coupling without log_det": (
            6 * n,
            lambda: ops.affine_coupling(x1, x2, a, *vectors, log_det=False),
        ),
        "coupling likelihood": (
            4 * n,
            lambda: ops.coupling_log_likelihood(x1, x2, a, *vectors),
        ),
        "coupling inverse": (5 * n, lambda: ops.affine_coupling_inverse(x1, x2, a, *vectors)),
        "coupling backward": (
            10 * n,
            lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True),
        ),
        "norm forward": (
            2 * x.nbytes + bias_map.nbytes,
            lambda: ops.channel_norm(x, weight, bias, bias_map),
        ),
        "square sums": (x2.nbytes, lambda: ops.log_likelihood_map(x2)),
    }


def aggregation(_: Measured) -> Measured:
    return {f"batch {batch}": _time(_aggregations(batch)) for batch in (1, 8)}


def _aggregations(batch: int) -> dict[str, Run]:
    from msflow_ext import ops

    maps = [-torch.randn(batch, s, s, device="cuda").square() for s in SIZES]

    def eager() -> Any:
        with ops.backend("reference"):
            return ops.aggregate(maps, 512)

    return {"ours": lambda: ops.aggregate(maps, 512), "eager": eager}


def training(_: Measured) -> Measured:
    """One step of the flows at batch 8: loss, gradients, clipping, Adam."""
    features = _features(8, torch.channels_last)
    runs = {
        f"{name} {mode}": _step(flows, features, mode == "bf16")
        for name, flows in _flows().items()
        for mode in ("fp32", "bf16")
    }
    torch.set_float32_matmul_precision("high")
    runs["compile bf16"] = _step(_flows()["eager"], features, True, compile=True)
    return _ratios(_time(runs), "ours bf16")


def inference(_: Measured) -> Measured:
    """Log-likelihoods from features, batch 1 and 8; the graph holds one stream per scale."""
    return {f"batch {batch}": _inference(batch) for batch in (1, 8)}


def _inference(batch: int) -> Measured:
    import msflow_ext as mx

    features = _features(batch, torch.channels_last)
    flows = {name: f.eval().requires_grad_(False) for name, f in _flows().items()}
    fast = flows.pop("ours").optimize(torch.bfloat16)
    best = torch.compile(flows["eager"].log_likelihood, mode="max-autotune")
    replay = mx.graphed(fast.log_likelihood, features)

    def amp(function: Any) -> Run:
        def run() -> Any:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                return function(features)

        return run

    times = _time(
        {
            **{f"{name} bf16": amp(f.log_likelihood) for name, f in flows.items()},
            "compile max-autotune bf16": amp(best),
            "ours optimized bf16": lambda: fast.log_likelihood(features),
            "ours graph bf16": lambda: replay(features),
        }
    )
    wanted = flows["eager"].log_likelihood(features)
    pairs = zip(replay(features), wanted, strict=True)
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)
    return _ratios(times, "ours graph bf16") | {"error against eager fp32": error}


STEPS: Mapping[str, Callable[[Measured], Measured]] = {
    step.__name__: step
    for step in (
        build,
        check,
        tests,
        ceilings,
        kernels,
        aggregation,
        training,
        inference,
        sanitizer,
    )
}


# ---- helpers ----


def _time(runs: Mapping[str, Run], rounds: int = 21, seconds: float = 0.01) -> dict[str, float]:
    """Median ms of each, measured in turn, round by round; a sample is as many calls as take ``seconds``."""
    calls, samples = {}, {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls[name] = max(1, min(200, int(seconds / (time.perf_counter() - start))))
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls[name]):
                run()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / calls[name])
    return {name: round(sorted(s)[len(s) // 2], 5) for name, s in samples.items()}


def _ratios(times: dict[str, float], ours: str) -> Measured:
    return {
        name: {"ms": ms, "against_ours": round(ms / times[ours], 2)} for name, ms in times.items()
    }


def _features(batch: int, layout: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = zip(CHANNELS, SIZES, strict=True)
    maps = (torch.randn(batch, c, s, s, generator=generator) for c, s in sides)
    return [m.cuda().contiguous(memory_format=layout) for m in maps]


def _flows() -> dict[str, Any]:
    """Ours and the authors' way, with FrEIA's dense permutations where FrEIA is installed, on equal weights."""
    from msflow_ext import MSFlowHead
    from msflow_ext.bench.official import OfficialMSFlow

    head = MSFlowHead(CHANNELS, blocks=BLOCKS, seed=0)
    flows: dict[str, Any] = {"ours": copy.deepcopy(head).cuda()}
    for name, permutation in (("eager", "index"), ("FrEIA", "dense")):
        try:
            official = OfficialMSFlow(head, [(s, s) for s in SIZES], permutation).cuda()
        except ModuleNotFoundError:
            continue
        official.conditions = [c.cuda() for c in official.conditions]
        official.fusion.perms = [p.cuda() for p in official.fusion.perms]
        flows[name] = official
    return {
        name: f.to(memory_format=torch.channels_last) if isinstance(f, nn.Module) else f
        for name, f in flows.items()
    }


def _step(flows: Any, features: Sequence[Tensor], half: bool, *, compile: bool = False) -> Run:
    parameters = [p for p in flows.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    loss_of = torch.compile(flows.loss) if compile else flows.loss

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = loss_of(features)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
