"""The update of low-rank weights (Algorithm 1, step 4).

W <- (1 - lr wd) W - step s_c X_c         W, X [C, K], in float32, rounded once at the store
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels.batch import Hyper
from apollo_kernels.triton_kernels import int8
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.adamw import decayed
from apollo_kernels.triton_kernels.element import element, narrow, round_stochastically, widen
from apollo_kernels.triton_kernels.philox import ROUNDING_INT8, rounding, rounding_anywhere


# Reads G once, reads and writes W: 6 bytes per bf16 weight, 12 per float32 weight, 4.06 per int8
# weight with a bf16 gradient (GROUP > 0: how many share a grid). Nothing is used twice. Rounding by
# chance draws one call, 60 issue slots, for 8 weights.
@triton.jit
def _apply(
    table, items, space, clock,
    T: tl.constexpr, G_T: tl.constexpr, K_UNIT: tl.constexpr, G_K_UNIT: tl.constexpr,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, BY_EIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    row, number, tile = tables.find_work(table, items, tables.LOW_RANK_WIDTH)
    record = space + 4 * number
    if tl.load(record) == 0.0:
        return
    step, high, low = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    even_channels: tl.constexpr = ALIGNED and not (K_UNIT and G_K_UNIT)
    channels = tables.load_number(row, tables.LOW_RANK.channels, even_channels).to(tl.int32)
    even_size: tl.constexpr = ALIGNED and (K_UNIT or G_K_UNIT)
    size = tables.load_number(row, tables.LOW_RANK.k, even_size).to(tl.int32)
    k_tiles = tl.cdiv(size, BK)
    c0, k0 = tile // k_tiles * BC, tile % k_tiles * BK
    c, k = c0 + tl.arange(0, BC), k0 + tl.arange(0, BK)
    w_ld = tables.load_number(row, tables.LOW_RANK.weight_ld, ALIGNED)
    g_ld = tables.load_number(row, tables.LOW_RANK.grad_ld, ALIGNED)
    w_at = tables.load_pointer(row, tables.LOW_RANK.weight, T, ALIGNED)
    g_at = tables.load_pointer(row, tables.LOW_RANK.grad, G_T, ALIGNED)
    if GROUP and not ROWS:  # int8 tiles are [rows, columns] of the parameter, as grids are cut
        by_c, by_k = c[None, :], k[:, None]
    else:
        by_c, by_k = c[:, None], k[None, :]
    w_at += by_c * w_ld + by_k if K_UNIT else by_k * w_ld + by_c
    g_at += by_c * g_ld + by_k if G_K_UNIT else by_k * g_ld + by_c
    inside = (by_c < channels) & (by_k < size)
    s_at = space + tl.load(row + tables.LOW_RANK.scales) + by_c
    s = tl.load(s_at, mask=by_c < channels, other=0.0)
    stored = tl.load(w_at, mask=inside, other=0, eviction_policy="evict_first")
    g = widen(tl.load(g_at, mask=inside, other=0, eviction_policy="evict_first"))
    if GROUP:
        M: tl.constexpr = BC if ROWS else BK
        N: tl.constexpr = BK if ROWS else BC
        i0, l0 = (c0, k0) if ROWS else (k0, c0)
        m, n = (channels, size) if ROWS else (size, channels)
        i = i0 + tl.arange(0, M)[:, None]
        group, groups = l0 // GROUP + tl.arange(0, N // GROUP)[None, :], tl.cdiv(n, GROUP)
        grid_at = tables.load_pointer(row, tables.LOW_RANK.grid, tl.int32, False)
        grid_at += i.to(tl.int64) * groups + group
        within = (i < m) & (group < groups)
        grid = tl.load(grid_at, mask=within, other=0)
        w = int8.dequantize(stored, grid, GROUP)
    else:
        w = widen(stored)
    old, w = w, tl.fma(g, tl.broadcast_to(-(s * step), w.shape), decayed(w, high, low))
    if GROUP or STOCHASTIC:
        key, t = tl.load(row + tables.LOW_RANK.key), tl.load(clock + number)
    if GROUP:
        if PART:  # some rows of the whole
            i0 += tl.load(row + tables.LOW_RANK.row).to(tl.int32)
        bits = rounding(key, t, i0, l0, M, N, ROUNDING_INT8)
        codes, grid = int8.requantize(old, w, inside, grid, bits, GROUP)
        tl.store(w_at, codes, mask=inside, eviction_policy="evict_first")
        tl.store(grid_at, grid, mask=within)
        return
    if STOCHASTIC:
        if ROWS:
            M: tl.constexpr = BC
            N: tl.constexpr = BK
            i0, l0 = c0, k0
        else:
            M: tl.constexpr = BK
            N: tl.constexpr = BC
            i0, l0 = k0, c0
        if PART:
            i0 += tl.load(row + tables.LOW_RANK.row).to(tl.int32)
            l0 += tl.load(row + tables.LOW_RANK.column).to(tl.int32)
        if BY_EIGHTS:
            bits = rounding(key, t, i0, l0, M, N)
        else:
            bits = rounding_anywhere(key, t, i0, l0, M, N)
        if not ROWS:
            bits = tl.trans(bits)
        w = round_stochastically(w, bits)
    tl.store(w_at, narrow(w, T), mask=inside, eviction_policy="evict_first")


class Tiling(NamedTuple):
    """Which kernel a matrix takes: launches are grouped by this."""

    T: tl.dtype
    G_T: tl.dtype
    K_UNIT: bool
    G_K_UNIT: bool
    ROWS: bool
    ALIGNED: bool
    BC: int
    BK: int
    GROUP: int
    PART: bool
    BY_EIGHTS: bool


def choose(layout: tables.Layout) -> Tiling:
    """The tile of a matrix: 4096 elements, 32 of each of 128 threads, some loads in flight.

    Segments of 512 along W's memory order; a square tile where that side is short, or where G runs
    across it and both need whole sectors. The tiles of int8 weights hold whole groups.
    """
    g, w = layout.g, layout.w
    fast = layout.k if w.k_unit else layout.channels
    long = (8, 512) if fast > 128 and g.k_unit == w.k_unit else (64, 64)
    along_k = w.k_unit
    if layout.group:
        long, along_k = (4096 // max(512, layout.group), max(512, layout.group)), layout.rows
    return Tiling(
        element(w.dtype), element(g.dtype), w.k_unit, g.k_unit, layout.rows,
        g.aligned and w.aligned, *(long if along_k else long[::-1]), layout.group,
        layout.k_first is not None, layout.by_eights,
    )  # fmt: skip


def warps(stochastic: bool) -> int:
    """Half as many elements per thread where random bits stand beside them."""
    return 8 if stochastic else 4


def apply(
    tiling: Tiling, table: Tensor, items: Tensor, space: Tensor, clock: Tensor, hyper: Hyper
) -> None:
    """Updates the weights of every item's tile by the records that scale.limit left."""
    stochastic = hyper.stochastic_rounding and tiling.T == element(torch.bfloat16)
    _apply[(len(items),)](
        table, items, space, clock, **tiling._asdict(), STOCHASTIC=stochastic,
        num_warps=warps(stochastic or tiling.GROUP > 0), enable_fp_fusion=True,
    )  # fmt: skip
