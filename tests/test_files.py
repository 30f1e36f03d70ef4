"""Files are complete or absent and have the mode of the umask; a folder has one writer at a time."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msflow_ext.files import LOCK, locked, read_json, replacing, write_bytes, write_text

HOLD = """
import sys, time
from pathlib import Path
from msflow_ext.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.family("run files")
@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("value", [0o002, 0o022, 0o077], ids=oct)
def test_a_file_has_the_mode_of_the_umask(tmp_path, value):
    with umask(value):
        write_bytes(tmp_path / "new/bytes", b"1")
        with replacing(tmp_path / "weights") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
            writer = mode(temporary)
        with replacing(tmp_path / "closed") as temporary:
            temporary.write_bytes(b"2")
            temporary.chmod(0o400)
    assert writer & 0o077 == 0, "the writer must choose another mode for this test"
    for name in ("new/bytes", "weights", "closed"):
        assert mode(tmp_path / name) == 0o666 & ~value
    assert mode(tmp_path / "new") == 0o777 & ~value


@pytest.mark.family("run files")
def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    def interrupted() -> None:
        with replacing(tmp_path / "a.bin") as temporary:
            temporary.with_name("weights.data").write_bytes(b"part")
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".a.bin.msflow.tmp"
    for clean in (lambda: write_bytes(tmp_path / "a.bin", b"whole"), lambda: locked(tmp_path)):
        (left / "deep").mkdir(parents=True)  # as after kill -9
        (left / "new").write_bytes(b"half")
        with clean() or nullcontext():
            assert (tmp_path / "a.bin").read_bytes() == b"whole"
        assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.family("run files")
@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission")
def test_a_link_in_the_place_of_the_temporary_folder_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_text(elsewhere / "kept", "kept")
    (tmp_path / ".a.txt.msflow.tmp").symlink_to(elsewhere)
    write_text(tmp_path / "a.txt", "new")
    assert (elsewhere / "kept").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "elsewhere"]


@pytest.mark.family("writers")
def test_a_folder_has_one_writer_until_its_lock_is_released(tmp_path):
    folder = tmp_path / "new" / "run"
    with locked(folder):
        expected = r"run is being written by another process: wait"
        with pytest.raises(BlockingIOError, match=expected), locked(folder):
            raise AssertionError
        with locked(tmp_path):
            pass
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert list((tmp_path / "new").iterdir()) == [], (
        "a new folder in which nothing was written is removed"
    )
    with locked(folder):
        write_text(folder / "a.txt", "kept")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


@pytest.mark.family("writers")
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_process_releases_its_folder(tmp_path, ending):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path):
            raise AssertionError
        holder.send_signal(getattr(signal, ending))
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.family("crafted files")
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[1]", '{"a": 1', "\ufeff"])
def test_damaged_or_deeply_nested_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json (is damaged|must hold a JSON object)"):
        read_json(tmp_path / "a.json")
