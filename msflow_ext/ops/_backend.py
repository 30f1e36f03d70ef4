"""Loads the compiled kernels and chooses, call by call, between them and the reference."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Element types of the kernels, in the order of ``csrc/common/tensor.h``.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Dtypes that the kernels support. Permutations are int64.
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)

# A subclass may redefine operations, so it uses the reference.
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

View = tuple[int, int, int, int, int] | None


_COMPILE_LOG = Path(__file__).with_name("compile_log.txt")  # written by cmake/build_backend.py


def compile_log() -> list[str]:
    """Return the compiler's last lines if it failed when this package was installed, otherwise an empty list."""
    if not _COMPILE_LOG.is_file():
        return []
    text = _COMPILE_LOG.read_text(encoding="utf-8", errors="replace")
    return text.partition(" - retrying due to override")[0].splitlines()[-20:]


def _load() -> tuple[ModuleType | None, str]:
    """Return the compiled module, or None, and its status in words."""
    try:
        from msflow_ext.ops import _C  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        failed = "its compiler failed when msflow_ext was installed" if compile_log() else error
        return None, f"not compiled ({failed})"
    parallel_for = _parallel_for()
    if parallel_for is None:
        return _C, "compiled; one thread, because this torch has no torch_parallel_for"
    _C.set_parallel_for(parallel_for)
    return _C, "compiled; threads of torch"


# Libraries that may export torch_parallel_for. On Linux and macOS a lookup also searches a library's dependencies, on
# Windows only the library. A name without a folder finds a library that is already loaded.
_TORCH_LIBRARIES = ("torch_cpu.dll", "libtorch_cpu.dylib", "libtorch_cpu.so")


def _parallel_for() -> int | None:
    """Return the address of torch_parallel_for, or None if this torch does not export it."""
    folder = Path(torch.__file__).parent / "lib"
    inside = [str(folder / name) for name in _TORCH_LIBRARIES]
    for library in (torch._C.__file__, *inside, *_TORCH_LIBRARIES):
        with contextlib.suppress(AttributeError, OSError):
            function = ctypes.CDLL(library).torch_parallel_for
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


C: Any
C, STATUS = _load()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops in this context on compiled kernels or on their reference in PyTorch.

    Outside the context, an op runs on a kernel if there is one for its tensors, otherwise on its reference. Other
    threads and asyncio tasks are not affected.

    Args:
        name: ``"native"`` for kernels, ``"reference"`` for PyTorch.

    Raises:
        ValueError: ``name`` is neither of them.
        RuntimeError: ``name`` is ``"native"`` and no kernel is compiled.

    Examples:
        >>> from msflow_ext import ops
        >>> z = torch.ones(2, 3, 4)
        >>> with ops.backend("reference"):
        ...     ops.half_square_norm(z)
        tensor([6., 6.])
    """
    with forcing(_checked(name, "name")):
        yield


@contextlib.contextmanager
def forcing(name: str | None) -> Iterator[None]:
    """Run the ops in this context on a backend; None leaves the choice to :func:`is_native`."""
    before = _forced.get()
    _forced.set(name)
    try:
        yield
    finally:
        _forced.set(before)


def forced() -> str | None:
    """Return the backend that :func:`backend` or the environment sets here, or None."""
    return _forced.get()


def _checked(name: str, source: str) -> str:
    """Return the name of a backend after checking it; ``source`` says where it comes from."""
    if name not in ("native", "reference"):
        raise ValueError(f"{source} must be 'native' or 'reference', got {name!r}")
    if name == "native" and C is None:
        raise RuntimeError(
            f"{source} must be 'reference', got 'native', because kernels are {STATUS}"
        )
    return name


_by_environment: str | None = os.environ.get("MSFLOW_EXT_BACKEND") or None
if _by_environment is not None:
    _checked(_by_environment, "MSFLOW_EXT_BACKEND")
_forced: ContextVar[str | None] = ContextVar("backend", default=_by_environment)


def is_native(*tensors: Tensor | None, cuda: bool = True) -> bool:
    """Return whether compiled kernels can process these tensors.

    ``cuda`` says whether the op has CUDA kernels. The reference serves exported and traced graphs, everything that
    :func:`is_transformed` lists, float16 on the CPU, GPUs without a build, and other devices.
    """
    if C is None or _forced.get() == "reference":
        if C is None:
            _warn_once()
        return False
    for tensor in tensors:
        if tensor is None or (tensor.is_cpu and tensor.dtype in _CPU_DTYPES):
            continue
        if not (cuda and _has_cuda_kernels(tensor)):
            return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not is_transformed(*tensors)


def _has_cuda_kernels(tensor: Tensor) -> bool:
    """Return whether CUDA kernels exist for the tensor's dtype and device."""
    if tensor.dtype not in _CUDA_DTYPES:
        return False
    if tensor.is_cuda:
        return cuda_problem(tensor.device.index) is None
    return tensor.is_cpu and _emulated


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether PyTorch must see every operation, or tensors may hold no values.

    This is true under functorch transforms (also for batched gradients), forward-mode differentiation, tracers,
    ``make_fx`` and ``FakeTensorMode``, and for tensor subclasses. Results computed then must not be cached.
    """
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
            return True
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._len_torch_dispatch_stack() > 0 and _is_traced_by_mode())
        or any(map(torch._C._dispatch_tls_is_dispatch_key_included, _TRANSFORMS))
    )


def hides_values(*tensors: Tensor | None) -> bool:
    """Return whether the values of tensors must not be read: while compiling, and if :func:`is_transformed`."""
    return torch.compiler.is_compiling() or is_transformed(*tensors)


# Tracing before autograd, and the older vmap, which batches gradients (is_grads_batched).
_TRANSFORMS: Any = tuple(map(torch._C._parse_dispatch_key, ("PreDispatch", "VmapMode")))
_MODES = torch._C._TorchDispatchModeKey


def _is_traced_by_mode() -> bool:
    """Return whether an active dispatch mode traces or holds no data; all other modes only observe."""
    modes = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)


def cuda_problem(device: int) -> str | None:
    """Return the reason why compiled kernels do not run on this CUDA device, or None if they do."""
    if C is None:
        return f"kernels {STATUS}"
    if not hasattr(C, "cuda_problem"):
        return "no CUDA kernel is built"
    if device not in _cuda_problems:
        with torch.cuda.device(device):
            _cuda_problems[device] = C.cuda_problem() or None
    return _cuda_problems[device]


# torch.compiler.assume_constant_result sets the same mark, but imports the compiler, which takes over a second.
cuda_problem._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

_cuda_problems: dict[int, str | None] = {}

_emulated = False


def emulate() -> None:
    """Run the emulated CUDA kernels (``MSFLOW_EXT_EMULATE``) on CPU tensors, for tests.

    Raises:
        RuntimeError: This build has no emulated kernels.
    """
    global STATUS, _emulated
    if getattr(C, "cuda_architectures", None) != "emulated":
        raise RuntimeError(f"this build has no emulated CUDA kernels: kernels are {STATUS}")
    STATUS, _emulated = "compiled; CUDA kernels emulated", True


def runs_cuda(x: Tensor) -> bool:
    """Return whether CUDA kernels process ``x``."""
    return x.is_cuda or _emulated


def run(entry: str, on: Tensor, *arguments: Any, scratch: Callable[[], int] | None = None) -> Any:
    """Call an entry point of the compiled module for the device of ``on``.

    On CUDA it runs on the current stream. ``scratch`` returns the bytes of memory that the kernels need.
    """
    if not runs_cuda(on):
        return getattr(C, f"{entry}_cpu")(*arguments)
    memory = None if scratch is None else on.new_empty(scratch(), dtype=torch.uint8)
    address = 0 if memory is None else memory.data_ptr()
    if not on.is_cuda:
        return getattr(C, f"{entry}_cuda")(*arguments, address, 0)
    with torch.cuda.device(on.device):
        stream = torch.cuda.current_stream().cuda_stream
        return getattr(C, f"{entry}_cuda")(*arguments, address, stream)


_warned = False


def _warn_once() -> None:
    """Warn that the reference runs because no kernel is compiled."""
    global _warned
    if not _warned and _forced.get() is None and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"msflow_ext runs its slower reference: kernels {STATUS}. Install a C++17 compiler (g++, clang++ or Visual "
            "Studio's), then msflow_ext again; `msflow info` shows why the last attempt failed.",
            stacklevel=4,
        )


def strides(x: Tensor) -> tuple[int, int, int] | None:
    """Return the strides of sample, channel and position, or None if positions have no common stride."""
    shape, stride = x.shape, x.stride()  # Read once: this runs for every operand of every call.
    step: int | None = None
    following = 0
    for i in range(len(shape) - 1, 1, -1):  # Indices, because slices of a shape are slow.
        size, s = shape[i], stride[i]
        if size == 1:
            continue
        if step is None:
            step = s
        elif s != following:
            return (stride[0], 1, 1) if 0 in shape else None
        following = s * size
    return stride[0], stride[1] if shape[1] > 1 else 1, 1 if step is None else step


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a position are adjacent: channels_last, a slice of it, or ``(N, C)``."""
    if x.size(1) > 1 and x.stride(1) != 1:
        return False
    s = strides(x)
    return s is not None and (s[2] != 1 or math.prod(x.shape[2:]) == 1)


def in_memory(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if its memory does not hold its values (lazily negated views, zero tensors)."""
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


def views(channels_last: bool, *tensors: Tensor | None) -> tuple[list[Tensor | None], list[View]]:
    """Return tensors in this memory format, copied if necessary, and their descriptions for a kernel.

    A description is (address, element type, stride of sample, stride of channel, stride of position). The caller must
    keep the tensors alive while a kernel uses it.
    """
    kept: list[Tensor | None] = []
    out: list[View] = []
    for x in tensors:
        s = None if x is None else strides(x)
        if x is not None and (
            s is None or (s[1] if channels_last else s[2]) != 1 or (runs_cuda(x) and _slides(x, s))
        ):
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
            s = strides(x)
        kept.append(x)
        out.append(None if x is None or s is None else (address_of(x), DTYPES[x.dtype], *s))
    return kept, out


def address_of(x: Tensor) -> int:
    """Return the address of the first element.

    Raises:
        ValueError: The address is not aligned to the element size. On a GPU that would break the whole process.
    """
    address = x.data_ptr()
    if runs_cuda(x) and address % x.itemsize:
        raise ValueError(
            f"the memory of a {x.dtype} tensor {tuple(x.shape)} must begin at a multiple of {x.itemsize} bytes, got {address:#x}"
        )
    return address


def _slides(x: Tensor, s: tuple[int, int, int]) -> bool:
    """Return whether ``x`` is a view of sliding windows one element apart, which breaks 16-byte alignment."""
    if s[0] != 1 and s[1] != s[2]:
        return False
    sizes = (x.size(0), x.size(1), math.prod(x.shape[2:]))
    return [size > 1 and step == 1 for size, step in zip(sizes, s, strict=True)].count(True) > 1


def addresses(*vectors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Return contiguous vectors and their addresses, 0 for None. The caller must keep the vectors alive."""
    kept = [None if v is None else v.contiguous() for v in vectors]
    return kept, [0 if v is None else address_of(v) for v in kept]


def empty(
    like: Tensor,
    channels: int,
    channels_last: bool,
    dtype: torch.dtype | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Return a new tensor ``(N, channels, *size)`` in this memory format; ``size`` is by default that of ``like``.

    It is never a view: autograd forbids in-place changes of views that a custom function returns.
    """
    sizes = like.shape[2:] if size is None else size
    shape = (like.size(0), channels, *sizes)
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    steps = [max(channels, 1)]
    for each in reversed(sizes):
        steps.insert(0, steps[0] * max(each, 1))
    return like.new_empty_strided(shape, (steps[0], 1, *steps[1:]), dtype=dtype)
