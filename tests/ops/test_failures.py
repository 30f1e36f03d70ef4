"""Failures below Python raise an exception: memory, threads, objects without a value, interpreters."""

from __future__ import annotations

import ast
import copy
import ctypes
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from msflow_ext import ops
from msflow_ext.ops import _backend

pytestmark = [
    pytest.mark.skipif(_backend.C is None, reason=f"kernels {_backend.STATUS}"),
    pytest.mark.family("memory errors"),
]

C: Any = _backend.C
MEMORY = torch.zeros(1 << 16)
AT = MEMORY.data_ptr()

# (begin, end, context) and (begin, end, grain, body, context), as in csrc/common/parallel.h.
BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p
)


@pytest.fixture
def threads() -> Iterator[Callable[[Any], None]]:
    """Return ``threads(f)``: kernels call ``f`` instead of torch_parallel_for until the test ends."""
    yield lambda function: C.set_parallel_for(ctypes.cast(function, ctypes.c_void_p).value)
    C.set_parallel_for(_backend._parallel_for())


def run_whole(begin: int, end: int, grain: int, body: Any, context: int) -> int:
    body(begin, end, context)
    return 0


def run_one_by_one(begin: int, end: int, grain: int, body: Any, context: int) -> int:
    for i in range(begin, end):
        body(i, i + 1, context)
    return 0


def norm_of_huge_scratch(channels_last: bool) -> None:
    """Run a norm whose tasks need more memory than a process can address; they fail before they read a value."""
    channels = 2**46 if channels_last else 2**43
    norm = C.Norm((2, channels, 1), channels_last, False, 1e-5, AT, AT)
    x = (AT, 0, 0, 1, 0) if channels_last else (AT, 0, 0, 0, 1)
    C.norm_forward_cpu(norm, x, None, x, 0)


def kernels_still_work() -> bool:
    return ops.half_square_norm(torch.ones(4, 64, 64, 64)).tolist() == [64 * 64 * 32] * 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("loop", [None, run_whole, run_one_by_one])
def test_a_task_without_memory_raises_memory_error(
    threads: Callable[[Any], None], channels_last: bool, loop: Any
) -> None:
    function = PARALLEL_FOR(loop or run_whole)
    if loop is not None:
        threads(function)
    with pytest.raises(MemoryError, match="no memory for the intermediate results of a kernel"):
        norm_of_huge_scratch(channels_last)
    assert kernels_still_work()


def test_threads_that_do_not_start_raise_an_error(threads: Callable[[Any], None]) -> None:
    refusing = PARALLEL_FOR(lambda *_: 1)
    threads(refusing)
    with pytest.raises(RuntimeError, match="torch_parallel_for failed"):
        ops.half_square_norm(torch.ones(4, 64, 64, 64))


LIMITED = """
import resource, torch
from msflow_ext import ops
torch.set_num_threads(2)
C = 3_000_000
halves = [torch.ones(2, C // 2, 1) for _ in range(2)]
x, one, z = torch.ones(2, C, 1), torch.ones(C), torch.zeros(2, C, 1)
calls = {
    "coupling": lambda: ops.affine_coupling(*halves, z)[:2],
    "inverse": lambda: ops.affine_coupling_inverse(*halves, z)[:1],
    "likelihood": lambda: [ops.coupling_log_likelihood(*halves, z)],
    "norm": lambda: [ops.channel_norm(x, one, one)],
}
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
seen = set()
for name, call in calls.items():
    expected = [t.clone() for t in call()]
    for room in range(0, 160, 10):
        junk = [torch.full_like(t, 777) for t in expected]
        del junk
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, hard))
        try:
            outcome = "right" if all(map(torch.equal, call(), expected)) else "wrong"
        except MemoryError:
            outcome = "MemoryError"
        except RuntimeError as error:  # torch could not allocate the results
            outcome = "torch" if "alloc" in str(error).lower() else str(error)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        seen.add((name, outcome))
print(sorted(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_with_any_amount_of_memory_a_result_is_right_or_an_exception(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=tmp_path,  # the sources beside it would hide the installed package
        env={**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = ast.literal_eval(done.stdout)
    assert {outcome for _, outcome in seen} <= {"MemoryError", "torch", "right"}
    for name in ("coupling", "inverse", "likelihood", "norm"):
        assert (name, "MemoryError") in seen
        assert (name, "right") in seen


CLASSES = [] if C is None else [value for value in vars(C).values() if inspect.isclass(value)]
#: For each class, an entry point that accepts an object of it, and the other arguments.
ENTRY_POINTS = {
    "Coupling": ("coupling_inverse_cpu", *[None] * 4, 0),
    "Norm": ("norm_forward_cpu", *[None] * 3, 0),
    "Resample": ("pool_forward_cpu", None, None),
    "Winograd": ("winograd_cpu", None, None),
    "WinogradWeight": ("winograd_weight_cpu",),
    "WinogradGradient": ("winograd_gradient_cpu", None, None),
}


def hand_to_a_kernel(value: Any, cls: Any) -> None:
    """Call the entry point of ``cls`` with ``value``."""
    name, *rest = ENTRY_POINTS[cls.__name__]
    getattr(C, name)(value, *rest)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_object_without_a_value_never_reaches_a_kernel(cls: Any) -> None:
    message = f"{cls.__name__}: an object whose __init__ did not run cannot be used"
    blank = cls.__new__(cls)
    with pytest.raises(TypeError, match=message):
        hand_to_a_kernel(blank, cls)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        blank.__init__("nonsense")
    with pytest.raises(TypeError, match=message):
        hand_to_a_kernel(blank, cls)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot pickle"):
            copying(blank)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_object_cannot_take_the_place_of_another_class(cls: Any) -> None:
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Derived", (cls,), {})
    with pytest.raises(TypeError, match="immutable"):
        cls.__init__ = lambda self: None
    for other in CLASSES:
        if other is cls:
            continue
        blank = other.__new__(other)
        with pytest.raises(TypeError, match="assignment only supported for mutable types"):
            blank.__class__ = cls
        with pytest.raises(TypeError, match="incompatible function arguments"):
            hand_to_a_kernel(blank, cls)


OTHER_INTERPRETER = """
import importlib.util
spec = importlib.util.spec_from_file_location("msflow_ext.ops._C", PATH)
try: importlib.util.module_from_spec(spec)
except ImportError as error: print("refused:", error)
"""

INTERPRETERS = """
import importlib.util
try: import _xxsubinterpreters as interpreters
except ImportError: import _interpreters as interpreters
def load():
    spec = importlib.util.spec_from_file_location("msflow_ext.ops._C", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print("loaded", module.__name__, flush=True)
def refuse():
    other = interpreters.create()
    interpreters.run_string(other, OTHER)
    interpreters.destroy(other)
"""


@pytest.mark.parametrize("steps", ["load refuse load", "refuse load refuse"])
def test_another_interpreter_is_refused_and_the_main_one_still_works(steps: str) -> None:
    other = OTHER_INTERPRETER.replace("PATH", repr(C.__file__))
    code = INTERPRETERS.replace("PATH", repr(C.__file__)).replace("OTHER", repr(other))
    code += "".join(f"{step}()\n" for step in steps.split())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    refused = "refused: msflow_ext.ops._C works in Python's main interpreter only"
    says = {"load": "loaded msflow_ext.ops._C", "refuse": refused}
    assert sorted(done.stdout.splitlines()) == sorted(says[step] for step in steps.split())


@pytest.mark.family("builds")
@pytest.mark.parametrize("name", _backend._TORCH_LIBRARIES)
@pytest.mark.parametrize("in_folder", [True, False])
def test_torch_parallel_for_is_found_in_each_library_of_torch(
    monkeypatch: pytest.MonkeyPatch, threads: Any, name: str, in_folder: bool
) -> None:
    function = PARALLEL_FOR(run_whole)
    expected = str(Path(torch.__file__).parent / "lib" / name) if in_folder else name
    asked = []

    class Library:
        """Library that exports only its own symbols, as on Windows."""

        def __init__(self, path: str) -> None:
            asked.append(path)
            if path == expected:
                self.torch_parallel_for = function
            elif path != torch._C.__file__:
                raise OSError("no such library")

    with monkeypatch.context() as patched:
        patched.setattr(_backend.ctypes, "CDLL", Library)
        assert _backend._load() == (C, "compiled; threads of torch")
    assert (asked[0], asked[-1]) == (torch._C.__file__, expected)
    assert kernels_still_work()


@pytest.mark.family("builds")
def test_a_torch_without_parallel_for_runs_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend.ctypes, "CDLL", lambda path: object())
    status = "compiled; one thread, because this torch has no torch_parallel_for"
    assert _backend._load() == (C, status)
