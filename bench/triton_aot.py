"""Compiles every Triton kernel ahead of time, without a GPU, and tells what came out.

    python bench/triton_aot.py [--out DIR] [--arch 80 90 gfx942 ...]

One row per kernel variant and architecture: registers, spills, shared memory, and for CUDA the
instruction mix as in kernel_report.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_report
import measure
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apollo_kernels.triton_kernels import adamw, apply, project, scale, sparse, table
from apollo_kernels.triton_kernels.element import element

ARCHITECTURES = ("80", "86", "89", "90", "100", "120", "gfx942")
F32 = element(torch.float32)
TYPES = {"table": "*i64", "items": "*i32", "space": "*fp32", "clock": "*i64", "bad": "*i32"}
TYPES |= {"counters": "*i64", "gap": "i32", "scratch": "*fp32", "sent": "*fp32"}
TYPES |= {"norms": "*fp64", "owners": "i32", "width": "i32"}  # all others are fp32
OPTIONAL = ("lr_at", "grad_scale", "found_inf", "clip")
MIX = {
    "spills": "LDL|STL",
    "tensor": "HMMA|HGMMA|UTC[A-Z]*MMA",
    "load 16": r"LDG\S*\.128",
    "store 16": r"STG\S*\.128",
    "barriers": r"BAR\.",
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def layout(dtype: torch.dtype, k_unit: bool, rank: int, channels: int = 4096, k: int = 4096):
    """A matrix that vectors can read, as the launchers see it."""
    lies = table.Matrix(dtype, k_unit, k if k_unit else channels, True, True)
    return table.Layout(channels, k, rank, k_unit, rank % 16 == 0, lies, lies)


def variants(arch: str, everything: bool = True) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, its compile-time arguments and launch options) of what models launch."""
    for dtype in NAMES if everything else (torch.bfloat16, torch.float32):
        for k_unit in (True, False) if everything or dtype == torch.bfloat16 else (False,):
            side = f"{NAMES[dtype]} {'rows' if k_unit else 'columns'}"
            for rank in (1, 16, 64, 256) if everything else (1, 256):
                tiling = project.choose(layout(dtype, k_unit, rank), arch in ("90", "100"))
                kinds = ("", " signs", " exact", " stored") if everything else ("", " signs")
                for kind in kinds:
                    rest = {"STORE": kind == " stored", "SIGNS": kind == " signs"}
                    rest |= {"EXACT": kind == " exact", "FAST": True}
                    name = f"project {side} rank {rank}{kind}"
                    yield name, project._project, {**tiling._asdict(), **rest}
            for rank in (1, 3, 8, 20, 64, 128, 256) if everything else (1, 20, 128):
                tiling = sparse.choose(layout(dtype, k_unit, rank), arch in ("90", "100"))
                for store in (0, 1) if everything else (0,):
                    rest = {"STORE": bool(store), "num_warps": 8}
                    name = f"project_sparse {side} rank {rank}{' stored' * store}"
                    yield name, sparse._project_sparse, {**tiling._asdict(), **rest}
            tiling = apply.choose(layout(dtype, k_unit, 64))._asdict()
            for by_chance in (False, True) if dtype == torch.bfloat16 else (False,):
                name = f"apply {side}{' stochastic' * by_chance}"
                rest = {"STOCHASTIC": by_chance, "num_warps": apply.warps(by_chance)}
                yield name, apply._apply, {**tiling, **rest}
        tiling = adamw.Tiling(element(dtype), element(dtype), F32, True)._asdict()
        yield f"adamw {NAMES[dtype]}", adamw._adamw, {**tiling, "num_warps": 8}
    for rows in (True, False):  # int8 weights lie in rows; their channels may not
        shape = layout(torch.bfloat16, rows, 64)
        shape = shape._replace(w=shape.w._replace(dtype=torch.uint8), group=128)
        rest = {"STOCHASTIC": False, "num_warps": apply.warps(True)}
        side = "rows" if rows else "columns"
        yield f"apply int8 {side}", apply._apply, {**apply.choose(shape)._asdict(), **rest}
        shape = shape._replace(k_first=512)
        yield f"apply int8 {side}, part", apply._apply, {**apply.choose(shape)._asdict(), **rest}
    bf16, uint8 = element(torch.bfloat16), element(torch.uint8)
    tiling = adamw.Tiling(uint8, bf16, F32, True, GROUP=128)._asdict()
    yield "adamw int8", adamw._adamw, {**tiling, "num_warps": 8}
    for moments in (bf16, uint8):
        tiling = adamw.Tiling.of(bf16, bf16, moments, True)._asdict()
        yield f"adamw bf16, {moments} moments", adamw._adamw, {**tiling, "num_warps": 8}
    yield "combine", scale._combine, {
        "ALIGNED": True, "BR": 128, "BC": scale.COMBINE, "SPARSE": False,
    }  # fmt: skip
    flags = {"CORRECT": True, "FRONT": False, "LIMITER": True, "BLOCK": 1024}
    for tensor in (False, True):
        name = f"limit {'tensor' if tensor else 'channel'}"
        yield name, scale._limit, {"TENSOR": tensor, **flags}
    yield "begin", adamw._begin, {"CORRECT": True, "num_warps": 1}
    yield from parts(arch)
    given = dict.fromkeys(OPTIONAL, "*fp32")  # lr in a tensor, GradScaler's tensors, and clip
    tiling = project.choose(layout(torch.float16, True, 64), arch in ("90", "100"))._asdict()
    fused = {"STORE": False, "SIGNS": False, "EXACT": False, "FAST": True, **given}
    yield "project f16 rows rank 64, signals", project._project, {**tiling, **fused}
    for k_unit, rank, aligned in ((True, 20, True), (True, 128, False), (False, 128, False)):
        shape = layout(torch.bfloat16, k_unit, rank)
        shape = shape._replace(g=shape.g._replace(vectors=aligned, aligned=aligned))
        tiling = sparse.choose(shape, False)._asdict()
        side = f"{'rows' if k_unit else 'columns'} rank {rank}{' unaligned' * (not aligned)}"
        rest = {"STORE": False, "num_warps": 8, **given}
        yield f"project_sparse bf16 {side}, signals", sparse._project_sparse, {**tiling, **rest}
    flags = {"TENSOR": False, "CORRECT": False, "FRONT": True, "LIMITER": False, "BLOCK": 1024}
    yield "limit, signals", scale._limit, {**flags, **given}
    for rank in (1, 16):  # one lane per rank row: the sums over them go through shuffles alone
        tile = {"ALIGNED": False, "BR": rank, "BC": scale.COMBINE, "SPARSE": rank == 1}
        yield f"combine rank {rank}, signals", scale._combine, {**tile, **given}
    tiling = adamw.Tiling(element(torch.float16), element(torch.float16), F32, True)._asdict()
    yield "adamw f16, signals", adamw._adamw, {**tiling, "num_warps": 8, **given}
    yield "begin, signals", adamw._begin, {"CORRECT": False, "num_warps": 1, **given}


def parts(arch: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What parts of matrices launch besides, or as other kernels."""
    for k_unit, rank in ((False, 128), (True, 64)):
        shape = layout(torch.bfloat16, k_unit, rank)._replace(k_first=512, by_eights=False)
        side = f"bf16 {'rows' if k_unit else 'columns'} rank {rank}"
        rest: dict[str, Any] = {"STORE": True, "SIGNS": False, "EXACT": False, "FAST": True}
        tiling = project.choose(shape, arch in ("90", "100"))._asdict()
        yield f"project {side}, part", project._project, {**tiling, **rest}
        tiling, rest = sparse.choose(shape, False)._asdict(), {"STORE": True, "num_warps": 8}
        yield f"project_sparse {side}, part", sparse._project_sparse, {**tiling, **rest}
    rest = {"STOCHASTIC": True, "num_warps": apply.warps(True)}
    yield f"apply {side}, part", apply._apply, {**apply.choose(shape)._asdict(), **rest}
    yield "send", scale._send, {"ALIGNED": True, "BR": 128, "BC": scale.COMBINE}
    flags = {"CORRECT": True, "FRONT": False, "LIMITER": True}
    for tensor in (False, True):
        of = {"TENSOR": tensor, "BLOCK": 1024}
        yield f"norms {tensor}", scale._norms, of
        yield f"limit_parts {tensor}", scale._limit_parts, {**flags, **of}


def compiled(kernel: Any, fixed: dict[str, Any], arch: str) -> Any:
    """The kernel's image for ``arch``: a compute capability such as "90", or an AMD name."""
    options = {"num_warps": 4, "enable_fp_fusion": True}
    options |= {k: v for k, v in fixed.items() if k.startswith("num_")}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    signature, constants = {}, {}
    for name in kernel.arg_names:
        given = fixed.get(name)
        if name.isupper() or (name in OPTIONAL and given is None):
            signature[name] = "constexpr"
            constants[name] = False if amd and name == "FAST" else given
        else:
            signature[name] = given or TYPES.get(name, "fp32")
    pointers = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def row(name: str, arch: str, image: Any, folder: Path) -> dict[str, Any]:
    if arch.startswith("gfx"):
        text = image.asm["amdgcn"]
        found = {k: int(v) for k, v in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", text)}
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        shared = found["group_segment_fixed_size"]
        return {
            "kernel": name, "arch": arch, "registers": found["vgpr_count"], "spills": spills,
            "shared": max(shared, image.metadata.shared),
        }  # fmt: skip
    path = folder / "kernel.cubin"
    path.write_bytes(image.asm["cubin"])
    tool = kernel_report.cuobjdump()
    assert tool is not None, "Triton's wheel carries cuobjdump"
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dump(tool, "--dump-resource-usage", path)))
    sass = dump(tool, "-sass", path)
    mix = {column: len(re.findall(rf"\s(?:{words})", sass)) for column, words in MIX.items()}
    mix["fused"] = fused_after_shuffles(sass)
    mix["early"] = len(re.findall(r"wgmma\.wait_group\S* [1-9]", image.asm["ptx"]))
    return {
        "kernel": name, "arch": f"sm_{arch}", "registers": int(usage["REG"]), **mix,
        "stack": int(usage["STACK"]), "shared": image.metadata.shared,
    }  # fmt: skip


def fused_after_shuffles(sass: str) -> int:
    """How many multiply-adds read what a shuffle has brought from another lane.

    There must be none: where x * x + y is fused on one lane and y * y + x on the other, two lanes
    of one sum hold different bits, and it is chance which of them is stored.
    """
    shuffled: set[str] = set()
    found = 0
    form = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s+([^;]*);"
    for operation, operands in re.findall(form, sass, re.MULTILINE):
        registers = re.findall(r"\bR\d+\b", operands)
        if operation.startswith("SHFL"):
            shuffled.add(registers[0])
            continue
        found += operation.startswith("FFMA") and not shuffled.isdisjoint(registers[1:])
        shuffled.difference_update(overwritten(operation, registers))
    return found


def overwritten(operation: str, registers: list[str]) -> list[str]:
    """The registers that an operation writes: two or four in a row where its result is wide."""
    if not registers:
        return []
    wide = 4 if ".128" in operation else 2 if re.search(r"\.64|\.WIDE", operation) else 1
    loads = operation.startswith(("LD", "IMAD"))
    first = int(registers[0][1:])
    return [f"R{first + i}" for i in range(wide if loads else 1)]


def dump(tool: str, option: str, path: Path) -> str:
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True).stdout


def rows(architectures: tuple[str, ...], everything: bool = True) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            row(name, arch, compiled(kernel, fixed, arch), Path(folder))
            for arch in architectures
            for name, kernel, fixed in variants(arch, everything)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--few", action="store_true", help="a sample that covers every kernel")
    parser.add_argument("--out", type=Path, help="also write triton.md and triton.json there")
    args = parser.parse_args()
    found = rows(tuple(args.arch), not args.few)
    print(measure.table(found))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        body = measure.markdown(found)
        (args.out / "triton.md").write_text(f"# Triton kernels, as compiled\n\n{body}\n")
        (args.out / "triton.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
