"""What the interpreter must catch: faults in inline PTX, and barriers that are missing.

    python tests/ptx/mutants.py

The emulated device replaces inline PTX by C++, so that no other test can see the first kind. Each
is made in the text that nvcc gave out, within what csrc/device.h wrote itself.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as a script: tests/ has to be found
    sys.path[0] = str(Path(__file__).parent.parent)

from apollo_kernels import cuda
from ptx import cuda_host
from ptx.cases import BF16, F16, Case, Host, take
from ptx.machine import Device
from ptx.parser import Module, PtxError

TENSOR = {"scale_type": "tensor"}
TILES = (
    Case(((70, 72),), 20, weight=BF16, grad=BF16),
    Case(((70, 72),), 20, weight=BF16, grad=BF16, order="columns"),
)
FULL = tuple(replace(case, shapes=((256, 130),)) for case in TILES)  # whole tiles: cp.async
CASES = (
    *TILES,
    Case(((70, 72),), 20, "gaussian", BF16, F16),
    Case(((70, 72),), 4, "gaussian", BF16, BF16, hyper=TENSOR),
    Case(((40, 2150),), 4, "gaussian", BF16, BF16, order="columns", hyper=TENSOR),
    Case(((70, 72),), 24, "sparse", F16, BF16),
)


class Mutant(NamedTuple):
    name: str
    old: str  # a regular expression, for the lines of inline PTX
    new: str
    cases: tuple[Case, ...] = CASES


LDMATRIX = r"(ldmatrix\S+ \{)(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}"
MMA = r"(mma\S+\s+\{[^}]*\}, )\{([^,]+),([^,]+),([^,]+),([^,}]+)\}, \{([^,]+),([^,}]+)\}"
INLINE = [
    Mutant("cvt's operands swapped", r"(cvt\.rn\.bf16x2\.f32 \S+) (\S+), (\S+);", r"\1 \3, \2;"),
    Mutant("A's quarters in rows", MMA, r"\1{\2,\4,\3,\5}, {\6,\7}", TILES),
    Mutant("A's halves swapped", MMA, r"\1{\3,\2,\5,\4}, {\6,\7}", TILES),
    Mutant("B's halves swapped", MMA, r"\1{\2,\3,\4,\5}, {\7,\6}", TILES),
    Mutant("ldmatrix hands out 1 before 0", LDMATRIX, r"\1\3,\2,\4,\5}", TILES),
    Mutant("ldmatrix hands out 2 before 1", LDMATRIX, r"\1\2,\4,\3,\5}", TILES),
    Mutant("X is transposed no more", r"\.x4\.trans\.shared", ".x4.shared", TILES),
    Mutant("Z is transposed", r"\.x4\.shared", ".x4.trans.shared", TILES),
    Mutant("mma of f16 numbers", r"bf16\.bf16\.f32", "f16.f16.f32", TILES),
    Mutant("load16 in another order", r"(ld\.global\S+ \{%r\d+),(%r\d+),(%r\d+),", r"\1,\3,\2,"),
    Mutant("store16 in another order", r"(st\.global.*, \{%r\d+),(%r\d+),(%r\d+),", r"\1,\3,\2,"),
    Mutant("nobody waits for copies", r"cp\.async\.wait_group 0;", "", FULL),
    Mutant("half of a copy", r"(cp\.async\.c)g(\S+ .*), 16;", r"\1a\2, 8;", FULL),
    Mutant("sine for cosine", r"cos\.approx", "sin.approx"),
    Mutant("cosine for sine", r"sin\.approx", "cos.approx"),
    Mutant("ex2 for lg2", r"lg2\.approx", "ex2.approx"),
    Mutant("rsqrt for sqrt", r"(?<!r)sqrt\.approx", "rsqrt.approx"),
    Mutant("half from f32's low bits", r"cvt\.f32\.f16 (\S+), (\S+);", r"cvt.rn.f32.u16 \1, \2;"),
]
FEW = [m for m in INLINE if m.name in (
    "cvt's operands swapped", "A's quarters in rows", "ldmatrix hands out 2 before 1",
    "X is transposed no more", "nobody waits for copies",
)]  # fmt: skip


def inline(text: str, change: Callable[[str], str]) -> str:
    """``text`` with its inline PTX changed: nvcc says where that begins and ends."""
    marks = r"(// begin inline asm\n)(.*?)(// end inline asm)"
    return re.sub(marks, lambda m: m[1] + change(m[2]) + m[3], text, flags=re.DOTALL)


def complaints(text: str, cases: tuple[Case, ...], most: int = 1) -> Iterator[str]:
    """What is said against a module with this PTX."""
    compiled = cuda_host.kernels()
    changed = cuda_host.Kernels(Module(text), compiled.native)
    host = Host(cuda, functools.partial(cuda_host.running, changed), cuda_host.batch_memory)
    for case in cases:
        device = Device()
        try:
            yield from take(host, device, case)
        except (PtxError, IndexError) as error:
            yield str(error)
        yield from (f"{f.what}: {f.text}" for f in device.findings)


def seen(mutant: Mutant) -> str | None:
    """The first complaint, if there is one."""
    before = cuda_host.kernels().ptx.text
    after = inline(before, lambda part: re.sub(mutant.old, mutant.new, part))
    assert after != before, mutant.name
    return next(complaints(after, mutant.cases), None)


class Guarded(NamedTuple):
    """A kernel, cases that reach its barriers, and how many of them may go unseen, with reasons."""

    kernel: str
    cases: tuple[Case, ...]
    harmless: int = 0


SPARSE = (CASES[5], replace(CASES[5], order="columns"))
GUARDED = (
    Guarded("project_tiles", (*TILES, *FULL)),
    # The last one of an unrolled loop, after which nobody writes; and by row that between two slabs
    # of z, of which a chunk of K has one unless a matrix has more than a hundred tiles.
    Guarded("project_dots", CASES[3:5], 2),
    # By row, what a warp has stored is read by that warp alone.
    Guarded("project_sparse", SPARSE, 1),
    # The same for norms; and the last one of the last sum over a block.
    Guarded("scale_channels", CASES[4:5], 2),
)


def without_a_barrier(kernel: str, cases: tuple[Case, ...]) -> tuple[int, list[str]]:
    """Of the barriers that a kernel reaches in its cases: how many there are, and which ones may
    go without a complaint."""
    compiled = cuda_host.kernels()
    lines = compiled.ptx.text.splitlines()
    host = Host(cuda, functools.partial(cuda_host.running, compiled), cuda_host.batch_memory)
    reached: set[int] = set()
    for case in cases:
        device = Device()
        take(host, device, case)
        for name in (n for n in device.launches if kernel in n):
            reached |= set(device.barriers[name])
    unseen = []
    for line in sorted(reached):
        text = "\n".join([*lines[: line - 1], "", *lines[line:]])
        if next(complaints(text, cases), None) is None:
            unseen.append(f"{line}: {lines[line - 1].strip()}")
    return len(reached), unseen


def main() -> None:
    assert next(complaints(cuda_host.kernels().ptx.text, CASES), None) is None
    survived = 0
    for mutant in INLINE:
        since = time.monotonic()
        what = seen(mutant)
        survived += what is None
        print(f"{time.monotonic() - since:5.1f} s  {mutant.name}: {what or 'SURVIVED'}", flush=True)
    for kernel, cases, harmless in GUARDED:
        since = time.monotonic()
        count, unseen = without_a_barrier(kernel, cases)
        survived += len(unseen) != harmless
        told = f"{kernel}: {count} barriers, {len(unseen)} unseen, {harmless} of them expected"
        print(f"{time.monotonic() - since:5.1f} s  {told}")
        for line in unseen:
            print(f"         {line}", flush=True)
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
