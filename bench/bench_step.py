"""Times one optimizer step over the matrices of LLaMA models: ours next to its peers, in one run.

    python bench/bench_step.py [--models 60m ...] [--dtype bfloat16 ...] [--quick] [--out DIR]

The contest itself is the package's (apollo_kernels/commands/contest.py), where ``python -m
apollo_kernels bench`` has it too. Nothing is asserted here; bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measure
import torch
from roofline import Configuration, step_bytes
from shapes import LLAMA, Llama

from apollo_kernels import backends
from apollo_kernels.commands import contest
from apollo_kernels.commands.contest import DTYPES


def least_bytes(model: Llama, name: str, rank: int, width: int) -> float:
    """What a step of one of ours must move, with two reads of the gradient (roofline.py)."""
    wanted = 1 if name.endswith("Mini") else rank
    c = Configuration(name, wanted, float(width), float(width))
    shapes = model.matrices()
    return step_bytes(shapes, c) * sum(m * n for m, n in shapes)


def run(
    model_name: str, dtype_name: str, rank: int | None, rounds: int, compiled: bool, copy: float
) -> list[dict[str, Any]]:
    """One row per optimizer; times are scaled to all layers where not all fit."""
    model, device, dtype = LLAMA[model_name], measure.default_device(), DTYPES[dtype_name]
    rank = rank or min(256, model.hidden // 4)
    raced = contest.Model(model_name, model.layer_matrices(), model.layers, model.hidden)
    every = contest.entrants(raced, rank, device, compiled)
    rows = []
    for found in contest.race(raced, every, dtype, device, rounds):
        row = {"model": model_name, "dtype": dtype_name, **found}
        if "ms" in row and row["optimizer"].startswith("ours"):
            nbytes = least_bytes(model, row["optimizer"], rank, dtype.itemsize)
            row["of copy"] = nbytes / (row["ms"] * 1e-3) / copy
        rows.append(row)
    return rows


def main() -> None:
    device = measure.default_device()
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", choices=LLAMA, nargs="+")
    parser.add_argument("--rank", type=int, help="default: a quarter of the hidden size up to 256")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--compile", action="store_true", help="apollo_torch under torch.compile")
    parser.add_argument("--quick", action="store_true", help="7 rounds; on a GPU 130m, 1b and 7b")
    parser.add_argument("--out", type=Path, help="also write step.csv, step.json and step.png")
    args = parser.parse_args()
    measure.keep_freed_memory()
    few = ["130m", "1b", "7b"] if args.quick else list(LLAMA)
    models = args.models or (few if gpu else ["60m"])
    dtypes = args.dtype or (["bfloat16"] if gpu else list(DTYPES))
    rounds = args.rounds or (7 if args.quick else 21)
    print(f"{measure.card_name(device)}, torch {torch.__version__}", end="")
    print("" if gpu else f", {torch.get_num_threads()} threads", end="")
    copy = measure.copy_bandwidth(device)
    print(f", copies {copy / 1e9:.1f} GB/s")
    for backend, reason in backends.backends(device):
        if reason is not None:
            print(f"Not run: ours {backend}: {reason}")
    rows: list[dict[str, Any]] = []
    for model in models:
        for dtype in dtypes:
            found = run(model, dtype, args.rank, rounds, args.compile, copy)
            print(measure.table(found), "\n", flush=True)
            rows += found
            if args.out:  # after each model: what is measured survives what comes after it
                measure.write(args.out, "step", rows, device, copy=copy)
    if args.out:
        import plot

        plot.step(rows, measure.card_name(device), args.out / "step.png")


if __name__ == "__main__":
    main()
