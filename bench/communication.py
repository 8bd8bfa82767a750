"""What APOLLO adds to the traffic of FSDP2, from 8 to 16384 GPUs: a model, not a measurement.

    python bench/communication.py [--out DIR] [--tokens N] [--rank R]

Bytes are not modelled: each row asks the optimizer's own ``memory_report()`` on a mesh of so many
ranks, of which this process plays one (PyTorch's "fake" process group), over parameters without
memory. tests/test_distributed.py holds that report against the collectives of real steps. Times are
modelled, by the constants below: bytes over the slowest link on the way, and a latency per
collective that grows with the logarithm of the ranks. Nothing of ours overlaps with the backward
pass; FSDP's own collectives overlap with the computation, and the longer of the two counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the group "fake"

from apollo_kernels import APOLLO
from apollo_kernels.distributed import BUCKET

RESULTS = measure.ROOT / "bench" / "results" / "communication"

# What a GPU of an H100 server has: one direction of its links, as the makers publish them, and bf16
# products at 40 % of their peak, which large runs report. Latencies are of NCCL's order of size.
NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second, per GPU
PER_NODE = 8
LATENCY, PER_HOP = 20e-6, 5e-6  # seconds: of a collective, and for each doubling of its ranks
FLOPS = 0.4 * 989e12


@dataclass(frozen=True)
class Model:
    """LLaMA shapes with grouped-query attention; ``shards``: ranks that HSDP cuts weights over."""

    hidden: int
    mlp: int
    layers: int
    keys: int  # rows of k_proj and v_proj
    vocabulary: int
    shards: int

    def matrices(self) -> list[tuple[int, int]]:
        h, f, k = self.hidden, self.mlp, self.keys
        return ([(h, h)] * 2 + [(k, h)] * 2 + [(f, h)] * 2 + [(h, f)]) * self.layers

    def dense(self) -> list[tuple[int, ...]]:
        return [(self.vocabulary, self.hidden)] * 2 + [(self.hidden,)] * (2 * self.layers + 1)

    def weights(self) -> int:
        return sum(math.prod(shape) for shape in [*self.matrices(), *self.dense()])


MODELS = {
    "7B": Model(4096, 11008, 32, 4096, 32000, 8),
    "70B": Model(8192, 28672, 80, 1024, 128256, 64),
    "405B": Model(16384, 53248, 126, 1024, 128256, 512),
}
WORLDS = [8, 32, 128, 512, 2048, 8192, 16384]


def meshes(model: Model, world: int) -> Iterator[tuple[str, DeviceMesh, tuple[Placement, ...]]]:
    yield "FSDP2", init_device_mesh("cpu", (world,)), (Shard(0),)
    if world > model.shards:
        mesh = init_device_mesh("cpu", (world // model.shards, model.shards))
        yield "HSDP", mesh, (Replicate(), Shard(0))


def cut(
    shapes: list[tuple[int, ...]], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> list[torch.nn.Parameter]:
    """bf16 parameters as fully_shard cuts them, without memory; this process is the first rank."""
    made = []
    for shape in shapes:
        whole = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        own = whole[: -(-shape[0] // mesh.size(mesh.ndim - 1))].clone()
        tensor = DTensor.from_local(
            own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        made.append(torch.nn.Parameter(tensor))
    return made


def seconds(nbytes: float, ranks: int, calls: float = 1.0) -> float:
    """Of collectives over ``ranks`` neighbours, whose buffers are ``nbytes`` together."""
    link = NVLINK if ranks <= PER_NODE else INFINIBAND
    return nbytes * (ranks - 1) / ranks / link + calls * (LATENCY + PER_HOP * math.log2(ranks))


def count(model: Model, world: int, rank: int) -> Iterator[tuple[str, int, int, Any]]:
    """How weights are cut, over how many ranks, how many hold the same part, and the report."""
    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        for name, mesh, placements in meshes(model, world):
            groups = [
                {"params": cut(model.matrices(), mesh, placements), "rank": rank},
                {"params": cut(model.dense(), mesh, placements), "rank": None},
            ]
            report = APOLLO(groups, lr=1e-3).memory_report()
            shards = mesh.size(mesh.ndim - 1)
            yield name, shards, world // shards, report
    finally:
        distributed.destroy_process_group()


def rows(rank: int, tokens: int) -> Iterator[dict[str, Any]]:
    for label, model in MODELS.items():
        for world in WORLDS:
            for name, shards, replicas, report in count(model, world, rank):
                sent = report.traffic
                partial = sent.reduce_scatter + sent.all_gather
                calls = math.ceil(sent.reduce_scatter / BUCKET) + 1 if partial else 0
                extra = seconds(partial, shards, calls)
                extra += seconds(2 * sent.all_reduce, world, 3)  # flags by axis, norms
                own = 3 * model.layers
                fsdp = seconds(report.shard_traffic, shards, own)
                if replicas > 1:  # gradients of the shards, over the replicas
                    reduced = 2 * 2 * model.weights() / shards
                    fsdp += reduced / INFINIBAND + model.layers * PER_HOP * math.log2(replicas)
                compute = 6 * model.weights() * tokens / FLOPS
                yield {
                    "model": label,
                    "GPUs": world,
                    "cut": f"{name} over {shards}",
                    "state GB": report.state_bytes / 1e9,
                    "AdamW GB": report.adamw_bytes / 1e9,
                    "FSDP sends GB": report.shard_traffic / 1e9,
                    "ours adds GB": sent.total / 1e9,
                    "of FSDP %": 100 * sent.total / report.shard_traffic,
                    "compute ms": 1e3 * compute,
                    "FSDP ms": 1e3 * fsdp,
                    "ours ms": 1e3 * extra,
                    "of step %": 100 * extra / (max(compute, fsdp) + extra),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, on each GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = list(rows(options.rank, options.tokens))
    print(measure.table(found))
    options.out.mkdir(parents=True, exist_ok=True)
    head = (
        f"# What a step of APOLLO adds to FSDP2's traffic, rank {options.rank}, {options.tokens} "
        "tokens per GPU\n\nMade by `python bench/communication.py`, whose first lines say what is "
        "counted (bytes) and what is\nmodelled (times). Predicted; nothing of it has run on so "
        "many GPUs.\n\n"
    )
    (options.out / "communication.md").write_text(head + measure.markdown(found) + "\n")


if __name__ == "__main__":
    main()
