"""3x3 convolutions of stride 1 by Winograd's minimal filtering: 2.25 to 4 times fewer multiplications."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype

# Of the result's channels, so many lie side by side in the kernels' weight.
_PANEL = 32

# Interpolation points by size of a tile, besides infinity.
_R = math.sqrt(0.5)
_A, _B = 3 / 8, 5 / 4
_POINTS = {
    2: (0.0, 1.0, -1.0),
    3: (_A, -_A, _B, -_B),
    4: (0.0, _R, -_R, 1 / _R, -1 / _R),
}
_GRADIENT_TILE = 4


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: tuple[int, int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    r"""Convolve with a 3x3 kernel, stride 1, in tiles of the result: ``F(2x2, 3x3)`` to ``F(4x4, 3x3)``.

    .. math:: y = A^T \Big[ \sum_c (G g_c G^T) \odot (B^T d_c B) \Big] A + b

    of overlapping tiles :math:`d` of the input. Fewer multiplications cost digits: where a direct convolution in
    float32 errs by 1.7e-7 of the result's root mean square (192 channels), tiles of 2 err by 3.7e-7, of 3 by 5.9e-7
    and of 4 by 1.1e-6 (the usual points 0, 1, -1, 2, -2: 2.3e-6). Factors in bfloat16 err by 3.4e-3 with tiles of 2 and by
    4.8e-3 with tiles of 3, against 2.4e-3; with tiles of 4 it would be 1.0e-2, so there are none.

    Args:
        x: ``(N, C_in, H, W)``, float32, float64 or bfloat16 (float16: reference).
        weight: of :func:`winograd_weight`; float64 for float64, else float32, or bfloat16 for bfloat16.
        bias: ``(C_out,)`` in the accumulation dtype (float64 for float64, else float32).
        padding: zeros on both sides of (rows, columns).
        relu: whether negative results become 0.

    Returns:
        ``(N, C_out, H + 2 padding - 2, W + 2 padding - 2)`` in the dtype of ``x``; channels_last from the kernels.

    Raises:
        ValueError: shapes, devices or padding do not fit. TypeError: dtypes do not.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; points chosen for accuracy.
    """
    _check(x, weight, bias, padding)
    arguments = (x, weight, bias, *padding, bool(relu))
    fast = weight.dtype is torch.float32 or weight.dtype in factor_dtypes()
    if fast and _backend.is_native(x, weight, bias, cuda=False):
        return _winograd(*arguments)[0]
    return winograd_conv2d_reference(*arguments)


def winograd_weight(
    weight: Tensor, tile: int, dtype: torch.dtype = torch.float32, *, adjoint: bool = False
) -> Tensor:
    r"""A 3x3 kernel's values at the interpolation points, in the layout of :func:`winograd_conv2d`.

    Args:
        weight: ``(C_out, C_in, 3, 3)``, floating.
        tile: 2, 3 or 4: results of a tile in each direction.
        dtype: of the factors: float32, float64, or bfloat16 (tiles of 2 or 3, sums in float32).
        adjoint: for the convolution's derivative: from the gradient of its results to that of its input, where
            C_in and C_out change places.

    Returns:
        ``((tile + 2)^2, ceil(C_out / 32), ceil(C_in / k), 32, k)``, k = 2 for bfloat16 and 1 otherwise, missing
        channels 0: :math:`(tile + 2)^2 / 9` times the numbers of ``weight``; in bfloat16 they are rounded so that the
        errors at the points of a tile compensate each other (without a gradient).

    Raises:
        ValueError: shape or tile. TypeError: dtype.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"winograd_weight: weight must be (C_out, C_in, 3, 3), got {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"winograd_weight: weight must be floating, got {weight.dtype}")
    if tile not in _POINTS:
        raise ValueError(f"winograd_weight: tile must be 2, 3 or 4, got {tile}")
    if dtype is torch.bfloat16 and tile > 3:
        raise ValueError(f"winograd_weight: tile must be 2 or 3 for bfloat16, got {tile}")
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"winograd_weight: dtype must be float32, float64 or bfloat16, got {dtype}")
    if adjoint:
        weight = weight.transpose(0, 1)
    kernels = weight.dtype is torch.float32 and dtype is not torch.float64
    if dtype is torch.float32 and torch.is_grad_enabled() and weight.requires_grad:
        kernels = False  # which give no gradient; to bfloat16, nothing does
    if kernels and _backend.is_native(weight, cuda=False) and not torch.compiler.is_compiling():
        return _native_weight(weight, tile, dtype, adjoint)
    return _winograd_weight_reference(weight.flip(2, 3) if adjoint else weight, tile, dtype)


def _native_weight(weight: Tensor, tile: int, dtype: torch.dtype, turned: bool) -> Tensor:
    (c_out, c_in), k = weight.shape[:2], 2 if dtype is torch.bfloat16 else 1
    weight = _backend.in_memory(weight)
    if weight.stride()[2:] != (3, 1):
        weight = weight.contiguous()
    transform, correction = (np.array(t, np.float32) for t in _TABLES[tile])
    points = len(transform)
    values = weight.new_empty((points, -(-c_out // _PANEL), -(-c_in // k), _PANEL, k), dtype=dtype)
    job = _backend.C.WinogradWeight(
        (c_out, c_in, points),
        weight.data_ptr(),
        tuple(weight.stride()[:2]),
        turned,
        _backend.DTYPES[dtype],
        transform.ctypes.data,
        correction.ctypes.data if k == 2 else 0,
        values.data_ptr(),
    )
    _backend.C.winograd_weight_cpu(job)
    return values


def _winograd_weight_reference(weight: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    k = 2 if dtype is torch.bfloat16 else 1
    padded = F.pad(
        weight.double(), (0, 0, 0, 0, 0, -weight.size(1) % k, 0, -weight.size(0) % _PANEL)
    )
    panels = padded.flatten(2).reshape(-1, _PANEL, padded.size(1) // k, k, 9)
    panels = panels.permute(4, 0, 2, 1, 3)
    transform, correction = (padded.new_tensor(t) for t in _TABLES[tile])
    values = transform @ panels.flatten(1)
    values = _rounded(values, correction) if k == 2 else values.to(dtype)
    return values.view(-1, *panels.shape[1:])


def winograd_weight_grad(x: Tensor, grad: Tensor, *, padding: tuple[int, int] = (1, 1)) -> Tensor:
    r"""The gradient of a 3x3 kernel: the convolution of :func:`winograd_conv2d`, differentiated by its kernel.

    .. math:: \partial g_{oc} = G^T \Big[ \sum_t (A\, \partial y_{ot} A^T) \odot (B^T d_{ct} B) \Big] G

    over all tiles t of 4x4 results of all samples: 4 times fewer multiplications. In float32 it errs by 5.3e-7 of its
    root mean square from 24x24 positions and by 3.5e-6 from 8 times 64x64, where torch's convolution errs by 3.0e-7 and
    2.3e-6. Factors and sums are float32 for bfloat16 too. It has no gradient itself.

    Args:
        x: ``(N, C_in, H, W)``, the convolution's input: float32, float64 or bfloat16 (float16: reference).
        grad: ``(N, C_out, H + 2 padding - 2, W + 2 padding - 2)`` in the dtype of ``x``, of its results.
        padding: zeros on both sides of (rows, columns).

    Returns:
        ``(C_out, C_in, 3, 3)`` in the accumulation dtype (float64 for float64, else float32).

    Raises:
        ValueError: shapes, devices or padding do not fit. TypeError: dtypes do not.

    Source: the adjoint of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.
    """
    name = "winograd_weight_grad"
    _check_input(name, x, padding)
    size = (x.size(0), *_out_size(x, *padding))
    if grad.dim() != 4 or (grad.size(0), *grad.shape[2:]) != size:
        expected = f"({size[0]}, C_out, {size[1]}, {size[2]})"
        raise ValueError(f"{name}: grad must be {expected}, got {tuple(grad.shape)}")
    if not x.is_floating_point() or grad.dtype is not x.dtype:
        raise TypeError(
            f"{name}: x and grad must be of one floating dtype, got {x.dtype} and {grad.dtype}"
        )
    if grad.device != x.device:
        raise ValueError(f"{name}: grad must be on {x.device}, got {grad.device}")
    kernels = torch.float32 in factor_dtypes() and _backend.is_native(x, grad, cuda=False)
    if kernels and x.dtype is not torch.float64 and not torch.compiler.is_compiling():
        return _native_weight_grad(x.detach(), grad.detach(), padding)
    return _winograd_weight_grad_reference(x.detach(), grad.detach(), padding)


def _native_weight_grad(x: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    _keep, views = _backend.views(True, _backend.in_memory(x), _backend.in_memory(grad))
    found = x.new_empty((grad.size(1), x.size(1), 3, 3), dtype=torch.float32)
    transform = np.array(_TABLES[_GRADIENT_TILE][0], np.float32)
    job = _backend.C.WinogradGradient(
        tuple(x.shape), tuple(grad.shape[1:]), padding, transform.ctypes.data, found.data_ptr()
    )
    _backend.C.winograd_gradient_cpu(job, *views)
    return found


def _winograd_weight_grad_reference(x: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    a, g, b = _matrices(_GRADIENT_TILE, x.to(wide))
    inputs = b @ _tiles(x.to(wide), padding, _GRADIENT_TILE) @ b.mT
    more = (-grad.size(3) % _GRADIENT_TILE, -grad.size(2) % _GRADIENT_TILE)
    results = F.pad(grad.to(wide), (0, more[0], 0, more[1]))
    step = _GRADIENT_TILE
    results = a.mT @ results.unfold(2, step, step).unfold(3, step, step) @ a
    return g.mT @ torch.einsum("nohwij,nchwij->ocij", results, inputs) @ g


def factor_dtypes() -> tuple[torch.dtype, ...]:
    """The factors' dtypes that kernels multiply on this machine at the speed of its registers (AVX2, AVX-512).

    bfloat16 needs the processor's instruction for it (AVX-512 BF16); none where there are no kernels.
    """
    found = _backend.C.winograd_factors_cpu() if _backend.is_native() else ()
    return tuple(dtype for dtype, number in _backend.DTYPES.items() if number in found)


def winograd_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, pad_rows: int, pad_columns: int, relu: bool
) -> Tensor:
    """:func:`winograd_conv2d` in plain PyTorch, in the accumulation dtype except for the rounding of the factors."""
    wide = accumulation_dtype(x.dtype)
    tile = _tile(weight)
    a, _, b = _matrices(tile, x.to(wide))
    height, width = _out_size(x, pad_rows, pad_columns)
    inputs = b @ _tiles(x.to(wide), (pad_rows, pad_columns), tile) @ b.mT
    inputs = inputs.to(weight.dtype).to(wide)
    factors = weight.transpose(2, 3).flatten(3).flatten(1, 2)[:, : bias.numel(), : x.size(1)]
    factors = factors.unflatten(0, (tile + 2, tile + 2)).to(wide)
    products = torch.einsum("ijoc,nchwij->nohwij", factors, inputs)
    y = (a @ products @ a.mT).transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    y = y + bias[:, None, None]
    return (torch.relu(y) if relu else y).to(x.dtype)


def _tiles(x: Tensor, padding: tuple[int, int], tile: int) -> Tensor:
    """What the tiles of the results read: ``(N, C, down, across, tile + 2, tile + 2)``."""
    (height, width), (rows, columns) = _out_size(x, *padding), padding
    more = (-width % tile, -height % tile)  # so that the last tiles are whole
    x_padded = F.pad(x, (columns, columns + more[0], rows, rows + more[1]))
    return x_padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)


@torch.no_grad()
def _rounded(values: Tensor, correction: Tensor) -> Tensor:
    """Values in bfloat16, the last point's first, each chosen so that it makes up for the errors of those before."""
    found, errors = values.bfloat16(), torch.zeros_like(values)
    for i in reversed(range(len(values))):
        found[i] = values[i] - correction[i] @ errors
        errors[i] = found[i] - values[i]
    return found


def _matrices(tile: int, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_tensor(m) for m in _MATRICES[tile])


def _tile(weight: Tensor) -> int:
    return math.isqrt(weight.size(0)) - 2


def _out_size(x: Tensor, pad_rows: int, pad_columns: int) -> tuple[int, int]:
    return x.size(2) + 2 * pad_rows - 2, x.size(3) + 2 * pad_columns - 2


def _check_input(name: str, x: Tensor, padding: tuple[int, int]) -> None:
    if x.dim() != 4 or min(padding) < 0 or min(_out_size(x, *padding)) < 1:
        raise ValueError(
            f"{name}: x must be (N, C_in, H, W) of at least 3x3 with its padding, got {tuple(x.shape)} "
            f"and padding {tuple(padding)}"
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> None:
    name = "winograd_conv2d"
    _check_input(name, x, padding)
    wide = accumulation_dtype(x.dtype)
    if not x.is_floating_point() or weight.dtype not in (wide, x.dtype):
        raise TypeError(
            f"{name}: x must be floating and weight {wide} or bfloat16 beside bfloat16, got {x.dtype} and "
            f"{weight.dtype}"
        )
    if bias.dim() != 1 or bias.numel() == 0 or bias.dtype is not wide:
        raise TypeError(
            f"{name}: bias must be {wide} (C_out,), got {bias.dtype} {tuple(bias.shape)}"
        )
    k = 2 if weight.dtype is torch.bfloat16 else 1
    panels = (-(-bias.numel() // _PANEL), -(-x.size(1) // k), _PANEL, k)
    if weight.shape[1:] != panels or weight.size(0) not in ((16, 25) if k == 2 else (16, 25, 36)):
        raise ValueError(
            f"{name}: weight must be winograd_weight's (16, 25 or 36, {str(panels)[1:]} for {x.size(1)} channels "
            f"in and {bias.numel()} out, got {tuple(weight.shape)}"
        )
    for label, other in (("weight", weight), ("bias", bias)):
        if other.device != x.device:
            raise ValueError(f"{name}: {label} must be on {x.device}, got {other.device}")


def _allocate(x, weight, bias, pad_rows, pad_columns, relu):
    size = _out_size(x, pad_rows, pad_columns)
    return (_backend.empty(x, bias.numel(), True, size=size),)


def _run(results, x, weight, bias, pad_rows, pad_columns, relu):
    (y,) = results
    _keep, v = _backend.views(True, x, y)
    _dense, vectors = _backend.addresses(weight, bias)
    job = _backend.C.Winograd(
        tuple(x.shape),
        tuple(y.shape[1:]),
        _tile(weight),
        (pad_rows, pad_columns),
        relu,
        _backend.DTYPES[weight.dtype],
        *vectors,
    )
    _backend.C.winograd_cpu(job, *v)


def _toom_cook(points: tuple[float, ...]) -> tuple[list[list[float]], ...]:
    """A^T, G and B^T: interpolation, transposed, of a polynomial's product from its values at points and infinity."""
    others = [[q for q in points if q != p] for p in points]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    last = len(points) - 2
    a = [[*(p**i for p in points), float(i == last)] for i in range(last + 1)]
    g = [[p**i / s for i in range(3)] for p, s in zip(points, scales, strict=True)]
    b = [[*np.poly(rest)[::-1].tolist(), 0.0] for rest in others]
    return a, [*g, [0.0, 0.0, 1.0]], [*b, np.poly(points)[::-1].tolist()]


def _tables(tile: int) -> tuple[list[list[float]], list[list[float]]]:
    """From nine numbers to the values at the points, and by how much an error there moves the values before it.

    Errors ``e`` at the points cost ``e^T Q e``, the mean square that they add to results of a white input. With the
    Cholesky factor L of Q these are the squares of ``L^T e``, where a row holds its own and later errors.
    """
    a, g, b = (np.kron(m, m) for m in _MATRICES[tile])
    factor = np.linalg.cholesky((a.T @ a) * (b @ b.T))
    return g.tolist(), (factor / factor.diagonal()).T.tolist()


_MATRICES = {tile: _toom_cook(points) for tile, points in _POINTS.items()}
_TABLES = {tile: _tables(tile) for tile in _POINTS}

_winograd = NativeOp(
    "winograd_conv2d",
    "(Tensor x, Tensor weight, Tensor bias, int pad_rows, int pad_columns, bool relu) -> Tensor",
    allocate=_allocate,
    run=_run,
    reference=lambda *args: (winograd_conv2d_reference(*args),),
    tensors=3,
)
