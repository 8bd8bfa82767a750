"""What the compiler made of each kernel, and what a model of an SM predicts from it.

    python bench/kernel_report.py [--predict] [--out DIR] [BINARY ...]
    python bench/kernel_report.py --budgets [BINARY ...] > bench/budgets.csv

Registers, spills, shared memory, occupancy; instructions per element of the main loops. --predict
adds, per card, the share of the floor and the milliseconds of a LLaMA-7B step (bench/sm_model);
that takes minutes. Reads the native module (or any cubin, fatbin or library) with cuobjdump, which
comes with the CUDA toolkit and with Triton's wheel. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import budgets
import loop_figures
import measure
import predictions
import sass

# What an SM holds (CUDA programming guide, compute capabilities): threads, blocks, shared KB.
SM = {
    "sm_80": (2048, 32, 164),
    "sm_86": (1536, 16, 100),
    "sm_89": (1536, 24, 100),
    "sm_90a": (2048, 32, 228),
    "sm_100": (2048, 32, 228),
    "sm_120": (1536, 24, 100),
}
REGISTERS = 65536

# Column -> a pattern of the instructions that it counts.
MIX = {
    "tensor": r"HMMA|HGMMA|IMMA|UTCHMMA",
    "MUFU": r"MUFU",
    "load 16": r"LDG\S*\.128|LDGSTS",
    "store 16": r"STG\S*\.128",
    "spill": r"LDL|STL",
}


def cuobjdump() -> str | None:
    """Its path: on PATH, in the toolkit, or in Triton's wheel."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def native_module() -> Path | None:
    spec = importlib.util.find_spec("apollo_kernels._C")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _dump(tool: str, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    return done.stdout


def _sections(text: str, alone: str) -> list[tuple[str, str]]:
    """(architecture, text) of each ELF image that cuobjdump lists; a cubin is one of ``alone``."""
    pieces = ("\n" + text).split("\nFatbin elf code:\n")  # a pattern takes seconds
    if len(pieces) == 1:
        return [(alone, text)]
    marked = ((re.search(r"arch = (sm_\w+)", piece), piece) for piece in pieces)
    return [(found.group(1), piece) for found, piece in marked if found]


def _resources(sections: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, int]]:
    found = {}
    for arch, piece in sections:
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", piece):
            values = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found[arch, name] = values
    return found


def _threads(sections: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The launch bound of each kernel."""
    found = {}
    for arch, piece in sections:
        for section in piece.split(".nv.info.")[1:]:
            bound = re.search(r"EIATTR_MAX_THREADS\s+.*\s+Value:((?:\s*0x\w+){3})", section)
            if bound:
                found[arch, section.split()[0]] = math.prod(int(n, 16) for n in bound[1].split())
    return found


def _mix(function: sass.Function) -> Counter[str]:
    """Instructions by MIX's columns, and how many in all."""
    count: Counter[str] = Counter(instructions=len(function.instructions))
    for op, times in Counter(x.op for x in function.instructions).items():
        for column, pattern in MIX.items():
            count[column] += times * (re.match(pattern, op) is not None)
    return count


def _readable(mangled: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return {name: name for name in mangled}
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    plain = [re.sub(r"\(.*|^void |apollo::|\(anonymous namespace\)::", "", line)
             for line in done.stdout.splitlines()]  # fmt: skip
    return dict(zip(mangled, plain, strict=True))


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float | None:
    """Resident threads over the most that an SM holds, from registers, shared memory and blocks."""
    if arch not in SM or not threads:
        return None
    most, blocks, kilobytes = SM[arch]
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps) if registers else blocks
    older = arch in ("sm_80", "sm_86", "sm_89")
    reserved = 1024 if older else 0  # the system's share; cuobjdump counts it for later ones
    by_shared = int(kilobytes * 1024 // max(1, shared + reserved))
    return min(blocks, most // (32 * warps), by_registers, by_shared) * warps * 32 / most


def resident(arch: str, row: dict[str, Any]) -> int:
    """Blocks of a kernel that an SM holds."""
    return round((row["occupancy"] or 0) * SM[arch][0] / row["threads"])


def architectures(path: Path) -> list[str | None]:
    """Whose code a binary holds; a cubin does not say."""
    listed = _dump(_tool(), "--list-elf", str(path))
    found = re.findall(r"\.(sm_\w+)\.cubin", listed)
    return sorted(set(found), key=lambda arch: int(re.sub(r"\D", "", arch))) or [None]


def _tool() -> str:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit, or pip install triton")
    return tool


def resources(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Of every architecture and kernel: registers, and bytes of stack, local and shared memory."""
    found = _resources(_sections(_dump(_tool(), "--dump-resource-usage", str(path)), ""))
    names = _readable(list({name for _, name in found}))
    return {(arch, names[name]): used for (arch, name), used in found.items()}


class Binary:
    """The kernels of a module, fatbin, library or cubin, of all architectures or of one alone.

    ``functions`` and ``rows`` stand in one order; ``toolkit`` is the version of ptxas.

    Raises
        RuntimeError: without cuobjdump.
    """

    def __init__(self, path: Path, arch: str | None = None):
        only = ["-arch", arch] if arch else []

        def sections(what: str) -> list[tuple[str, str]]:
            return _sections(_dump(_tool(), *only, what, str(path)), alone)

        code = _dump(_tool(), *only, "-sass", str(path))
        own = re.search(r"code for (sm_\w+)", code)
        alone = own[1] if own else ""
        functions = {
            (image, name): function
            for image, text in _sections(code, alone)
            for name, function in sass.functions(text)
        }
        resources = _resources(sections("--dump-resource-usage"))
        image = sections("-elf")
        threads = _threads(image)
        release = re.search(r"Tool Version:.*release ([\d.]+)", "".join(text for _, text in image))
        self.toolkit = release[1] if release else "?"
        names = _readable([name for _, name in resources])
        order = sorted(resources, key=lambda key: (names[key[1]], key[0]))
        self.functions = [functions[key] for key in order]
        self.rows = [
            _row(names[key[1]], key[0], resources[key], threads.get(key, 0), function)
            for key, function in zip(order, self.functions, strict=True)
        ]


def _row(
    kernel: str, arch: str, used: dict[str, int], threads: int, function: sass.Function
) -> dict[str, Any]:
    mix = _mix(function)
    row: dict[str, Any] = {"kernel": kernel, "arch": arch, "threads": threads or None}
    row.update(registers=used["REG"], spills=mix["spill"], stack=used["STACK"])
    row["shared"] = used["SHARED"]
    row.update({column: mix[column] for column in ("instructions", *MIX) if column != "spill"})
    row["occupancy"] = occupancy(arch, used["REG"], used["SHARED"], threads)
    row["loops"] = loop_figures.figures(kernel, function)
    return row


def kernels(path: Path, arch: str | None = None) -> list[dict[str, Any]]:
    """One row per kernel and architecture."""
    return Binary(path, arch).rows


def without_loops(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "loops"} for row in rows]


def loop_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per main loop: what a turn holds, and instructions per element by architecture."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(re.sub(r"\D", "", row["arch"]))):
        for loop in row["loops"]:
            of = found.setdefault(
                (row["kernel"], loop.orientation),
                {
                    "kernel": row["kernel"],
                    "loop": loop.orientation,
                    "elements": loop.elements,
                    **{f"{size} bytes": loop.accesses.get(size, 0) for size in (16, 8)},
                    "scalars": loop.scalar,
                    "tensor": loop.tensor,
                    "MUFU": loop.mufu,
                },
            )
            of[row["arch"]] = loop.per_element
    return [found[key] for key in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binaries", nargs="*", type=Path, metavar="BINARY")
    parser.add_argument("--out", type=Path, help="also write kernels.md and kernels.json there")
    parser.add_argument("--predict", action="store_true", help="run the model of an SM")
    parser.add_argument("--budgets", action="store_true", help="print budgets.csv of today")
    args = parser.parse_args()
    paths = args.binaries or [p for p in [native_module()] if p is not None]
    for path in paths:
        if not path.is_file():
            parser.error(f"no file {path}")
    binaries = [Binary(path, arch) for path in paths for arch in architectures(path)]
    rows = [row for binary in binaries for row in binary.rows]
    if args.budgets:
        by = {a: [row for row in rows if row["arch"] == a] for a in budgets.ARCHITECTURES}
        budgets.write(by, binaries[0].toolkit)
        return
    empty = "The native module is not built: python -m apollo_kernels info says why."
    if paths:
        empty = f"No CUDA kernels in {', '.join(p.name for p in paths)}."
    tables = {"Kernels, as compiled": without_loops(rows)}
    if rows:
        tables["Main loops: what a turn holds, and instructions per element"] = loop_rows(rows)
        if args.predict:
            tables.update(predictions.tables(binaries))
    for title, table in tables.items():
        print(f"{title}\n\n{measure.table(table) if table else empty}\n")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        parts = [f"# {t}\n\n{measure.markdown(r) if r else empty}\n" for t, r in tables.items()]
        (args.out / "kernels.md").write_text("\n".join(parts))
        (args.out / "kernels.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
