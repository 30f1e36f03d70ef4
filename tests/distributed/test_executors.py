"""Tasks run where the flags say, and an error belongs to its task."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from msflow_ext.cli.flags import chosen_engine, device_of
from msflow_ext.distributed import executors
from msflow_ext.distributed.executors import on_ray, one_by_one


class Options(SimpleNamespace):
    """Flags as the parser returns them."""

    def __init__(self, **given: Any) -> None:
        default = {"engine": "local", "address": None, "tasks_at_once": None, "device": None}
        super().__init__(**{**default, "cpus_per_task": 1, "gpus_per_task": 0.0, **given})

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def test_the_local_engine_runs_tasks_in_order_and_returns_errors_with_their_tasks() -> None:
    def work(task: int) -> float:
        return 6 / task

    (first, wrong, last) = one_by_one(work, [3, 0, 2])
    assert (first, last) == ((3, 2.0, None), (2, 3.0, None))
    assert wrong[:2] == (0, None) and isinstance(wrong[2], ZeroDivisionError)


def test_an_interrupt_is_not_an_outcome_of_a_task() -> None:
    def work(task: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(one_by_one(work, [1]))


def test_flags_of_ray_need_engine_ray() -> None:
    assert chosen_engine(Options()) is one_by_one
    with pytest.raises(ValueError, match="--address must be given with --engine ray"):
        chosen_engine(Options(address="auto"))
    with pytest.raises(ValueError, match="--tasks-at-once must be given with --engine ray"):
        chosen_engine(Options(tasks_at_once=2))


def test_a_task_on_ray_computes_on_the_devices_that_it_reserves() -> None:
    assert device_of(Options(device="cuda:1")) == "cuda:1"
    assert device_of(Options(engine="ray")) == "cpu"
    assert device_of(Options(engine="ray", gpus_per_task=0.5)) == "cuda"
    with pytest.raises(ValueError, match="--device cuda with --engine ray needs --gpus-per-task"):
        device_of(Options(engine="ray", device="cuda"))


@pytest.mark.parametrize("wrong", [{"at_once": 0}, {"cpus": 0}, {"gpus": -1.0}])
def test_numbers_that_are_too_small_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        on_ray(**wrong)


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'msflow-ext\[ray\]'"):
        chosen_engine(Options(engine="ray"))
