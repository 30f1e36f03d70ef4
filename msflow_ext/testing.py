"""Self-check: versions, backends, tolerances, and every kernel against its reference."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.hardware import versions
from msflow_ext.ops import _backend
from msflow_ext.ops.coupling import CLAMP_FORMS

CUDA = ("coupling", "norm", "resample", "score")
OPS = (*CUDA, "winograd")


class Info(TypedDict):
    """What :func:`info` returns."""

    msflow_ext: str | None
    torch: str
    timm: str | None
    python: str
    machine: str
    threads: int
    kernels: str
    cuda_architectures: str
    backends: dict[str, dict[str, str]]
    compiler: NotRequired[list[str]]


def info() -> Info:
    """Versions, what is compiled, and the backend of each op per device with the reason for it.

    If the compiler failed when the package was installed, ``"compiler"`` holds the last lines that it wrote.

    Examples:
        >>> found = info()
        >>> sorted(found["backends"])
        ['coupling', 'norm', 'resample', 'score', 'winograd']
    """
    cpu, installed = "native" if _backend.C is not None else "reference", versions()
    found: Info = {
        "msflow_ext": installed.get("msflow-ext"),
        "torch": torch.__version__,
        "timm": installed.get("timm"),
        "python": installed["python"],
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": _backend.STATUS,
        "cuda_architectures": getattr(_backend.C, "cuda_architectures", ""),
        "backends": {
            op: {
                "cpu": f"{cpu}: {_backend.STATUS}",
                "cuda": _cuda() if op in CUDA else "reference: GPUs use the convolutions of cuDNN",
            }
            for op in OPS
        },
    }
    if log := _backend.compile_log():
        found["compiler"] = log
    return found


def _cuda() -> str:
    """Return the backend of CUDA tensors, and the reason for it on each device of this machine."""
    if _backend.C is None or not hasattr(_backend.C, "cuda_problem"):
        return "reference: no CUDA kernel is built"
    if not torch.cuda.is_available():
        return "native: compiled; this machine has no CUDA device to run them"
    problems = [_backend.cuda_problem(i) for i in range(torch.cuda.device_count())]
    said = (
        f"{torch.cuda.get_device_name(i)}: {'native' if p is None else f'reference, {p}'}"
        for i, p in enumerate(problems)
    )
    kind = "native" if None in problems else "reference"
    return f"{kind}: {'; '.join(said)}"


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the relative error allowed in a result of ``dtype`` that sums ``terms`` numbers: ``16 eps sqrt(terms)``.

    Half precision is summed in float32 and rounded once, when it is stored. That rounding is added.

    Examples:
        >>> tolerance(torch.float64, terms=100) == 160 * torch.finfo(torch.float64).eps
        True
    """
    accumulation = ops.accumulation_dtype(dtype)
    rounding = 0.0 if accumulation is dtype else 2 * torch.finfo(dtype).eps
    return 16 * torch.finfo(accumulation).eps * max(1, terms) ** 0.5 + rounding


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest deviation, divided by the largest expected magnitude or by 1; 0 for empty tensors.

    Raises:
        ValueError: The shapes differ.

    Examples:
        >>> relative_error(torch.tensor([1.0, -9.0]), torch.tensor([1.0, -10.0]))
        0.1
    """
    if got.shape != expected.shape:
        raise ValueError(f"got must have shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if expected.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1))


def check() -> list[tuple[str, float, float]]:
    """Compare every compiled kernel with its float64 reference, on the CPU and on each GPU of this machine.

    Returns:
        (case, relative error, tolerance) of each case. A kernel is wrong if the error exceeds the tolerance or is NaN.

    Raises:
        RuntimeError: No kernel is compiled.
    """
    rows = []
    for device in _devices():
        where = "" if device.type == "cpu" else f" {device}"
        for case, run, tensors in _cases(_backend.runs_cuda(torch.empty(0, device=device))):
            tensors = [t.to(device) for t in tensors]
            with ops.backend("native"):
                got = run(*tensors)
            with ops.backend("reference"):
                expected = run(*(t.double() if t.is_floating_point() else t for t in tensors))
            bound = max(tolerance(g.dtype, tensors[0][0].numel()) for g in got)
            errors = [relative_error(g, w) for g, w in zip(got, expected, strict=True)]
            error = math.nan if any(map(math.isnan, errors)) else max(errors)
            rows.append((case + where, error, bound))
    return rows


def _devices() -> list[torch.device]:
    """Return the devices that compiled kernels support."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    served = (torch.device("cuda", i) for i in gpus if _backend.cuda_problem(i) is None)
    return [torch.device("cpu"), *served]


# Channels of both halves and positions: tails everywhere, and sizes that move in whole packets of 16 bytes.
_SIZES = {"": (9, 8, (7, 9)), " in packets": (16, 16, (8, 8))}
# Of the norm: as many as the models have, so that each kernel that keeps 1 to 5 packets in registers is reached.
_NORM_CHANNELS = (128, 192, 256, 320, 576)
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _cases(cuda: bool) -> Iterator[tuple[str, Any, list[Tensor]]]:
    for size, sides in _SIZES.items():
        for layout, memory_format in _LAYOUTS.items():
            for x, a in _element_types(cuda):
                mixed = "" if x is a else f" with {str(a).removeprefix('torch.')}"
                label = f"{str(x).removeprefix('torch.')}{mixed} {layout}{size}"
                yield from _coupling_cases(label, x, a, sides, memory_format)
                yield from _upsampling_cases(label, x, a, sides, memory_format)
                if x is a:
                    yield from _other_cases(label, x, sides, memory_format)
    for layout, memory_format in _LAYOUTS.items():
        for x, a in _element_types(cuda):
            if x is a:
                yield from _norm_cases(
                    f"{str(x).removeprefix('torch.')} {layout}", x, memory_format
                )
    for dtype in (torch.float32, torch.float64):
        normal = _normal(dtype, torch.contiguous_format)
        maps = [-normal(2, s, s).square() for s in (8, 4, 3)]
        for size in (33, 64):
            label = f"{dtype} to {size} px"
            yield f"aggregate {label}", partial(_aggregate, size), maps
            yield f"mean aggregate {label}", partial(_mean_aggregate, size), maps


def _element_types(cuda: bool) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Yield the dtypes of the data and of the subnet's output."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        yield dtype, dtype
    yield torch.float32, torch.bfloat16
    if cuda:
        yield torch.float16, torch.float16
        yield torch.float32, torch.float16


def _normal(dtype: torch.dtype, layout: torch.memory_format) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=layout) if x.dim() == 4 else x

    return draw


def _coupling_cases(
    label: str,
    dtype: torch.dtype,
    subnet: torch.dtype,
    sides: tuple[int, int, tuple[int, int]],
    layout: torch.memory_format,
) -> Iterator[tuple[str, Any, list[Tensor]]]:
    normal, (c1, c2, size) = _normal(dtype, layout), sides
    wide = ops.accumulation_dtype(dtype)
    halves = [normal(3, c, *size) for c in (c1, c2)]
    a, scale = normal(3, 2 * c2, *size, dtype=subnet), normal(c1 + c2, dtype=wide).exp()
    operands = [*halves, a, scale, normal(c1 + c2, dtype=wide), torch.randperm(c1 + c2)]
    functions = (ops.affine_coupling, ops.affine_coupling_inverse, _coupling_results, _likelihood)
    for form in CLAMP_FORMS:
        couple, uncouple, alone, likelihood = (partial(f, clamp_form=form) for f in functions)
        cases: dict[str, Any] = {
            "coupling": couple,
            "coupling inverse": uncouple,
            "coupling without log_det": alone,
            "coupling likelihood": likelihood,
            "coupling backward": _gradients(couple),
        }
        if dtype is not subnet:
            copying = partial(ops.affine_coupling_with_copy, clamp_form=form)
            cases["coupling with copy"] = copying
            cases["coupling with copy backward"] = _gradients(copying)
        for case, function in cases.items():
            yield f"{case} {form} {label}", function, operands


def _upsampling_cases(
    label: str,
    dtype: torch.dtype,
    low: torch.dtype,
    sides: tuple[int, int, tuple[int, int]],
    layout: torch.memory_format,
) -> Iterator[tuple[str, Any, list[Tensor]]]:
    normal, (channels, _, size) = _normal(dtype, layout), sides
    operands = [normal(3, channels, *size), normal(3, channels, 4, 5, dtype=low)]
    yield f"upsampling {label}", _upsample, operands
    yield f"upsampling backward {label}", _gradients(_upsample), operands


def _other_cases(
    label: str,
    dtype: torch.dtype,
    sides: tuple[int, int, tuple[int, int]],
    layout: torch.memory_format,
) -> Iterator[tuple[str, Any, list[Tensor]]]:
    normal, (c1, c2, size) = _normal(dtype, layout), sides
    wide = ops.accumulation_dtype(dtype)
    x = normal(3, c1 + c2, *size)
    vectors = [normal(c1 + c2, dtype=wide) for _ in range(2)]
    functions: dict[str, tuple[Any, list[Tensor]]] = {
        "norm": (_norm, [x, *vectors, normal(1, c1 + c2, *size)]),
        "pooling": (_pool, [normal(3, c1, *size), normal(3, c2, 4, 5)]),
        "score": (_score, [x]),
    }
    for name, (function, operands) in functions.items():
        yield f"{name} {label}", function, operands
        yield f"{name} backward {label}", _gradients(function), operands
    if dtype in (torch.float32, torch.bfloat16):
        weight, bias = (normal(*s, dtype=torch.float32) for s in ((5, c1 + c2, 3, 3), (5,)))
        yield f"winograd {label}", _convolve, [x, weight / 9, bias]
        yield f"winograd weight gradient {label}", _weight_grad, [x, normal(3, 5, *size)]


def _norm_cases(
    label: str, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[tuple[str, Any, list[Tensor]]]:
    normal = _normal(dtype, layout)
    for channels in _NORM_CHANNELS:
        vectors = [normal(channels, dtype=ops.accumulation_dtype(dtype)) for _ in range(2)]
        operands = [normal(2, channels, 8, 8), *vectors, normal(1, channels, 8, 8)]
        yield f"norm {label} of {channels} channels", _norm, operands
        yield f"norm backward {label} of {channels} channels", _gradients(_norm), operands


def _coupling_results(*t: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return ops.affine_coupling(*t, **options, log_det=False)[:2]


def _likelihood(*t: Tensor, **options: Any) -> tuple[Tensor]:
    return (ops.coupling_log_likelihood(*t, **options),)


def _norm(*t: Tensor) -> tuple[Tensor]:
    return (ops.channel_norm(*t),)


def _score(z: Tensor) -> tuple[Tensor, Tensor]:
    return ops.log_likelihood_map(z), ops.half_square_norm(z)


def _pool(*maps: Tensor) -> tuple[Tensor]:
    return (ops.pool_and_concatenate(maps, (4, 5)),)


def _upsample(x: Tensor, low: Tensor) -> tuple[Tensor]:
    return (ops.upsample_and_add(x, low),)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Convolve with every tile size, with factors in the dtype of the bias."""
    values = [ops.winograd_weight(weight, tile, bias.dtype) for tile in (2, 3, 4)]
    return tuple(ops.winograd_conv2d(x, v, bias) for v in values)


def _weight_grad(x: Tensor, grad: Tensor) -> tuple[Tensor]:
    return (ops.winograd_weight_grad(x, grad),)


def _aggregate(size: int, *maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.aggregate(maps, size)
    return (
        result.score,
        result.log_score,
        result.nll_score,
        result.anomaly_map,
        result.image_map,
    )


def _mean_aggregate(size: int, *maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.mean_aggregate(maps, size)
    return result.score, result.anomaly_map


def _gradients(function: Any) -> Any:
    """Return a function that differentiates the sum of the squared results by all floating-point inputs."""

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        total = sum(result.square().sum() for result in function(*leaves))
        expected = [t for t in leaves if t.requires_grad]
        return list(torch.autograd.grad(total, expected))  # type: ignore[arg-type]

    return run
