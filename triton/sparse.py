"""R and q_c = |X_c|^2 of every low-rank gradient X [C, K] under a sparse projection.

R[c, h(k)] += sigma(k) X[c, k]: each block of r contracted indices is turned, signed and added to R,
so that the cost does not grow with the rank. h permutes a block, so row j of R gathers one k of it:
no scatter, no dot, and one order of the sums. Each k is read by one tile of rank rows alone.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.adamw import adam, gradient_factor
from apollo_kernels.triton_kernels.element import element, widen
from apollo_kernels.triton_kernels.philox import sparse_place, sparse_places, sparse_signs
from apollo_kernels.triton_kernels.project import find_epoch, find_tile, store
from apollo_kernels.triton_kernels.scale import moments


@triton.jit
def _swap(x, odd, W: tl.constexpr):
    """x [BC, units, W] whose place e holds what e xor ``odd`` [units] held; W is 4 or 8.

    A thread holds whole units, so that this is a selection per element and bit of ``odd``.
    """
    BC: tl.constexpr = x.shape[0]
    UNITS: tl.constexpr = x.shape[1]
    bits = odd[None, :, None, None] if W == 8 else odd[None, :, None]
    x = tl.reshape(x, (BC, UNITS, 2, 2, 2) if W == 8 else (BC, UNITS, 2, 2))
    for bit in tl.static_range(3 if W == 8 else 2):
        low, high = tl.split(x)
        turned = (bits >> bit & 1) != 0
        x = tl.join(tl.where(turned, high, low), tl.where(turned, low, high))
        x = tl.permute(x, (0, 1, 4, 2, 3) if W == 8 else (0, 1, 3, 2))  # the next bit comes last
    return tl.reshape(x, (BC, UNITS, W))


# Reads G once, whatever the rank, and R, M and V as _project does. An element takes a load or an
# eighth of one, a selection per bit that the load's address does not turn, and two multiply-adds.
@triton.jit(do_not_specialize=["gap"])
def _project_sparse(
    table, items, space, clock, grad_scale, found_inf, direction, b1, w1, b2, w2, eps, gap,
    T: tl.constexpr, K_UNIT: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr,
    EIGHTS: tl.constexpr, UNIT: tl.constexpr,
    BR: tl.constexpr, BLOCKS: tl.constexpr, BC: tl.constexpr, PART: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    if not STORE:  # noqa: SIM102  (else it writes the workspace alone, and square_norm needs q)
        if tables.is_skipped(found_inf):
            return
    row, channels, r_tile, chunk, c_tile, begin, end, _size, x_at, ld, k_first = find_tile(
        table, items, T, K_UNIT, ALIGNED, PART
    )
    key, epoch = find_epoch(table, items, clock, gap)
    rank = tl.load(row + tables.LOW_RANK.rank).to(tl.int32)
    if EIGHTS:
        rank = tl.multiple_of(rank, 8)
    if BR == 1:
        rank = 1

    N: tl.constexpr = BLOCKS * BR
    AROUND: tl.constexpr = max(8, BLOCKS)  # blocks per call for their places
    # Two turns of the loop have their loads in flight, where registers are left for them.
    WIDE: tl.constexpr = T == tl.float32 or not ALIGNED or (K_UNIT and UNIT == 1)
    AHEAD: tl.constexpr = 2 if BLOCKS == 1 and not WIDE else 1
    n, c = tl.arange(0, N), c_tile * BC + tl.arange(0, BC)
    block, j = n // BR, r_tile * BR + n % BR
    x_at += c[:, None] * ld if K_UNIT else c[None, :]
    acc = tl.zeros((BC, N) if K_UNIT else (N, BC), tl.float32)
    q = tl.zeros((BC, N // UNIT) if K_UNIT else (N, BC), tl.float32)
    first = begin // rank  # a multiple of AROUND
    count = tl.cdiv(end - begin, rank)
    for around in range(0, tl.cdiv(count, AROUND)):
        b0 = first + around * AROUND
        k0 = begin + around * (AROUND * rank)
        signs = sparse_signs(key, epoch, b0 // 16 + block // 16, j)
        if BR > 1:
            places = sparse_places(key, epoch, b0 // 8)
        blocks = tl.minimum(AROUND, count - around * AROUND)
        for u in tl.range(0, blocks, BLOCKS, loop_unroll_factor=AHEAD):
            b = b0 + u + block
            # k within k0's blocks: the inverse of h at j, and its unit's begin, which decides masks
            if BR == 1:
                unit = n // UNIT * UNIT
                k = n
            elif EIGHTS:
                turn, rotation = sparse_place(places, b, rank // 8)
                group = j // 8 - rotation
                group += tl.where(group < 0, rank // 8, 0)
                # The address turns units, and registers what lies within one.
                e = (j % 8 // UNIT ^ turn // UNIT) * UNIT
                unit = (u + block) * rank + group * 8 + e
                k = tl.max_contiguous(tl.multiple_of(unit + j % UNIT, UNIT), UNIT)
            else:
                i = j - sparse_place(places, b, rank)[1]
                unit = (u + block) * rank + i + tl.where(i < 0, rank, 0)
                k = unit
            inside = (unit < end - k0) & (j < rank)
            if PART:
                inside &= k0 + unit >= k_first
            inside = tl.max_constancy(inside, UNIT)
            if K_UNIT:
                mask = (c < channels)[:, None] & inside[None, :]
                x = widen(tl.load(x_at + (k0 + k)[None, :], mask=mask, other=0))
            else:
                mask = (c < channels)[None, :] & inside[:, None]
                x = widen(tl.load(x_at + (k0 + k)[:, None] * ld, mask=mask, other=0))
            if UNIT > 1 and BR > 1:
                m = tl.arange(0, N // UNIT) // (BR // UNIT)
                odd = sparse_place(places, b0 + u + m, 1)[0]
                x = tl.reshape(_swap(tl.reshape(x, (BC, N // UNIT, UNIT)), odd, UNIT), (BC, N))
            sign = (((signs >> (b % 16).to(tl.uint32) & 1) << 31) | 0x3F800000).to(
                tl.float32, bitcast=True
            )
            if UNIT > 1:
                q += tl.sum(tl.reshape(x * x, (BC, N // UNIT, UNIT)), 2)
            else:
                q += x * x
            acc += x * (sign[None, :] if K_UNIT else sign[:, None])

    q_at = space + tl.load(row + tables.LOW_RANK.q)
    q_part = chunk * tl.load(row + tables.LOW_RANK.r_tiles) + r_tile
    tl.store(q_at + q_part * channels + c, tl.sum(q, 1 if K_UNIT else 0), mask=c < channels)
    if K_UNIT:
        acc = tl.trans(tl.sum(tl.reshape(acc, (BC, BLOCKS, BR)), 1))
    else:
        acc = tl.sum(tl.reshape(acc, (BLOCKS, BR, BC)), 0)
    rows = r_tile * BR + tl.arange(0, BR)
    if STORE:
        store(row, space, acc, c, rows, chunk, R_ALIGNED)
    else:
        factor = gradient_factor(direction, grad_scale, None)
        moments(row, space, acc, c, rows, r_tile, factor, b1, w1, b2, w2, eps, R_ALIGNED)


class Tiling(NamedTuple):
    """Which kernel a matrix takes: launches are grouped by this."""

    T: tl.dtype
    K_UNIT: bool
    ALIGNED: bool
    R_ALIGNED: bool
    EIGHTS: bool  # the rank is a multiple of 8, so that whole groups of 8 indices are turned
    UNIT: int  # contracted indices per load: 16 bytes of them, or one
    BR: int
    BLOCKS: int
    BC: int
    PART: bool


def choose(layout: tables.Layout, asynchronous: bool) -> Tiling:
    """The tile of a matrix: 16 KB at a time, 64 bytes of each of 256 threads. Where elements are
    loaded one by one, each has an address in registers: 4096 of them.

    Lower ranks take several blocks at a time, for the segments of contiguous elements; not more
    than 8 and best half of that, since 8 blocks share the calls for their places and signs. Rank 1
    has no places. ``asynchronous`` changes nothing, since nothing is multiplied.
    """
    rank, g = layout.rank, layout.g
    eights = rank > 0 and rank % 8 == 0
    rows = min(256 if g.k_unit else 128, triton.next_power_of_2(max(rank, 1)))
    if rows == 1:
        blocks = 128 if g.k_unit else 16
    else:
        blocks = max(1, min(8 if rows < 8 else 4, 128 // rows))
    unit = 16 // g.dtype.itemsize if g.k_unit and g.aligned and (eights or rows == 1) else 1
    one_by_one = unit == 1 if g.k_unit else not g.aligned
    elements = 4096 if one_by_one else 16384 // g.dtype.itemsize
    channels = min(256, elements // (rows * blocks))
    return Tiling(
        element(g.dtype), g.k_unit, g.aligned, layout.r_aligned, eights, unit, rows, blocks,
        channels, layout.k_first is not None,
    )  # fmt: skip


def block(layout: tables.Layout, tiling: Tiling) -> int:
    """What the first contracted index of a part is rounded down to a multiple of: 16 divides it."""
    return max(16, tiling.BLOCKS) * max(layout.rank, 1)


def split(layout: tables.Layout, tiling: Tiling, k: int) -> tuple[int, int]:
    """Contracted indices per chunk, and chunks: few tiles with a long K are cut along it.

    The matrix's shape and order alone decide, so channels are counted by one tile for all dtypes
    and alignments. No more sums are written than by project.split. A chunk is a multiple of 16
    blocks, which have their signs from one call.
    """
    k, rank = max(k, 1), max(layout.rank, 1)
    channels = 8192 // (tiling.BR * tiling.BLOCKS)
    tiles = triton.cdiv(layout.channels, channels) * triton.cdiv(rank, tiling.BR)
    chunks = max(1, min(64 // max(tiles, 1), k // 1024))
    unit = max(16, tiling.BLOCKS) * rank
    chunk = triton.cdiv(triton.cdiv(k, chunks), unit) * unit
    return chunk, triton.cdiv(k, chunk)


def project(
    tiling: Tiling, stored: bool, table: Tensor, items: Tensor, space: Tensor, clock: Tensor,
    signals: Signals, hyper: Hyper,
) -> None:  # fmt: skip
    """Projects every item's tile and writes each row's t, as project.project does."""
    _project_sparse[(len(items),)](
        table, items, space, clock, signals.grad_scale, signals.found_inf, *adam(hyper),
        hyper.update_proj_gap, *tiling, STORE=stored, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
