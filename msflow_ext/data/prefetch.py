"""Decode images on threads, ahead of the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Decoded = TypeVar("Decoded")


def decoded(
    decode: Callable[[Any], Decoded], chunks: Iterable[list[Any]], workers: int
) -> Iterator[list[Decoded]]:
    """Yield ``decode(source)`` for each chunk of sources, decoded one chunk ahead on threads.

    If a source fails, the results before it in its chunk are yielded first; then the error is raised.
    """
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[list[Future[Decoded]]] = deque()
        for chunk in chunks:
            ahead.append([pool.submit(decode, source) for source in chunk])
            if len(ahead) > 1:
                yield from _results(ahead.popleft())
        while ahead:
            yield from _results(ahead.popleft())


def _results(futures: list[Future[Decoded]]) -> Iterator[list[Decoded]]:
    wrong = next((i for i, future in enumerate(futures) if future.exception()), len(futures))
    if wrong:
        yield [future.result() for future in futures[:wrong]]
    if wrong < len(futures):
        futures[wrong].result()
