"""What a compiled kernel may cost at most, and what is said of one that costs more.

budgets.csv holds the figures, per kernel, main loop and architecture: those of the day they were
taken, with 2 % of slack for instructions and registers rounded up to what an SM hands out. After a
change that is meant to cost more, or costs less:

    python bench/kernel_report.py --budgets > bench/budgets.csv

TARGETS is what the design asks for, whatever today's figures are.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

FILE = Path(__file__).with_suffix(".csv")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
SLACK = 1.02
PER_ELEMENT = "instructions per element"
# Of a turn; all others have 16 bytes. Where the file says nothing, there may be none.
EIGHTS, SCALARS = "8-byte accesses", "scalar accesses"
REGISTERS, OCCUPANCY = "registers", "occupancy"

# Kernel -> instructions per element of its main loops.
TARGETS = {
    "apply_update<bfloat16, bfloat16, ToNearest>": 12.0,
    "project_sparse<bfloat16>": 7.5,
    "project_sparse<float>": 7.5,
}


class Key(NamedTuple):
    kernel: str
    loop: str  # row, column, any; - for figures of the whole kernel
    figure: str


def measured(rows: Iterable[dict[str, Any]]) -> dict[Key, float]:
    """The figures of kernel_report's rows of one architecture."""
    found: dict[Key, float] = {}
    for row in rows:
        kernel = row["kernel"]
        found[Key(kernel, "-", REGISTERS)] = row["registers"]
        if row["occupancy"] is not None:
            found[Key(kernel, "-", OCCUPANCY)] = row["occupancy"]
        for loop in row["loops"]:
            found[Key(kernel, loop.orientation, PER_ELEMENT)] = loop.per_element
            found[Key(kernel, loop.orientation, EIGHTS)] = loop.accesses.get(8, 0)
            found[Key(kernel, loop.orientation, SCALARS)] = loop.scalar
    return found


def budget(figure: str, value: float) -> float:
    """What today's value makes of itself."""
    if figure == PER_ELEMENT:
        return math.ceil(100 * SLACK * value) / 100
    if figure == REGISTERS:  # a warp gets them by 256, 8 for each lane
        return math.ceil(value / 8) * 8
    return math.floor(10000 * value) / 10000 if figure == OCCUPANCY else value


def complaints(architecture: str, rows: list[dict[str, Any]], path: Path = FILE) -> list[str]:
    """A sentence per figure beyond its budget, or without one. Nothing may spill."""
    found, budgets = measured(rows), read(architecture, path)
    said = []
    for row in rows:
        for what in ("spills", "stack"):
            if row[what]:
                said.append(f"{architecture}: {row['kernel']}: {what} {row[what]}, budget 0")
    for key, value in found.items():
        where = f"{key.kernel}, {key.loop} loop" if key.loop != "-" else key.kernel
        most = budgets.get(key, 0.0 if key.figure in (EIGHTS, SCALARS) else None)
        if most is None:
            said.append(f"{architecture}: {where}: no budget of {key.figure} ({value:.4g})")
            continue
        worse = value < most if key.figure == OCCUPANCY else value > most
        if worse:
            said.append(f"{architecture}: {where}: {key.figure} {value:.4g}, budget {most:.4g}")
    missing = [key for key in budgets if key not in found]
    return said + [
        f"{architecture}: {', '.join(key)}: is gone, but has a budget" for key in missing
    ]


def beyond_targets(architecture: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    said = []
    for key, value in measured(rows).items():
        most = TARGETS.get(key.kernel)
        if most is not None and key.figure == PER_ELEMENT and value > most:
            said.append(
                f"{architecture}: {key.kernel}, {key.loop} loop: "
                f"{value:.4g} {PER_ELEMENT}, target {most:.4g}"
            )
    return said


def read(architecture: str, path: Path = FILE) -> dict[Key, float]:
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            Key(row["kernel"], row["loop"], row["figure"]): float(row[architecture])
            for row in rows
            if row[architecture]
        }


def toolkit(path: Path = FILE) -> str:
    """The version of ptxas that the budgets are of; another one makes other code."""
    return path.read_text().split("\n", 1)[0].rpartition(" ")[2]


def write(
    by_architecture: dict[str, list[dict[str, Any]]], toolkit: str, to: TextIO = sys.stdout
) -> None:
    found = {name: measured(rows) for name, rows in by_architecture.items()}
    keys = sorted({key for figures in found.values() for key in figures})
    to.write(
        f"# python bench/kernel_report.py --budgets > bench/budgets.csv  # of CUDA {toolkit}\n"
    )
    table = csv.writer(to, lineterminator="\n")
    table.writerow(["kernel", "loop", "figure", *found])
    for key in keys:
        if key.figure in (EIGHTS, SCALARS) and not any(f.get(key) for f in found.values()):
            continue
        values = [figures.get(key) for figures in found.values()]
        cells = ["" if v is None else f"{budget(key.figure, v):g}" for v in values]
        table.writerow([*key, *cells])
