"""What a step must move and compute, the machine's own ceilings, and the times that follow.

    python bench/roofline.py [--rank 256] [--model 7b] [--out DIR]

The model: `project` reads G (and computes 2 r flops a weight), `scale` reads and writes the float32
moments, `apply` reads G and reads and writes W. Each verb takes the longer of its bytes over the
copy bandwidth and its flops over the matmul rate.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import card_facts
import measure
import torch
from shapes import LLAMA

# Of named cards: measured copy bandwidth of 85 to 92 % of the data sheet, dense bf16 rate at 70 %.
CARDS = {
    "H200": (4.3e12, 0.7 * 989e12),
    "H100": (2.9e12, 0.7 * 989e12),
    "A100-80G": (1.70e12, 0.7 * 312e12),
    "RTX 4090": (0.92e12, 0.7 * 165e12),
    "L4": (0.26e12, 0.7 * 121e12),
}


UNITS = {
    "copy": ("GB/s", 1e9),
    "read": ("GB/s", 1e9),
    "rows of 64 bytes": ("GB/s", 1e9),
    "rows of 128 bytes": ("GB/s", 1e9),
    "Philox normals": ("G/s", 1e9),
    "Philox normals per SM and clock": ("", 1.0),
}


@dataclass(frozen=True)
class Configuration:
    """``weight`` and ``grad``: bytes per value; ``reads``: how often G crosses the memory border;
    ``sparse``: a projection that adds each entry once, whatever the rank."""

    name: str
    rank: int
    weight: float = 2.0
    grad: float = 2.0
    reads: int = 2
    sparse: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one verb over a set of matrices."""

    nbytes: float
    flops: float = 0.0

    def ms(self, bandwidth: float, rate: float) -> float:
        return 1e3 * max(self.nbytes / bandwidth, self.flops / rate)


def costs(shapes: list[tuple[int, int]], c: Configuration) -> dict[str, Cost]:
    """Bytes and flops of each verb over ``shapes``."""
    weights = sum(m * n for m, n in shapes)
    moments = sum(2 * 4 * max(shape) * min(c.rank, *shape) for shape in shapes)
    channels = sum(max(shape) for shape in shapes)
    second_read = c.grad * weights if c.reads == 2 else 0.0
    return {
        "project": Cost(c.grad * weights, 2.0 * ((1 if c.sparse else c.rank) + 1) * weights),
        "scale": Cost(2.0 * moments + 8.0 * channels),
        "apply": Cost(2 * c.weight * weights + second_read, 3.0 * weights),
    }


def step_bytes(shapes: list[tuple[int, int]], c: Configuration) -> float:
    """Of the whole step, a weight."""
    total = sum(cost.nbytes for cost in costs(shapes, c).values())
    return total / sum(m * n for m, n in shapes)


def configurations(rank: int) -> list[Configuration]:
    int8 = 1 + 4 / 128  # a code, and a scale and a zero point for 128 of them
    return [
        Configuration(f"bf16, rank {rank}", rank),
        Configuration(f"bf16, rank {rank}, G read once", rank, reads=1),
        Configuration("bf16, Mini", 1),
        Configuration(f"float32, rank {rank}", rank, 4.0, 4.0),
        Configuration("float32, Mini", 1, 4.0, 4.0),
        Configuration("int8 weights, Mini", 1, int8, 2.0),
    ]


def ceilings(device: torch.device) -> dict[str, float]:
    """Of this machine, measured: bytes and flops per second."""
    found = {
        "copy": measure.copy_bandwidth(device),
        "read": measure.read_bandwidth(device),
        "matmul bf16": measure.matmul_rate(device, torch.bfloat16),
        "matmul float32": measure.matmul_rate(device, torch.float32),
    }
    if device.type == "cpu":
        found["Philox normals"] = _host_normals()
    else:
        found.update(_device_normals())
    return found


def _host_normals() -> float:
    """Normals per second of one thread of the native generator (or PyTorch's, without it)."""
    from apollo_kernels import philox

    timing = measure.cold(
        lambda i: i, lambda i: philox.draw(i, 0, 64, 4096), 1, torch.device("cpu"), 0.2
    )
    return 64 * 4096 / (timing.median * 1e-3)


def _device_normals() -> dict[str, float]:
    """Of the GPU: per second, and per SM and clock. Empty without nvcc."""
    major, minor = torch.cuda.get_device_capability()
    facts = card_facts.collect(f"sm_{major}{minor}")
    names = {
        "Philox normals": "normals_per_second",
        "Philox normals per SM and clock": "normals_per_sm_and_clock",
        "rows of 64 bytes": "rows_of_64_bytes_per_second",
        "rows of 128 bytes": "rows_of_128_bytes_per_second",
    }
    return {ours: facts[theirs] for ours, theirs in names.items() if theirs in facts}


def predictions(
    shapes: list[tuple[int, int]], rank: int, here: dict[str, float], name: str
) -> list[dict[str, object]]:
    """Milliseconds of a whole step on named cards and on this machine."""
    machines = {**CARDS, name: (here["copy"], here["matmul bf16"])}
    adamw = Cost(14.0 * sum(m * n for m, n in shapes))  # bf16 weights, gradients and moments
    rows: list[dict[str, object]] = [{"configuration": "AdamW, fused, bf16", "bytes/weight": 14.0}]
    rows[0].update({card: adamw.ms(*rates) for card, rates in machines.items()})
    for c in configurations(rank):
        row: dict[str, object] = {"configuration": c.name, "bytes/weight": step_bytes(shapes, c)}
        verbs = costs(shapes, c).values()
        row.update({k: sum(v.ms(*rates) for v in verbs) for k, rates in machines.items()})
        rows.append(row)
    return rows


def verbs_on_the_roof(model: str) -> list[dict[str, object]]:
    """Each verb that computes, at some ranks, over a layer in bf16: what its picture needs."""
    shapes = LLAMA[model].layer_matrices()
    found = []
    for rank in (1, 64, 128, 256):
        for verb, cost in costs(shapes, Configuration("", rank)).items():
            if verb == "project" or (verb == "apply" and rank == 1):
                row: dict[str, object] = {"verb": verb, "rank": rank}
                found.append({**row, "flops/byte": cost.flops / cost.nbytes})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=LLAMA, default="7b")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--out", type=Path, help="also write roofline.json and roofline.png there")
    args = parser.parse_args()
    device = measure.default_device()
    shapes, name = LLAMA[args.model].matrices(), measure.card_name(device)
    here = ceilings(device)
    print(f"Measured on {name}:")
    for key, value in here.items():
        unit, scale = UNITS.get(key, ("Gflop/s", 1e9))
        print(f"  {key:<32}{value / scale:>12,.1f} {unit}")
    rows = predictions(shapes, args.rank, here, name)
    print(f"\nPredicted ms per step, LLaMA-{args.model}'s {len(shapes)} matrices:")
    print(measure.table(rows))
    if args.out:
        verbs = verbs_on_the_roof(args.model)
        measure.write(args.out, "roofline", rows, device, ceilings=here, verbs=verbs)
        import plot

        plot.roofline(args.out)


if __name__ == "__main__":
    main()
