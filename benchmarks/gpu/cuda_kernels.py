"""Tabulate registers and memory of the compiled CUDA kernels: `python -m benchmarks.gpu.cuda_kernels`.

The table has a row per kernel and a column per architecture, and needs no GPU. It is written to
`results/cuda_kernels.md`. The tests also check the width of loads and stores in the most used kernels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msflow_ext.ops import _backend

TABLE = Path(__file__).parents[1] / "results" / "cuda_kernels.md"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDE = re.compile(r"\b(LDG|STG)\.E\S*\b(?:128|256)\b")


@dataclass(frozen=True)
class Kernel:
    """A kernel for an architecture: registers per thread, and bytes of stack, local and static shared memory."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    shared: int


def module() -> Path | None:
    """Return the compiled module, or None if it has no CUDA kernels."""
    built = getattr(_backend.C, "cuda_architectures", "")
    return Path(_backend.C.__file__) if built and built != "emulated" else None


def cuobjdump() -> str | None:
    """Return the disassembler of a CUDA toolkit, NVIDIA's packages or triton, or None."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda") if home]
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "*/bin")):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            folders += sorted(Path(root).glob(inside))
    path = os.pathsep.join(map(str, [os.environ.get("PATH", ""), *folders]))
    return shutil.which("cuobjdump", path=path)


def kernels(file: Path) -> list[Kernel]:
    """Return all kernels of a module, for every architecture of its machine code."""
    architecture, name, found = "", "", []
    for line in _dump(file, "-res-usage"):
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.split()[-1].rstrip(":")
        elif usage := _USAGE.search(line):
            registers, stack, shared, local = map(int, usage.groups())
            found.append(Kernel(name, architecture, registers, stack, local, shared))
    return found


def wide_accesses(file: Path, architecture: str) -> dict[str, set[str]]:
    """Return which of LDG and STG each kernel uses with 16 bytes or more."""
    name, found = "", {}
    for line in _dump(file, "-arch", architecture, "-sass"):
        if "Function :" in line:
            name = line.split()[-1]
            found[name] = set()
        elif access := _WIDE.search(line):
            found[name].add(access[1])
    return found


def readable(names: list[str]) -> list[str]:
    """Return the names demangled and without namespaces if the system has c++filt, else unchanged."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = (re.sub(r"msflow::|\(anonymous namespace\)::", "", n) for n in done.stdout.splitlines())
    return [re.sub(r"^void |\(.*\)$", "", n).replace(" >", ">") for n in plain]


def _dump(file: Path, *options: str) -> Iterator[str]:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump must be in PATH, a CUDA toolkit or triton")
    # It runs nvdisasm from the same folder.
    path = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", "")))
    with subprocess.Popen(
        [tool, *options, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": path},
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)} failed on {file}")


def main() -> int:
    file = module()
    if file is None:
        print("msflow_ext must be built with CUDA kernels", file=sys.stderr)
        return 2
    found = kernels(file)
    names = sorted({k.name for k in found})
    shown = dict(zip(names, readable(names), strict=True))
    architectures = sorted({k.architecture for k in found}, key=lambda a: int(a[3:].rstrip("af")))
    registers = {(k.name, k.architecture): k.registers for k in found}
    lines = [
        "# What the compiler made of the CUDA kernels",
        "",
        f"Registers of a thread per architecture, by `python -m benchmarks.gpu.cuda_kernels`. {len(found)} kernels; bytes of",
        f"stack or local memory in any of them: {max(k.stack + k.local for k in found)}. Not run on a GPU yet.",
        "",
        f"| kernel | {' | '.join(architectures)} | static shared memory |",
        f"|---|{'---|' * (len(architectures) + 1)}",
    ]
    for name in sorted(names, key=shown.__getitem__):
        row = [str(registers.get((name, a), "")) for a in architectures]
        shared = max(k.shared for k in found if k.name == name)
        lines.append(f"| `{shown[name]}` | {' | '.join(row)} | {shared} |")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE}: {len(found)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
