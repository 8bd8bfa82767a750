"""The CUDA back end: tables of parameters on the device, and launches over a whole group.

    project, scale, limit, apply   the low-rank parameters of a group, four launches
    adamw, advance                 its dense ones, two

A launch reads a table with one row per parameter (csrc/apollo.h) and a map from blocks to rows.
Both stay on the device and are rebuilt only when a tensor has moved; a step itself allocates
nothing and never waits for the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import philox, reference
from apollo_kernels.philox import ProjectionCache
from apollo_kernels.reference import Dense, Hyper, LowRank
from apollo_kernels.repeat import Launch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The module that holds the kernels; tests put an emulated device's here.
kernels: Any = philox._C
kernel_device = "cuda"


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None if they can."""
    if device.type != kernel_device:
        return f"needs a {kernel_device.upper()} device, the tensors are on {device.type!r}"
    if kernels is None:
        return "the native module is not built"
    if not hasattr(kernels, "step_low_rank"):
        return f"the native module has no kernels: {kernels.build_info()['cuda_missing']}"
    return _no_image(device) if device.type == "cuda" else None


@functools.cache
def _no_image(device: torch.device) -> str | None:
    """Asks the driver once, by a step over nothing but a kernel's attributes."""
    problem = kernels.probe(device.index or 0)
    if not problem:
        return None
    warnings.warn(f"the CUDA kernels cannot run on {device}: {problem}", stacklevel=2)
    return f"the driver refuses the kernels: {problem}"


def supported(weight: Tensor, grad: Tensor) -> bool:
    """Whether the kernels take these dtypes and sizes; reference.py takes the rest."""
    return weight.dtype in DTYPES and grad.dtype in DTYPES and max(weight.shape, default=0) < 2**31


def _row_major(x: Tensor) -> bool | None:
    """Whether a matrix [m, n] lies in memory as rows, or (False) as columns; None: as neither."""
    m, n = x.shape
    if n == 1 or x.stride(1) == 1:
        return True
    return False if m == 1 or x.stride(0) == 1 else None


def _leading(x: Tensor, row_major: bool) -> int:
    """Elements between neighbouring rows of memory."""
    return x.stride(0) if row_major else x.stride(1)


def _blocks_to_rows(blocks: Sequence[int], device: torch.device) -> Tensor:
    """int32 map from each block of a launch to its parameter."""
    rows = torch.arange(len(blocks), dtype=torch.int32)
    return rows.repeat_interleave(torch.tensor(blocks, dtype=torch.int64)).to(device)


@dataclass
class _Plan:
    """What the launches of one group need, as long as no tensor of it moves."""

    pointers: tuple[int, ...]
    table: Tensor  # int64 [parameters, fields], on the device
    host: Tensor  # the same in pinned memory, which the copy to the device may read later
    counts: list[tuple[int, ...]]  # blocks of each parameter in each launch
    maps: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    workspace: Tensor
    mirrors: list[_Mirror]

    def __post_init__(self) -> None:
        self.map_pointers = [m.data_ptr() for m in self.maps]


@dataclass
class _Mirror:
    """A copy in an order that the kernels can walk: made before a step, written back after it."""

    index: int
    field: str
    copy: Tensor
    back: bool


class _Mirrors(list[_Mirror]):
    def make(self, batch: Sequence[Any], index: int, field: str, like: Tensor) -> Tensor:
        original = getattr(batch[index], field)
        copy = torch.empty_like(like, dtype=original.dtype)
        self.append(_Mirror(index, field, copy, back=field != "grad"))
        return copy


def _table(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True), host


def _planned(
    pointers: tuple[int, ...],
    rows: list[list[int]],
    counts: Sequence[tuple[int, ...]],
    workspace: tuple[int, torch.dtype],
    mirrors: list[_Mirror],
    device: torch.device,
    old: _Plan | None,
) -> _Plan:
    """A plan; of an old one whose blocks are the same, only the table is new: then nobody waits."""
    blocks = tuple(map(sum, zip(*counts, strict=True)))
    table, host = _table(rows, device)
    size, dtype = workspace
    if old is not None and old.counts == counts and old.workspace.numel() == size:
        maps, space = old.maps, old.workspace
    else:
        maps = tuple(_blocks_to_rows(column, device) for column in zip(*counts, strict=True))
        space = torch.zeros(size, dtype=dtype, device=device)
    return _Plan(pointers, table, host, list(counts), maps, blocks, space, mirrors)


def _plan_low_rank(
    batch: Sequence[LowRank], rank: int, pointers: tuple[int, ...], old: _Plan | None
) -> _Plan:
    device = batch[0].weight.device
    mirrors, rows, size = _Mirrors(), [], 0
    counts: list[tuple[int, int, int]] = []
    for i, item in enumerate(batch):
        weight, grad = item.weight, item.grad
        if _row_major(weight) is None:
            whole = torch.empty(weight.shape, device=device)
            weight = mirrors.make(batch, i, "weight", whole)
        row_major = bool(_row_major(weight))
        if _row_major(grad) != row_major and 1 not in grad.shape:
            grad = mirrors.make(batch, i, "grad", weight)  # both lie in the same order
        m, n = weight.shape
        channels, k = (m, n) if item.rows else (n, m)
        own = item.exp_avg.shape[1]
        by_row = row_major == item.rows
        tiles = kernels.tiling(channels, k, own, rank, DTYPES[grad.dtype], by_row)
        channel_tiles, rank_tiles, chunks, chunk_length, fused = tiles
        scale_blocks = -(-channels // kernels.SCALE_CHANNELS)
        outer, inner = (m, n) if row_major else (n, m)
        vectors = outer * -(-inner // 8)
        empty = channels == 0 or k == 0
        count = (
            0 if empty else channel_tiles * chunks * rank_tiles,
            0 if empty else scale_blocks,
            0 if empty else -(-vectors // kernels.APPLY_VECTORS),
        )
        # Floats of the workspace: R where `scale` sums it, norms per rank tile, s and q, parts.
        sizes = (
            0 if fused else chunks * channels * own,
            2 * rank_tiles * channels if fused else 0,
            (1 + chunks) * channels,
            3 * scale_blocks + 2,
        )
        offsets = [size + sum(sizes[:i]) for i in range(4)]
        size += sum(sizes)
        first = [sum(c[i] for c in counts) for i in range(3)]
        moments = []
        for field in ("exp_avg", "exp_avg_sq"):
            t = getattr(item, field)
            whole = t if t.is_contiguous() else mirrors.make(batch, i, field, t.contiguous())
            moments.append(whole)
        tensors = (weight, grad, *moments, item.update_norm, item.step)
        order = int(by_row) + 2 * row_major
        leading = _leading(weight, row_major), _leading(grad, row_major)
        rows.append(
            [*(t.data_ptr() for t in tensors), item.key, channels, k, own, *leading, order,
             chunks, chunk_length, *offsets, *first]
        )  # fmt: skip
        counts.append(count)
    workspace = size, torch.float32
    return _planned(pointers, rows, counts, workspace, mirrors, device, old)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dimensions."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.numel() == 0 or span == t.numel()


def _plan_dense(batch: Sequence[Dense], pointers: tuple[int, ...], old: _Plan | None) -> _Plan:
    device = batch[0].weight.device
    mirrors, rows = _Mirrors(), []
    counts: list[tuple[int]] = []
    for i, item in enumerate(batch):
        weight = item.weight
        if not _is_dense(weight):
            weight = mirrors.make(batch, i, "weight", torch.empty(weight.shape, device=device))
        tensors = [weight]
        for field in ("grad", "exp_avg", "exp_avg_sq"):
            t = getattr(item, field)
            same = t.stride() == weight.stride()
            tensors.append(t if same else mirrors.make(batch, i, field, weight))
        count = weight.numel()
        first = sum(blocks for (blocks,) in counts)
        rows.append([*(t.data_ptr() for t in (*tensors, item.step)), count, first, i])
        counts.append((-(-count // (8 * kernels.APPLY_VECTORS)),))
    flags = len(batch), torch.int32
    return _planned(pointers, rows, counts, flags, mirrors, device, old)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's index and torch's current stream on it."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _float32(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(torch.float32)


def _hyper(
    h: Hyper, counters: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Any, list[Tensor | None]]:
    """The kernels' Hyper, and the tensors that it points to."""
    lr = h.lr if isinstance(h.lr, Tensor) and h.lr.device == counters.device else None
    kept = [_float32(t) for t in (lr, grad_scale, found_inf)]
    made = kernels.Hyper(
        *map(_pointer, kept), counters.data_ptr(), float(h.lr) if lr is None else 0.0, *h.betas,
        h.eps, h.weight_decay, h.scale, h.update_proj_gap, h.correct_bias, h.maximize,
        h.scale_type == "tensor", h.scale_front, h.disable_nl, h.distribution == "rademacher",
        h.stochastic_rounding,
    )  # fmt: skip
    return made, kept


def _by_dtypes(batch: Sequence[Any]) -> dict[tuple[torch.dtype, torch.dtype], list[Any]]:
    groups: dict[tuple[torch.dtype, torch.dtype], list[Any]] = {}
    for item in batch:
        groups.setdefault((item.weight.dtype, item.grad.dtype), []).append(item)
    return groups


# A CUDA graph reads its tables at every replay, and no one tells when it goes.
_captured: list[_Plan] = []


@dataclass(frozen=True)
class _Launches:
    """A group's launches, to be made now and, while no tensor moves, again."""

    plan: _Plan
    kind: str
    count: int
    rank: int
    dtypes: tuple[int, int]
    device: torch.device

    def __call__(
        self,
        hyper: Hyper,
        counters: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        only: int = 15,
    ) -> None:
        """``only``: which of project, scale, limit, apply, by bits; for benchmarks."""
        made, kept = _hyper(hyper, counters, grad_scale, found_inf)
        plan, device, stream = self.plan, *_stream(self.device)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.append(plan)
        if self.kind == "low-rank":
            kernels.step_low_rank(
                plan.table.data_ptr(), plan.map_pointers, plan.blocks, self.count,
                plan.workspace.data_ptr(), *self.dtypes, self.rank, made, device, stream, only,
            )  # fmt: skip
        else:
            kernels.step_dense(
                plan.table.data_ptr(), plan.map_pointers[0], plan.blocks[0], self.count,
                plan.workspace.data_ptr(), *self.dtypes, made, device, stream,
            )  # fmt: skip
        del kept  # until here: the launches read them


def _plan(
    kind: str,
    batch: list[Any],
    cache: ProjectionCache,
    build: Callable[[tuple[int, ...], _Plan | None], _Plan],
) -> _Plan:
    """The group's plan of the step before, unless one of its tensors has moved."""
    names = [field.name for field in fields(batch[0]) if field.type == "Tensor"]
    pointers = tuple(getattr(item, name).data_ptr() for item in batch for name in names)
    key = (kind, batch[0].weight.data_ptr(), batch[0].weight.dtype, batch[0].grad.dtype)
    plan = cache.plans.get(key)
    if plan is None or plan.pointers != pointers:
        if len(cache.plans) > 64:  # of parameters that have moved away
            cache.plans.clear()
        plan = cache.plans[key] = build(pointers, plan)
    return plan


def _step(
    kind: str,
    batch: list[Any],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    amp: tuple[Tensor | None, Tensor | None],
) -> _Launches | None:
    """The launches over a group of one pair of dtypes; None where copies go around them."""
    rank = max(item.exp_avg.shape[1] for item in batch) if kind == "low-rank" else 0

    def build(pointers: tuple[int, ...], old: _Plan | None) -> _Plan:
        if kind == "low-rank":
            return _plan_low_rank(batch, rank, pointers, old)
        return _plan_dense(batch, pointers, old)

    plan = _plan(kind, batch, cache, build)
    weight, grad = batch[0].weight, batch[0].grad
    dtypes = DTYPES[weight.dtype], DTYPES[grad.dtype]
    launches = _Launches(plan, kind, len(batch), rank, dtypes, weight.device)
    for mirror in plan.mirrors:
        mirror.copy.copy_(getattr(batch[mirror.index], mirror.field))
    launches(hyper, counters, *amp)
    for mirror in plan.mirrors:
        if mirror.back:
            getattr(batch[mirror.index], mirror.field).copy_(mirror.copy)
    return None if plan.mirrors else launches


def _all_steps(
    kind: str,
    batch: Sequence[Any],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    amp: tuple[Tensor | None, Tensor | None],
) -> Launch | None:
    made: list[_Launches | None] = []
    for group in _by_dtypes(batch).values():
        if all(supported(item.weight, item.grad) for item in group):
            made.append(_step(kind, group, hyper, counters, cache, amp))
        else:
            step = reference.step_low_rank if kind == "low-rank" else reference.step_dense
            step(group, hyper, counters, cache, *amp)
            made.append(None)
    launches = [launch for launch in made if launch is not None]
    if len(launches) < len(made):
        return None

    def again(h: Hyper, c: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for launch in launches:
            launch(h, c, grad_scale, found_inf)

    return again


def step_low_rank(
    batch: Sequence[LowRank],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Launch | None:
    """As reference.step_low_rank, without a host sync.

    Returns
        what repeats the step on the same tensors; None where something goes around the kernels.
    """
    return _all_steps("low-rank", batch, hyper, counters, cache, (grad_scale, found_inf))


def step_dense(
    batch: Sequence[Dense],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Launch | None:
    """As reference.step_dense, without a host sync; returns as step_low_rank does."""
    return _all_steps("dense", batch, hyper, counters, cache, (grad_scale, found_inf))
