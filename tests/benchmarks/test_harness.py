"""The harness of the benchmarks times only providers with right results, and selects cases by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext.bench import (
    TINY,
    Case,
    Provider,
    baseline,
    difference,
    harness,
    machine,
    measure,
    ratio,
    table,
)
from msflow_ext.bench.cases import flows

Load = Callable[[str], ModuleType]


def doubling(wrong: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(
        name="double",
        inputs=lambda: [torch.arange(100.0)],
        providers={"right": Provider(lambda: lambda x: 2 * x), "wrong": Provider(lambda: wrong)},
        expected=lambda x: 2 * x.double(),
        rounds=2,
        **options,
    )


def one_element_off(x: Tensor) -> Tensor:
    return torch.where(x == 50, 2 * x + 1, 2 * x)


@pytest.mark.parametrize(
    "wrong",
    [one_element_off, lambda x: torch.where(x == 50, math.nan, 2 * x), lambda x: 2 * x[:-1]],
    ids=["one-element", "nan", "shape"],
)
def test_a_provider_with_wrong_results_is_refused_and_not_timed(
    wrong: Callable[[Tensor], Tensor],
) -> None:
    row = measure(doubling(wrong), seconds=0)
    assert "deviate" in row["providers"]["wrong"]["refused"]
    assert "ms" not in row["providers"]["wrong"]
    assert len(row["providers"]["right"]["ms"]) == 2
    assert any("not timed" in line for line in table(row))


def test_a_provider_whose_later_results_differ_is_refused() -> None:
    state = [0.0]

    def drifting(x: Tensor) -> Tensor:
        state[0] += 1
        return 2 * x * state[0]

    row = measure(doubling(drifting, calls=2), seconds=0)
    assert "refused" in row["providers"]["wrong"]


def test_other_providers_are_timed_if_one_fails() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    found = measure(doubling(failing), seconds=0)["providers"]
    assert found["wrong"] == {"refused": "RuntimeError: no compiler"}
    assert found["right"]["ms"]


def test_bfloat16_is_not_timed_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able in (True, False):
        monkeypatch.setattr(harness, "has_bfloat16", lambda able=able: able)
        found = measure(flows(**TINY), seconds=0)["providers"]
        assert ("ms" in found["eager bf16"]) == able
        assert "ms" in found["eager fp32"] and "ms" in found["ours optimized bf16"]
    assert found["eager bf16"] == {"refused": "this processor has no instructions for bfloat16"}


def test_a_copy_of_as_many_bytes_is_timed_too() -> None:
    row = measure(doubling(lambda x: x + x, bytes=800), seconds=0)
    assert set(row["providers"]) == {"right", "wrong", "copy"}
    assert all(len(found["ms"]) == 2 for found in row["providers"].values())


def test_inputs_rotate_past_the_cache_unless_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1000)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for hot, addresses in seen.items():

        def watched(x: Tensor, addresses: set[int] = addresses) -> Tensor:
            addresses.add(x.data_ptr())
            return 2 * x

        measure(doubling(watched, hot=hot), seconds=0)
    assert len(seen[True]) == 1
    assert len(seen[False]) * 400 > 2 * 1000


def test_all_flows_agree_with_eager_pytorch_and_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "has_bfloat16", lambda: True)
    row = measure(flows(**TINY), seconds=0)
    for name, found in row["providers"].items():
        assert found["error"] <= (0.05 if "bf16" in name else 1e-4), name
        assert found["ms"], name


def test_saved_activations_exclude_parameters_and_inputs() -> None:
    layer = torch.nn.Linear(10, 10)
    case = Case(
        name="square of a layer",
        inputs=lambda: [torch.ones(2, 10)],
        providers={"torch": Provider(lambda: lambda x: layer(x).square().sum())},
        expected="torch",
        grad=True,
        memory=True,
    )
    found = measure(case, seconds=0)["providers"]["torch"]
    # The squared tensors, and the sum.
    assert found["saved_mb"] == pytest.approx((2 * 10 + 1) * 4 / 1e6)


def test_the_difference_is_relative_to_the_largest_magnitude() -> None:
    assert difference([torch.tensor([1.0, 4.0]), 2.0], [torch.tensor([2.0, 4.0]), 2.0]) == 0.25


def test_ratio_is_taken_within_each_round() -> None:
    assert ratio([10.0, 100.0, 1000.0], [5.0, 50.0, 500.0]) == 2


def test_kernels_agree_with_float64_in_the_suite(load: Load) -> None:
    for module in ("bench_norm", "bench_score", "bench_metrics"):
        case = load(f"kernels.{module}").cases(quick=True)[-1]
        found = measure(case, seconds=0)["providers"]
        assert "ms" in found["ours"], (case.name, found)


def test_the_baseline_is_the_reference_implementation_if_it_was_timed() -> None:
    timed, refused = {"ms": [1.0]}, {"refused": "wrong"}
    providers = {"eager fp32": timed, "reference fp32": timed, "ours": timed}
    assert baseline({"providers": providers}) == "reference fp32"
    assert baseline({"providers": {**providers, "reference fp32": refused}}) == "eager fp32"
    assert baseline({"providers": {"mine": refused, "theirs": timed}}) == "theirs"
    assert baseline({"providers": {"mine": refused}}) == ""


def test_cases_are_selected_by_file_or_by_the_beginning_of_their_names(load: Load) -> None:
    chosen = load("__main__").chosen
    whole = [case.name for case in chosen(["norm"], quick=True)]
    assert whole == [case.name for case in load("kernels.bench_norm").cases(quick=True)]
    some = [case.name for case in chosen(["norm fp32 nchw", "score"], quick=True)]
    assert {name.split()[0] for name in some} == {"norm", "likelihood", "aggregation"}
    assert 0 < sum(name.startswith("norm") for name in some) < len(whole)
    everything = [case.name for case in chosen([], quick=True)]
    assert len(set(everything)) == len(everything) and set(some) < set(everything)
    with pytest.raises(SystemExit, match="begin the name of a case, got 3, rnom"):
        list(chosen(["norm", "rnom", "3"], quick=True))
