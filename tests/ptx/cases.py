"""Steps of a few matrices or dense parameters, compared with the float64 restatement.

A case says what is stepped; ``take`` builds it, runs its launches through a host (cuda_host or
triton_host) and returns what disagrees. Gradients are surrounded by NaN, and a launch may touch
nothing but the tensors of its case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import parts
import restatement
import torch

from apollo_kernels import int8, moments, reference
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals
from apollo_kernels.philox import ROUNDING_INT8, rounding_bits

from .cuda_host import region
from .machine import Device
from .memory import Region

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8 = torch.uint8  # codes: of a weight, with rows in memory whatever the order, or of moments
SHORT = {F32: "f32", BF16: "bf16", F16: "f16", INT8: "int8"}

restatement.projection = functools.lru_cache(maxsize=256)(restatement.projection)


class Host(NamedTuple):
    """A back end under the interpreter."""

    backend: Any  # the module that builds batches
    running: Callable[[Device, list[Region]], AbstractContextManager[None]]
    memory: Callable[[Any], list[Region]]  # what a batch owns


@dataclass(frozen=True)
class Case:
    """``order``: how weight and gradient lie in memory: rows, columns, or odd, which is rows with
    gaps that no 16-byte access fits. ``shapes`` share their launches."""

    shapes: tuple[tuple[int, ...], ...]
    rank: int = 0  # 0: dense parameters
    proj: str = "rademacher"
    weight: torch.dtype = F32
    grad: torch.dtype = F32
    order: str = "rows"
    rows: bool = True  # channels are the rows of the matrix
    steps: int = 2
    separate: bool = False
    signals: dict[str, float] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    moments: torch.dtype = F32  # of dense parameters
    ends: tuple[int, ...] = ()  # of the parts that ranks have of the contracted side

    @property
    def ranks(self) -> set[int]:
        """Of the matrices: none is above its K."""
        return {min(self.rank, shape[1 if self.rows else 0]) for shape in self.shapes if self.rank}

    def __str__(self) -> str:
        kind = f"rank {self.rank} {self.proj}" if self.rank else "dense"
        shapes = " ".join("x".join(map(str, s)) for s in self.shapes)
        words = [kind, shapes, f"{SHORT[self.weight]}-{SHORT[self.grad]}", self.order]
        words += ["contracts " + ("columns" if self.rows else "rows")] * bool(self.rank)
        words += [f"{SHORT[self.moments]} moments"] * (self.moments != F32)
        words += (
            [f"parts to {self.ends}"] * bool(self.ends)
            + ["separate"] * self.separate
            + [*self.signals]
            + [*self.hyper]
        )
        return ", ".join(words)


def laid_out(x: np.ndarray, dtype: torch.dtype, order: str) -> torch.Tensor:
    t = torch.tensor(x).to(dtype)
    if order == "columns":
        return t.t().contiguous().t()
    if order == "odd":
        whole = torch.full((t.shape[0] + 2, t.shape[1] + 9), math.nan).to(dtype)
        return whole[1:-1, 3:-6].copy_(t)
    return t


class _Matrix:
    """One item, its restatement, and the weights that the restatement has reached."""

    def __init__(self, case: Case, shape: tuple[int, ...], number: int, h: Hyper):
        random = np.random.default_rng(number)
        self.case, self.random, self.shape = case, random, shape
        values = 0.02 * random.standard_normal(shape)
        grid: torch.Tensor | None = None
        if case.weight == INT8:
            weight, grid = int8.quantize(torch.tensor(values, dtype=F32), 128)
        else:
            weight = laid_out(values, case.weight, case.order)
            self.w = weight.double().numpy()
        grad = laid_out(np.zeros(shape), case.grad, case.order)
        key = restatement.key_of(7, number)
        step = torch.zeros((), dtype=torch.int64)
        shared = dict(betas=h.betas, eps=h.eps, weight_decay=h.weight_decay, lr=float(h.lr),
                      correct_bias=h.correct_bias)  # fmt: skip
        self.spec: Any
        self.item: LowRank | Dense
        if not case.rank:
            pair = [torch.zeros(shape, dtype=case.moments) for _ in moments.MOMENTS]
            units = None
            if case.moments == INT8:
                units = torch.zeros(moments.blocks(shape)), torch.zeros(moments.blocks(shape))
            self.item = Dense(weight, grad, *pair, step, grid, key, units)
            self.spec = restatement.Dense(**shared)
            return
        channels, k = shape if case.rows else shape[::-1]
        rank = min(case.rank, k)
        pair = [torch.zeros(channels, rank) for _ in moments.MOMENTS]
        norm = torch.zeros(())
        self.item = LowRank(weight, grad, *pair, norm, step, key, case.rows, grid=grid)
        self.spec = restatement.Apollo(
            shape, key=key, rank=rank, proj_type="right" if case.rows else "left",
            scale_type=h.scale_type, scale=h.scale, update_proj_gap=h.update_proj_gap,
            scale_front=h.scale_front, disable_nl=h.disable_nl, distribution=h.distribution,
            **shared,
        )  # fmt: skip

    def memory(self) -> list[Region]:
        names = ["weight", "exp_avg", "exp_avg_sq", "step"] + ["update_norm"] * bool(self.case.rank)
        names += ["grid"] * (self.item.grid is not None)
        tensors = [region(getattr(self.item, name), name) for name in names]
        tensors += [region(unit, "unit") for unit in getattr(self.item, "units", None) or ()]
        return [*tensors, region(self.item.grad, "gradient", False)]

    def new_gradient(self) -> None:
        self.item.grad.copy_(torch.tensor(0.01 * self.random.standard_normal(self.shape)))

    def restate(self, factor: float) -> None:
        """The step that the kernels are about to take; what signals do is done to the gradient."""
        if self.item.grid is not None:  # each step from the codes that the one before has left
            self.before = self.item.weight.clone(), self.item.grid.clone()
            self.w = int8.dequantize(*self.before).double().numpy()
        if self.case.moments != F32:  # as they are stored
            self.former = [t.clone() for t in self._stored()]
            self.spec.m, self.spec.v = (t.double().numpy() for t in self._widened(self.former))
        self.w = self.spec.step(self.w, factor * self.item.grad.double().numpy())

    def disagrees(self) -> list[str]:
        """Moments to 2^-19 of their largest entry, as in test_cuda_batch.py; scales, where a norm
        of few entries is small, to 2^-13. Normals may be rounded to bf16's other neighbour in one
        of 1000, which moves a row of R by 2^-8 of what one k adds to it."""
        flips = 2.0**-7 if self.case.proj == "gaussian" and self.case.rank else 0.0
        found = []

        def within(name: str, x: torch.Tensor, exact: np.ndarray, slack: float, more: Any = 0.0):
            wrong = np.abs(x.double().numpy() - exact) - more
            size = float(np.abs(exact).max())
            if not (wrong <= slack * size).all():  # NaN is wrong too
                found.append(f"{name} is off by {np.max(wrong) / size:.1e} of its largest")

        if self.case.moments == F32:
            within("exp_avg", self.item.exp_avg, self.spec.m, 2**-19 + flips)
            within("exp_avg_sq", self.item.exp_avg_sq, self.spec.v, 2**-18 + 2 * flips)
        else:
            found += self._moments_disagree()
        if self.case.rank and self.spec.norm is not None:
            norm = np.asarray(self.spec.norm)
            within("update_norm", self.item.update_norm, norm, 2**-14 + flips)
        if int(self.item.step) != self.case.steps:
            found.append(f"step is {int(self.item.step)}")
        if self.item.grid is not None:
            return found + self._codes_disagree()
        change = np.abs(self.spec.update).max()
        unit = torch.finfo(self.case.weight).eps
        rounding = self.case.steps * unit * (np.abs(self.w) + change)
        slack = (2**-13 + 4 * flips) * change * self.case.steps
        within("weight", self.item.weight, self.w, 0.0, rounding + slack)
        return found

    def _stored(self) -> list[torch.Tensor]:
        return [self.item.exp_avg, self.item.exp_avg_sq, *(getattr(self.item, "units", None) or ())]

    @staticmethod
    def _widened(stored: list[torch.Tensor]) -> list[torch.Tensor]:
        if len(stored) == 2:
            return [t.float() for t in stored]
        pairs = zip(stored[:2], stored[2:], moments.MOMENTS, strict=True)
        return [moments.from_codes(codes, unit, key) for codes, unit, key in pairs]

    def _moments_disagree(self) -> list[str]:
        """With what the specification makes of the restated ones under the same random bits. Some
        2^-20 of an error moves one of 1000 over an edge."""
        m, v, *units = self.former
        twin = replace(self.item, exp_avg=m, exp_avg_sq=v, units=tuple(units) or None)
        keeper = reference._Moments(twin, self.case.steps)
        both = (torch.tensor(x, dtype=F32) for x in (self.spec.m, self.spec.v))
        keeper.store(slice(0, self.shape[0]), *both)
        pairs = zip(self._stored(), self.former, ("M", "V", "units", "units"), strict=False)
        wrong = [(name, int((a != b).sum()), a.numel()) for a, b, name in pairs]
        return [f"{n} {name} of {size}" for name, n, size in wrong if n > max(1, 0.01 * size)]

    def _codes_disagree(self) -> list[str]:
        """With int8.py's codes of the restated weight under the same random bits. An update of
        some codes is off by 2^-13 of itself at most, which moves one code in 100 over an edge."""
        codes, grid = (t.clone() for t in self.before)
        old, new = int8.dequantize(codes, grid), torch.tensor(self.w, dtype=F32)
        m, n = codes.shape
        bits = rounding_bits(self.item.key, self.case.steps, 0, m, n, codes.device, ROUNDING_INT8)
        int8.requantize(codes, grid, old, new, bits)
        assert self.item.grid is not None
        moved = grid != self.item.grid
        alike = ~moved.repeat_interleave(128, 1)[:, :n]
        wrong = int((codes != self.item.weight)[alike].sum())
        found = [f"{wrong} codes of {m * n}"] * (wrong > max(1, 0.01 * m * n))
        return found + [f"{int(moved.sum())} grids"] * (int(moved.sum()) > 1 + 0.05 * moved.numel())


def take(host: Host, device: Device, case: Case) -> list[str]:
    """What disagrees after the steps of a case; empty if nothing does."""
    matrices, counters = _run(host, device, case, restated=True)
    found = [f"{m.shape}: {what}" for m in matrices for what in m.disagrees()]
    if counters.tolist()[0::2] != [case.steps * len(matrices), 0]:
        found.append(f"counters are {counters.tolist()}")
    return found


class Recorder(Device):
    """Runs nothing, and knows what would have been launched."""

    def launch(self, kernel: Any, *_: Any) -> None:
        self.launches[kernel.name] += 1


def launched(host: Host, case: Case) -> set[str]:
    """The names of the kernels that a case launches."""
    recorder = Recorder()
    _run(host, recorder, replace(case, steps=1), restated=False)
    return set(recorder.launches)


def _run(
    host: Host, device: Device, case: Case, restated: bool
) -> tuple[list[_Matrix], torch.Tensor]:
    options = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, correct_bias=True,
                   maximize=False, distribution=case.proj, update_proj_gap=1)  # fmt: skip
    h = Hyper(**{**options, **case.hyper})
    counters = torch.zeros(3, dtype=torch.int64)
    given = {name: torch.tensor(value) for name, value in case.signals.items()}
    signals = Signals(counters, **given)
    factor = case.signals.get("clip", 1.0) / case.signals.get("grad_scale", 1.0)
    matrices = [_Matrix(case, shape, i, h) for i, shape in enumerate(case.shapes)]
    memory = [region(counters, "counters")]
    memory += [region(t, name, False) for name, t in given.items()]
    for matrix in matrices:
        memory += matrix.memory()
    items: list[Any] = [matrix.item for matrix in matrices]
    if case.ends:
        _run_parts(host, device, case, h, signals, matrices, memory, restated)
        return matrices, counters
    with host.running(device, memory):
        families: dict[Any, list[Any]] = {}
        for item in items:
            families.setdefault(host.backend.family(item), []).append(item)
        batches: list[Any] = []
        for family in families.values():
            if case.rank:
                batches.append(host.backend.build(family, separate=case.separate))
            else:
                batches.append(host.backend.build_dense(family))
            memory += host.memory(batches[-1])
        for _ in range(case.steps):
            for matrix in matrices:
                matrix.new_gradient()
                if restated:
                    matrix.restate(-factor if h.maximize else factor)
            for batch in batches:
                if case.rank:
                    batch.project(h, replace(signals, clip=None))
                    batch.scale(h, signals)
                    batch.apply(h, signals)
                else:
                    batch.adamw(h, signals)
    return matrices, counters


def _run_parts(
    host: Host, device: Device, case: Case, h: Hyper, signals: Signals, matrices: list[_Matrix],
    memory: list[Region], restated: bool,
) -> None:  # fmt: skip
    """The same by ranks that hold parts of the matrices, of one family."""
    dim = 1 if case.rows else 0
    ranks = parts.by_rank([matrix.item for matrix in matrices], dim, case.ends)
    for item in (item for items in ranks for item in items):
        names = ("weight", "exp_avg", "exp_avg_sq", "step", "update_norm")
        memory += [region(getattr(item, name), name) for name in names]
        memory.append(region(item.grad, "gradient", False))
    others = [parts.signals_for(items[0]) for items in ranks[1:]]
    memory += [region(s.counters, "counters") for s in others]
    passed: list[torch.Tensor] = []  # kept, or others would take their place

    def watched(batch: Any) -> Any:
        fresh = batch._passing

        def passing(*shape: int) -> torch.Tensor:
            passed.append(fresh(*shape))
            memory.append(region(passed[-1], "passing"))
            return passed[-1]

        batch._passing = passing
        memory.extend(host.memory(batch))
        return batch

    with host.running(device, memory):
        batches = [watched(host.backend.build(items, separate=case.separate)) for items in ranks]
        for _ in range(case.steps):
            for i, matrix in enumerate(matrices):
                matrix.new_gradient()
                if restated:
                    matrix.restate(1.0)
                firsts = (0, *case.ends[:-1])
                for items, first, end in zip(ranks, firsts, case.ends, strict=True):
                    own = items[i]
                    own.grad.copy_(matrix.item.grad.narrow(dim, first, end - first))
            parts.verbs(batches, [signals, *others], h)
    for i, matrix in enumerate(matrices):
        own = [items[i] for items in ranks]
        names = ("weight", "exp_avg", "exp_avg_sq")
        for name, whole in zip(names, parts.together(own, dim), strict=True):
            getattr(matrix.item, name).copy_(whole)
        matrix.item.update_norm.copy_(own[-1].update_norm)
        matrix.item.step.copy_(own[-1].step)


def bits(host: Host, device: Device, case: Case) -> list[bytes]:
    """The bits of all that the steps of a case write."""
    matrices, _ = _run(host, device, case, restated=False)
    names = ("weight", "grid", "exp_avg", "exp_avg_sq", "update_norm", "step")
    values = [v for m in matrices for n in names if (v := getattr(m.item, n, None)) is not None]
    values += [unit for m in matrices for unit in getattr(m.item, "units", None) or ()]
    return [v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for v in values]
