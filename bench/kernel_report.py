"""What the compiler made of each kernel: registers, spills, shared memory, instructions, occupancy.

    python bench/kernel_report.py [--out DIR] [BINARY ...]

Reads the native module (or any cubin, fatbin or library) with cuobjdump, which comes with the CUDA
toolkit and with Triton's wheel. No GPU is needed.
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

import measure

# What an SM holds (CUDA programming guide, compute capabilities): threads, blocks, shared KB.
SM = {
    "sm_80": (2048, 32, 164),
    "sm_86": (1536, 16, 100),
    "sm_89": (1536, 24, 100),
    "sm_90": (2048, 32, 228),
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


def _sections(text: str) -> list[tuple[str, str]]:
    """(architecture, text) of each ELF image that cuobjdump lists."""
    pieces = re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)
    marked = ((re.search(r"arch = (sm_\w+)", piece), piece) for piece in pieces)
    return [(found.group(1), piece) for found, piece in marked if found]


def _resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    found = {}
    for arch, piece in _sections(text):
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", piece):
            values = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found[arch, name] = values
    return found


def _threads(text: str) -> dict[tuple[str, str], int]:
    """The launch bound of each kernel."""
    found = {}
    for arch, piece in _sections(text):
        for section in piece.split(".nv.info.")[1:]:
            bound = re.search(r"EIATTR_MAX_THREADS\s+.*\s+Value:((?:\s*0x\w+){3})", section)
            if bound:
                found[arch, section.split()[0]] = math.prod(int(n, 16) for n in bound[1].split())
    return found


def _mixes(text: str) -> dict[tuple[str, str], Counter[str]]:
    """Instructions of each kernel, by MIX's columns, and how many in all."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for arch, piece in _sections(text):
        for block in piece.split("Function : ")[1:]:
            count: Counter[str] = Counter()
            for word in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", block):
                count["instructions"] += 1
                for column, pattern in MIX.items():
                    count[column] += re.match(pattern, word) is not None
            found[arch, block.split()[0]] = count
    return found


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


def kernels(path: Path, arch: str | None = None) -> list[dict[str, Any]]:
    """One row per kernel and architecture (or of one alone) in a binary.

    Raises
        RuntimeError: without cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit, or pip install triton")
    only = ["-arch", arch] if arch else []
    resources = _resources(_dump(tool, *only, "--dump-resource-usage", str(path)))
    bounds = _threads(_dump(tool, *only, "-elf", str(path)))
    mixes = _mixes(_dump(tool, *only, "-sass", str(path)))
    names = _readable([name for _, name in resources])
    rows = []
    for (arch, name), used in resources.items():
        threads, mix = bounds.get((arch, name), 0), mixes.get((arch, name), Counter())
        row: dict[str, Any] = {"kernel": names[name], "arch": arch, "threads": threads or None}
        row.update(registers=used["REG"], spills=mix["spill"], stack=used["STACK"])
        row["shared"] = used["SHARED"]
        row.update({column: mix[column] for column in ("instructions", *MIX) if column != "spill"})
        row["occupancy"] = occupancy(arch, used["REG"], used["SHARED"], threads)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binaries", nargs="*", type=Path, metavar="BINARY")
    parser.add_argument("--out", type=Path, help="also write kernels.md and kernels.json there")
    args = parser.parse_args()
    paths = args.binaries or [p for p in [native_module()] if p is not None]
    for path in paths:
        if not path.is_file():
            parser.error(f"no file {path}")
    rows = [row for path in paths for row in kernels(path)]
    if rows:
        text = measure.table(rows)
    elif not paths:
        text = "The native module is not built: python -m apollo_kernels info says why."
    else:
        text = f"No CUDA kernels in {', '.join(p.name for p in paths)}."
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        body = measure.markdown(rows) if rows else text
        (args.out / "kernels.md").write_text(f"# Kernels, as compiled\n\n{body}\n")
        (args.out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
