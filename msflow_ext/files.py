"""Atomic writes, and folders that only one process writes at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Name of the lock file in a folder; readers of run folders and archives skip it.
LOCK = ".msflow.lock"
#: Error codes of a full disk, quota or limit.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_UNFINISHED = ".msflow.tmp"  # suffix of folders in which files are prepared


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a path whose file takes the place of ``path`` when the block ends without an error.

    A reader, or a process killed at any moment, sees the old file or the new one, never a part. The file has the mode
    that the umask gives, whatever mode its writer chose. The lent path lies in a hidden folder of its own: with it goes
    what else a writer leaves beside its file, now or, after a kill, when ``path`` is written or its folder locked again.
    """
    folder = path.with_name(f".{path.name}{_UNFINISHED}")
    temporary = folder / "new"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(folder)
        folder.mkdir()
        mode = _usual_mode(temporary)
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # the error has a message already
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)
    # The new name itself must reach the disk, too, where the platform can flush a folder.
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove what is there, if anything: a folder, or a file or link in its place, which is not followed."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _usual_mode(path: Path) -> int:
    """Return the permissions that a new file at ``path`` gets; the file is removed again."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(file).st_mode)
    finally:
        os.close(file)
        path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Write into ``folder``, which is made if it is not there, while no other process does.

    What killed processes left unfinished right inside it is removed.
    The operating system holds the lock for the process and lets go of it when that ends, however it ends. It is kept
    between machines as far as the file system does so; where it knows no locks, there is a warning.

    Raises:
        BlockingIOError: another process, or another part of this one, writes into it. OSError: it cannot be written.
    """
    from filelock import FileLock, Timeout

    check_writable(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{folder} is being written by another process: wait until it ends, or choose another folder"
        ) from None
    try:
        for unfinished in folder.glob(f".*{_UNFINISHED}"):
            _remove(unfinished)
        yield folder
    finally:
        # While it is held: who waits for a file that has lost its name notices, and takes the next one.
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)
        lock.release(force=True)
        if new:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be written into ``folder``. Leave nothing behind."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(f"folder {folder} cannot be written: {error.strerror}") from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; names of files in it need not be valid Unicode."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
