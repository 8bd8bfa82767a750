"""Adam's moments of R, each channel's scale s_c, and the norm-growth limiter (Algorithm 1, 2-3).

    M, V <- R, R^2;  N = M / (sqrt(V) + eps);  s_c = |N_c| / |R_c|;  u^2 = sum_c s_c^2 q_c

The workspace, float32, begins with a record of 4 per row: what the update needs beside s. The table
says where the rest of it stands.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels import batch
from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.adamw import (
    F32,
    F64,
    adam,
    gradient_factor,
    kept_share,
    load_rate,
    normalized,
    rates,
    step_size,
    update_moments,
)
from apollo_kernels.triton_kernels.element import finite

COMBINE = 32  # channels per program of _combine
TINY = tl.constexpr(batch.TINY)
GROWTH = tl.constexpr(batch.NORM_GROWTH)


@triton.jit
def over_root_of_rank(row, factor):
    """factor r^-1/2, which makes rows of z those of P. A sparse projection needs none."""
    rank = tl.load(row + tables.LOW_RANK.rank)
    return factor / tl.sqrt(tl.maximum(rank, 1).to(F32))


@triton.jit
def moments(row, space, r, c, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED: tl.constexpr):
    """M and V of a tile of R, in place, and the tile's |R_c|^2 and |N_c|^2.

    r [BR, BC] is sum_k z x, which times ``factor`` is R.
    """
    channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
    rank = tables.load_number(row, tables.LOW_RANK.rank, ALIGNED)
    r *= factor
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    offset = c[None, :] * rank + j[:, None]
    m_at = tables.load_pointer(row, tables.LOW_RANK.exp_avg, F32, ALIGNED) + offset
    v_at = tables.load_pointer(row, tables.LOW_RANK.exp_avg_sq, F32, ALIGNED) + offset
    m, v = tl.load(m_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
    # Both squares are selected: a product that goes straight into a sum would be fused with the
    # addition, and then the lanes that hold one sum would end an ulp apart.
    r2 = tl.where(inside, r * r, 0.0)
    m, v, _ = update_moments(m, v, r, r2, b1, w1, b2, w2)
    if r.numel < 512:
        tl.debug_barrier()  # a tile smaller than the block is read by several warps, stored by one
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    n, some = normalized(m, v, eps)
    n2 = tl.where(inside & some, n * n, 0.0)
    tile = r_tile * channels.to(tl.int64) + c
    r_squares = space + tl.load(row + tables.LOW_RANK.r_squares) + tile
    n_squares = space + tl.load(row + tables.LOW_RANK.n_squares) + tile
    tl.store(r_squares, tl.sum(r2, 0), mask=c < channels)
    tl.store(n_squares, tl.sum(n2, 0), mask=c < channels)


# Where project wrote R: reads its partial sums, in order; reads and writes the moments.
@triton.jit
def _combine(
    table, items, space, grad_scale, found_inf, clip, direction, b1, w1, b2, w2, eps,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    if tables.is_skipped(found_inf):
        return
    row, _, tile = tables.find_work(table, items, tables.LOW_RANK_WIDTH)
    channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
    r_tiles = tl.load(row + tables.LOW_RANK.r_tiles).to(tl.int32)
    rank = tables.load_number(row, tables.LOW_RANK.rank, ALIGNED)
    r_tile = tile % r_tiles
    c = tile // r_tiles * BC + tl.arange(0, BC)
    j = r_tile * BR + tl.arange(0, BR)
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    part = space + tables.load_number(row, tables.LOW_RANK.partial, ALIGNED)
    part += c[None, :] * rank + j[:, None]
    r = tl.zeros((BR, BC), F32)
    for _ in range(0, tl.load(row + tables.LOW_RANK.chunks).to(tl.int32)):
        r += tl.load(part, mask=inside, other=0.0)
        part += channels * rank
    factor = gradient_factor(direction, grad_scale, clip)
    if not SPARSE:
        factor = over_root_of_rank(row, factor)
    moments(row, space, r, c, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)


def combine(
    aligned: bool, rank_rows: int, table: Tensor, items: Tensor, space: Tensor, signals: Signals,
    hyper: Hyper,
) -> None:  # fmt: skip
    """The moments of matrices whose R project wrote to the workspace."""
    _combine[(len(items),)](
        table, items, space, signals.grad_scale, signals.found_inf, signals.clip, *adam(hyper),
        ALIGNED=aligned, BR=rank_rows, BC=COMBINE, SPARSE=hyper.distribution == "sparse",
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _total(p, c, channels, count):
    """The sum of p[i, c] over i < count, in order."""
    total = tl.zeros(c.shape, F32)
    for _ in range(0, count):
        total += tl.load(p + c, mask=c < channels, other=0.0)
        p += channels
    return total


@triton.jit
def _limit_update(
    row, number, record, clock, counters, u, factor, lr, lr_at, weight_decay, log_b1, log_b2, alpha,
    CORRECT: tl.constexpr, LIMITER: tl.constexpr,
):  # fmt: skip
    """By the update's norm u: the limiter, and what is left of a step for the weights."""
    # Rows that share a step read it in project's launch, which wrote t here; one of them stores it.
    t = tl.load(clock + number)
    if tl.load(row + tables.LOW_RANK.leads) != 0:
        tl.store(tables.load_pointer(row, tables.LOW_RANK.step, tl.int64, False), t)
    if finite(u):
        rate = load_rate(lr, lr_at)
        step = (step_size(rate, log_b1, log_b2, t, CORRECT) * alpha).to(F32) * factor
        if LIMITER:
            norm_at = tables.load_pointer(row, tables.LOW_RANK.update_norm, F32, False)
            previous = tl.load(norm_at)
            growth = tl.maximum(u / (previous + TINY) / GROWTH, 1.0)
            limit_factor = tl.where(previous < TINY, 1.0, 1.0 / growth)
            tl.debug_barrier()  # every warp has read the norm
            tl.store(norm_at, u * limit_factor)
            tl.atomic_add(counters + 1, (limit_factor < 1.0).to(tl.int64))
            step *= limit_factor
        tl.atomic_add(counters, 1)
        high, low = kept_share(rate, weight_decay)
        tl.store(record, 1.0)
        tl.store(record + 1, step)
        tl.store(record + 2, high)
        tl.store(record + 3, low)
    else:
        tl.atomic_add(counters + 2, 1)


@triton.jit
def _find_sums(row, space):
    """A row's channels, in how many parts q and |R_c|^2, |N_c|^2 lie, and where q, s and these."""
    channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
    q_parts = tl.load(row + tables.LOW_RANK.q_parts).to(tl.int32)
    r_tiles = tl.load(row + tables.LOW_RANK.r_tiles).to(tl.int32)
    q_at = space + tl.load(row + tables.LOW_RANK.q)
    s_at = space + tl.load(row + tables.LOW_RANK.scales)
    r2_at = space + tl.load(row + tables.LOW_RANK.r_squares)
    n2_at = space + tl.load(row + tables.LOW_RANK.n_squares)
    return channels, q_parts, r_tiles, q_at, s_at, r2_at, n2_at


# Reads 4 (q_parts + 2 r_tiles) bytes per channel and writes 4. One program per row adds in a fixed
# order, so the limiter's norm has the same bits in every run.
@triton.jit
def _limit(
    table, space, clock, counters, grad_scale, found_inf, clip, direction, lr, lr_at, weight_decay,
    log_b1, log_b2, alpha,
    TENSOR: tl.constexpr, CORRECT: tl.constexpr, FRONT: tl.constexpr, LIMITER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    record = space + 4 * number
    tl.store(record, 0.0)  # the weights stay as they are, unless the end is reached
    if tables.is_skipped(found_inf):
        return
    row = tables.row_address(table, number, tables.LOW_RANK_WIDTH)
    channels, q_parts, r_tiles, q_at, s_at, r2_at, n2_at = _find_sums(row, space)
    factor = gradient_factor(direction, grad_scale, clip)

    tensor_scale = 0.0
    if TENSOR:  # in float64: a sum over all channels overflows long before its products with s^2
        r2, n2 = tl.zeros((BLOCK,), F64), tl.zeros((BLOCK,), F64)
        for c0 in range(0, channels, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            r2 += _total(r2_at, c, channels, r_tiles).to(F64)
            n2 += _total(n2_at, c, channels, r_tiles).to(F64)
        tensor_scale = (tl.sqrt(tl.sum(n2, 0)) / (tl.sqrt(tl.sum(r2, 0)) + TINY)).to(F32)
    u2 = tl.zeros((BLOCK,), F32)
    for c0 in range(0, channels, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        if TENSOR:
            s = tl.zeros((BLOCK,), F32) + tensor_scale
        else:
            r_norm = tl.sqrt(_total(r2_at, c, channels, r_tiles))
            s = tl.sqrt(_total(n2_at, c, channels, r_tiles)) / (r_norm + TINY)
        tl.store(s_at + c, s, mask=c < channels)
        raw = s * factor  # the scale of the gradient as it is; its square alone could underflow
        u2 += raw * (raw * _total(q_at, c, channels, q_parts))
    u = tl.sqrt(tl.sum(u2, 0))
    if FRONT:
        u *= alpha

    _limit_update(row, number, record, clock, counters, u, factor, lr, lr_at, weight_decay, log_b1,
                  log_b2, alpha, CORRECT, LIMITER)  # fmt: skip


def _numbers(hyper: Hyper, device: torch.device) -> tuple[float | Tensor | None, ...]:
    """The arguments of a limiter's kernel that come from ``hyper``."""
    return adam(hyper)[0], *rates(hyper, device), math.sqrt(hyper.scale)


def _switches(hyper: Hyper) -> dict[str, int]:
    return {
        "TENSOR": hyper.scale_type == "tensor", "CORRECT": hyper.correct_bias,
        "FRONT": hyper.scale_front, "LIMITER": not hyper.disable_nl, "BLOCK": 1024,
    }  # fmt: skip


def limit(table: Tensor, space: Tensor, clock: Tensor, signals: Signals, hyper: Hyper) -> None:
    """The scales and the limiter of every row; advances step, update_norm and the counters."""
    _limit[(len(table),)](
        table, space, clock, signals.counters, signals.grad_scale, signals.found_inf, signals.clip,
        *_numbers(hyper, table.device), **_switches(hyper), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


# ---- parts of matrices, between whose verbs other ranks' sums come -------------------------------


# Reads the partial sums and q, and writes their sums to where the owners of their channels get them
# from: R [share, rank] and q [share] of every matrix, ``width`` floats per owner.
@triton.jit(do_not_specialize=["owners", "width"])
def _send(
    table, items, scratch, sent, owners, width,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, _, tile = tables.find_work(table, items, tables.LOW_RANK_WIDTH)
    channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
    r_tiles = tl.load(row + tables.LOW_RANK.r_tiles).to(tl.int32)
    rank = tables.load_number(row, tables.LOW_RANK.rank, ALIGNED)
    share = tl.load(row + tables.LOW_RANK.share).to(tl.int32)
    r_tile = tile % r_tiles
    c = tile // r_tiles * BC + tl.arange(0, BC)
    j = r_tile * BR + tl.arange(0, BR)
    part = scratch + tables.load_number(row, tables.LOW_RANK.partial, True)
    part += c[None, :] * rank + j[:, None]
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    r = tl.zeros((BR, BC), F32)
    for _ in range(0, tl.load(row + tables.LOW_RANK.chunks).to(tl.int32)):
        r += tl.load(part, mask=inside, other=0.0)
        part += channels * rank
    to = sent + (c // share).to(tl.int64) * width
    r_at = (to + tl.load(row + tables.LOW_RANK.sent_r) + c % share * rank)[None, :] + j[:, None]
    wanted = c < owners * share
    tl.store(r_at, r, mask=wanted[None, :] & (j < rank)[:, None])
    if r_tile == 0:
        q_parts = tl.load(row + tables.LOW_RANK.q_parts).to(tl.int32)
        q = _total(scratch + tl.load(row + tables.LOW_RANK.q), c, channels, q_parts)
        tl.store(to + tl.load(row + tables.LOW_RANK.sent_q) + c % share, q, mask=wanted)


def send(
    aligned: bool, rank_rows: int, table: Tensor, items: Tensor, scratch: Tensor, sent: Tensor
) -> None:
    """R and q of every item's tile, for the ranks that have the moments of its channels.

    Args
        sent: [owners, width] float32.
    """
    _send[(len(items),)](
        table, items, scratch, sent, *sent.shape, ALIGNED=aligned, BR=rank_rows, BC=COMBINE,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


# As _limit, up to the sums that other ranks add theirs to: u^2 or, for one scale per tensor, |R|^2,
# |N|^2 and q.
@triton.jit
def _norms(
    table, space, norms, grad_scale, found_inf, clip, direction,
    TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if tables.is_skipped(found_inf):
        return
    row = tables.row_address(table, number, tables.LOW_RANK_WIDTH)
    channels, q_parts, r_tiles, q_at, s_at, r2_at, n2_at = _find_sums(row, space)
    factor = gradient_factor(direction, grad_scale, clip)
    r2_sum, n2_sum = tl.zeros((BLOCK,), F64), tl.zeros((BLOCK,), F64)
    q_sum = tl.zeros((BLOCK,), F64)
    for c0 in range(0, channels, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        r2 = _total(r2_at, c, channels, r_tiles)
        n2 = _total(n2_at, c, channels, r_tiles)
        raw = tl.zeros((BLOCK,), F32) + factor
        if TENSOR:
            r2_sum += r2.to(F64)
            n2_sum += n2.to(F64)
        else:
            s = tl.sqrt(n2) / (tl.sqrt(r2) + TINY)
            tl.store(s_at + c, s, mask=c < channels)
            raw = s * factor
        q_sum += (raw * (raw * _total(q_at, c, channels, q_parts))).to(F64)
    if TENSOR:
        to = norms + 3 * number
        tl.store(to, tl.sum(r2_sum, 0))
        tl.store(to + 1, tl.sum(n2_sum, 0))
        tl.store(to + 2, tl.sum(q_sum, 0))
    else:
        tl.store(norms + number, tl.sum(q_sum, 0))


def norms(table: Tensor, space: Tensor, to: Tensor, signals: Signals, hyper: Hyper) -> None:
    """The scales of every row, and its sums into ``to``, float64 [rows] or [3 rows]."""
    _norms[(len(table),)](
        table, space, to, signals.grad_scale, signals.found_inf, signals.clip, adam(hyper)[0],
        TENSOR=hyper.scale_type == "tensor", BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


# The rest of _limit, once the sums are those of all ranks.
@triton.jit
def _limit_parts(
    table, space, norms, clock, counters, grad_scale, found_inf, clip, direction, lr, lr_at,
    weight_decay, log_b1, log_b2, alpha,
    TENSOR: tl.constexpr, CORRECT: tl.constexpr, FRONT: tl.constexpr, LIMITER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    record = space + 4 * number
    tl.store(record, 0.0)
    if tables.is_skipped(found_inf):
        return
    row = tables.row_address(table, number, tables.LOW_RANK_WIDTH)
    if TENSOR:
        r2, n2 = tl.load(norms + 3 * number), tl.load(norms + 3 * number + 1)
        s = tl.sqrt(n2) / (tl.sqrt(r2) + TINY)
        u = tl.sqrt(s * s * tl.load(norms + 3 * number + 2)).to(F32)
        channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
        s_at = space + tl.load(row + tables.LOW_RANK.scales)
        for c0 in range(0, channels, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            tl.store(s_at + c, tl.zeros((BLOCK,), F32) + s.to(F32), mask=c < channels)
    else:
        u = tl.sqrt(tl.load(norms + number)).to(F32)
    if FRONT:
        u *= alpha
    factor = gradient_factor(direction, grad_scale, clip)
    _limit_update(row, number, record, clock, counters, u, factor, lr, lr_at, weight_decay, log_b1,
                  log_b2, alpha, CORRECT, LIMITER)  # fmt: skip


def limit_parts(
    table: Tensor, space: Tensor, norms: Tensor, clock: Tensor, signals: Signals, hyper: Hyper
) -> None:
    """``limit`` by the sums of all ranks, which ``norms`` has of every row."""
    _limit_parts[(len(table),)](
        table, space, norms, clock, signals.counters, signals.grad_scale, signals.found_inf,
        signals.clip, *_numbers(hyper, table.device), **_switches(hyper), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
