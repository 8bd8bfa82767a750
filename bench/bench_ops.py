"""Times each verb and the generator over LLaMA shapes: GB/s, and the share of the measured copy.

    python bench/bench_ops.py [--quick] [--model 7b] [--out DIR]

Inputs rotate through more memory than the caches hold. Every result is asserted against float64
before it is timed. A back end joins by an entry in VERBS.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from roofline import Configuration, costs
from shapes import LLAMA
from torch import Tensor

from apollo_kernels import backends, batch, cpu, philox, reference

RANKS = (1, 8, 64, 128, 256, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """Channels X [C, K] of one gradient; ``rows``: whether channels are its rows in memory."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    device: torch.device

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
        return batch.Hyper(1e-3, (0.9, 0.999), 1e-6, 0.0, True, False, scale_type=kind)


def agree(found: Tensor, exact: Tensor, eps: float, what: str) -> None:
    """Raises unless ``found`` errs by at most ``eps`` of the largest value."""
    error = float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))
    if not error <= eps:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {eps:.2e}")


def torch_project(case: Case) -> Callable[[Tensor], Any]:
    """``project`` as the PyTorch back end runs it on this device."""
    z = philox.draw(1, 0, case.rank, case.k, device=case.device)
    p, x = philox.scaled(z, torch.float32), case.matrix(0)
    native = cpu.supported(x)
    packed = cpu.arrange(z, cpu.layout(x, case.rank)) if native else None
    call = (
        (lambda x: cpu.project(x, packed, case.rank))
        if native
        else lambda x: reference.project(x, p)
    )
    r, q = call(x)
    exact = reference.project(x.double(), philox.scaled(z, torch.float64))
    bound = 2e-6 * max(1.0, math.sqrt(case.k / 256))  # float32 sums of k terms
    agree(r, exact[0], bound, "project R")
    agree(q, exact[1], bound, "project q")
    return call


def torch_scale(case: Case) -> Callable[[Tensor], Any]:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        r = torch.randn(case.channels, case.rank, generator=generator)
        return tuple(t.to(case.device, dtype) for t in (r, r.square().sum(1), r * 0.1, r**2 + 0.1))

    s, u2 = reference.scale(*inputs(torch.float32), case.hyper())
    exact = reference.scale(*inputs(torch.float64), case.hyper())
    agree(s, exact[0], 1e-5, "scale s")
    agree(u2, exact[1], 1e-5, "scale u^2")
    r, q, m, v = inputs(torch.float32)
    return lambda _: reference.scale(r, q, m, v, case.hyper())


def torch_apply(case: Case) -> Callable[[Tensor], Any]:
    coefficient = torch.full((case.channels,), 1e-3, device=case.device)
    w, x = case.matrix(1), case.matrix(2)
    call = cpu.apply if cpu.supported(w, x) else reference.apply
    exact = w.double() - coefficient.double()[:, None] * x.double()
    found = w.clone()
    call(found, x, coefficient, 0.0)
    agree(found, exact, torch.finfo(case.dtype).eps, "apply")
    return lambda x: call(w, x, coefficient, 0.0)


def kernel_verb(backend: str, verb: str) -> Callable[[Case], Callable[[Tensor], Any]]:
    """One verb of a back end's Batch, the others left out; a whole step is checked before."""

    def prepare(case: Case) -> Callable[[Tensor], Any]:
        made: dict[int, tuple[batch.LowRank, batch.Batch]] = {}  # a Batch holds addresses only
        hyper = case.hyper()
        counters = torch.zeros((3,), dtype=torch.int64, device=case.device)
        signals = batch.Signals(counters)

        def batch_of(x: Tensor) -> tuple[batch.LowRank, batch.Batch]:
            if x.data_ptr() not in made:
                grad = x if case.rows else x.t()
                shape = (case.channels, case.rank)
                moments = [torch.zeros(shape, device=case.device) for _ in "mv"]
                norm = torch.zeros((), device=case.device)
                step = torch.zeros((), dtype=torch.int64, device=case.device)
                item = batch.LowRank(
                    torch.zeros_like(grad), grad, *moments, norm, step, 1, case.rows
                )
                module = backends.load(backend)
                made[x.data_ptr()] = item, module.build([item], separate=False)
            return made[x.data_ptr()]

        x = case.matrix(0)
        item, whole = batch_of(x)
        for name in ("project", "scale", "apply"):
            getattr(whole, name)(hyper, signals)
        z = philox.draw(1, 0, case.rank, case.k)
        p = philox.scaled(z, torch.float64).to(case.device)
        r, q = reference.project(x.double(), p)
        zeros = torch.zeros_like(r), torch.zeros_like(r)
        s, _ = reference.scale(r, q, *zeros, hyper)
        w = -s[:, None] * x.double() * hyper.step_size(1)
        # One normal in 1000 may be bf16's other neighbour, 2^-8 away: 2^-8 sqrt(1e-3) of R.
        agree(item.exp_avg, zeros[0], 2**-8 * 0.1, f"{backend} project")
        found = item.weight if case.rows else item.weight.t()
        agree(found, w, 2**-6 if case.rank < 4 else 2**-7, f"{backend} step")
        return lambda x: getattr(batch_of(x)[1], verb)(hyper, signals)

    return prepare


def kernel_verbs(backend: str) -> dict[str, Callable[[Case], Callable[[Tensor], Any]]]:
    return {verb: kernel_verb(backend, verb) for verb in ("project", "scale", "apply")}


VERBS: dict[str, dict[str, Callable[[Case], Callable[[Tensor], Any]]]] = {
    "torch": {"project": torch_project, "scale": torch_scale, "apply": torch_apply},
    "cuda": kernel_verbs("cuda"),
    "triton": kernel_verbs("triton"),
}


def cases(model: str, quick: bool, device: torch.device) -> Iterator[Case]:
    shapes = list(dict.fromkeys(LLAMA[model].layer_matrices()))
    ranks = (1, 128) if quick else RANKS
    for shape in shapes[1:] if quick else shapes:
        for rank in ranks:
            if rank <= min(shape):
                for dtype in DTYPES.values():
                    yield Case(shape, rank, dtype, device)


def measure_case(case: Case, copy: float, budget_s: float) -> Iterator[dict[str, Any]]:
    width = float(case.dtype.itemsize)
    model = costs([case.shape], Configuration("", case.rank, width, width))
    for backend, verbs in VERBS.items():
        if dict(backends.backends(case.device))[backend] is not None:
            continue
        for verb, prepare in verbs.items():
            call = prepare(case)
            nbytes = int(width * case.channels * case.k)
            timing = measure.cold(case.matrix, call, nbytes, case.device, budget_s)
            rate = model[verb].nbytes / (timing.median * 1e-3)
            yield {
                "backend": backend,
                "verb": verb,
                "shape": "x".join(map(str, case.shape)),
                "rank": case.rank,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "GB/s": rate / 1e9,
                "of copy": rate / copy,
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
    with measure.Progress("ops", len(todo)) as bar:
        for case in todo:
            rows += measure_case(case, copy, budget)
            bar.update()
    rows += measure_generator(device, budget)
    print(measure.table(rows))
    if args.out:
        measure.write(args.out, "ops", rows, device, copy=copy)


if __name__ == "__main__":
    main()
