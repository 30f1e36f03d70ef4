"""Compare the results of several providers of a computation, then time them in turns."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msflow_ext.bench import machine, memory
from msflow_ext.bench.summary import difference, tensors_of
from msflow_ext.hardware import has_bfloat16

MOST_ROUNDS = 40
SAMPLE_SECONDS = 2e-3  # shorter calls are repeated until a sample takes this long
WARM_UP_SECONDS = 1.0
MOST_SETS = 64


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Attributes:
        make: builds the callable that is called with the inputs of the case. Building is not timed.
        tolerance: largest deviation from the expected results, relative to their largest magnitude.
        slow: building takes a minute or more, so it is only done on request.
        bf16: PyTorch convolves in bfloat16. Not timed if the processor has no instructions for it.
        expected: computes the expected results, if they differ from those of the case.
    """

    make: Callable[[], Callable[..., Any]]
    tolerance: float = 1e-4
    slow: bool = False
    bf16: bool = False
    expected: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Case:
    """One computation on given data, and its providers.

    Attributes:
        name: unique name with sizes and dtype.
        inputs: draws the arguments of a call.
        providers: implementations by name.
        expected: name of the provider whose results are right, or a function of the inputs that returns them.
        bytes: bytes that one call must read and write, for GB/s; 0 if unknown.
        hot: use the same inputs, which may be cached, in every call. Otherwise inputs rotate past the last-level cache.
        grad: record gradients.
        calls: number of first calls to compare; more than one if a call changes the provider.
        rounds: smallest number of rounds.
        memory: also measure the peak memory of a call and, with ``grad``, the memory saved for the backward pass.
        facts: returns plain values to store with the times.
    """

    name: str
    inputs: Callable[[], Sequence[Any]]
    providers: Mapping[str, Provider]
    expected: str | Callable[..., Any]
    bytes: int = 0
    hot: bool = False
    grad: bool = False
    calls: int = 1
    rounds: int = 5
    memory: bool = False
    facts: Callable[[], Mapping[str, Any]] | None = None


@dataclass
class Ready:
    """The providers of a case that gave the expected results, and sets of inputs for them."""

    case: Case
    runs: dict[str, Callable[..., Any]]
    sets: list[Sequence[Any]]
    found: dict[
        str, dict[str, Any]
    ]  # error and tolerance of each provider, or the reason why it was refused

    def arguments(self) -> Iterator[Sequence[Any]]:
        return itertools.cycle(self.sets)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set the number of threads of PyTorch and the kernels inside the context; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(case: Case, names: Sequence[str] | None = None, *, slow: bool = False) -> Ready:
    """Build the providers of a case and compare their results with the expected ones.

    Args:
        case: the case.
        names: names of the providers; by default all.
        slow: also build providers that take a minute or more.
    """
    if slow:
        torch.compiler.reset()  # otherwise calls would first try the code of other cases
    chosen = [n for n, p in case.providers.items() if slow or not p.slow]
    chosen = [n for n in chosen if names is None or n in names]
    inputs = case.inputs()
    ready = Ready(case, {}, _copies(case, inputs), {})
    with torch.set_grad_enabled(case.grad):
        common: list[Any] = []
        if isinstance(case.expected, str):
            ready.runs[case.expected] = case.providers[case.expected].make()
            common = _results(ready.runs[case.expected], inputs, case.calls)
        elif any(case.providers[n].expected is None for n in chosen):
            common = _results(case.expected, inputs, case.calls)
        for name in chosen:
            _compare(ready, name, inputs, common)
    if case.expected in ready.runs and case.expected not in chosen:
        del ready.runs[str(case.expected)]
    return ready


def _compare(ready: Ready, name: str, inputs: Sequence[Any], common: list[Any]) -> None:
    """Build one provider, and keep it if its first results are as expected, else record why it is refused."""
    case, provider = ready.case, ready.case.providers[name]
    found = ready.found[name] = {}
    if provider.bf16 and not has_bfloat16():
        found["refused"] = "this processor has no instructions for bfloat16"
        return
    if name == case.expected:
        found.update(error=0.0, tolerance=provider.tolerance)
        return
    expected = common if provider.expected is None else [provider.expected(*inputs)]
    try:
        run = provider.make()
        error = max(map(difference, _results(run, inputs, case.calls), expected))
    except Exception as failure:  # third-party code may raise anything; still time the others
        reason = " ".join(str(failure).split())[:300]
        found["refused"] = f"{type(failure).__name__}: {reason}"
        return
    found.update(error=_rounded(error), tolerance=provider.tolerance)
    if error <= provider.tolerance:
        ready.runs[name] = run
    else:
        found["refused"] = (
            f"results deviate by {error:.1e}, more than the tolerance of {provider.tolerance:.1e}"
        )


def measure(case: Case, *, slow: bool = False, seconds: float = 20.0) -> dict[str, Any]:
    """Time a case, and return a row of results as plain values for JSON.

    Args:
        case: the case.
        slow: also time providers that take a minute or more to build.
        seconds: time after which no round begins once there are ``case.rounds`` of them.

    Returns:
        Name, sizes and conditions of the case. By provider it holds the ``error``, the ``ms`` of every round or why it
        was ``refused``, and ``peak_mb`` and ``saved_mb`` if measured. With ``case.bytes`` there is a provider ``copy``,
        which moves as many bytes in the same rounds. ``others`` is the share of the machine that other processes used.
    """
    others, load = machine.Others(), machine.load_average()
    ready = prepare(case, slow=slow)
    found = ready.found
    with torch.set_grad_enabled(case.grad):
        if case.memory:
            for name, run in ready.runs.items():
                if not case.providers[name].slow:
                    found[name] |= _memory(run, ready.sets[0], case.grad)
        calls = {name: (run, ready.arguments()) for name, run in ready.runs.items()}
        if case.bytes:
            calls["copy"] = (_copy, itertools.cycle(_copy_buffers(case, len(ready.sets))))
            found["copy"] = {}
        for name, samples in _rounds(calls, len(ready.sets), case.rounds, seconds).items():
            found[name]["ms"] = samples
    return {
        "case": case.name,
        "threads": torch.get_num_threads(),
        "hot": case.hot,
        "bytes": case.bytes,
        "facts": dict(case.facts()) if case.facts else {},
        "others": others.share(),
        "load_average": [load, machine.load_average()],
        "providers": found,
    }


def _results(run: Callable[..., Any], inputs: Sequence[Any], calls: int) -> list[Any]:
    """Return copies of the results of the first calls, because a provider may reuse its memory."""
    return [[t.clone() for t in tensors_of(run(*inputs))] for _ in range(calls)]


def _copies(case: Case, inputs: Sequence[Any]) -> list[Sequence[Any]]:
    """Return so many copies of the inputs that none is still cached when it is used again."""
    nbytes = sum(t.nbytes for t in _leaves(inputs))
    if case.hot or not nbytes:
        return [inputs]
    count = min(MOST_SETS, 1 + math.ceil(2 * machine.cache_bytes() / nbytes))
    return [inputs, *(_clone(inputs) for _ in range(count - 1))]


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return [_clone(each) for each in value]
    return value


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _copy_buffers(case: Case, sets: int) -> list[tuple[Tensor, Tensor]]:
    count = max(1, case.bytes // 8)  # float32: half of the bytes are read, half are written
    return [(torch.ones(count), torch.zeros(count)) for _ in range(sets)]


def _memory(run: Callable[..., Any], inputs: Sequence[Any], saves: bool) -> dict[str, Any]:
    """Return the megabytes at the peak of a call, and those saved for the backward pass without parameters."""
    peak = memory.peak(lambda: run(*inputs))
    found: dict[str, Any] = {} if peak is None else {"peak_mb": _rounded(peak / 1e6)}
    if saves:
        found["saved_mb"] = _rounded(memory.saved(lambda: run(*inputs)) / 1e6)
    return found


def _rounds(
    calls: Mapping[str, tuple[Callable[..., Any], Iterator[Sequence[Any]]]],
    sets: int,
    least: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Return the milliseconds per call of each, one sample per round; the order rotates between rounds."""
    repeats = {
        name: 1 if least == 1 else max(1, math.ceil(SAMPLE_SECONDS / _warm_up(*call, sets)))
        for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least and time.perf_counter() - began > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            run, arguments = calls[name]
            samples[name].append(_rounded(1e3 * _time(run, arguments, repeats[name])))
    return samples


def _warm_up(run: Callable[..., Any], arguments: Iterator[Sequence[Any]], sets: int) -> float:
    """Call with every set of inputs, for a second at most, and return the seconds of the fastest call."""
    began, fastest = time.perf_counter(), math.inf
    for _ in range(max(2, sets)):
        fastest = min(fastest, _time(run, arguments, 1))
        if time.perf_counter() - began > WARM_UP_SECONDS:
            break
    return fastest


def _time(run: Callable[..., Any], arguments: Iterator[Sequence[Any]], repeats: int) -> float:
    """Return the seconds per call."""
    began = time.perf_counter()
    for _ in range(repeats):
        run(*next(arguments))
    return (time.perf_counter() - began) / repeats


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
