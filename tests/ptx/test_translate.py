"""PTX translated to C++ does what NVIDIA's manual says, opcode by opcode, and its faults are found."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptx_reader
import pytest
import translate

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine of PTX uses x86-64"),
]

FORMATS = {
    "u8": "B",
    "s8": "b",
    "u16": "H",
    "s16": "h",
    "u32": "I",
    "s32": "i",
    "u64": "Q",
    "s64": "q",
}
FORMATS |= {"b16": "H", "b32": "I", "b64": "Q", "f16": "e", "bf16": "H", "f32": "f", "f64": "d"}
INF, NAN = math.inf, math.nan

#: Instruction, types of its operands and of its result, and values: the operands', then the result's.
CASES: list[tuple[str, str, str, list[tuple[Any, ...]]]] = [
    ("add.s32", "s32 s32", "s32", [(2, 3, 5), (2**31 - 1, 1, -(2**31))]),
    ("add.s16", "s16 s16", "s16", [(2**15 - 1, 1, -(2**15))]),
    ("add.s64", "s64 s64", "s64", [(2**63 - 1, 1, -(2**63))]),
    ("add.f32", "f32 f32", "f32", [(1.5, 2.25, 3.75), (INF, 1, INF)]),
    ("add.rn.f64", "f64 f64", "f64", [(0.1, 0.2, 0.1 + 0.2)]),
    ("sub.s32", "s32 s32", "s32", [(-(2**31), 1, 2**31 - 1)]),
    ("sub.f64", "f64 f64", "f64", [(1.0, 0.75, 0.25)]),
    ("mul.f32", "f32 f32", "f32", [(1.5, -2.0, -3.0)]),
    ("mul.lo.s32", "s32 s32", "s32", [(65536, 65537, 65536), (-3, 5, -15)]),
    ("mul.lo.s64", "s64 s64", "s64", [(2**40, 2**30 + 1, 2**40)]),
    ("mul.wide.s32", "s32 s32", "s64", [(-(2**31), 4, -(2**33))]),
    ("mul.wide.u32", "u32 u32", "u64", [(2**32 - 1, 2, 2**33 - 2)]),
    ("mul.hi.u32", "u32 u32", "u32", [(2**31, 6, 3)]),
    ("mul.hi.s64", "s64 s64", "s64", [(-(2**62), 8, -2)]),
    ("mad.lo.s32", "s32 s32 s32", "s32", [(3, 4, 5, 17), (2**30, 4, -1, -1)]),
    ("mad.lo.s64", "s64 s64 s64", "s64", [(3, 4, 5, 17)]),
    ("mad.wide.s32", "s32 s32 s64", "s64", [(2**30, 4, 1, 2**32 + 1)]),
    ("fma.rn.f32", "f32 f32 f32", "f32", [(1 + 2**-23, 1 + 2**-23, -1 - 2**-22, 2**-46)]),
    ("fma.rn.f64", "f64 f64 f64", "f64", [(2.0, 3.0, 1.0, 7.0)]),
    ("fma.rm.f32", "f32 f32 f32", "f32", [(1.0, 1.0, 2**-30, 1.0), (-1.0, 1.0, -(2**-30), -1 - 2**-23)]),
    ("div.s32", "s32 s32", "s32", [(-7, 2, -3)]),
    ("div.u16", "u16 u16", "u16", [(65535, 2, 32767)]),
    ("div.rn.f32", "f32 f32", "f32", [(1.0, 4.0, 0.25), (1.0, 0.0, INF)]),
    ("rem.s32", "s32 s32", "s32", [(-7, 2, -1)]),
    ("rem.u32", "u32 u32", "u32", [(2**32 - 1, 10, 5)]),
    ("rcp.rn.f64", "f64", "f64", [(8.0, 0.125)]),
    ("rcp.approx.ftz.f32", "f32", "f32", [(4.0, 0.25), (1e-40, INF), (3e38, 0.0)]),
    ("rcp.approx.ftz.f64", "f64", "f64", [(4.0, 0.25)]),
    ("sqrt.rn.f32", "f32", "f32", [(2.25, 1.5)]),
    ("ex2.approx.ftz.f32", "f32", "f32", [(3.0, 8.0), (-INF, 0.0), (-140.0, 0.0)]),
    ("neg.f32", "f32", "f32", [(1.5, -1.5)]),
    ("neg.s64", "s64", "s64", [(5, -5)]),
    ("abs.f32", "f32", "f32", [(-1.5, 1.5)]),
    ("min.s32", "s32 s32", "s32", [(-1, 1, -1)]),
    ("max.u32", "u32 u32", "u32", [(2**32 - 1, 1, 2**32 - 1)]),
    ("max.f32", "f32 f32", "f32", [(NAN, 1.0, 1.0), (-1.0, 2.0, 2.0)]),
    ("copysign.f32", "f32 f32", "f32", [(-1.0, 3.0, -3.0)]),  # the sign of the first, the size of the second
    ("and.b32", "b32 b32", "b32", [(12, 10, 8)]),
    ("or.b64", "b64 b64", "b64", [(12, 10, 14)]),
    ("xor.b32", "b32 b32", "b32", [(12, 10, 6)]),
    ("not.b32", "b32", "b32", [(0, 2**32 - 1)]),
    ("and.pred", "pred pred", "pred", [(1, 1, 1), (1, 0, 0)]),
    ("not.pred", "pred", "pred", [(1, 0)]),
    ("shl.b32", "b32 u32", "b32", [(1, 31, 2**31), (1, 32, 0)]),
    ("shl.b64", "b64 u32", "b64", [(1, 40, 2**40), (1, 64, 0)]),
    ("shr.s32", "s32 u32", "s32", [(-8, 1, -4), (-8, 40, -1)]),
    ("shr.u32", "u32 u32", "u32", [(2**31, 31, 1), (1, 32, 0)]),
    ("shf.l.wrap.b32", "b32 b32 b32", "b32", [(0x80000001, 1, 1, 3), (7, 9, 32, 9)]),
    ("bfe.u32", "u32 u32 u32", "u32", [(0xABCD, 4, 8, 0xBC), (0xABCD, 32, 8, 0), (0xABCD, 8, 40, 0xAB)]),
    ("prmt.b32", "b32 b32 b32", "b32", [(0x33221100, 0x77665544, 0x7140, 0x77114400), (0x80, 0, 0x8888, 2**32 - 1)]),
    ("selp.b32", "b32 b32 pred", "b32", [(1, 2, 1, 1), (1, 2, 0, 2)]),
    ("mov.f64", "f64", "f64", [(0.1, 0.1)]),
    ("setp.eq.s32", "s32 s32", "pred", [(1, 1, 1), (1, 2, 0)]),
    ("setp.lt.s64", "s64 s64", "pred", [(-1, 0, 1)]),
    ("setp.lt.u64", "u64 u64", "pred", [(2**64 - 1, 0, 0)]),
    ("setp.ne.f32", "f32 f32", "pred", [(1.0, 2.0, 1), (NAN, 1.0, 0)]),
    ("setp.neu.f32", "f32 f32", "pred", [(1.0, 1.0, 0), (NAN, 1.0, 1)]),
    ("setp.equ.f32", "f32 f32", "pred", [(1.0, 2.0, 0), (NAN, 1.0, 1)]),
    ("setp.leu.f64", "f64 f64", "pred", [(1.0, 1.0, 1), (2.0, 1.0, 0), (NAN, 1.0, 1)]),
    ("setp.gtu.f32", "f32 f32", "pred", [(1.0, 1.0, 0), (NAN, 1.0, 1)]),
    ("setp.ge.f32", "f32 f32", "pred", [(1.0, 1.0, 1), (NAN, 1.0, 0)]),
    ("setp.num.f32", "f32 f32", "pred", [(1.0, 2.0, 1), (NAN, 1.0, 0)]),
    ("setp.nan.f32", "f32 f32", "pred", [(1.0, 2.0, 0), (1.0, NAN, 1)]),
    ("cvt.s64.s32", "s32", "s64", [(-5, -5)]),
    ("cvt.u64.u32", "u32", "u64", [(2**32 - 1, 2**32 - 1)]),
    ("cvt.u32.u64", "u64", "u32", [(2**32 + 7, 7)]),
    ("cvt.s32.s16", "s16", "s32", [(-2, -2)]),
    ("cvt.s32.s8", "s16", "s32", [(0x01FE, -2)]),  # of the low byte
    ("cvt.u16.u32", "u32", "u16", [(65537, 1)]),
    ("cvt.rn.f32.s64", "s64", "f32", [(2**24 + 1, 2.0**24)]),
    ("cvt.rn.f64.u64", "u64", "f64", [(2**64 - 1, 2.0**64)]),
    ("cvt.rn.f32.f64", "f64", "f32", [(1 + 2**-30, 1.0)]),
    ("cvt.f64.f32", "f32", "f64", [(0.5, 0.5)]),
    ("cvt.rzi.s64.f64", "f64", "s64", [(-1.9, -1), (1e300, 2**63 - 1), (NAN, -(2**63))]),
    ("cvt.rni.f32.f32", "f32", "f32", [(2.5, 2.0), (3.5, 4.0)]),
    ("cvt.sat.f32.f32", "f32", "f32", [(1.5, 1.0), (-1.0, 0.0), (NAN, 0.0), (0.25, 0.25)]),
    ("cvt.f32.f16", "f16", "f32", [(0.5, 0.5), (INF, INF)]),
    ("cvt.rn.f16.f32", "f32", "f16", [(1 + 2**-11, 1.0), (1 + 3 * 2**-11, 1 + 2**-9), (1e6, INF)]),
    ("cvt.rn.bf16.f32", "f32", "bf16", [(1.0, 0x3F80), (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82), (NAN, 0x7FFF)]),
]  # fmt: skip
REGISTERS = {"16": "%rs", "32": "%r", "64": "%rd", "f32": "%f", "f64": "%fd", "pred": "%p"}
DECLARED = """
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .f32 %f<9>; .reg .f64 %fd<9>;
"""

#: Kernels of several instructions: memory, control, shuffles, atomics. All take the addresses of inputs and results.
WHOLE = {
    # reverse the numbers of a block through shared memory; the last load must wait for all stores
    "reversed": """
  .shared .align 4 .b8 stage[256];
  mov.u32 %r1, %tid.x; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x;
  mad.lo.s32 %r6, %r4, %r5, %r1;
  mul.wide.u32 %rd3, %r6, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  ld.global.u32 %r2, [%rd4];
  mov.u32 %r7, stage; shl.b32 %r8, %r1, 2; add.s32 %r9, %r7, %r8;
  st.shared.u32 [%r9], %r2;
  bar.sync 0;
  sub.s32 %r10, %r7, %r8;
  ld.shared.u32 %r3, [%r10+252];
  st.global.u32 [%rd5], %r3;
""",
    # the sum of a warp, in all of its lanes; %p2 receives whether the lane took part
    "warp_sum": """
  mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  ld.global.u32 %r2, [%rd4]; mov.u32 %r3, 16;
$again:
  shfl.sync.bfly.b32 %r4|%p2, %r2, %r3, 31, -1;
  add.s32 %r2, %r2, %r4; shr.u32 %r3, %r3, 1; setp.ne.s32 %p1, %r3, 0;
  @%p1 bra $again;
  st.global.u32 [%rd5], %r2;
""",
    # how many numbers there are of 0, 1, ...
    "histogram": """
  mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3;
  ld.global.u32 %r2, [%rd4]; mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd2, %rd5;
  atom.global.add.u32 %r3, [%rd6], 1;
""",
    # in one thread: four numbers at once, through both halves of a register and dynamic shared memory
    "vectors": """
  mov.u32 %r10, %tid.x; setp.ne.s32 %p1, %r10, 0;
  @%p1 bra $done;
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1]; { .reg .b16 low; mov.b32 {low, %rs1}, %r1; }
  mov.b32 {%rs2, %rs3}, %r2; mov.b32 %r5, {%rs1, %rs2}; mov.b64 %rd7, {%r3, %r4}; cvt.u32.u64 %r6, %rd7;
  mov.u32 %r7, dynamic; st.shared.v2.u32 [%r7+8], {%r5, %r6}; ld.shared.v2.u32 {%r8, %r9}, [%r7+8];
  st.global.v2.u32 [%rd2], {%r8, %r9};
$done:
""",
    # every thread writes to one place
    "one_place": "st.global.u32 [%rd2], 7;",
    "beyond": "mov.u32 %r1, 65532; st.shared.u32 [%r1], %r1;",
    "misaligned": "ld.global.u64 %rd3, [%rd1+4];",
    "by_zero": "mov.u32 %r1, 0; div.u32 %r2, %r1, %r1;",
}  # fmt: skip
WHOLE["reversed_without_barrier"] = WHOLE["reversed"].replace("bar.sync 0;", "")


def kernel(name: str, body: str) -> str:
    return f"""
.visible .entry {name}(
  .param .u64 {name}_param_0,
  .param .u64 {name}_param_1
)
{{{DECLARED}
  ld.param.u64 %rd1, [{name}_param_0]; ld.param.u64 %rd2, [{name}_param_1];
  cvta.to.global.u64 %rd1, %rd1;
{body}
  ret;
}}
"""


def register(kind: str, number: int) -> str:
    prefix = REGISTERS.get(kind) or REGISTERS[re.sub(r"\D", "", kind)]
    return f"{prefix}{number}"


def body_of(opcode: str, operands: list[str], result: str) -> str:
    """Return a body that loads operands of 8 bytes each, executes one instruction and stores its result."""
    lines, names = [], [register(kind, i) for i, kind in enumerate(operands, 3)]
    for place, (kind, name) in enumerate(zip(operands, names, strict=True)):
        load = f"ld.global.{moved(kind)} {{}}, [%rd1+{8 * place}];"
        lines.append(load.format("%r19" if kind == "pred" else name))
        if kind == "pred":
            lines.append(f"setp.ne.s32 {name}, %r19, 0;")
    to = register(result, 8)
    lines.append(f"{opcode} {', '.join([to, *names])};")
    if result == "pred":
        lines.append(f"selp.u32 %r19, 1, 0, {to};")
    lines.append(f"st.global.{moved(result)} [%rd2], {'%r19' if result == 'pred' else to};")
    return "\n".join(lines)


def moved(kind: str) -> str:
    """Return the type that loads and stores numbers of ``kind``."""
    return {"pred": "u32", "f32": "f32", "f64": "f64"}.get(kind, "u" + re.sub(r"\D", "", kind))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels of this file, translated and compiled."""
    folder = tmp_path_factory.mktemp("ptx")
    bodies = {
        f"case_{i}": body_of(case[0], case[1].split(), case[2]) for i, case in enumerate(CASES)
    }
    text = ".extern .shared .align 16 .b8 dynamic[];\n"
    text += "".join(kernel(name, body) for name, body in {**bodies, **WHOLE}.items())
    (folder / "kernels.cpp").write_text(translate.translate(text, "test", "kernels"))
    out = folder / "kernels.so"
    flags = ["-std=c++17", "-O0", "-w", "-fwrapv", "-ffp-contract=off", "-mfma", "-mf16c"]
    paths = [f"-I{HERE}", f"-I{HERE.parent / 'cuda_emulator'}", '-DMSFLOW_EXT_PTX="test"']
    sources = [str(HERE / "exports.cpp"), str(folder / "kernels.cpp")]
    command = [str(COMPILER), *flags, "-shared", "-fPIC", *paths, *sources, "-o", str(out), "-ldl"]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def run(library: Path) -> Callable[..., bytes]:
    """``run(name, inputs, size)``: the bytes that a kernel of one block writes."""
    loaded = ctypes.CDLL(str(library))

    def call(name: str, inputs: bytes, size: int, threads: int = 32, dynamic: int = 0) -> bytes:
        source, to = (
            ctypes.create_string_buffer(inputs, len(inputs)),
            ctypes.create_string_buffer(size),
        )
        addresses = [ctypes.c_uint64(ctypes.addressof(each)) for each in (source, to)]
        parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(each) for each in addresses))
        loaded.ptx_run(name.encode(), 1, threads, dynamic, parameters)
        return to.raw

    return call


def packed(kind: str, value: Any) -> bytes:
    code = "I" if kind == "pred" else FORMATS[kind]
    if code in "BHIQ":
        value &= 2 ** (8 * struct.calcsize(code)) - 1
    if code in "hiq":
        half = 2 ** (8 * struct.calcsize(code) - 1)
        value = (value + half) % (2 * half) - half
    return struct.pack(f"<{code}", value)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_an_instruction_gives_what_the_manual_says(run: Any, number: int) -> None:
    _, operands, result, rows = CASES[number]
    for *values, expected in rows:
        inputs = b"".join(
            packed(k, v).ljust(8, b"\0") for k, v in zip(operands.split(), values, strict=True)
        )
        right = packed(result, expected)
        assert run(f"case_{number}", inputs, len(right)) == right, (values, expected)


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def test_shared_memory_is_one_block_s_and_barriers_order_it(run: Any) -> None:
    values = range(10, 74)
    assert run("reversed", numbers(*values), 256, threads=64) == numbers(*values[::-1])


def test_a_warp_sums_by_shuffles_in_a_loop(run: Any) -> None:
    assert run("warp_sum", numbers(*range(32)), 128) == numbers(*[sum(range(32))] * 32)


def test_atomics_of_all_threads_count(run: Any) -> None:
    assert run("histogram", numbers(*[i % 3 for i in range(32)]), 12) == numbers(11, 11, 10)


def test_vectors_are_taken_apart_and_joined(run: Any) -> None:
    inputs = numbers(0x11112222, 0x33334444, 5, 6)
    assert run("vectors", inputs, 8, threads=32, dynamic=16)[:8] == numbers(0x44441111, 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reversed_without_barrier", "races with a"),
        ("one_place", "two writes race"),
        ("beyond", "beyond shared memory"),
        ("misaligned", "a misaligned access to global memory"),
        ("by_zero", "a division by 0"),
        ("absent", "no kernel is called absent"),
    ],
)
def test_a_fault_ends_the_process_with_its_name(library: Path, name: str, text: str) -> None:
    script = f"""
import ctypes
data = [ctypes.create_string_buffer(4096) for _ in range(2)]
addresses = [ctypes.c_uint64(ctypes.addressof(each) + 15 & -16) for each in data]
parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(each) for each in addresses))
ctypes.CDLL({str(library)!r}).ptx_run({name!r}.encode(), 1, 64, 0, parameters)
"""
    env = {**os.environ, "MSFLOW_EXT_PTX_GLOBAL": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode != 0 and text in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "tex.2d.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];",
        "add.sat.s32 %r1, %r1, %r1;",
        "cvt.rp.f32.f64 %f1, %fd1;",
        "setp.lo.u32 %p1, %r1, %r1;",
        "shfl.sync.up.b32 %r1|%p1, %r1, 1, 0, -1;",
        "atom.global.max.u32 %r1, [%rd1], 1;",
        "bar.sync 1;",
        "ld.local.u32 %r1, [%rd1];",
        "mov.u32 %r1, %laneid;",
        "cvta.shared.u64 %rd1, %rd1;",
    ],
)
def test_what_is_unknown_is_refused_with_its_kernel(statement: str) -> None:
    with pytest.raises(ValueError, match="some_kernel: unknown instruction") as refused:
        translate.translate(kernel("some_kernel", statement), "test", "unit")
    assert statement.split()[0] in str(refused.value)


def test_planted_faults_are_in_the_code() -> None:
    text = kernel("k", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16];\nbar.sync 0;")
    right, without, shifted = (
        translate.translate(text, "test", "unit", plant=plant)
        for plant in (None, "barriers", "loads")
    )
    assert "ptx::barrier()" in right and "ptx::barrier()" not in without
    assert "+ (16)) + 4)" in shifted and "+ (16)) + 4)" not in right


def test_kernels_are_chosen_by_their_names() -> None:
    text = kernel("first", "bar.sync 0;") + kernel("second", "bar.sync 0;")
    assert [each.name for each in ptx_reader.kernels(text)] == ["first", "second"]
    chosen = translate.translate(text, "test", "unit", only="second")
    assert "// second" in chosen and "// first" not in chosen


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("fma.rn.f32 %f1, %f1, %f1, %f1;", ("formula", 1)),
        ("div.rn.f32 %f1, %f1, %f1;", ("formula", 8)),
        ("cvt.rn.bf16.f32 %rs1, %f1;", ("formula", 1)),
        ("add.s32 %r1, %r1, %r1;", ("index", 1)),
        ("add.s64 %rd1, %rd1, %rd1;", ("index", 2)),
        ("div.u32 %r1, %r1, %r1;", ("index", 18)),
        ("setp.lt.s32 %p1, %r1, %r1;", ("control", 1)),
        ("bra $again;", ("control", 1)),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];", ("memory", 1)),
        ("mov.u32 %r1, %r2;", ("index", 0)),
        ("ld.param.u64 %rd1, [k_param_0];", ("index", 0)),
    ],
)
def test_instructions_are_counted_by_class(statement: str, expected: tuple[str, int]) -> None:
    (each,) = ptx_reader._statements(statement)
    assert isinstance(each, ptx_reader.Instruction)
    assert ptx_reader.cost(each) == expected
