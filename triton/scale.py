"""Adam's moments of R, each channel's scale s_c, and the norm-growth limiter (Algorithm 1, 2-3).

    M, V <- R, R^2;  N = M / (sqrt(V) + eps);  s_c = |N_c| / |R_c|;  u^2 = sum_c s_c^2 q_c

A parameter's workspace, at SUMS, float32: s [C], q [CHUNKS, C], |R|^2 and |N|^2 [R_TILES, C] each.
The workspace begins with a record of 4 per parameter: what the update needs beside s.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels import reference
from apollo_kernels.triton_kernels import table as at
from apollo_kernels.triton_kernels.element import finite

COMBINE = 32  # channels per program of _combine
TINY = tl.constexpr(reference.TINY)
GROWTH = tl.constexpr(reference.NORM_GROWTH)
F32 = tl.float32


@triton.jit
def inverse(grad_scale):
    """What GradScaler's factor is undone with; grad_scale may be None."""
    if grad_scale is None:
        return 1.0
    else:
        return 1.0 / tl.load(grad_scale)


@triton.jit
def moments(
    row, space, r, c, j, r_tile, grad_scale, direction, w1, b2, w2, eps, ALIGNED: tl.constexpr
):  # fmt: skip
    """M and V of a tile of R, in place, and the tile's |R_c|^2 and |N_c|^2.

    r [BR, BC] is sum_k z x, neither scaled nor signed; w1 = 1 - b1 and w2 = 1 - b2 come from the
    host, since float32 would lose three digits of 1 - 0.999. An entry whose R^2 is not finite keeps
    its moments.
    """
    channels, rank = tl.load(row + at.C).to(tl.int32), at.number(row, at.RANK, ALIGNED)
    r *= direction * inverse(grad_scale) / tl.sqrt(rank.to(F32))
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    where = c[None, :] * rank + j[:, None]
    m_at = at.pointer(row, at.M, F32, ALIGNED) + where
    v_at = at.pointer(row, at.V, F32, ALIGNED) + where
    m, v = tl.load(m_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
    r2 = tl.where(inside, r * r, 0.0)
    keep = finite(r2)
    m = tl.where(keep, m + w1 * (r - m), m)
    v = tl.where(keep, b2 * v + w2 * r2, v)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    n = tl.where(inside, m / (tl.sqrt(v) + eps), 0.0)
    chunks, r_tiles = tl.load(row + at.CHUNKS), tl.load(row + at.R_TILES)
    r2_at = space + tl.load(row + at.SUMS) + (1 + chunks + r_tile) * channels + c
    tl.store(r2_at, tl.sum(r2, 0), mask=c < channels)
    tl.store(r2_at + r_tiles * channels, tl.sum(n * n, 0), mask=c < channels)


# Where K was split: reads CHUNKS partial sums of R, in order; reads and writes the moments.
@triton.jit
def _combine(
    table, items, space, grad_scale, found_inf, direction, w1, b2, w2, eps,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    if at.skipped(found_inf):
        return
    row, _, tile = at.work(table, items, at.LOW_RANK)
    channels, r_tiles = tl.load(row + at.C).to(tl.int32), tl.load(row + at.R_TILES).to(tl.int32)
    rank = at.number(row, at.RANK, ALIGNED)
    r_tile = tile % r_tiles
    c = tile // r_tiles * BC + tl.arange(0, BC)
    j = r_tile * BR + tl.arange(0, BR)
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    part = space + tl.load(row + at.PARTIAL) + c[None, :] * rank + j[:, None]
    r = tl.zeros((BR, BC), F32)
    for _ in range(0, tl.load(row + at.CHUNKS).to(tl.int32)):
        r += tl.load(part, mask=inside, other=0.0)
        part += channels * rank
    moments(row, space, r, c, j, r_tile, grad_scale, direction, w1, b2, w2, eps, ALIGNED)


Scaler = tuple[Tensor | None, Tensor | None]  # GradScaler's grad_scale and found_inf


def adam(hyper: reference.Hyper) -> tuple[float, ...]:
    """The gradient's sign, then 1 - b1, b2, 1 - b2 and eps."""
    b1, b2 = map(float, hyper.betas)  # an integer would be compiled into the kernel
    return (-1.0 if hyper.maximize else 1.0), 1 - b1, b2, 1 - b2, float(hyper.eps)


def combine(
    R_ALIGNED: bool, BR: int,
    table: Tensor, items: Tensor, space: Tensor, scaler: Scaler, hyper: reference.Hyper,
) -> None:  # fmt: skip
    """The moments of parameters whose K was split, from project's partial sums."""
    _combine[(len(items),)](
        table, items, space, *scaler, *adam(hyper), ALIGNED=R_ALIGNED, BR=BR, BC=COMBINE,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def one_minus_power(log_b, t):
    """1 - b^t; in float64, since powers near 1 cancel. One scalar per parameter."""
    return 1.0 - tl.exp(t.to(tl.float64) * log_b)


@triton.jit
def _total(p, c, channels, count):
    """The sum of p[i, c] over i < count, in order."""
    total = tl.zeros(c.shape, F32)
    for _ in range(0, count):
        total += tl.load(p + c, mask=c < channels, other=0.0)
        p += channels
    return total


# Reads 4 (CHUNKS + 2 R_TILES) bytes per channel and writes 4. One program per parameter adds in a
# fixed order, so the limiter's norm has the same bits in every run.
@triton.jit
def _limit(
    table, space, counters, grad_scale, found_inf, direction, lr, lr_at, weight_decay,
    log_b1, log_b2, alpha,
    TENSOR: tl.constexpr, CORRECT: tl.constexpr, FRONT: tl.constexpr, LIMITER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    record = space + 4 * number
    tl.store(record, 0.0)  # nothing is written, unless the end is reached
    if at.skipped(found_inf):
        return
    row = table + number.to(tl.int64) * at.LOW_RANK
    channels, chunks = tl.load(row + at.C).to(tl.int32), tl.load(row + at.CHUNKS).to(tl.int32)
    r_tiles = tl.load(row + at.R_TILES).to(tl.int32)
    s_at = space + tl.load(row + at.SUMS)
    q_at = s_at + channels
    r2_at = q_at + chunks.to(tl.int64) * channels
    n2_at = r2_at + r_tiles.to(tl.int64) * channels
    unscale = inverse(grad_scale) * direction

    everything = 0.0
    if TENSOR:
        r2, n2 = tl.zeros((BLOCK,), F32), tl.zeros((BLOCK,), F32)
        for c0 in range(0, channels, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            r2 += _total(r2_at, c, channels, r_tiles)
            n2 += _total(n2_at, c, channels, r_tiles)
        everything = tl.sqrt(tl.sum(n2, 0)) / (tl.sqrt(tl.sum(r2, 0)) + TINY)
    u2 = tl.zeros((BLOCK,), F32)
    for c0 in range(0, channels, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        if TENSOR:
            s = tl.zeros((BLOCK,), F32) + everything
        else:
            r_norm = tl.sqrt(_total(r2_at, c, channels, r_tiles))
            s = tl.sqrt(_total(n2_at, c, channels, r_tiles)) / (r_norm + TINY)
        tl.store(s_at + c, s, mask=c < channels)
        u2 += s * s * (_total(q_at, c, channels, chunks) * (unscale * unscale))
    u = tl.sqrt(tl.sum(u2, 0))
    if FRONT:
        u *= alpha

    step_at = at.pointer(row, at.STEP, F32, False)
    t = tl.load(step_at) + 1.0
    tl.store(step_at, t)
    if not finite(u):
        tl.atomic_add(counters + 2, 1)
        return
    factor = u * 0.0 + 1.0
    if LIMITER:
        norm_at = at.pointer(row, at.NORM, F32, False)
        previous = tl.load(norm_at)
        growth = tl.maximum(u / (previous + TINY) / GROWTH, 1.0)
        factor = tl.where(previous < TINY, 1.0, 1.0 / growth)
        tl.store(norm_at, u * factor)
    tl.atomic_add(counters, 1)
    tl.atomic_add(counters + 1, (factor < 1.0).to(tl.int64))
    if lr_at is not None:
        lr = tl.load(lr_at).to(F32)
    step = lr * factor * alpha * unscale
    if CORRECT:
        c1, c2 = one_minus_power(log_b1, t), one_minus_power(log_b2, t)
        step *= (tl.sqrt(c2) / c1).to(F32)
    tl.store(record, 1.0)
    tl.store(record + 1, step)
    tl.store(record + 2, lr * weight_decay)


def rates(hyper: reference.Hyper, device: torch.device) -> tuple[float | Tensor | None, ...]:
    """lr as a number, lr as a tensor if it is one on ``device``, weight decay, ln b1 and ln b2."""
    lr = hyper.lr
    lr, lr_at = (0.0, lr) if isinstance(lr, Tensor) and lr.device == device else (float(lr), None)
    logs = (math.log(b) if b > 0 else -math.inf for b in hyper.betas)
    return lr, lr_at, float(hyper.weight_decay), *logs


def limit(
    table: Tensor, space: Tensor, counters: Tensor, scaler: Scaler, hyper: reference.Hyper
) -> None:
    """The scales and the limiter of every row; advances step, update_norm and the counters."""
    _limit[(len(table),)](
        table, space, counters, *scaler, adam(hyper)[0], *rates(hyper, table.device),
        math.sqrt(hyper.scale), TENSOR=hyper.scale_type == "tensor", CORRECT=hyper.correct_bias,
        FRONT=hyper.scale_front, LIMITER=not hyper.disable_nl,
        BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
