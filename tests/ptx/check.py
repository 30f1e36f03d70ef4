"""Check every kernel of a set of translated PTX against its float64 reference: ``check.py [SET]``.

Run where ``msflow_ext`` is built with MSFLOW_EXT_PTX. Any fault of memory ends the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

from msflow_ext import testing
from msflow_ext.ops import _backend

NOT_LAUNCHED = ("probe",)  # only asked for its attributes


def main() -> None:
    if len(sys.argv) > 1:
        os.environ["MSFLOW_EXT_PTX_SET"] = sys.argv[1]
    _backend.emulate()
    library = ctypes.CDLL(_backend.C.__file__)
    library.ptx_kernels.restype = library.ptx_counts.restype = ctypes.c_char_p
    rows = testing.check()
    wrong = [row for row in rows if not row[1] <= row[2]]
    executed = {line.split(" ", 4)[4] for line in library.ptx_counts().decode().splitlines()}
    left = [
        name
        for name in library.ptx_kernels().decode().splitlines()
        if name not in executed and not any(each in name for each in NOT_LAUNCHED)
    ]
    if wrong or left:
        sys.exit(f"wrong results: {wrong}\nkernels that no case runs: {left}")
    print(
        f"{sys.argv[1]}: {len(executed)} compiled kernels match their reference in {len(rows)} cases"
    )


if __name__ == "__main__":
    main()
