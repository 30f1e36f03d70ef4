"""Read PTX: its kernels, their registers, shared memory and instructions, and what an instruction costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: C++ type and bytes of PTX's types. Half-precision numbers are their bits.
TYPES = {
    **{
        f"{k}{n}": (f"{'' if k == 's' else 'u'}int{n}_t", n // 8)
        for k in "usb"
        for n in (8, 16, 32, 64)
    },
    **{"f16": ("uint16_t", 2), "bf16": ("uint16_t", 2), "f32": ("float", 4), "f64": ("double", 8)},
    "pred": ("bool", 1),
}
#: What an instruction counts as, and about how many instructions of the machine it takes.
CLASSES = ("formula", "index", "control", "memory")
SLOW = {"rcp.rn": 8, "div.rn": 8, "sqrt.rn": 8, "div": 18, "rem": 18, "mul.lo": 1, "mad.lo": 1}
SLOW_IN_64_BITS = {"div": 30, "rem": 30, "mul.lo": 4, "mad.lo": 5}


@dataclass
class Instruction:
    """``@!%p1 ld.global.v4.f32 {%f1, ...}, [%rd1+16]``"""

    text: str
    guard: str
    opcode: list[str]
    operands: list[str]


@dataclass
class Kernel:
    name: str
    parameters: list[str] = field(default_factory=list)
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # %rd: b64, how many
    shared: dict[str, int] = field(default_factory=dict)  # bytes from the start of shared memory
    shared_size: int = 0  # without the dynamic part, which follows
    body: list[Instruction | str] = field(default_factory=list)  # a text is a label


def kernels(text: str) -> Iterator[Kernel]:
    """Yield the kernels of a file of PTX."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{(.*?)\n\}", text, re.S))
    outside = re.sub(r"\.entry.*?\n\}", "", text, flags=re.S)
    for entry in entries:
        name, parameters, body = entry.groups()
        kernel = Kernel(name, re.findall(r"([\w$]+_param_\d+)", parameters))
        for kind, register, count in re.findall(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;", body):
            kernel.registers[register] = kind, int(count)
        for kind, register in re.findall(r"\.reg \.(\w+)\s+(%?[a-z]+);", body):
            kernel.registers[register] = kind, 1
        used = [each for each in _shared(outside) if re.search(re.escape(each[0]) + r"\b", body)]
        _place(kernel, [*used, *_shared(body)])
        kernel.body = list(_statements(re.sub(r"(?<!\w)\.(reg|shared|pragma)\b[^;]*;", "", body)))
        yield kernel


def _shared(text: str) -> list[tuple[str, int, int | None]]:
    """Return name, alignment and bytes of variables in shared memory; None: as much as the launch says."""
    arrays = re.findall(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d*)\];", text)
    scalars = re.findall(r"\.shared \.align (\d+) \.(\w+) ([\w$]+);", text)
    return [(name, int(align), int(size) if size else None) for align, name, size in arrays] + [
        (name, int(align), TYPES[kind][1]) for align, kind, name in scalars
    ]


def _place(kernel: Kernel, variables: list[tuple[str, int, int | None]]) -> None:
    for name, align, size in variables:
        if size is not None:
            kernel.shared[name] = -(-kernel.shared_size // align) * align
            kernel.shared_size = kernel.shared[name] + size
    kernel.shared_size = -(-kernel.shared_size // 16) * 16
    kernel.shared |= {name: kernel.shared_size for name, _, size in variables if size is None}


def _statements(body: str) -> Iterator[Instruction | str]:
    vectors = re.sub(r"\{(\s*[%\w.]+(?:\s*,\s*[%\w.]+)*\s*)\}", r"(\1)", body)
    for text in re.findall(r"\$\w+:|[^;:]+;", re.sub(r"[{}]", " ", vectors)):
        text = " ".join(text.split())
        if text.startswith("$"):
            yield text.strip(":").replace("$", "L")
            continue
        match = re.fullmatch(r"(?:@(!?%p\d+) )?([a-z][\w.]*)(?: (.*))?;", text)
        if match is None:
            raise ValueError(f"no instruction: {text!r}")
        guard, opcode, operands = match.groups()
        parts = re.findall(r"\([^)]*\)|\[[^\]]*\]|[^,\s]+", operands or "")
        yield Instruction(text, guard or "", opcode.split("."), parts)


def cost(each: Instruction) -> tuple[str, int]:
    """Return the class of an instruction, and about how many instructions of the machine it takes.

    ``mov``, ``cvta`` and loads of parameters cost nothing: registers are renamed and parameters are operands.
    """
    *name, t = each.opcode
    if each.opcode[0] in ("mov", "cvta") or each.opcode[:2] == ["ld", "param"]:
        return "index", 0
    if each.opcode[0] in ("ld", "st", "atom", "shfl"):
        return "memory", 1
    if each.opcode[0] in ("bra", "ret", "bar") or t == "pred":
        return "control", 1
    form = ".".join(name)
    if any(part.startswith(("f", "bf")) and part in TYPES for part in each.opcode):
        return "formula", SLOW.get(form, 1)
    wide = t in ("u64", "s64", "b64")
    weight = (
        SLOW_IN_64_BITS.get(form, 2 if each.opcode[0] != "cvt" else 1)
        if wide
        else SLOW.get(form, 1)
    )
    return ("control" if each.opcode[0] in ("setp", "selp") else "index"), weight
