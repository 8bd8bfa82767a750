"""Writes the README's figures, each from a file of bench/results or from the package's estimate.

    python bench/readme_figures.py [--check]

A block stands between two comments, ``<!-- figures: NAME -->`` and ``<!-- end -->``. With --check
nothing is written, and the exit status is 1 if a block differs. A new one joins by a function in
BLOCKS that returns its lines.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apollo_kernels import estimate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU, H200 = RESULTS / "cpu-x86_64", RESULTS / "nvidia-h200"
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

MODES = {  # of the estimate: how the README calls them
    "AdamW, float32 moments": "AdamW",
    "8-bit Adam": "8-bit Adam",
    "GaLore": "GaLore, rank 1024",
    "APOLLO": "APOLLO, rank 256",
    "APOLLO-Mini": "APOLLO-Mini",
    "APOLLO-Mini, int8 dense moments": "Mini, int8 moments of embedding and head",
    "APOLLO-Mini, gradient release, embeddings": "Mini, gradient release, low-rank embeddings",
    "Q-APOLLO-Mini, gradient release": "the same with int8 weights",
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> Iterator[str]:
    yield line(*cells)
    yield "|" + "---|" * len(cells)


# ---- memory --------------------------------------------------------------------------------------


def memory() -> Iterator[str]:
    """GB of weights + state and of the peak, one sequence of 256, activations checkpointed."""
    models = {"LLaMA-7B": "7b", "Llama-3-8B": "8b"}
    found = {
        title: {
            e.mode: e for e in estimate.estimate(name, batch=1, sequence=256, checkpointing=[True])
        }
        for title, name in models.items()
    }
    yield from head("", *(cell for title in models for cell in (title, "peak")))
    for mode, name in MODES.items():
        cells = []
        for title in models:
            e = found[title][mode]
            cells.append(f"{e.weights / 1e9:.1f} + {e.state / 1e9:.2f} | {e.peak / 1e9:.1f}")
        yield line(name, *cells)


def mixtral() -> Iterator[str]:
    """The state of a mixture, by mode."""
    found = estimate.estimate("8x7b", batch=1, sequence=256, checkpointing=[True])
    state = {e.mode: f"{e.state / 1e9:.1f}" for e in found}
    wanted = {mode: mode for mode in ("AdamW, float32 moments", "AdamW, bf16 moments")}
    wanted |= {mode: MODES[mode] for mode in ("APOLLO", "APOLLO-Mini")}
    yield from head(*wanted.values())
    yield line(*(state[mode] for mode in wanted))


def capped() -> Iterator[str]:
    """Training steps on an H200 whose allocator was held to a smaller card's memory."""
    yield from head("run", "cap, GB", "tokens", "peak allocated, GB", "counted, GB")
    for row in rows_of(H200 / "memory.csv"):
        if not row["tokens/s"]:
            sizes = (f"{float(row[k]):.2f}" for k in ("allocated GB", "counted GB"))
            yield line(row["run"], row["cap GB"], row["batch"], *sizes)


def throughput() -> Iterator[str]:
    yield from head("", "largest micro-batch", "tokens per second")
    for row in rows_of(H200 / "memory.csv"):
        if row["tokens/s"]:
            yield line(row["run"], row["batch"], f"{float(row['tokens/s']):,.0f}")


# ---- steps ---------------------------------------------------------------------------------------


def _steps(path: Path, columns: dict[str, str], lines: dict[str, tuple[str, str]]) -> Iterator[str]:
    """``columns``: heading -> optimizer, with RANK for the model's; ``lines``: first cell -> model
    and dtype."""
    found = {(r["model"], r["dtype"], r["optimizer"]): r["ms"] for r in rows_of(path)}
    yield from head("", *columns)
    for name, (model, dtype) in lines.items():
        cells = []
        for optimizer in columns.values():
            wanted = optimizer.replace("RANK", "256" if model == "7b" else "128")
            ms = float(found[model, dtype, wanted])
            cells.append(f"{ms:.3g}")
        yield line(name, *cells)


def h200() -> Iterator[str]:
    return _steps(
        H200 / "step.csv",
        {
            "AdamW fused": "AdamW fused",
            "foreach": "AdamW foreach",
            "apollo_torch, Mini": "apollo_torch, Mini",
            "its rank": "apollo_torch, rank RANK",
            "**ours, Mini**": "ours cuda, Mini",
            "**sparse**": "ours cuda, rank RANK, sparse",
            "**Gaussian**": "ours cuda, rank RANK",
            "Triton, Mini": "ours triton, Mini",
            "sparse": "ours triton, rank RANK, sparse",
            "Gaussian": "ours triton, rank RANK",
        },
        {"LLaMA-7B, rank 256": ("7b", "bfloat16"), "LLaMA-60M, rank 128": ("60m", "bfloat16")},
    )


def cpu() -> Iterator[str]:
    return _steps(
        CPU / "step.csv",
        {
            "AdamW fused": "AdamW fused",
            "**ours, Mini**": "ours torch, Mini",
            "**sparse**": "ours torch, rank RANK, sparse",
            "**Gaussian**": "ours torch, rank RANK",
            "apollo_torch, Mini": "apollo_torch, Mini",
            "its rank": "apollo_torch, rank RANK",
        },
        {"float32": ("60m", "float32"), "bf16": ("60m", "bfloat16")},
    )


# ---- losses --------------------------------------------------------------------------------------


def demo() -> Iterator[str]:
    yield from head("", "validation loss", "weights", "optimizer state")
    for row in json.loads((CPU / "demo" / "demo.json").read_text()):
        weights, state = (f"{row[f'{k}_mb']:.2f} MB" for k in ("weights", "state"))
        yield line(row["optimizer"], f"{row['loss']:.3f}", weights, state)


def losses() -> Iterator[str]:
    """From convergence.py's table: the mean over seeds, and how far it is from AdamW's."""
    text = (CPU / "convergence.md").read_text().splitlines()
    table = [[c.strip() for c in row.strip("|").split("|")] for row in text if row[:1] == "|"]
    names = table[0]
    yield from head("", "loss, mean", "to AdamW at the same seed", "state")
    for cells in table[2:]:
        row: dict[str, Any] = dict(zip(names, cells, strict=True))
        seeds = [float(v) for k, v in row.items() if k.startswith("seed")]
        mean = f"{statistics.mean(seeds):.3f}"
        yield line(row["optimizer"], mean, row["to AdamW"], f"{row['state MB']} MB")


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    f.__name__: f for f in (memory, mixtral, capped, throughput, h200, cpu, demo, losses)
}


def filled(text: str) -> str:
    """``text`` with every block as its source has it now."""

    def fill(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return begin + "\n" + "\n".join(BLOCKS[name]()) + "\n\n" + end

    return _BLOCK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one differs")
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if options.check:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
