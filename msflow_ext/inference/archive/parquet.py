"""A folder or bucket of Parquet files that together hold one row per image; a file is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from msflow_ext.files import locked

_OWNER = b"msflow_ext"  # key of this package's metadata in a Parquet file


class Store:
    """Files by name in a local or remote folder; a file appears only when it is complete.

    Args:
        place: folder, or URI that pyarrow or fsspec supports: ``s3://``, ``gs://``, ``file://``, ...

    Raises:
        ValueError: neither supports the URI.
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self._files, self._root = _opened(place)

    def locked(self) -> AbstractContextManager[object]:
        """Lock the folder against other writers, see :func:`msflow_ext.files.locked`; a bucket has no lock."""
        from pyarrow.fs import LocalFileSystem

        return (
            locked(Path(self._root)) if isinstance(self._files, LocalFileSystem) else nullcontext()
        )

    def names(self) -> set[str]:
        """Return the names of all complete files."""
        return {info.base_name for info in self._there() if not info.base_name.startswith(".")}

    def path(self, name: str) -> str:
        """Return the path of a file as error messages show it."""
        return f"{self.place}/{name}"

    def write(self, name: str, content: Any) -> None:
        """Write a file, or replace it; raise OSError if it cannot be written."""
        temporary, final = f"{self._root}/.{name}.{uuid4().hex}", f"{self._root}/{name}"
        try:
            self._files.create_dir(self._root, recursive=True)
            with self._files.open_output_stream(temporary) as stream:
                stream.write(content)
            self._sync(temporary)
            self._files.move(temporary, final)
        except OSError as error:
            with suppress(OSError):
                self._files.delete_file(temporary)
            raise OSError(f"{self.path(name)} cannot be written: {_reason(error)}") from error

    def read(self, name: str) -> Any:
        """Return a file's content as a pyarrow buffer; raise OSError if it cannot be read."""
        try:
            with self._files.open_input_stream(f"{self._root}/{name}") as stream:
                return stream.read_buffer()
        except OSError as error:
            raise OSError(f"{self.path(name)} cannot be read: {_reason(error)}") from error

    def write_table(self, name: str, table: Any, owner: Mapping[str, Any]) -> None:
        """Write a table as Parquet, with an owner that :meth:`owner_of` returns."""
        import pyarrow
        from pyarrow import parquet

        sink = pyarrow.BufferOutputStream()
        text = json.dumps(owner).encode()
        parquet.write_table(table.replace_schema_metadata({_OWNER: text}), sink, compression="zstd")
        self.write(name, sink.getvalue())

    def read_table(self, name: str, columns: Sequence[str]) -> Any:
        """Return columns of a Parquet file; raise ValueError if it is damaged."""
        from pyarrow import parquet

        return self._parquet(name, lambda file: parquet.read_table(file, columns=list(columns)))

    def owner_of(self, name: str) -> tuple[dict[str, Any], int]:
        """Return the owner and the number of rows of a Parquet file; raise ValueError if it is damaged."""
        from pyarrow import parquet

        found = self._parquet(name, parquet.read_metadata)
        return json.loads((found.metadata or {}).get(_OWNER, b"{}")), found.num_rows

    def clear_unfinished(self) -> None:
        """Remove incomplete files of killed processes."""
        for info in self._there():
            if info.is_file and info.base_name.startswith((".part-", "._")):
                with suppress(OSError):
                    self._files.delete_file(info.path)

    def _there(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        try:
            return self._files.get_file_info(FileSelector(self._root, allow_not_found=True))
        except OSError as error:
            raise OSError(f"{self.place} cannot be read: {_reason(error)}") from error

    def _parquet(self, name: str, read: Any) -> Any:
        from pyarrow import ArrowInvalid

        try:
            with self._files.open_input_file(f"{self._root}/{name}") as file:
                return read(file)
        except (ArrowInvalid, OSError) as error:
            what = f"{self.path(name)} cannot be read: {_reason(error)}"
            raise ValueError(f"{what}. Remove it, and it is scored again") from error

    def _sync(self, path: str) -> None:
        """Flush a local file to the disk, before it gets its final name."""
        from pyarrow.fs import LocalFileSystem

        if isinstance(self._files, LocalFileSystem):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def schema(maps: str | None = None) -> Any:
    """Return the columns of a shard.

    * ``path``: path of the image; ``error``: why it has no score.
    * ``score``, ``label``, ``p_value``: as in :class:`msflow_ext.inference.Result`.
    * ``map_max``, ``map_mean``: maximum and mean of the anomaly map.
    * ``map_area``: share of the anomaly map above the pixel threshold.
    * ``map_max_x``, ``map_max_y``: position of the maximum, from 0 (left, top) to 1 (right, bottom).
    * ``map``, ``map_height``, ``map_width`` (maps ``"array"``): the anomaly map, float32, row by row.
    * ``map_png`` (maps ``"png"``): the heat map over the image.
    """
    pa = _pyarrow()
    columns = [("path", pa.string()), ("score", pa.float64()), ("label", pa.int8())]
    statistics = ("p_value", "map_max", "map_mean", "map_area", "map_max_x", "map_max_y")
    columns += [(name, pa.float64()) for name in statistics]
    if maps == "array":
        columns += [("map_height", pa.int32()), ("map_width", pa.int32())]
        columns += [("map", pa.list_(pa.float32()))]
    if maps == "png":
        columns += [("map_png", pa.binary())]
    return pa.schema([*columns, ("error", pa.string())])


def _opened(place: str) -> tuple[Any, str]:
    """Return the file system of a place, and the path in it."""
    pa = _pyarrow()
    from pyarrow import fs

    if "://" not in place:
        return fs.LocalFileSystem(), os.path.abspath(place)
    try:
        files, root = fs.FileSystem.from_uri(place)
    except pa.ArrowInvalid:
        import fsspec

        try:
            found, root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"--out must be a folder or a known URI, got {place}: {error}"
            ) from None
        files = fs.PyFileSystem(fs.FSSpecHandler(found))
    return files, root.rstrip("/")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Parquet needs pyarrow: pip install 'msflow-ext[parquet]'"
        ) from None
    return pyarrow


def _reason(error: Exception) -> str:
    """Return the reason of an error, without the path and numbers around it."""
    found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else found
