"""Checks of the compiled module: integers that no tensor has raise an exception, and never crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msflow_ext import ops
from msflow_ext.ops import _backend

pytestmark = pytest.mark.skipif(_backend.C is None, reason=f"kernels {_backend.STATUS}")

EXAMPLES = int(os.environ.get("MSFLOW_EXAMPLES", "100"))
REFUSALS = (ValueError, TypeError, RuntimeError, OverflowError, MemoryError)


class Address(int):
    """Address of memory that is large enough for every call below; 0 must be refused."""


class Optional(Address):
    """Address that may be 0."""


class Code(int):
    """Element type."""


class Free(int):
    """Integer for which every value is valid."""


MEMORY = torch.zeros(1 << 20, dtype=torch.uint8)
THRESHOLDS = torch.arange(8.0).flip(0)  # a call reads 3 of them, also as float64
AT, MAYBE, FLOAT = Address(MEMORY.data_ptr()), Optional(MEMORY.data_ptr()), Code(0)

CONTIGUOUS, NULLABLE = (AT, FLOAT, 40, 4, 1), (MAYBE, FLOAT, Free(0), 4, 1)
HALF, COPY = (AT, Code(2), 40, 4, 1), (MAYBE, Code(2), 40, 4, 1)
CHANNELS_LAST = (AT, FLOAT, 40, 1, 5)
COUPLING = ("Coupling", (2, 3, 2, 4, 3), False, Code(0), 2.0, 9.0, MAYBE, MAYBE, Optional(0))
NORM = ("Norm", (2, 5, 4), False, True, 1e-5, AT, AT)
RESAMPLE = ("Resample", (2, 3), (4, 5), (2, 3), False)
WINOGRAD = ("Winograd", (2, 3, 4, 5), (4, 4, 5), 2, (1, 1), True, FLOAT, AT, AT)
WEIGHT = ("WinogradWeight", (3, 2, 16), AT, (18, 9), True, FLOAT, AT, MAYBE, AT)
MAPS = [(AT, 2, 3), (AT, 4, 2)]

# Valid arguments of every entry point. A tuple that begins with a name describes an object of that class.
CALLS: dict[str, tuple[Any, ...]] = {
    "coupling_forward": (COUPLING, *[CONTIGUOUS] * 2, HALF, *[CONTIGUOUS] * 2, COPY, MAYBE),
    "coupling_inverse": (COUPLING, *[CONTIGUOUS] * 4, AT),
    "coupling_backward": (
        *(COUPLING, CONTIGUOUS, CONTIGUOUS, COPY, AT),
        *(CONTIGUOUS, CONTIGUOUS, HALF, CONTIGUOUS, CONTIGUOUS, HALF, MAYBE, MAYBE),
    ),
    "coupling_likelihood": (COUPLING, *[CONTIGUOUS] * 3, AT),
    "norm_forward": (NORM, CONTIGUOUS, NULLABLE, CONTIGUOUS, MAYBE),
    "norm_backward": (NORM, CONTIGUOUS, CONTIGUOUS, NULLABLE, AT, CONTIGUOUS, NULLABLE, AT, AT),
    "pool_forward": (RESAMPLE, CONTIGUOUS, CONTIGUOUS),
    "pool_backward": (RESAMPLE, CONTIGUOUS, CONTIGUOUS),
    "upsample_forward": (RESAMPLE, CONTIGUOUS, HALF, HALF),
    "upsample_backward": (RESAMPLE, CONTIGUOUS, CONTIGUOUS),
    "square_sums": (2, 5, 4, False, CONTIGUOUS, MAYBE, MAYBE),
    "aggregate": (FLOAT, 2, 4, 5, 3, MAPS, *[AT] * 5),
    "mean_aggregate": (FLOAT, 2, 4, 5, MAPS, AT, AT),
    "ranking": (FLOAT, AT, AT, 7, Address(THRESHOLDS.data_ptr()), 3, Free(2), AT, AT),
    "winograd": (WINOGRAD, CHANNELS_LAST, CHANNELS_LAST),
    "winograd_weight": (WEIGHT,),
}
WITHOUT_SCRATCH = ("coupling_likelihood", "norm_forward", "pool", "upsample")
if getattr(_backend.C, "cuda_architectures", "") == "emulated":
    CALLS = {f"{name}_cpu": call for name, call in CALLS.items()} | {
        f"{name}_cuda": (*call, Free(0) if name.startswith(WITHOUT_SCRATCH) else AT, Free(0))
        for name, call in CALLS.items()
        if name not in ("ranking", "winograd", "winograd_weight")
    }
else:
    CALLS = {f"{name}_cpu": call for name, call in CALLS.items()}

HUGE = [2**49, 2**62, 2**63 - 1, 2**64, 2**200]
NEGATIVE = [-1, -7, -(2**31), -(2**63), -(2**64)]


def run(name: str, arguments: Any) -> None:
    """Call an entry point; a tuple that begins with a name becomes an object of that class."""
    C = _backend.C
    described = isinstance(arguments[0], tuple) and isinstance(arguments[0][0], str)
    first = getattr(C, arguments[0][0])(*arguments[0][1:]) if described else arguments[0]
    getattr(C, name)(first, *arguments[1:])


def leaves(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield path and value of every integer that is not ``Free``."""
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from leaves(part, (*path, i))
    elif isinstance(value, int) and not isinstance(value, (bool, Free)):
        yield path, value


def replaced(value: Any, path: tuple[int, ...], by: int) -> Any:
    if not path:
        return by
    parts = [*value]
    parts[path[0]] = replaced(parts[path[0]], path[1:], by)
    return type(value)(parts)


def refused(value: int) -> list[int]:
    """Return integers that no tensor has in the place of this value."""
    if isinstance(value, Address):
        return [*NEGATIVE, 2**64 - 1, 2**64, *([] if isinstance(value, Optional) else [0])]
    return [*NEGATIVE, *HUGE, *([4, 5] if isinstance(value, Code) else [])]


def harmless(value: int) -> list[int]:
    """Return integers that keep the call within the memory of the valid call."""
    if isinstance(value, Address):
        return [0, value]
    return [0, 1, 2, 3] if isinstance(value, Code) else [*range(value + 1)]


@pytest.mark.parametrize("name", CALLS)
def test_an_entry_point_accepts_the_arguments_of_tensors(name: str) -> None:
    run(name, CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_an_integer_that_no_tensor_has_is_refused(name: str) -> None:
    for path, value in leaves(CALLS[name]):
        for bad in refused(value):
            try:
                run(name, replaced(CALLS[name], path, bad))
            except REFUSALS:
                continue
            pytest.fail(f"{name} accepts {bad} for {value} at {path}")


@pytest.mark.parametrize("name", CALLS)
def test_any_mixture_of_integers_gives_a_result_or_an_exception(name: str) -> None:
    at = dict(leaves(CALLS[name]))

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.data(), st.lists(st.sampled_from([*at]), min_size=1, max_size=6))
    def check(data: st.DataObject, paths: list[tuple[int, ...]]) -> None:
        arguments = CALLS[name]
        for path in paths:
            # Packets of 16 bytes must stay aligned.
            choice = [0, at[path]] if name.endswith("_cuda") else harmless(at[path])
            choice = choice + refused(at[path])[: data.draw(st.integers(0, 3))]
            arguments = replaced(arguments, path, data.draw(st.sampled_from(choice)))
        try:
            run(name, arguments)
        except REFUSALS:
            return

    check()


def test_thresholds_that_do_not_decrease_are_refused() -> None:
    call = CALLS["ranking_cpu"]
    for wrong in ([1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, -0.0, -1.0]):
        thresholds = torch.tensor(wrong)
        with pytest.raises(ValueError, match="thresholds must fall strictly"):
            run("ranking_cpu", (*call[:4], thresholds.data_ptr(), *call[5:]))


def test_tensors_of_different_types_are_refused() -> None:
    double = (AT, Code(1), 40, 4, 1)
    with pytest.raises(ValueError, match="x1 must have the element type of the call"):
        run("coupling_forward_cpu", (COUPLING, double, *[CONTIGUOUS] * 4, None, AT))
    with pytest.raises(ValueError, match="copy must differ from y1 in its element type"):
        run("coupling_forward_cpu", (COUPLING, *[CONTIGUOUS] * 6, AT))
    with pytest.raises(ValueError, match="copy must have the element type of the call"):
        run("coupling_forward_cpu", (COUPLING, *[CONTIGUOUS] * 2, HALF, *[CONTIGUOUS] * 3, AT))
    with pytest.raises(ValueError, match="x must be float32 or have the element type of the call"):
        run("upsample_forward_cpu", (RESAMPLE, CONTIGUOUS, double, double))
    with pytest.raises(ValueError, match="y must have the element type of the call"):
        run("norm_forward_cpu", (NORM, CONTIGUOUS, None, double, 0))
    with pytest.raises(ValueError, match="x must be float32, or bfloat16"):
        run("winograd_cpu", (WINOGRAD, (AT, Code(1), 40, 1, 5), CHANNELS_LAST))


# Sizes of tensors without elements, for which no memory must be allocated.
MANY, FEWER = 2**40, 2**29


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (ops.affine_coupling, [(0, FEWER, 2), (0, FEWER, 2), (0, 2 * FEWER, 2)], (0,)),
        (ops.affine_coupling, [(1, 2 * FEWER, 0), (1, FEWER, 0), (1, 2 * FEWER, 0)], (1,)),
        (ops.affine_coupling_inverse, [(1, FEWER, 0), (1, FEWER, 0), (1, 2 * FEWER, 0)], (1,)),
        (ops.coupling_log_likelihood, [(0, FEWER, 2), (0, FEWER, 2), (0, 2 * FEWER, 2)], (0, 2)),
        (ops.log_likelihood_map, [(0, MANY, 5)], (0, 5)),
        (ops.half_square_norm, [(1, MANY, 0)], (1,)),
        (ops.upsample_and_add, [(0, 1, MANY, 1), (0, 1, 3, 1)], (0, 1, MANY, 1)),
        (lambda x: ops.pool_and_concatenate([x], (2, 1)), [(0, 1, MANY, 1)], (0, 1, 2, 1)),
        (lambda x: ops.aggregate([x], (MANY, 2)).score, [(0, 2, 3)], (0,)),
        (lambda x: ops.mean_aggregate([x], (MANY, 2)).anomaly_map, [(0, 2, 3)], (0, MANY, 2)),
    ],
)
def test_a_huge_tensor_without_elements_needs_no_memory(
    native: None, function: Any, shapes: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    differentiable = len(shapes[0]) > 3 or function in (ops.affine_coupling, ops.half_square_norm)
    operands = [torch.empty(shape).requires_grad_(differentiable) for shape in shapes]
    found = function(*operands)
    found = found if isinstance(found, tuple) else (found,)
    assert found[-1].shape == expected
    assert not any(t.count_nonzero() for t in found)
    if differentiable:
        gradients = torch.autograd.grad([t.sum() for t in found], operands)
        assert [g.shape for g in gradients] == shapes
