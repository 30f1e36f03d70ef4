"""Watch a folder: yield images as they arrive, and append scores to a table that survives interruptions."""

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

LONGEST = 2**15  # bytes; an unfinished last row is shorter, so more means a damaged table


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second has its previous effect.

    Call it from the main thread: Python handles signals only there.
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
    """Yield the name and path of each image that arrives in ``folder`` or its subfolders, until ``stop``.

    An image is yielded when its size (above 0) and modification time have not changed for
    ``interval`` seconds. So an image that is still being written is not read. It is yielded again
    only if it has changed and its name is not in ``known``.

    The log names every file passed over in the first poll, and later only those with a reason.

    Args:
        folder: folder to watch, searched by :func:`msflow_ext.data.walk.walk`.
        known: names, relative to ``folder``, of images that need no score.
        stop: ends the iteration when set.
        interval: seconds between two polls of the folder.
        apart: folders to pass over, see :func:`msflow_ext.data.walk.walk`.

    Raises:
        FileNotFoundError: the folder does not exist, or no longer exists.
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
    """Log files passed over that were not ``said`` before, and return the names of all logged files."""
    new = {
        name: reason
        for name, reason in found.passed_over.items()
        if said is None or (reason and name not in said)
    }
    replace(found, passed_over=new).log_passed_over()
    return (said or set()) | new.keys()


class ScoreLog:
    """A table of scores, see :func:`msflow_ext.runs.score_table.write_scores`, that grows row by row.

    A row is on the disk when :meth:`append` returns. If the last row is incomplete, for example after
    a loss of power, opening the table removes it. An image that cannot be scored has a row with its
    error, and a second row once it is scored. The last row of a name counts.

    Args:
        path: path of the table; the first row creates it.

    Attributes:
        names: names of the images with a score, in the order of their rows.
        failed: errors of the images without a score, by name.

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
                    f"{path} must begin with {','.join(HEADER)}, got {begin.strip()}: an older version or "
                    "another program wrote it. Choose another --out"
                )
            for row in read_scores(path, size):
                self._note(row)
        if len(text) - size > LONGEST:
            raise ValueError(f"{path} is damaged: a quotation mark is missing after {size} bytes")
        if size < len(text):
            os.truncate(path, size)

    def append(self, row: Row) -> None:
        """Append the row of an image, unless the image failed before with the same error.

        Raises:
            OSError: the row cannot be written; the table is unchanged.
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
