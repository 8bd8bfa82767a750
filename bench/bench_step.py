"""Times one optimizer step over the matrices of a LLaMA: ours next to its peers, in one process.

    python bench/bench_step.py [--model 60m] [--layers N] [--rank 128] [--quick] [--csv FILE]

The optimizers take turns, so that a machine whose speed drifts is unfair to none. Only ratios
within one run mean anything; nothing is asserted here.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from peers import optimizers
from shapes import LLAMA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parameters(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Matrices with synthetic gradients, the same for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(p)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in the state, also those inside of objects (apollo_torch's projector)."""
    total = 0
    for state in optimizer.state.values():
        values = list(state.values())
        values += [v for x in state.values() for v in getattr(x, "__dict__", {}).values()]
        total += sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))
    return total


def measure(
    shapes: list[tuple[int, int]], dtype: torch.dtype, rank: int, rounds: int
) -> list[dict[str, object]]:
    """One row per optimizer: median, p20 and p80 of ``rounds`` steps after two warm-up steps."""
    made = {name: build(parameters(shapes, dtype)) for name, build in optimizers(rank).items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 2):
        for name, optimizer in made.items():
            begin = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - begin))
        print(f"\r{dtype}: round {turn + 1}/{rounds + 2}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for name, optimizer in made.items():
        p20, *_, p80 = statistics.quantiles(times[name], n=5)
        median = statistics.median(times[name])
        row = {"dtype": str(dtype).removeprefix("torch."), "optimizer": name, "ms": median}
        row.update(p20=p20, p80=p80, state_MB=state_bytes(optimizer) / 1e6)
        for label, peer in (("AdamW fused", "AdamW fused"), ("apollo_torch", _published(name))):
            if peer in times:  # the median of the ratios of neighbouring measurements
                pairs = zip(times[name], times[peer], strict=True)
                row[f"time / {label}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def _published(name: str) -> str:
    return f"apollo_torch {'Mini' if name.endswith('Mini') else name.split(' ', 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=LLAMA, default="60m")
    parser.add_argument("--layers", type=int, help="as many layers (default: all)")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="7 rounds")
    parser.add_argument("--csv", type=Path, help="also write the rows there")
    args = parser.parse_args()
    shapes = LLAMA[args.model].matrices(args.layers)
    weights = sum(m * n for m, n in shapes)
    print(f"{args.model}: {len(shapes)} matrices, {weights / 1e6:.1f} M weights, CPU, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    for name in args.dtype:
        rows += measure(shapes, DTYPES[name], args.rank, 7 if args.quick else args.rounds)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for line in [{k: k for k in keys}, *rows]:
        cells = [line.get(k, "-") for k in keys]
        text = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
        print("".join(f"{t:<22}" if i < 2 else f"{t:>20}" for i, t in enumerate(text)))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
