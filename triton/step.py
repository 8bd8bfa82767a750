"""The Triton back end's two entries: a whole batch of parameters per step, in a few launches.

project (one launch per kind of gradient) -> combine (where K is split) -> limit -> apply (one per
kind of weight). The host waits for nothing: step, epoch, limiter and counters are the device's.
Signatures and meaning: reference.py.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apollo_kernels import reference
from apollo_kernels.philox import ProjectionCache
from apollo_kernels.reference import Dense, Hyper, LowRank
from apollo_kernels.repeat import Launch
from apollo_kernels.triton_kernels import apply, project, scale
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.element import element

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Plan(NamedTuple):
    """What a batch's layouts decide: kernels, tiles, and places in the workspace."""

    static: list[tuple[int, ...]]  # the columns of each row that are no addresses
    project: list[tuple[project.Tiling, bool, Tensor]]
    combine: list[tuple[tuple[bool, int], Tensor]]
    apply: list[tuple[apply.Tiling, Tensor]]
    floats: int


def _grouped(entries: Sequence[tuple[Any, int]], device: torch.device) -> list[tuple[Any, Tensor]]:
    """(kernel, tiles) of each row -> the work items of each kernel; rows without tiles drop out."""
    groups = defaultdict(list)
    for row, (kernel, tiles) in enumerate(entries):
        if tiles:
            groups[kernel].append((row, tiles))
    return [(kernel, tables.items(tiles, device)) for kernel, tiles in groups.items()]


def _asynchronous_dots(device: torch.device) -> bool:
    """Hopper's wgmma and data-centre Blackwell's tcgen05."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache(maxsize=64)
def _plan(device: torch.device, layouts: tuple[tables.Layout, ...]) -> _Plan:
    static, projects, combines, applies = [], [], [], []
    floats = 4 * len(layouts)  # the records
    asynchronous = _asynchronous_dots(device)
    for layout in layouts:
        channels, k, rank, _, _, g, w = layout
        tiling = project.choose(layout, asynchronous)
        chunk, chunks = project.split(layout, tiling)
        r_tiles = triton.cdiv(rank, tiling.BR)
        tiles = triton.cdiv(channels, tiling.BC) * r_tiles
        sums, partial = floats, floats + (1 + chunks + 2 * r_tiles) * channels
        floats = partial + (chunks * channels * rank if chunks > 1 else 0)
        projects.append(((tiling, chunks > 1), tiles * chunks))
        sums_tiles = triton.cdiv(channels, scale.COMBINE) * r_tiles if chunks > 1 else 0
        combines.append(((tiling.R_ALIGNED, tiling.BR), sums_tiles))
        update = apply.choose(layout)
        applies.append((update, triton.cdiv(channels, update.BC) * triton.cdiv(k, update.BK)))
        static.append((channels, k, rank, g.ld, w.ld, chunk, chunks, r_tiles, sums, partial))
    return _Plan(
        static,
        [(*kernel, tiles) for kernel, tiles in _grouped(projects, device)],
        _grouped(combines, device),
        _grouped(applies, device),
        floats,
    )


class _Copies:
    """Contiguous stand-ins for tensors that the kernels cannot read as they lie."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor | None, Tensor]] = []  # copies live until they are launched

    def of(self, t: Tensor, written: bool) -> Tensor:
        copy = t.contiguous()
        self._held.append((t if written else None, copy))
        return copy

    def write_back(self) -> bool:
        """Whether there were any copies; what the kernels wrote is where it belongs then."""
        for t, copy in self._held:
            if t is not None:
                t.copy_(copy)
        return bool(self._held)


def _guard(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _ours(item: LowRank | Dense) -> bool:
    """Whether the kernels take it; PyTorch takes the rest: float64, and sides beyond int32."""
    sizes = max(item.weight.shape, default=0) < 2**31
    return item.weight.dtype in _DTYPES and item.grad.dtype in _DTYPES and sizes


def _launch_low_rank(
    plan: _Plan,
    table: Tensor,
    space: Tensor,
    hyper: Hyper,
    counters: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The launches of a batch, for as long as none of its tensors moves."""
    scaler = (grad_scale, found_inf)
    tables.keep_if_capturing(plan, table, space)
    with _guard(table.device):
        for tiling, chunked, items in plan.project:
            project.project(tiling, chunked, table, items, space, scaler, hyper)
        for tile, items in plan.combine:
            scale.combine(*tile, table, items, space, scaler, hyper)
        scale.limit(table, space, counters, scaler, hyper)
        for update, items in plan.apply:
            apply.apply(update, table, items, space, hyper)


def step_low_rank(
    batch: Sequence[LowRank],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Launch | None:
    """As reference.step_low_rank, without a wait for the device.

    A weight or gradient of which neither side is contiguous is copied, and written back.

    Returns
        what repeats the step on the same tensors; None where something goes around the kernels.
    """
    amp, copies = (grad_scale, found_inf), _Copies()
    if rest := [item for item in batch if not _ours(item)]:
        reference.step_low_rank(rest, hyper, counters, cache, *amp)
    ours = [item for item in batch if _ours(item)]
    if not ours:
        return None
    device, layouts, addresses = ours[0].weight.device, [], []
    for item in ours:
        w, g = item.weight, item.grad
        if not item.rows:
            w, g = w.t(), g.t()
        if (g_lies := tables.matrix(g)) is None:
            g = copies.of(g, written=False)
            g_lies = tables.matrix(g)
        if (w_lies := tables.matrix(w)) is None:
            w = copies.of(w, written=True)
            w_lies = tables.matrix(w)
        m, v = (
            t if t.is_contiguous() else copies.of(t, written=True)
            for t in (item.exp_avg, item.exp_avg_sq)
        )
        vectors = m.shape[1] % 16 == 0 and m.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0
        layouts.append(tables.Layout(*w.shape, m.shape[1], item.rows, vectors, g_lies, w_lies))
        held = (g, w, m, v, item.update_norm, item.step)
        addresses.append((*(t.data_ptr() for t in held), item.key))
    plan = _plan(device, tuple(layouts))
    rows = tuple((*a, *s) for a, s in zip(addresses, plan.static, strict=True))
    space = torch.empty(plan.floats, dtype=torch.float32, device=device)
    launch = partial(_launch_low_rank, plan, tables.table(device, rows), space)
    launch(hyper, counters, *amp)
    return None if copies.write_back() or rest else launch


@lru_cache(maxsize=64)
def _dense_plan(
    device: torch.device, layouts: tuple[tuple[int, apply.DenseTiling], ...]
) -> list[tuple[apply.DenseTiling, Tensor]]:
    tiles = [(tiling, triton.cdiv(size, tiling.BLOCK)) for size, tiling in layouts]
    return _grouped(tiles, device)


def _flat(tensors: Sequence[Tensor], copies: _Copies) -> list[Tensor]:
    """W, G, M, V as they are where all lie alike and without gaps, else as contiguous copies."""
    w, g, *_ = tensors
    dense = torch.empty_like(w, device="meta").stride() == w.stride()
    if dense and all(t.stride() == w.stride() for t in tensors):
        return list(tensors)
    return [t if t.is_contiguous() else copies.of(t, written=t is not g) for t in tensors]


def _launch_dense(
    plan: list[tuple[apply.DenseTiling, Tensor]],
    table: Tensor,
    space: Tensor,
    bad: Tensor,
    hyper: Hyper,
    counters: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """As _launch_low_rank."""
    tables.keep_if_capturing(plan, table, space, bad)
    with _guard(table.device):
        apply.begin(table, space, bad, counters, found_inf, hyper)
        for tiling, items in plan:
            apply.adamw(tiling, table, items, space, bad, counters, grad_scale, hyper)


def step_dense(
    batch: Sequence[Dense],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Launch | None:
    """As reference.step_dense, without a wait for the device; returns as step_low_rank does.

    W, G, M and V that do not lie alike in memory, or have gaps, are copied, and written back.
    """
    amp, copies = (grad_scale, found_inf), _Copies()
    if rest := [item for item in batch if not _ours(item)]:
        reference.step_dense(rest, hyper, counters, cache, *amp)
    ours = [item for item in batch if _ours(item)]
    if not ours:
        return None
    device, layouts, rows = ours[0].weight.device, [], []
    for item in ours:
        held = _flat((item.weight, item.grad, item.exp_avg, item.exp_avg_sq), copies)
        w, g, m, v = held
        aligned = all(t.data_ptr() % 16 == 0 for t in held) and w.numel() % 16 == 0
        tiling = apply.DenseTiling(element(w.dtype), element(g.dtype), aligned)
        layouts.append((w.numel(), tiling))
        rows.append((*(t.data_ptr() for t in (g, w, m, v, item.step)), w.numel()))
    plan, table = _dense_plan(device, tuple(layouts)), tables.table(device, tuple(rows))
    space = torch.empty(4 * len(ours), dtype=torch.float32, device=device)
    bad = torch.empty(len(ours), dtype=torch.int32, device=device)
    launch = partial(_launch_dense, plan, table, space, bad)
    launch(hyper, counters, *amp)
    return None if copies.write_back() or rest else launch
