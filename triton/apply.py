"""The updates of weights: APOLLO's (Algorithm 1, step 4) and, for dense parameters, AdamW's.

W <- W - lr wd W - step alpha limit s_c X_c         W, X [C, K], in float32, rounded once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels import reference
from apollo_kernels.triton_kernels import table as at
from apollo_kernels.triton_kernels.element import (
    element,
    finite,
    narrow,
    round_stochastically,
    widen,
)
from apollo_kernels.triton_kernels.philox import rounding
from apollo_kernels.triton_kernels.scale import F32, adam, inverse, one_minus_power, rates


# Reads G once, reads and writes W: 6 bytes a bf16 weight, 12 a float32 one. Nothing is used twice.
# Stochastic rounding draws one call, 60 issue slots, for 8 weights.
@triton.jit
def _apply(
    table, items, space,
    T: tl.constexpr, G_T: tl.constexpr, K_UNIT: tl.constexpr, G_K_UNIT: tl.constexpr,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    row, number, tile = at.work(table, items, at.LOW_RANK)
    record = space + 4 * number
    if tl.load(record) == 0.0:
        return
    step, decay = tl.load(record + 1), tl.load(record + 2)
    channels = at.number(row, at.C, ALIGNED and not (K_UNIT and G_K_UNIT)).to(tl.int32)
    size = at.number(row, at.K, ALIGNED and (K_UNIT or G_K_UNIT)).to(tl.int32)
    k_tiles = tl.cdiv(size, BK)
    c0, k0 = tile // k_tiles * BC, tile % k_tiles * BK
    c, k = c0 + tl.arange(0, BC), k0 + tl.arange(0, BK)
    w_ld, g_ld = at.number(row, at.W_LD, ALIGNED), at.number(row, at.G_LD, ALIGNED)
    w_at, g_at = at.pointer(row, at.W, T, ALIGNED), at.pointer(row, at.G, G_T, ALIGNED)
    by_c, by_k = c[:, None], k[None, :]
    w_at += by_c * w_ld + by_k if K_UNIT else by_k * w_ld + by_c
    g_at += by_c * g_ld + by_k if G_K_UNIT else by_k * g_ld + by_c
    inside = (by_c < channels) & (by_k < size)
    s = tl.load(space + tl.load(row + at.SUMS) + c, mask=c < channels, other=0.0)
    w = widen(tl.load(w_at, mask=inside, other=0, eviction_policy="evict_first"))
    g = widen(tl.load(g_at, mask=inside, other=0, eviction_policy="evict_first"))
    if decay != 0.0:  # 0 * Inf is NaN; and 1 - decay in float32 would lose a decay of 1e-7
        w = tl.fma(w, -decay, w)
    w = tl.fma(g, tl.broadcast_to(-(s * step)[:, None], (BC, BK)), w)
    if STOCHASTIC:
        key, t = tl.load(row + at.KEY), tl.load(at.pointer(row, at.STEP, F32, False)).to(tl.int32)
        if ROWS:
            bits = rounding(key, t, c0, k0, BC, BK)
        else:
            bits = tl.trans(rounding(key, t, k0, c0, BK, BC))
        w = round_stochastically(w, bits)
    tl.store(w_at, narrow(w, T), mask=inside, eviction_policy="evict_first")


class Tiling(NamedTuple):
    """Which kernel a parameter takes: launches are grouped by this."""

    T: tl.dtype
    G_T: tl.dtype
    K_UNIT: bool
    G_K_UNIT: bool
    ROWS: bool
    ALIGNED: bool
    BC: int
    BK: int


def choose(layout: at.Layout) -> Tiling:
    """The tile of a parameter: 4096 elements, 32 of each of 128 threads, some loads in flight.

    Segments of 512 along W's memory order; a square tile where that side is short, or where G runs
    across it and both need whole sectors.
    """
    g, w = layout.g, layout.w
    fast = layout.k if w.k_unit else layout.channels
    long = (8, 512) if fast > 128 and g.k_unit == w.k_unit else (64, 64)
    return Tiling(
        element(w.dtype), element(g.dtype), w.k_unit, g.k_unit, layout.rows,
        g.aligned and w.aligned, *(long if w.k_unit else long[::-1]),
    )  # fmt: skip


def warps(stochastic: bool) -> int:
    """Half as many elements per thread where their random bits stand beside them."""
    return 8 if stochastic else 4


def apply(
    tiling: Tiling, table: Tensor, items: Tensor, space: Tensor, hyper: reference.Hyper
) -> None:
    """Updates the weights of every item's tile by the records that scale.limit left."""
    stochastic = hyper.stochastic_rounding and tiling.T == element(torch.bfloat16)
    _apply[(len(items),)](
        table, items, space, **tiling._asdict(), STOCHASTIC=stochastic,
        num_warps=warps(stochastic), enable_fp_fusion=True,
    )  # fmt: skip


# Writes 8 bytes per parameter: what every tile of _adamw needs.
@triton.jit
def _begin(
    table, space, bad, counters, found_inf, lr, lr_at, weight_decay, log_b1, log_b2,
    CORRECT: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    record = space + 4 * number
    tl.store(record, 0.0)
    if at.skipped(found_inf):
        return
    step_at = at.pointer(table + number.to(tl.int64) * at.DENSE, at.D_STEP, F32, False)
    t = tl.load(step_at) + 1.0
    tl.store(step_at, t)
    tl.store(bad + number, 0)
    tl.atomic_add(counters, 1)  # until a tile meets an element that is not finite
    if lr_at is not None:
        lr = tl.load(lr_at).to(F32)
    step, root = lr, lr * 0.0 + 1.0
    if CORRECT:
        step = (lr / one_minus_power(log_b1, t)).to(F32)
        root = (1.0 / tl.sqrt(one_minus_power(log_b2, t))).to(F32)
    tl.store(record, 1.0)
    tl.store(record + 1, step)
    tl.store(record + 2, lr * weight_decay)
    tl.store(record + 3, root)


# Reads G, reads and writes W, M and V: 22 bytes a bf16 weight, 28 a float32 one.
@triton.jit
def _adamw(
    table, items, space, bad, counters, grad_scale, direction, w1, b2, w2, eps,
    T: tl.constexpr, G_T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, number, tile = at.work(table, items, at.DENSE)
    record = space + 4 * number
    if tl.load(record) == 0.0:
        return
    step, decay, root = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    size = at.number(row, at.D_SIZE, ALIGNED)
    i = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    w_at, g_at = at.pointer(row, at.W, T, ALIGNED) + i, at.pointer(row, at.G, G_T, ALIGNED) + i
    m_at, v_at = at.pointer(row, at.M, F32, ALIGNED) + i, at.pointer(row, at.V, F32, ALIGNED) + i
    g = widen(tl.load(g_at, mask=inside, other=0)) * (direction * inverse(grad_scale))
    w = widen(tl.load(w_at, mask=inside, other=0))
    old_m = tl.load(m_at, mask=inside, other=0.0)
    old_v = tl.load(v_at, mask=inside, other=0.0)
    good = finite(g * g)
    m = old_m + w1 * (g - old_m)
    v = b2 * old_v + w2 * (g * g)
    kept = w
    if decay != 0.0:  # 0 * Inf is NaN
        kept = tl.fma(w, -decay, w)
    new = kept - step * (m / (tl.sqrt(v) * root + eps))
    # Selected, not masked: a mask that depends on data would cut the vector stores into elements.
    tl.store(w_at, narrow(tl.where(good, new, w), T), mask=inside)
    tl.store(m_at, tl.where(good, m, old_m), mask=inside)
    tl.store(v_at, tl.where(good, v, old_v), mask=inside)
    if tl.max((inside & (good == 0)).to(tl.int32), 0) != 0:
        first = (tl.atomic_xchg(bad + number, 1) == 0).to(tl.int64)  # of the parameter's tiles
        tl.atomic_add(counters, -first)
        tl.atomic_add(counters + 2, first)


class DenseTiling(NamedTuple):
    """Which kernel a dense parameter takes: 4096 elements, 16 of each of 256 threads."""

    T: tl.dtype
    G_T: tl.dtype
    ALIGNED: bool
    BLOCK: int = 4096


def begin(
    table: Tensor, space: Tensor, bad: Tensor, counters: Tensor, found_inf: Tensor | None,
    hyper: reference.Hyper,
) -> None:  # fmt: skip
    """The rates of every row; advances step, and counts each as updated."""
    _begin[(len(table),)](
        table, space, bad, counters, found_inf, *rates(hyper, table.device),
        CORRECT=hyper.correct_bias, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def adamw(
    tiling: DenseTiling, table: Tensor, items: Tensor, space: Tensor, bad: Tensor,
    counters: Tensor, grad_scale: Tensor | None, hyper: reference.Hyper,
) -> None:  # fmt: skip
    """Updates every item's tile by the records that ``begin`` left."""
    _adamw[(len(items),)](
        table, items, space, bad, counters, grad_scale, *adam(hyper), **tiling._asdict(),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
