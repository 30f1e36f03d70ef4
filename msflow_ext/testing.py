"""What is built and whether it works here: versions, backends, tolerances, and every kernel against its reference."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import msflow_ext
from msflow_ext import ops
from msflow_ext.ops import _backend

OPS = ("coupling", "norm", "resample", "score", "winograd")


def info() -> dict[str, Any]:
    """Versions, what is compiled, and the backend of each op per device with the reason for it."""
    cpu = "native" if _backend.C is not None else "reference"
    return {
        "msflow_ext": msflow_ext.__version__,
        "torch": torch.__version__,
        "timm": _version("timm"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": _backend.STATUS,
        "backends": {
            op: {
                "cpu": f"{cpu}: {_backend.STATUS}",
                "cuda": "reference: no CUDA kernel is built",
            }
            for op in OPS
        },
    }


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Relative error granted to a result of ``dtype`` that sums ``terms`` numbers: ``16 eps sqrt(terms)``.

    Half precision is summed in float32 and rounded once, when it is stored: that rounding comes on top.
    """
    wide = ops.accumulation_dtype(dtype)
    rounding = 0.0 if wide is dtype else 2 * torch.finfo(dtype).eps
    return 16 * torch.finfo(wide).eps * max(1, terms) ** 0.5 + rounding


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation, in units of the largest magnitude wanted or 1; 0 for empty tensors."""
    if got.shape != wanted.shape:
        raise ValueError(
            f"relative_error: shapes differ, {tuple(got.shape)} and {tuple(wanted.shape)}"
        )
    if wanted.numel() == 0:
        return 0.0
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1))


def check() -> list[tuple[str, float, float]]:
    """Run every compiled kernel against its float64 reference on this machine.

    Returns:
        (case, relative error, tolerance) of each; a case is wrong where the error exceeds the tolerance or is NaN.

    Raises:
        RuntimeError: nothing is compiled.
    """
    rows = []
    for case, run, tensors in _cases():
        with ops.backend("native"):
            got = run(*tensors)
        with ops.backend("reference"):
            wanted = run(*(t.double() if t.is_floating_point() else t for t in tensors))
        bound = tolerance(tensors[0].dtype, tensors[0][0].numel())
        errors = [relative_error(g, w) for g, w in zip(got, wanted, strict=True)]
        error = math.nan if any(map(math.isnan, errors)) else max(errors)
        rows.append((case, error, bound))
    return rows


def _cases() -> Iterator[tuple[str, Any, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for name, layout in (
            ("planar", torch.contiguous_format),
            ("interleaved", torch.channels_last),
        ):
            x1, x2, a, x = (
                normal(3, c, 7, 9).to(dtype).contiguous(memory_format=layout)
                for c in (9, 8, 16, 17)
            )
            scale, offset = (normal(17).exp().to(wide), normal(17).to(wide))
            perm = torch.randperm(17, generator=generator)
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            for form in ("0.2", "head", "atan"):

                def couple(*t: Tensor, form: str = form) -> tuple[Tensor, ...]:
                    return ops.affine_coupling(*t, clamp_form=form)

                def uncouple(*t: Tensor, form: str = form) -> tuple[Tensor, ...]:
                    return ops.affine_coupling_inverse(*t, clamp_form=form)

                operands = [x1, x2, a, scale, offset, perm]
                yield f"coupling {form} {label}", couple, operands
                yield f"coupling inverse {form} {label}", uncouple, operands
                yield f"coupling backward {form} {label}", _gradients(couple), operands
            norm_operands = [x, scale, offset, normal(1, 17, 7, 9).to(dtype)]
            yield f"norm {label}", lambda *t: (ops.channel_norm(*t),), norm_operands
            yield (
                f"norm backward {label}",
                _gradients(lambda *t: (ops.channel_norm(*t),)),
                norm_operands,
            )
            maps = [x1, x2[..., :4, :5].contiguous(memory_format=layout)]
            yield f"pooling {label}", _pool, maps
            yield f"pooling backward {label}", _gradients(_pool), maps
            maps = [x1, normal(3, 9, 4, 5).to(dtype).contiguous(memory_format=layout)]
            yield f"upsampling {label}", _upsample, maps
            yield f"upsampling backward {label}", _gradients(_upsample), maps
            if dtype is not torch.float64:
                yield f"winograd {label}", _convolve, [x, normal(5, 17, 3, 3) / 9, normal(5)]
            likelihoods = [x]
            yield (
                f"score {label}",
                lambda z: (ops.log_likelihood_map(z), ops.half_square_norm(z)),
                likelihoods,
            )
        if dtype is not torch.bfloat16:
            maps = [-normal(2, s, s).square().to(dtype) for s in (8, 4, 3)]
            yield f"aggregate {dtype}", _aggregate, maps
            yield f"mean aggregate {dtype}", _mean_aggregate, maps


def _pool(*maps: Tensor) -> tuple[Tensor]:
    return (ops.pool_and_concatenate(maps, (4, 5)),)


def _upsample(x: Tensor, low: Tensor) -> tuple[Tensor]:
    return (ops.upsample_and_add(x, low),)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """With both sizes of tiles; factors as wide as the bias."""
    values = [ops.winograd_weight(weight, tile, bias.dtype) for tile in (2, 4)]
    return tuple(ops.winograd_conv2d(x, v, bias) for v in values)


def _aggregate(*maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.aggregate(maps, 33)
    return (
        result.score,
        result.log_score,
        result.nll_score,
        result.anomaly_map,
        result.image_map,
    )


def _mean_aggregate(*maps: Tensor) -> tuple[Tensor, ...]:
    result = ops.mean_aggregate(maps, 33)
    return result.score, result.anomaly_map


def _gradients(function: Any) -> Any:
    """Gradients of all floating inputs, of the results' sum of squares."""

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        total = sum(result.square().sum() for result in function(*leaves))
        wanted = [t for t in leaves if t.requires_grad]
        return list(torch.autograd.grad(total, wanted))  # type: ignore[arg-type]

    return run


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
