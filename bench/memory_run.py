"""Trains models of 7B to 13B on this GPU under a cap on its allocator: claims.md counted it.

    python bench/memory_run.py [RUN ...] [--out DIR]

A cap stands for a smaller card: PyTorch's allocator may reserve no more, so a run that ends has
fitted. It is set once the model stands on the GPU and is quantized, before the optimizer is made.
The CUDA context is not under the cap (about 0.5 GB). Weights and tokens are random
and rates not tuned, so a loss says only that numbers stayed finite. Runs of memory share the GPU;
those of throughput have it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
STEPS = 5
DEVICE = "cuda:0"
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@dataclass(frozen=True)
class Trial:
    """A run of memory_claims.py under a cap in GB; ``alone``: its tokens per second count too."""

    cap: float
    options: dict[str, Any]
    alone: bool = False


INT8 = {"int8": True, "release": True}
TRIALS = {
    "7B int8, Mini, release": Trial(8, {**INT8, "embeddings": True}),
    "7B int8 but for embedding and head, Mini, release": Trial(12, INT8),
    "8B bf16, Mini, release": Trial(
        24, {"model": "llama-3-8b", "release": True, "embeddings": True, "sequence": 2048}
    ),
    "13B bf16, Mini, DDP": Trial(80, {"model": "llama-13b", "ddp": "views"}),
    "7B bf16, fused AdamW": Trial(80, {"optimizer": "adamw", "batch": 24}, alone=True),
    "7B bf16, APOLLO rank 256": Trial(80, {"optimizer": "apollo", "batch": 37}, alone=True),
    "7B bf16, Mini": Trial(80, {"batch": 39}, alone=True),
    "7B bf16, Mini, release": Trial(80, {"batch": 39, "release": True}, alone=True),
}
for trial in TRIALS.values():
    if trial.alone:  # as in the claim about micro-batches
        trial.options["checkpointing"] = False


def train(trial: Trial) -> dict[str, Any]:
    """Some steps; a batch that does not fit under the cap is tried with one sequence less."""
    import torch
    from memory_claims import Run, _model, _optimizers, _release

    import apollo_kernels

    device = torch.device(DEVICE)
    run = Run(**trial.options)
    torch.manual_seed(0)
    with device:
        model = _model(run)
        if run.int8:
            apollo_kernels.quantize_(model, embeddings=run.embeddings)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, trial.cap * GB / total), device)
    with _process_group(run.ddp):
        trained: torch.nn.Module = model
        if run.ddp:
            trained = torch.nn.parallel.DistributedDataParallel(
                model, gradient_as_bucket_view=run.ddp == "views"
            )
        optimizers = _optimizers(run, model)
        if run.release:
            _release(model, optimizers)
        own_steps = not (run.release and run.optimizer == "adamw")
        batch = run.batch
        while True:
            try:
                found = _steps(trained, optimizers if own_steps else [], batch, run.sequence)
                break
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch -= 1
                for optimizer in optimizers:
                    optimizer.zero_grad()
                torch.cuda.empty_cache()
    return {"batch": f"{batch} x {run.sequence}", "wanted": run.batch, **found}


def _steps(model: Any, optimizers: list[Any], batch: int, sequence: int) -> dict[str, Any]:
    import torch

    vocabulary = 32000
    ids = torch.randint(vocabulary, (batch, sequence), device=DEVICE)
    losses, seconds = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        del loss
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    if not math.isfinite(losses[-1]):
        raise AssertionError(f"the loss is not finite: {losses}")
    return {
        "allocated GB": torch.cuda.max_memory_allocated() / GB,
        "reserved GB": torch.cuda.max_memory_reserved() / GB,
        "tokens/s": batch * sequence / statistics.median(seconds[2:]),
        "loss, first": losses[0],
        "last": losses[-1],
    }


@contextlib.contextmanager
def _process_group(wanted: str) -> Iterator[None]:
    """DDP's own buckets and hooks, in a group of one."""
    if not wanted:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29517", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def start(name: str) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, "--one", name]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    output = process.communicate()[0].strip().splitlines()
    row: dict[str, Any] = {"run": name, "cap GB": TRIALS[name].cap}
    if process.returncode:
        print(f"{name}:", *output[-25:], sep="\n", flush=True)
        return {**row, "note": (output or ["no output"])[-1][:200]}
    row.update(json.loads(output[-1]))
    if not TRIALS[name].alone:
        del row["tokens/s"]
    return row


def counted(trial: Trial) -> float | None:
    """The peak on fake tensors, GB, where claims.json has it."""
    import memory_claims

    run = memory_claims.Run(**trial.options)
    path = memory_claims.RESULTS / "claims.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else {}
    found = rows.get(memory_claims.told(run))
    return None if found is None else found["peak"] / GB


def kept(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the rows of an earlier call whose runs were not made again, in the order of TRIALS."""
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {row["run"]: row for row in [*earlier, *rows]}
    return [by_name[name] for name in TRIALS if name in by_name]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="; ".join(TRIALS))
    parser.add_argument("--out", type=Path, help="also write memory.csv and memory.json there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(TRIALS[args.one])), flush=True)
        return 0
    if unknown := set(args.runs) - set(TRIALS):
        parser.error(f"unknown run {sorted(unknown)}; there are {list(TRIALS)}")
    wanted = [name for name in TRIALS if not args.runs or name in args.runs]
    import measure
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run")
        return 0
    rows = []
    together = {name: start(name) for name in wanted if not TRIALS[name].alone}
    rows += [finish(name, process) for name, process in together.items()]
    rows += [finish(name, start(name)) for name in wanted if TRIALS[name].alone]
    for row in rows:
        row["counted GB"] = counted(TRIALS[row["run"]])
    print(measure.table(rows))
    if args.out:
        rows = kept(args.out / "memory.json", rows)
        measure.write(args.out, "memory", rows, measure.default_device())
    return int(any("note" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
