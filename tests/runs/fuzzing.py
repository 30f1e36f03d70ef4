"""Search for files that a reader neither reads nor refuses, with Atheris: fuzzing.py NAME SECONDS.

``NAME`` is a key of ``READERS`` in ``test_damaged_files.py``. A file that breaks a reader is kept, and ends the
search with its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # not available for every Python

with atheris.instrument_imports(include=["msflow_ext", "safetensors", "yaml"]):
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    from test_damaged_files import READERS


def main(name: str, seconds: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    make, read = READERS[name]
    folder = Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    (folder / "data").mkdir()
    (folder / "corpus" / "seed").write_bytes(make(folder / "data"))
    file = folder / "data" / name

    def once(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(ValueError, FileNotFoundError):
            read(file)

    limits = [f"-max_total_time={seconds}", "-max_len=65536", "-timeout=20", "-rss_limit_mb=6000"]
    output = [f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *output, str(folder / "corpus")], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
