"""3x3 convolutions of stride 1 by Winograd's minimal filtering, with 2.25 to 4 times fewer multiplications."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype

# Number of output channels that are adjacent in the transformed weight.
_PANEL = 32

# Interpolation points besides infinity, by tile size.
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
    r"""Convolve with a 3x3 kernel of stride 1 in tiles of the result: ``F(2x2, 3x3)`` to ``F(4x4, 3x3)``.

    .. math:: y = A^T \Big[ \sum_c (G g_c G^T) \odot (B^T d_c B) \Big] A + b

    The :math:`d_c` are overlapping tiles of the input. Fewer multiplications cost accuracy. Errors for 192 channels,
    relative to the root mean square of the result:

    | tile | float32 | bfloat16 |
    | --- | --- | --- |
    | direct sum | 1.7e-7 | 2.4e-3 |
    | 2 | 3.7e-7 | 3.4e-3 |
    | 3 | 5.9e-7 | 4.8e-3 |
    | 4 | 1.1e-6 | not offered (1.0e-2) |

    Args:
        x: Input in float32, float64, bfloat16 or float16. The reference runs float16.
        weight: Result of :func:`winograd_weight` in the accumulation dtype, or in bfloat16 if ``x`` is bfloat16.
        bias: Bias in the accumulation dtype: float64 for float64, otherwise float32.
        padding: Number of zeros on both sides of (rows, columns).
        relu: If True, replace negative results by 0.

    Shape:
        - x: ``(N, C_in, H, W)``.
        - bias: ``(C_out,)``.

    Returns:
        ``(N, C_out, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2)`` in the dtype of ``x``. Kernels return
        channels_last.

    Raises:
        ValueError: A shape, a device or the padding does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> x, weight, bias = torch.randn(1, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(5)
        >>> y = winograd_conv2d(x, winograd_weight(weight, 2), bias)
        >>> torch.allclose(y, F.conv2d(x, weight, bias, padding=1), atol=1e-4)
        True

    References:
        Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016. The interpolation points are chosen
        for accuracy: with 0, 1, -1, 2 and -2, tiles of 4 have errors of 2.3e-6 in float32.
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
    r"""Transform a 3x3 kernel to its values at the interpolation points, as :func:`winograd_conv2d` reads them.

    Args:
        weight: Kernel ``(C_out, C_in, 3, 3)`` of any floating-point dtype.
        tile: Number of results of a tile in each direction: 2, 3 or 4.
        dtype: Dtype of the result: float32, float64, or bfloat16 for tiles of 2 or 3.
        adjoint: If True, transform the kernel that maps the gradient of the convolution's results to that of its input.
            ``C_in`` and ``C_out`` change places.

    Returns:
        ``((tile + 2)^2, ceil(C_out / 32), ceil(C_in / k), 32, k)``, with k = 2 for bfloat16, otherwise 1, and zeros for
        missing channels. In bfloat16, values are rounded so that the errors within a tile compensate each other, and
        they have no gradient.

    Raises:
        ValueError: The shape or the tile does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> winograd_weight(torch.randn(5, 4, 3, 3), 2).shape
        torch.Size([16, 1, 4, 32, 1])
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must have shape (C_out, C_in, 3, 3), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must have a floating-point dtype, got {weight.dtype}")
    if tile not in _POINTS:
        raise ValueError(f"tile must be 2, 3 or 4, got {tile}")
    if dtype is torch.bfloat16 and tile > 3:
        raise ValueError(f"tile must be 2 or 3 for bfloat16, got {tile}")
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"dtype must be float32, float64 or bfloat16, got {dtype}")
    if adjoint:
        weight = weight.transpose(0, 1)
    kernels = weight.dtype is torch.float32 and dtype is not torch.float64
    if dtype is torch.float32 and torch.is_grad_enabled() and weight.requires_grad:
        kernels = False  # kernels compute no gradient; bfloat16 has none in any case
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
    panels = padded.flatten(2).reshape(padded.size(0) // _PANEL, _PANEL, padded.size(1) // k, k, 9)
    panels = panels.permute(4, 0, 2, 1, 3)
    transform, correction = (padded.new_tensor(t) for t in _TABLES[tile])
    values = transform @ panels.flatten(1)
    values = _rounded(values, correction) if k == 2 else values.to(dtype)
    return values.view(len(transform), *panels.shape[1:])


def winograd_weight_grad(x: Tensor, grad: Tensor, *, padding: tuple[int, int] = (1, 1)) -> Tensor:
    r"""Compute the gradient of :func:`winograd_conv2d` with respect to its 3x3 kernel.

    .. math:: \partial g_{oc} = G^T \Big[ \sum_t (A\, \partial y_{ot} A^T) \odot (B^T d_{ct} B) \Big] G

    The sum runs over the tiles t of 4x4 results of all samples, with 4 times fewer multiplications than a direct sum.
    Errors in float32, relative to the root mean square of the gradient:

    | positions | this function | torch's convolution |
    | --- | --- | --- |
    | 24x24 | 5.3e-7 | 3.0e-7 |
    | 8 times 64x64 | 3.5e-6 | 2.3e-6 |

    For bfloat16, factors and sums are float32 too. The result has no gradient.

    Args:
        x: Input of the convolution in float32, float64, bfloat16 or float16. The reference runs float16.
        grad: Gradient of the results, in the dtype of ``x``.
        padding: Number of zeros on both sides of (rows, columns).

    Shape:
        - x: ``(N, C_in, H, W)``.
        - grad: ``(N, C_out, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2)``.

    Returns:
        ``(C_out, C_in, 3, 3)`` in the accumulation dtype: float64 for float64, otherwise float32.

    Raises:
        ValueError: A shape, a device or the padding does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> winograd_weight_grad(torch.randn(1, 4, 6, 6), torch.randn(1, 5, 6, 6)).shape
        torch.Size([5, 4, 3, 3])

    References:
        The adjoint of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.
    """
    _check_input(x, padding)
    size = (x.size(0), *_out_size(x, *padding))
    if grad.dim() != 4 or (grad.size(0), *grad.shape[2:]) != size:
        expected = f"({size[0]}, C_out, {size[1]}, {size[2]})"
        raise ValueError(f"grad must have shape {expected}, got {tuple(grad.shape)}")
    if not x.is_floating_point() or grad.dtype is not x.dtype:
        raise TypeError(
            f"x and grad must have the same floating-point dtype, got {x.dtype} and {grad.dtype}"
        )
    if grad.device != x.device:
        raise ValueError(f"grad must be on {x.device}, got {grad.device}")
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
    accumulation = accumulation_dtype(x.dtype)
    a, g, b = _matrices(_GRADIENT_TILE, x.to(accumulation))
    inputs = b @ _tiles(x.to(accumulation), padding, _GRADIENT_TILE) @ b.mT
    more = (-grad.size(3) % _GRADIENT_TILE, -grad.size(2) % _GRADIENT_TILE)
    results = F.pad(grad.to(accumulation), (0, more[0], 0, more[1]))
    step = _GRADIENT_TILE
    results = a.mT @ results.unfold(2, step, step).unfold(3, step, step) @ a
    return g.mT @ torch.einsum("nohwij,nchwij->ocij", results, inputs) @ g


def factor_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of factors that kernels multiply with this machine's vector instructions (AVX2, AVX-512).

    bfloat16 needs AVX-512 BF16. Without kernels there are none.
    """
    found = _backend.C.winograd_factors_cpu() if _backend.is_native() else ()
    return tuple(dtype for dtype, number in _backend.DTYPES.items() if number in found)


def winograd_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, pad_rows: int, pad_columns: int, relu: bool
) -> Tensor:
    """Compute :func:`winograd_conv2d` in plain PyTorch, in the accumulation dtype except for the factors."""
    accumulation = accumulation_dtype(x.dtype)
    tile = _tile(weight)
    a, _, b = _matrices(tile, x.to(accumulation))
    height, width = _out_size(x, pad_rows, pad_columns)
    inputs = b @ _tiles(x.to(accumulation), (pad_rows, pad_columns), tile) @ b.mT
    inputs = inputs.to(weight.dtype).to(accumulation)
    factors = weight.transpose(2, 3).flatten(3).flatten(1, 2)[:, : bias.numel(), : x.size(1)]
    factors = factors.unflatten(0, (tile + 2, tile + 2)).to(accumulation)
    products = torch.einsum("ijoc,nchwij->nohwij", factors, inputs)
    y = (a @ products @ a.mT).transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    y = y + bias[:, None, None]
    return (torch.relu(y) if relu else y).to(x.dtype)


def _tiles(x: Tensor, padding: tuple[int, int], tile: int) -> Tensor:
    """Return the input tiles ``(N, C, rows, columns, tile + 2, tile + 2)``."""
    (height, width), (rows, columns) = _out_size(x, *padding), padding
    more = (-width % tile, -height % tile)  # completes the last tiles
    x_padded = F.pad(x, (columns, columns + more[0], rows, rows + more[1]))
    return x_padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)


@torch.no_grad()
def _rounded(values: Tensor, correction: Tensor) -> Tensor:
    """Round values to bfloat16, the last point first; each rounding compensates the errors before it."""
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


def _check_input(x: Tensor, padding: tuple[int, int]) -> None:
    if x.dim() != 4 or min(padding) < 0 or min(_out_size(x, *padding)) < 1:
        raise ValueError(
            f"x must have shape (N, C_in, H, W), at least 3x3 with its padding, got {tuple(x.shape)} "
            f"and padding {tuple(padding)}"
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> None:
    _check_input(x, padding)
    accumulation = accumulation_dtype(x.dtype)
    if not x.is_floating_point() or weight.dtype not in (accumulation, x.dtype):
        raise TypeError(
            f"x must have a floating-point dtype and weight {accumulation}, or bfloat16 if x is bfloat16, got "
            f"{x.dtype} and {weight.dtype}"
        )
    if bias.dim() != 1 or bias.numel() == 0 or bias.dtype is not accumulation:
        raise TypeError(
            f"bias must be {accumulation} of shape (C_out,), got {bias.dtype} {tuple(bias.shape)}"
        )
    k = 2 if weight.dtype is torch.bfloat16 else 1
    panels = (-(-bias.numel() // _PANEL), -(-x.size(1) // k), _PANEL, k)
    if weight.shape[1:] != panels or weight.size(0) not in ((16, 25) if k == 2 else (16, 25, 36)):
        raise ValueError(
            f"weight must have winograd_weight's shape (16, 25 or 36, {str(panels)[1:]} for {x.size(1)} input and "
            f"{bias.numel()} output channels, got {tuple(weight.shape)}"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {other.device}")


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
    """Return A^T, G and B^T, the transposed Toom-Cook interpolation from values at points and at infinity."""
    others = [[q for q in points if q != p] for p in points]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    last = len(points) - 2
    a = [[*(p**i for p in points), float(i == last)] for i in range(last + 1)]
    g = [[p**i / s for i in range(3)] for p, s in zip(points, scales, strict=True)]
    b = [[*np.poly(rest)[::-1].tolist(), 0.0] for rest in others]
    return a, [*g, [0.0, 0.0, 1.0]], [*b, np.poly(points)[::-1].tolist()]


def _tables(tile: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return the transform of nine weights to the points, and the correction of each value for later errors.

    Errors ``e`` at the points add ``e^T Q e`` to the mean square of the results of a white input. With the Cholesky
    factor L of Q this is the squared norm of ``L^T e``, where row i holds only the errors from i on.
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
