"""Times each verb and the generator over LLaMA shapes: GB/s, and the share of the measured copy.

    python bench/bench_ops.py [--quick] [--model 7b] [--out DIR]

Inputs rotate through more memory than the caches hold. Every result is asserted against float64
before it is timed, and what has been timed is written at once. Every back end that can run joins.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import measure
import torch
from roofline import Configuration, costs
from shapes import LLAMA
from torch import Tensor

from apollo_kernels import backends, batch, philox, reference

RANKS = (1, 8, 64, 128, 256, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """Channels X [C, K] of one gradient; ``rows``: whether channels are its rows in memory."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    device: torch.device
    distribution: str = "gaussian"

    @property
    def rows(self) -> bool:
        return self.shape[0] >= self.shape[1]

    @property
    def channels(self) -> int:
        return max(self.shape)

    @property
    def k(self) -> int:
        return min(self.shape)

    def matrix(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        g = torch.randn(self.shape, generator=generator, device=self.device).to(self.dtype)
        return g if self.rows else g.t()

    def hyper(self) -> batch.Hyper:
        kind = "tensor" if self.rank == 1 else "channel"
        return batch.Hyper(
            1e-3, (0.9, 0.999), 1e-6, 0.0, True, False, scale_type=kind,
            distribution=self.distribution,
        )  # fmt: skip

    def exact_projection(self) -> Tensor:
        """P [r, K] in float64: also of the sparse distribution, which the verbs never build."""
        if self.distribution == "sparse" and self.rank > 1:
            row, sign = philox.sparse(1, 0, self.rank, self.k)
            p = torch.zeros(self.rank, self.k, dtype=torch.float64)
            return p.index_put_((row, torch.arange(self.k)), sign.double()).to(self.device)
        z = philox.draw(1, 0, self.rank, self.k, self.distribution)
        return philox.scaled(z, torch.float64).to(self.device)


def agree(found: Tensor, exact: Tensor, eps: float, what: str) -> None:
    """Raises unless ``found`` errs by at most ``eps`` of the largest value."""
    error = float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))
    if not error <= eps:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {eps:.2e}")


VERBS = ("project", "scale", "apply")


@dataclass
class Stepped:
    """One matrix in a Batch of its own, past its first step, so that any verb can run alone."""

    item: batch.LowRank  # a Batch may hold nothing but its addresses
    batch: batch.Batch
    hyper: batch.Hyper
    signals: batch.Signals

    def run(self, verb: str) -> None:
        getattr(self.batch, verb)(self.hyper, self.signals)

    @classmethod
    def of(cls, backend: str, case: Case, seed: int) -> Stepped:
        x, device = case.matrix(seed), case.device
        grad = x if case.rows else x.t()
        moments = [torch.zeros((case.channels, case.rank), device=device) for _ in "mv"]
        norm, step = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64).to(device)
        item = batch.LowRank(torch.zeros_like(grad), grad, *moments, norm, step, 1, case.rows)
        module = backends.load(backend)
        made = module.build([item], separate=False)
        if not module.BY_ADDRESS:
            made.lend([grad])
        counters = torch.zeros((3,), dtype=torch.int64, device=device)
        stepped = cls(item, made, case.hyper(), batch.Signals(counters))
        for verb in VERBS:
            stepped.run(verb)
        return stepped


def check(backend: str, case: Case) -> None:
    """Raises unless the first step of this case is right, by float64."""
    stepped, x = Stepped.of(backend, case, 0), case.matrix(0)
    r, q = reference.project(x.double(), case.exact_projection())
    zeros = torch.zeros_like(r), torch.zeros_like(r)
    s, _ = reference.scale(r, q, *zeros, stepped.hyper)
    w = -s[:, None] * x.double() * stepped.hyper.step_size(1)
    # One normal in 1000 may be bf16's other neighbour on a card, 2^-8 away: 2^-8 sqrt(1e-3) of R;
    # else float32 sums of K terms.
    flips = backend != "torch" and case.distribution == "gaussian"
    bound = 2**-8 * 0.1 if flips else 4e-6 * max(1.0, math.sqrt(case.k / 256))
    agree(stepped.item.exp_avg, zeros[0], bound, f"{backend} project")
    weight = stepped.item.weight
    found = weight if case.rows else weight.t()
    agree(found, w, 2**-6 if case.rank < 4 else 2**-7, f"{backend} step")


def cases(model: str, quick: bool, device: torch.device) -> Iterator[Case]:
    """Every shape, rank and dtype with normals; at two ranks, the other distributions too."""
    shapes = list(dict.fromkeys(LLAMA[model].layer_matrices()))
    ranks = (1, 128) if quick else RANKS
    for shape in shapes[1:] if quick else shapes:
        for rank in ranks:
            for distribution in philox.DISTRIBUTIONS:
                if rank > min(shape) or (distribution != "gaussian" and rank not in (128, 256)):
                    continue
                for dtype in DTYPES.values():
                    yield Case(shape, rank, dtype, device, distribution)


def measure_case(case: Case, copy: float, budget_s: float) -> Iterator[dict[str, Any]]:
    width = float(case.dtype.itemsize)
    sparse = case.distribution == "sparse"
    model = costs([case.shape], Configuration("", case.rank, width, width, sparse=sparse))
    for backend, reason in backends.backends(case.device):
        if reason is not None:
            continue
        check(backend, case)
        for verb in VERBS:
            nbytes = int(width * case.channels * case.k)
            make = partial(Stepped.of, backend, case)
            run = methodcaller("run", verb)
            timing = measure.cold(make, run, nbytes, case.device, budget_s)
            rate = model[verb].nbytes / (timing.median * 1e-3)
            yield {
                "backend": backend,
                "verb": verb,
                "shape": "x".join(map(str, case.shape)),
                "rank": case.rank,
                "proj": case.distribution,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "GB/s": rate / 1e9,
                "of copy": rate / copy,
                "flops/byte": model[verb].flops / model[verb].nbytes,
            }


def measure_generator(device: torch.device, budget_s: float) -> Iterator[dict[str, Any]]:
    rank, dim = 128, 4096
    for distribution in philox.DISTRIBUTIONS:
        draw = partial(philox.draw, rank=rank, dim=dim, distribution=distribution, device=device)
        timing = measure.cold(lambda i: i, lambda i, d=draw: d(i, 0), 1, device, budget_s)
        row = {"backend": "torch", "verb": f"draw {distribution}", "shape": f"{rank}x{dim}"}
        row.update(ms=timing.median, p20=timing.p20, p80=timing.p80)
        yield {**row, "ns/value": 1e6 * timing.median / (rank * dim)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=LLAMA, help="default: 7b on a GPU, 60m on a CPU")
    parser.add_argument("--quick", action="store_true", help="two shapes, ranks 1 and 128")
    parser.add_argument("--out", type=Path, help="also write ops.csv and ops.json there")
    args = parser.parse_args()
    measure.keep_freed_memory()
    device = measure.default_device()
    model = args.model or ("7b" if device.type == "cuda" else "60m")
    budget = 0.05 if args.quick else 0.2
    copy = measure.copy_bandwidth(device)
    print(f"LLaMA-{model} on {measure.card_name(device)}: copies {copy / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    todo = list(cases(model, args.quick, device))

    def write() -> None:  # at once: a run that is stopped leaves what it has
        if args.out:
            measure.write(args.out, "ops", rows, device, copy=copy)

    with measure.Progress("ops", len(todo)) as bar:
        for case in todo:
            rows += measure_case(case, copy, budget)
            write()
            bar.update()
    rows += measure_generator(device, budget)
    write()
    print(measure.table(rows))
    if args.out:
        import plot

        plot.roofline(args.out)


if __name__ == "__main__":
    main()
