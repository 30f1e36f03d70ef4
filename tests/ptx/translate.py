"""Translate the PTX that nvcc writes into C++, which the fibers of tests/cuda_emulator run.

    python tests/ptx/translate.py SET FILE.ptx OUT.cpp [--only REGEX] [--plant barriers|loads]

Each kernel becomes a C++ function of one statement per instruction, and is added to the set of kernels called SET.
Opcodes are tables below: what they do not list is refused by name. ``--plant`` leaves barriers out or shifts wide loads,
to show that the checks find such faults.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ptx_reader import CLASSES, TYPES, Instruction, Kernel, cost, kernels

SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ctaid.x": "blockIdx.x",
    "%ntid.x": "blockDim.x",
    "%nctaid.x": "gridDim.x",
}
#: No kernel makes a generic address of one in shared memory: ``cvta.shared`` is refused. So the rest is global memory.
SPACES = ("param", "shared", "global")

#: Opcode with its modifiers, without its type: the value of the result. T is the type, W the one twice as wide.
VALUES = {
    "add": "T({0} + {1})",
    "add.rn": "T({0} + {1})",
    "sub": "T({0} - {1})",
    "mul": "T({0} * {1})",
    "mul.lo": "T({0} * {1})",
    "mul.wide": "W(W({0}) * W({1}))",
    "mul.hi": "T((W({0}) * W({1})) >> (8 * sizeof(T)))",
    "mad.lo": "T({0} * {1} + {2})",
    "mad.wide": "W(W({0}) * W({1}) + {2})",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "fma.rm": "ptx::fma_down({0}, {1}, {2})",
    "div": "ptx::quotient<T>({0}, {1})",
    "div.rn": "{0} / {1}",
    "rem": "ptx::remainder<T>({0}, {1})",
    "rcp.rn": "T(1) / {0}",
    "rcp.approx.ftz": "ptx::rcp_approx({0})",
    "sqrt.rn": "std::sqrt({0})",
    "ex2.approx.ftz": "ptx::ex2_approx({0})",
    "neg": "T(-{0})",
    "abs": "ptx::absolute<T>({0})",
    "min": "ptx::smaller<T>({0}, {1})",
    "max": "ptx::larger<T>({0}, {1})",
    "copysign": "std::copysign({1}, {0})",
    "and": "T({0} & {1})",
    "or": "T({0} | {1})",
    "xor": "T({0} ^ {1})",
    "not": "ptx::inverted<T>({0})",
    "shl": "ptx::left<T>({0}, {1})",
    "shr": "ptx::right<T>({0}, {1})",
    "shf.l.wrap": "ptx::funnel_left({0}, {1}, {2})",
    "bfe": "ptx::bits<T>({0}, {1}, {2})",
    "prmt": "ptx::permuted_bytes({0}, {1}, {2})",
    "selp": "{2} ? {0} : {1}",
    "mov": "{0}",
    "cvta.to.global": "{0}",
}
#: Types of operands that are not the instruction's own, by their place.
OPERANDS = {
    "shl": {1: "u32"},
    "shr": {1: "u32"},
    "bfe": {1: "u32", 2: "u32"},
    "selp": {2: "pred"},
}
COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "{0} < {1} || {0} > {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    # the second half is true of a NaN
    "equ": "!({0} < {1} || {0} > {1})",
    "neu": "!({0} == {1})",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "num": "{0} == {0} && {1} == {1}",
    "nan": "{0} != {0} || {1} != {1}",
}
#: Modifiers, result and operand of a conversion, where i stands for every integer type: the value.
CONVERSIONS = {
    " i i": "T({0})",
    "rn f32 i": "T({0})",
    "rn f64 i": "T({0})",
    "rn f32 f64": "T({0})",
    " f64 f32": "T({0})",
    "rzi i f32": "ptx::whole<T>({0})",
    "rzi i f64": "ptx::whole<T>({0})",
    "rni f32 f32": "std::nearbyint({0})",
    "sat f32 f32": "ptx::saturated({0})",
    " f32 f16": "ptx::from_half({0})",
    "rn f16 f32": "ptx::to_half({0})",
    "rn bf16 f32": "ptx::to_bfloat16({0})",
}


class Writer:
    """The C++ of one kernel."""

    def __init__(self, kernel: Kernel, function: str, plant: str | None = None) -> None:
        self.kernel, self.function, self.plant = kernel, function, plant

    def lines(self) -> Iterator[str]:
        kernel = self.kernel
        yield f"// {kernel.name}"
        yield f"static void {self.function}(ptx::Parameters parameters, uint32_t dynamic) {{"
        yield f"  ptx::begin({kernel.shared_size}u + dynamic);"
        yield "  (void)parameters;"
        for register, (kind, count) in kernel.registers.items():
            cpp = "bool" if kind == "pred" else "ptx::Register"
            yield f"  {cpp} {register.strip('%')}_[{count}] = {{}};"
        for block in self._blocks():
            counts: dict[str, int] = dict.fromkeys(CLASSES, 0)
            for each in block:
                if isinstance(each, Instruction):
                    name, weight = cost(each)
                    counts[name] += weight
            if isinstance(block[0], str):
                yield f"{block[0]}:;"
            yield f"  ptx::count({', '.join(map(str, counts.values()))});"
            yield from (
                f"  {self._guarded(each)}" for each in block if isinstance(each, Instruction)
            )
        yield "  return;"
        yield "}\n"

    def _blocks(self) -> Iterator[list[Instruction | str]]:
        """Yield the runs of instructions that are executed together: from a label or jump to the next."""
        block: list[Instruction | str] = []
        for each in self.kernel.body:
            if isinstance(each, str) and block:
                yield block
                block = []
            block.append(each)
            if isinstance(each, Instruction) and each.opcode[0] in ("bra", "ret"):
                yield block
                block = []
        if block:
            yield block

    def _guarded(self, each: Instruction) -> str:
        try:
            statement = self._statement(each)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.kernel.name}: unknown instruction {each.text!r} ({error})"
            ) from error
        if not each.guard:
            return statement
        negated = "!" if each.guard.startswith("!") else ""
        return f"if ({negated}{self._register(each.guard.lstrip('!'))}) {{ {statement} }}"

    def _statement(self, each: Instruction) -> str:
        special = STATEMENTS.get(each.opcode[0])
        if special is not None:
            return special(self, each)
        if each.opcode[0] == "setp":
            _, comparison, t = each.opcode
            operands = [self._value(o, t) for o in each.operands[1:]]
            return self._put(each.operands[0], "pred", COMPARISONS[comparison].format(*operands))
        if each.opcode[0] == "cvt":
            return self._convert(each)
        *name, t = each.opcode
        form = ".".join(name)
        own = OPERANDS.get(name[0], {})
        operands = [self._value(o, own.get(i, t)) for i, o in enumerate(each.operands[1:])]
        result = _twice(t) if name[-1] == "wide" else t
        if name[-1] == "wide" and name[0] == "mad":
            operands[2] = self._value(each.operands[3], result)
        wide = {4: "int64_t", 8: "__int128"}.get(TYPES[t][1], "int32_t")
        wide = f"{'unsigned ' if wide.startswith('__') else 'u'}{wide}" if t[0] == "u" else wide
        value = re.sub(r"\bT\b", TYPES[t][0], re.sub(r"\bW\b", wide, VALUES[form]))
        return self._put(each.operands[0], result, value.format(*operands))

    def _convert(self, each: Instruction) -> str:
        _, *modifiers, to, source = each.opcode
        kinds = ("i" if kind[0] in "us" else kind for kind in (to, source))
        value = CONVERSIONS[" ".join((".".join(modifiers), *kinds))].replace(
            "T(", f"{TYPES[to][0]}("
        )
        value = value.replace("<T>", f"<{TYPES[to][0]}>")
        return self._put(each.operands[0], to, value.format(self._value(each.operands[1], source)))

    def _register(self, operand: str) -> str:
        match = re.fullmatch(r"(%?[a-z]+)(\d*)", operand)
        if match is None or match[1] not in self.kernel.registers:
            raise KeyError(operand)
        return f"{match[1].strip('%')}_[{match[2] or 0}]"

    def _value(self, operand: str, t: str) -> str:
        """Return C++ that reads an operand as type ``t``."""
        cpp = TYPES[t][0]
        if operand in SPECIAL:
            return f"{cpp}({SPECIAL[operand]})"
        if operand.startswith("%"):
            return self._register(operand) + ("" if t == "pred" else f".as<{cpp}>()")
        if operand in self.kernel.shared:
            return f"{cpp}({self.kernel.shared[operand]}u)"
        if operand in self.kernel.parameters:
            return f"{cpp}(uintptr_t(parameters[{self.kernel.parameters.index(operand)}]))"
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return f"ptx::from_bits<float>(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return f"ptx::from_bits<double>(0x{match[1]}ull)"
        number = int(operand, 0)
        return f"{cpp}({operand}{'ll' if abs(number) < 2**63 else 'ull'})"

    def _put(self, operand: str, t: str, value: str) -> str:
        """Return C++ that writes a value of type ``t``; an integer fills a wider register with its sign or zeros."""
        if t == "pred":
            return f"{self._register(operand)} = {value};"
        match = re.match(r"%?[a-z]+", operand)
        kind = self.kernel.registers[match[0]][0] if match else ""
        cpp, size = TYPES[t]
        if t[0] in "usb" and TYPES[kind][1] > size:
            cpp = TYPES[("s" if t[0] == "s" else "u") + str(8 * TYPES[kind][1])][0]
        return f"{self._register(operand)}.set<{cpp}>({value});"

    def _address(self, operand: str) -> str:
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand)
        if match is None:
            raise KeyError(operand)
        base, offset = match[1], match[2] or "0"
        if base in self.kernel.parameters:
            place = f"uintptr_t(parameters[{self.kernel.parameters.index(base)}])"
        else:
            wide = (
                base.startswith("%")
                and self.kernel.registers[re.sub(r"\d+$", "", base)][0] == "b64"
            )
            place = self._value(base, "u64" if wide else "u32")
        return f"uintptr_t({place} + ({offset}))"

    def memory(self, each: Instruction) -> str:
        """Loads and stores, of one number or of a vector: the whole access is checked, then each number moved."""
        kind, *words, t = each.opcode
        space = (
            words.pop(0) if words and words[0] in SPACES else "global"
        )  # a generic address: see SPACES
        count = {(): 1, ("v2",): 2, ("v4",): 4}[tuple(words)]
        cpp, size = TYPES[t]
        to, source = each.operands if kind == "ld" else each.operands[::-1]
        items = _items(to) if count > 1 else [to]
        planted = (
            " + 4"
            if self.plant == "loads" and kind == "ld" and (space, count) == ("global", 4)
            else ""
        )
        checked = f"ptx::{space}_address<{size * count}, {str(kind == 'st').lower()}>"
        moves = [f"const uintptr_t at = {checked}({self._address(source)}{planted});"]
        for place in range(count):
            where = f"at + {place * size}"
            if kind == "ld":
                moves.append(self._put(items[place], t, f"ptx::loaded<{cpp}>({where})"))
            else:
                moves.append(f"ptx::store<{cpp}>({where}, {self._value(items[place], t)});")
        return f"{{ {' '.join(moves)} }}"

    def move(self, each: Instruction) -> str:
        """``mov``: also two halves into one register, and one register into two halves."""
        t, (to, source) = each.opcode[-1], each.operands
        cpp, size = TYPES[t]
        half = f"u{4 * size}"
        if source.startswith("("):
            low, high = (self._value(item, half) for item in _items(source))
            return self._put(to, t, f"{cpp}({cpp}({low}) | {cpp}({high}) << {4 * size})")
        if to.startswith("("):
            low, high = _items(to)
            narrow, value = TYPES[half][0], self._value(source, t)
            upper = self._put(high, half, f"{narrow}(whole >> {4 * size})")
            lower = "" if low == "_" else self._put(low, half, f"{narrow}(whole)")
            return f"{{ const {cpp} whole = {value}; {lower} {upper if high != '_' else ''} }}"
        return self._put(to, t, self._value(source, t))

    def shuffle(self, each: Instruction) -> str:
        if each.opcode != ["shfl", "sync", "bfly", "b32"]:
            raise KeyError(".".join(each.opcode))
        to, _, took = each.operands[0].partition("|")
        value, lane, clamp, mask = (self._value(o, "u32") for o in each.operands[1:])
        flag = f" {self._register(took)} = true;" if took else ""
        return self._put(to, "u32", f"ptx::shuffled({value}, {lane}, {clamp}, {mask})") + flag

    def atomic(self, each: Instruction) -> str:
        _, space, name, t = each.opcode
        if name != "add" or t[0] not in "us":
            raise KeyError(".".join(each.opcode))
        cpp, size = TYPES[t]
        to, address, value = each.operands
        old = self._put(to, t, "before")
        return (
            f"{{ const uintptr_t at = ptx::{space}_address<{size}, true, true>({self._address(address)}); "
            f"const {cpp} before = ptx::loaded<{cpp}>(at); "
            f"ptx::store<{cpp}>(at, {cpp}(before + {self._value(value, t)})); {old} }}"
        )

    def barrier(self, each: Instruction) -> str:
        if each.opcode != ["bar", "sync"] or each.operands != ["0"]:
            raise KeyError(each.text)
        return ";" if self.plant == "barriers" else "ptx::barrier();"

    def branch(self, each: Instruction) -> str:
        return f"goto {each.operands[0].replace('$', 'L')};"

    def leave(self, each: Instruction) -> str:
        return "return;"


STATEMENTS: dict[str, Callable[[Writer, Instruction], str]] = {
    "ld": Writer.memory,
    "st": Writer.memory,
    "mov": Writer.move,
    "shfl": Writer.shuffle,
    "atom": Writer.atomic,
    "bar": Writer.barrier,
    "bra": Writer.branch,
    "ret": Writer.leave,
}


def translate(text: str, to: str, unit: str, only: str = "", plant: str | None = None) -> str:
    """Return C++ that adds the kernels in ``text`` to the set ``to``.

    Args:
        text: PTX.
        to: name of the set of kernels.
        unit: a word for the names of C++ functions, different for each file.
        only: regular expression of the kernels to translate.
        plant: a fault to build in: ``"barriers"`` leaves them out, ``"loads"`` shifts those of 4 numbers by 4 bytes.

    Raises:
        ValueError: an instruction is unknown; it is named with its kernel.
    """
    found = [kernel for kernel in kernels(text) if re.search(only, kernel.name)]
    functions = [
        line
        for index, kernel in enumerate(found)
        for line in Writer(kernel, f"{unit}_{index}", plant).lines()
    ]
    names = (f'  ptx::add("{to}", "{each.name}", {unit}_{i});' for i, each in enumerate(found))
    body = ["static const bool added = [] {", *names, "  return true;", "}();"]
    return "\n".join(['#include "machine.h"\n', *functions, *body, ""])


def _items(vector: str) -> list[str]:
    return [item.strip() for item in vector.strip("()").split(",")]


def _twice(t: str) -> str:
    return t[0] + str(2 * int(t[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set")
    parser.add_argument("ptx", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--plant", choices=("barriers", "loads"))
    given = parser.parse_args()
    unit = re.sub(r"\W", "_", given.out.stem)
    text = translate(given.ptx.read_text("utf-8"), given.set, unit, given.only, given.plant)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
