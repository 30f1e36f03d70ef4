"""Walk a folder: which files are read, and which are passed over."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msflow_ext.files import LOCK
from msflow_ext.text_table import one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp")

#: Folders of pictures that this package writes, recognized by one of the files beside them.
PICTURES = ("maps", "masks")
BESIDE_PICTURES = ("scores.csv", "model.safetensors")

#: Reasons to pass over folders that the caller names, and folders of written pictures.
APART = "this command uses it for something else"
OURS = "written by msflow"

SHOWN = 5  # names in one line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The contents of a folder. Names are paths relative to the folder, with ``/``.

    Attributes:
        folder: the folder.
        files: the matching files and their status, sorted by folder and name.
        folders: names of the sub-folders that are not hidden.
        passed_over: everything else by name, with the reason, or ``""`` if the name shows it. The
            name of a folder ends in ``/`` and stands for its whole contents.
    """

    folder: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.files]

    def log_passed_over(self) -> None:
        """Log one line with the number and the first names of the files passed over, if there are any."""
        if self.passed_over:
            log.warning("%s: %s", one_line(str(self.folder)), summary(self.passed_over))


def walk(
    folder: str | Path,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    deep: bool = True,
    apart: Iterable[str | Path] = (),
) -> Found:
    """Find the files in ``folder`` and its sub-folders that have one of the suffixes, in any case.

    All commands that read a folder of images follow these rules:

    * Hidden files and folders, whose names begin with a dot, are passed over.
    * Links are followed. A folder that was met before, for example through a link, is passed over,
      so that every walk ends. Folders are entered before links to folders.
    * Heat maps and masks that this package wrote are passed over: folders ``maps`` and ``masks``
      beside a ``scores.csv`` or a ``model.safetensors``.
    * A sub-folder without read permission and a broken link are passed over.

    Args:
        suffixes: in lower case, with the dot.
        deep: whether to search sub-folders. If not, they are listed in ``folders`` only.
        apart: folders to pass over, which need not exist.

    Raises:
        OSError: ``folder`` cannot be read.
    """
    walked = _Walk(Path(folder), tuple(suffixes), deep, apart)
    walked.run()
    return walked.found


def few(words: Sequence[str]) -> str:
    """Join the first words, and say how many more there are."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def summary(passed_over: Mapping[str, str]) -> str:
    """Return the number of files passed over and the first names, those with a reason first."""
    names = sorted(passed_over, key=lambda name: (not passed_over[name], name))
    reasons = [f" ({passed_over[name]})" if passed_over[name] else "" for name in names]
    listed = few([name + reason for name, reason in zip(names, reasons, strict=True)])
    return one_line(f"{len(names)} passed over: {listed}")


class _Walk:
    def __init__(
        self, folder: Path, suffixes: Sequence[str], deep: bool, apart: Iterable[str | Path]
    ) -> None:
        self.found = Found(folder)
        self.suffixes, self.deep = suffixes, deep
        self.met = {_identity(folder): "."}
        self.apart = {_identity(path) for path in apart if os.path.isdir(path)}
        self.pending: deque[str] = deque()
        self.links: deque[str] = deque()

    def run(self) -> None:
        self._scan("")
        while self.pending or self.links:
            name = self.pending.popleft() if self.pending else self.links.popleft()
            self._enter(name)
        in_order = sorted(self.found.files.items(), key=lambda file: file[0].split("/"))
        self.found.files.clear()
        self.found.files.update(in_order)
        self.found.folders.sort()

    def _enter(self, name: str) -> None:
        """Scan a sub-folder, or note why it is passed over."""
        reason = ""
        try:
            identity = _identity(self.found.folder / name)
            if identity in self.apart:
                reason = APART
            elif identity in self.met:
                reason = f"the same folder as {self.met[identity]}"
            else:
                self.met[identity] = name
                self.found.folders.append(name)
                self._scan(f"{name}/")
        except FileNotFoundError:  # gone meanwhile
            return
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            self.found.passed_over[f"{name}/"] = reason

    def _scan(self, prefix: str) -> None:
        with os.scandir(self.found.folder / prefix) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        ours = any(entry.name in BESIDE_PICTURES for entry in entries)
        for entry in entries:
            name = prefix + entry.name
            if entry.name == LOCK:
                continue  # of the command that writes here, which may be this one
            if entry.name.startswith("."):
                self.found.passed_over[name + "/" * _is_folder(entry)] = ""
            elif _is_folder(entry):
                if ours and entry.name in PICTURES:
                    self.found.passed_over[f"{name}/"] = OURS
                elif self.deep:
                    (self.links if entry.is_symlink() else self.pending).append(name)
                else:
                    self.found.folders.append(name)
            else:
                self._note(name, entry)

    def _note(self, name: str, entry: os.DirEntry[str]) -> None:
        """Record a file, or why it is passed over."""
        reason = ""
        matches = os.path.splitext(entry.name)[1].lower() in self.suffixes
        try:
            if matches or entry.is_symlink():
                status = entry.stat()
                if matches and entry.is_file():
                    self.found.files[name] = status
                    return
                reason = "not a file" if matches else ""
        except OSError as error:
            if not entry.is_symlink():  # gone meanwhile
                return
            gone = isinstance(error, FileNotFoundError)
            reason = "a broken link" if gone else str(error.strerror)
        self.found.passed_over[name] = reason


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one into a folder without read permission
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
