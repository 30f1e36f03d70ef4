"""Follow a folder: images as they arrive, and a table of scores that survives interruptions."""

from __future__ import annotations

import os
import signal
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from msflow_ext.data.walk import Found, walk
from msflow_ext.runs.csv_cells import csv_line, whole_lines
from msflow_ext.runs.score_table import HEADER, Row, read_scores, row_line

LONGEST = 2**15  # bytes of a row that was cut off; more is no such row


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """An event that the first SIGINT or SIGTERM sets; the second does what it always does.

    Only the main thread can ask for signals.
    """
    stop = Event()
    before: dict[int, Any] = {}

    def on_signal(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arrivals(
    folder: Path,
    known: Container[str],
    stop: Event,
    *,
    interval: float = 0.5,
    apart: Sequence[Path] = (),
) -> Iterator[tuple[str, Path]]:
    """Name and path of each image that comes to lie in ``folder`` or in folders there, until ``stop``.

    The name is the path from ``folder`` on. An image has arrived when two looks, ``interval`` seconds
    apart, find the same size above 0 and the same time of change: one still being written is left
    alone, one moved in is taken at the second look. An image comes once, and again only if it has
    changed and its name is not in ``known``. The folder is searched by
    :func:`msflow_ext.data.walk.walk`, which says what is passed over and what ``apart`` is; the log
    names what is passed over at first, and later what is for a reason.

    Raises:
        FileNotFoundError: the folder is not there, or not any more.
    """
    offered: dict[str, tuple[int, int]] = {}
    last: dict[str, tuple[int, int]] = {}
    said: set[str] | None = None
    while not stop.is_set():
        found = _walked(folder, apart)
        said = _say_passed_over(found, said)
        now = {
            name: (status.st_size, status.st_mtime_ns)
            for name, status in found.files.items()
            if status.st_size
        }
        for name in sorted(now):
            if name in known or now[name] != last.get(name) or now[name] == offered.get(name):
                continue
            offered[name] = now[name]
            yield name, folder / name
            if stop.is_set():
                return
        last = now
        stop.wait(interval)


def _walked(folder: Path, apart: Sequence[Path]) -> Found:
    try:
        return walk(folder, apart=apart)
    except OSError as error:
        raise FileNotFoundError(f"{folder} cannot be watched: {error.strerror}") from error


def _say_passed_over(found: Found, said: set[str] | None) -> set[str]:
    """Log what is passed over and was not ``said`` before; at first all of it."""
    new = {
        name: reason
        for name, reason in found.passed_over.items()
        if said is None or (reason and name not in said)
    }
    replace(found, passed_over=new).log_passed_over()
    return (said or set()) | new.keys()


class ScoreLog:
    """A table of scores as :func:`msflow_ext.runs.score_table.write_scores` makes, to which rows are appended.

    A row is on the disk when :meth:`append` returns. A last row that was cut off, as by a loss of
    power, is removed on opening. An image that could not be scored has a row that says why, and
    another one when it is scored later: the last row of a name counts.

    Args:
        path: of the table; made with its first row if it is not there.

    Attributes:
        names: of the images with a score, in the order of their rows.
        failed: names of the others, each with its error.

    Raises:
        ValueError: the file is another kind of table, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, None] = {}
        self.failed: dict[str, str] = {}
        text = path.read_bytes() if path.is_file() else b""
        size = whole_lines(text)
        self._empty = not size
        if not self._empty:
            begin = text[: text.find(b"\n") + 1].decode("utf-8", "replace")
            if begin != csv_line(HEADER):
                raise ValueError(
                    f"{path} must begin with {','.join(HEADER)}, got {begin.strip()}, as an older version or "
                    "another program writes it: choose another --out"
                )
            for row in read_scores(path, size):
                self._note(row)
        if len(text) - size > LONGEST:
            raise ValueError(f"{path} is damaged: a quotation mark is missing after {size} bytes")
        if size < len(text):
            os.truncate(path, size)

    def append(self, row: Row) -> None:
        """Write one image's row; OSError if the disk does not take all of it, and then none of it.

        An image that fails again for the same reason gets no second row.
        """
        if row.error and self.failed.get(row.name) == row.error:
            return
        text = (csv_line(HEADER) if self._empty else "") + row_line(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            _write_all(file.fileno(), text.encode("utf-8", "surrogateescape"), self.path)
        self._empty = False
        self._note(row)

    def _note(self, row: Row) -> None:
        if row.error:
            self.failed[row.name] = row.error
        else:
            self.failed.pop(row.name, None)
            self.names[row.name] = None


def _write_all(file: int, content: bytes, path: Path) -> None:
    size = os.fstat(file).st_size
    try:
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
    except OSError as error:
        os.ftruncate(file, size)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
