"""Time kernels, training and inference on a GPU: the timed steps of `python -m benchmarks.gpu`."""

# Functions import msflow_ext, because the step `build` comes first.

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS, BLOCKS, SIZES = (256, 512, 1024), (2, 5, 8), (64, 32, 16)  # wide_resnet50_2 at 512 px
COPIED, SIDE = (
    2**28,
    8192,
)  # floats to copy and side of the matrices, to measure the device's limits
CALLS = 16  # calls in a timed graph
Measured = dict[str, Any]
Run = Callable[[], Any]


def ceilings(_: Measured) -> Measured:
    """Measure the copy bandwidth in GB/s, reads and writes, and the dense bf16 matmul rate in TFLOP/s."""
    source = torch.empty(COPIED, device="cuda")
    copy_ms = _time({"copy": lambda: source.clone()})["copy"]
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    matmul_ms = _time({"matmul": lambda: a @ a})["matmul"]
    return {
        "copy_gbs": round(2 * source.nbytes / copy_ms / 1e6, 1),
        "matmul_tflops": round(2 * SIDE**3 / matmul_ms / 1e9, 1),
    }


def kernels(_: Measured) -> Measured:
    """Measure each kernel at batch 8: ms, GB/s, GB/s of a copy of as many bytes, and the ratio of both.

    CUDA graphs exclude the time of Python calls, which take longer than most kernels.
    """
    rows: Measured = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for kind, where in _kinds():
            for name, (moved, run) in _kernel_cases(*where).items():
                source = torch.zeros(moved // 8, device="cuda")
                # A graph copies by the driver, which is not always the fastest way; neg runs a kernel.
                copies = {"memcpy": _recorded(source.clone), "kernel": _recorded(source.neg)}
                times = _time({"ours": _recorded(run), **copies}, seconds=0.004)
                gbs = {which: moved * CALLS / ms / 1e6 for which, ms in times.items()}
                copied = max(gbs[which] for which in copies)
                rows[f"{name} {kind}"] = {
                    "ms": round(times["ours"] / CALLS, 5),
                    "gbs": round(gbs["ours"]),
                    "copy_gbs": round(copied),
                    "share": round(gbs["ours"] / copied, 3),
                }
    return rows


def _kinds() -> Iterator[tuple[str, tuple[int, int, torch.dtype, torch.memory_format]]]:
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for c, size in zip(CHANNELS, SIZES, strict=True):
                kind = f"{c}x{size}x{size} {str(dtype)[6:]} {str(layout)[6:]}"
                yield kind, (c, size, dtype, layout)


def _kernel_cases(
    c: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, tuple[int, Run]]:
    """Return the bytes to move and a call, by name."""
    from msflow_ext import ops

    half = c // 2
    x1, x2, a = (_normal(8, d, size, dtype, layout) for d in (half, half, c))
    scale, offset = torch.rand(c, device="cuda") + 0.5, torch.randn(c, device="cuda")
    vectors = (scale, offset, torch.randperm(c, device="cuda"))
    to_norm = _norm_inputs(c, size, dtype, layout)
    leaves = [t.detach().requires_grad_() for t in (x1, x2, a)]
    l1, l2, l3 = leaves
    y = ops.affine_coupling(l1, l2, l3, *vectors)
    upstream = [torch.ones_like(t) for t in y]
    n = x1.nbytes
    # The inverse reads only the transformed results, which are mixed with the conditioning ones in channels_last.
    transformed = 4 if layout is torch.contiguous_format else 5
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
        "coupling inverse": (
            transformed * n,
            lambda: ops.affine_coupling_inverse(x1, x2, a, *vectors),
        ),
        "coupling backward": (
            10 * n,
            lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True),
        ),
        "norm forward": (
            2 * to_norm[0].nbytes + to_norm[3].nbytes,
            lambda: ops.channel_norm(*to_norm[:4]),
        ),
        "square sums": (x2.nbytes, lambda: ops.log_likelihood_map(x2)),
    }


def _norm_inputs(
    c: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[Tensor, ...]:
    """Return x, weight, bias, and the bias map in float32 and in the dtype of x."""
    hidden = c // 2 + 64
    x, bias_map = (_normal(n, hidden, size, dtype, layout) for n in (8, 1))
    weight, bias = torch.rand(hidden, device="cuda") + 0.5, torch.randn(hidden, device="cuda")
    return x, weight, bias, bias_map.float(), bias_map


def norm(_: Measured) -> Measured:
    """Measure bias map, LayerNorm over channels and ReLU at batch 8 in CUDA graphs."""
    from benchmarks.kernels import bench_norm
    from msflow_ext.bench.modes import compiled

    ways = {"ours": bench_norm.ours, "eager": bench_norm.eager}
    ways["compile"] = compiled(bench_norm.to_compile)
    rows: Measured = {}
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        for kind, where in _kinds():
            inputs = _norm_inputs(*where)
            runs = {name: _recorded(partial(way, *inputs)) for name, way in ways.items()}
            times = _time(runs, seconds=0.004)
            rows[kind] = _ratios({name: ms / CALLS for name, ms in times.items()}, "ours")
    return rows


def aggregation(_: Measured) -> Measured:
    """Measure maps and scores of 512 px from likelihoods."""
    return {f"batch {batch}": _ratios(_time(_aggregations(batch)), "ours") for batch in (1, 8)}


def _aggregations(batch: int) -> dict[str, Run]:
    from msflow_ext import ops

    maps = [-torch.randn(batch, s, s, device="cuda").square() for s in SIZES]

    def eager() -> Any:
        with ops.backend("reference"):
            return ops.aggregate(maps, 512)

    return {"ours": lambda: ops.aggregate(maps, 512), "eager": eager}


def training(_: Measured) -> Measured:
    """Measure a step of the flows at batch 8: loss, gradients, clipping, Adam."""
    from msflow_ext.bench.modes import compiled

    torch.set_float32_matmul_precision("high")  # as users set it for speed
    features = _features(8, torch.channels_last)
    runs = {
        f"{name} {mode}": _step(flows, features, mode == "bf16")
        for name, flows in _flows().items()
        for mode in ("fp32", "bf16")
    }
    runs["compile bf16"] = _step(_flows()["eager"], features, True, way=compiled)
    return _ratios(_time(runs), "ours bf16")


def inference(_: Measured) -> Measured:
    """Measure log-likelihoods from features at batch 1 and 8; the graph has a stream per scale."""
    return {f"batch {batch}": _inference(batch) for batch in (1, 8)}


def _inference(batch: int) -> Measured:
    import msflow_ext as mx

    features = _features(batch, torch.channels_last)
    flows = {name: f.eval().requires_grad_(False) for name, f in _flows().items()}
    fast = flows.pop("ours").optimize(torch.bfloat16)
    mode = "max-autotune" if batch == 1 else "default"  # max-autotune takes minutes
    best = torch.compile(flows["eager"].log_likelihood, mode=mode, dynamic=False)
    replay = mx.graphed(fast.log_likelihood, features)

    def amp(function: Any) -> Run:
        def run() -> Any:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                return function(features)

        return run

    times = _time(
        {
            **{f"{name} bf16": amp(f.log_likelihood) for name, f in flows.items()},
            f"compile {mode} bf16": amp(best),
            "ours optimized bf16": lambda: fast.log_likelihood(features),
            "ours graph bf16": lambda: replay(features),
        }
    )
    expected = flows["eager"].log_likelihood(features)
    pairs = zip(replay(features), expected, strict=True)
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)
    return _ratios(times, "ours graph bf16") | {"error against eager fp32": error}


# ---- helpers ----


def _normal(n: int, c: int, size: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    x = torch.randn(n, c, size, size, device="cuda")
    return x.to(dtype).contiguous(memory_format=layout)


def _recorded(run: Run) -> Run:
    """Return the replay of ``CALLS`` calls as one CUDA graph, recorded on the current stream."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            run()
    return graph.replay


def _time(runs: Mapping[str, Run], rounds: int = 21, seconds: float = 0.01) -> dict[str, float]:
    """Return the median ms of each, measured in turns; a sample has as many calls as take ``seconds``."""
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
        name: {"ms": round(ms, 5), "against_ours": round(ms / times[ours], 2)}
        for name, ms in times.items()
    }


def _features(batch: int, layout: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = zip(CHANNELS, SIZES, strict=True)
    maps = (torch.randn(batch, c, s, s, generator=generator) for c, s in sides)
    return [m.cuda().contiguous(memory_format=layout) for m in maps]


def _flows() -> dict[str, Any]:
    """Return ours and the reference implementation with equal weights, with dense permutations too if FrEIA is installed."""
    from msflow_ext import MSFlowHead
    from msflow_ext.bench.reference import ReferenceMSFlow

    head = MSFlowHead(CHANNELS, blocks=BLOCKS, seed=0)
    flows: dict[str, Any] = {"ours": copy.deepcopy(head).cuda()}
    for name, permutation in (("eager", "index"), ("FrEIA", "dense")):
        try:
            reference = ReferenceMSFlow(head, [(s, s) for s in SIZES], permutation).cuda()
        except ModuleNotFoundError:
            continue
        reference.conditions = [c.cuda() for c in reference.conditions]
        reference.fusion.perms = [p.cuda() for p in reference.fusion.perms]
        flows[name] = reference
    return {
        name: f.to(memory_format=torch.channels_last) if isinstance(f, nn.Module) else f
        for name, f in flows.items()
    }


def _step(
    flows: Any, features: Sequence[Tensor], half: bool, *, way: Callable[[Run], Run] = lambda f: f
) -> Run:
    parameters = [p for p in flows.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    loss_of: Any = way(flows.loss)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = loss_of(features)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return run
