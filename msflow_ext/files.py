"""Write files atomically, and lock folders so that one process at a time writes into them."""

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

#: Name of the lock file in a folder that a process writes. Readers ignore it.
LOCK = ".msflow.lock"
#: Error codes for a full disk, quota or file size limit.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_UNFINISHED = ".msflow.tmp"  # suffix of the folders in which files are written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces ``path`` if the block ends without an error.

    A reader sees the old file or the new one, never a part, even if this process is killed. The file has the mode that
    the umask gives, whatever mode its writer chose. The temporary path is in a hidden folder, which is removed with
    everything that a writer leaves in it. After a kill, the next write or lock removes it.
    """
    folder = path.with_name(f".{path.name}{_UNFINISHED}")
    temporary = folder / "new"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(folder)
        folder.mkdir()
        mode = _default_mode(temporary)
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # its message is already a sentence
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)
    # The new name must reach the disk too, on platforms that can flush a folder.
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder if it exists, or the file or link in its place; links are not followed."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _default_mode(path: Path) -> int:
    """Return the permissions of a new file at ``path``, which is removed again."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(file).st_mode)
    finally:
        os.close(file)
        path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Lock ``folder`` for writing, and create it if it does not exist.

    Unfinished files of killed processes directly inside it are removed. The operating system releases the lock when the
    process ends, however it ends. Between machines, the lock depends on the file system. If that has no locks, a
    warning says so.

    Raises:
        BlockingIOError: another process, or another part of this one, writes into the folder.
        OSError: the folder cannot be written.
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
        # Unlink before the release: a process that waits for this file notices, and opens the next one.
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)
        lock.release(force=True)
        if new:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


def check_writable(folder: Path) -> None:
    """Raise an OSError if ``folder`` cannot be created or written. Nothing is left behind."""
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
    """Write UTF-8 text atomically. File names in it need not be valid Unicode."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or holds another kind of value.
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
