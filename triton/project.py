"""R = z X^T / sqrt(r) and q_c = |X_c|^2 of every low-rank gradient X [C, K] (Algorithm 1, step 1).

z is drawn in registers and never stored. A program owns BC channels and BR rank rows, so that an
entry of z, 14 issue slots, serves BC channels. Where K is not split and nothing has to come in
between, Adam's moments of R follow at once, and R itself never reaches memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.adamw import adam, gradient_factor
from apollo_kernels.triton_kernels.element import INTERPRET, element, to_bf16, widen
from apollo_kernels.triton_kernels.philox import FAST, draw
from apollo_kernels.triton_kernels.scale import moments, over_root_of_rank


@triton.jit
def _dot(z, x, acc):
    """acc + z x with float32 sums; z [BR, BK] bf16, x [BK, BC] as loaded.

    float32 is cut into three bf16 pieces, 24 bits together: exact products on tensor cores. They
    are summed apart and then added, since a tensor core's own sum truncates.
    """
    if x.dtype == tl.float32:
        high = to_bf16(x)
        rest = x - high.to(tl.float32)
        middle = to_bf16(rest)
        part = tl.dot(z, to_bf16(rest - middle.to(tl.float32)), input_precision="ieee")
        part = tl.dot(z, middle, part, input_precision="ieee")
        return acc + tl.dot(z, high, part, input_precision="ieee")
    elif INTERPRET:
        return tl.dot(z, widen(x), acc, input_precision="ieee")
    else:
        return tl.dot(z.to(x.dtype), x, acc)


@triton.jit
def _settled(acc):
    """acc, behind an instruction that nobody can look through: wgmma, which goes on by itself, has
    to end before it. Else Triton lets it go on into the next turn, and draws the next z into the
    registers that it still reads (its issue 9433; on an H200 a rademacher R was wrong by 7 %)."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _halves(acc):
    """acc [R, C] as two [R, C / 2]: its first channels, its last ones."""
    R: tl.constexpr = acc.shape[0]
    C: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (R, 2, C // 2)), (0, 2, 1)))


@triton.jit
def find_tile(
    table, items, T: tl.constexpr, K_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr
):
    """This program's row, its channels, its tiles of rank rows, of K and of channels, where its
    contracted indices begin and end, and the size of K; then where X begins, its other stride, and
    its first contracted index. A PART counts those indices as the whole matrix does, from a block
    of numbers on, and its X would begin at the whole's first."""
    row, _, tile = tables.find_work(table, items, tables.LOW_RANK_WIDTH)
    channels = tables.load_number(row, tables.LOW_RANK.channels, ALIGNED and not K_UNIT).to(
        tl.int32
    )
    size = tables.load_number(row, tables.LOW_RANK.k, ALIGNED and K_UNIT).to(tl.int32)
    r_tiles = tl.load(row + tables.LOW_RANK.r_tiles).to(tl.int32)
    chunks = tl.load(row + tables.LOW_RANK.chunks).to(tl.int32)
    r_tile, chunk, c_tile = tile % r_tiles, tile // r_tiles % chunks, tile // r_tiles // chunks
    length = tables.load_number(row, tables.LOW_RANK.chunk, True)
    begin = (chunk * length).to(tl.int32)
    ld = tables.load_number(row, tables.LOW_RANK.grad_ld, ALIGNED)
    x_at = tables.load_pointer(row, tables.LOW_RANK.grad, T, ALIGNED)
    first = 0
    if PART:
        k_first = tables.load_number(row, tables.LOW_RANK.k_first, ALIGNED and K_UNIT)
        x_at -= k_first if K_UNIT else k_first * ld
        first = k_first.to(tl.int32)
        size += first
        begin += tables.load_number(row, tables.LOW_RANK.k_begin, True).to(tl.int32)
    end = tl.minimum(size, begin + length.to(tl.int32))
    return row, channels, r_tile, chunk, c_tile, begin, end, size, x_at, ld, first


@triton.jit
def find_epoch(table, items, clock, gap):
    """The key and the epoch of this program's row, whose first tile leaves t for ``limit``."""
    row, number, tile = tables.find_work(table, items, tables.LOW_RANK_WIDTH)
    step = tl.load(tables.load_pointer(row, tables.LOW_RANK.step, tl.int64, False))
    if tile == 0:
        tl.store(clock + number, step + 1)
    return tl.load(row + tables.LOW_RANK.key), step // gap


@triton.jit
def store(row, space, r, c, j, chunk, ALIGNED: tl.constexpr):
    """r [BR, BC], the sums of one chunk of K, into the workspace: _combine adds them up."""
    channels = tl.load(row + tables.LOW_RANK.channels).to(tl.int32)
    rank = tables.load_number(row, tables.LOW_RANK.rank, ALIGNED)
    to = space + tables.load_number(row, tables.LOW_RANK.partial, True) + chunk * channels * rank
    inside = (c < channels)[None, :] & (j < rank)[:, None]
    tl.store(to + c[None, :] * rank + j[:, None], r, mask=inside)


@triton.jit
def adam_of(
    row, space, r, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adam's moments of r [BR, C], whose channels begin at c0."""
    c = c0 + tl.arange(0, r.shape[1])
    moments(row, space, r, c, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)


@triton.jit
def adam_of_halves(
    row, space, r, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED: tl.constexpr,
):  # fmt: skip
    left, right = _halves(r)
    adam_of(row, space, left, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)
    c0 += r.shape[1] // 2
    adam_of(row, space, right, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)


@triton.jit
def adam_of_quarters(
    row, space, r, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED: tl.constexpr,
):  # fmt: skip
    left, right = _halves(r)
    adam_of_halves(row, space, left, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)
    c0 += r.shape[1] // 2
    adam_of_halves(row, space, right, c0, j, r_tile, factor, b1, w1, b2, w2, eps, ALIGNED)


# Reads G once: 2 bytes per bf16 weight, 4 per float32. It is read again for each further tile
# of rank rows; its neighbour finds it in L2. Without STORE the moments are read and written, 16 r/K
# bytes more; with it R is written, 4 r/K per chunk.
@triton.jit(do_not_specialize=["gap"])
def _project(
    table, items, space, clock, grad_scale, found_inf, direction, b1, w1, b2, w2, eps, gap,
    T: tl.constexpr, K_UNIT: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    ASYNC: tl.constexpr, PART: tl.constexpr,
    STORE: tl.constexpr, SIGNS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    if not STORE:  # noqa: SIM102  (else it writes the workspace alone, and square_norm needs q)
        if tables.is_skipped(found_inf):
            return
    row, channels, r_tile, chunk, c_tile, begin, end, size, x_at, ld, first = find_tile(
        table, items, T, K_UNIT, ALIGNED, PART
    )
    key, epoch = find_epoch(table, items, clock, gap)

    c, k = c_tile * BC + tl.arange(0, BC), tl.arange(0, BK)
    if K_UNIT:
        x_at += c[None, :] * ld + (begin + k)[:, None]
    else:
        x_at += (begin + k)[:, None] * ld + c[None, :]
    acc = tl.zeros((BK if BR == 1 else BR, BC), tl.float32)
    q = tl.zeros((BK, BC), tl.float32)
    for k0 in range(begin, end, BK):
        inside = k0 + k < size
        if PART:
            inside &= k0 + k >= first
        x = tl.load(x_at, mask=(c < channels)[None, :] & inside[:, None], other=0)
        z = to_bf16(draw(key, epoch, r_tile * BR, k0, BR, BK, SIGNS, EXACT, FAST))
        wide = widen(x)
        q += wide * wide
        if BR == 1:  # the channels' dot products with one row: no use for a tensor core
            acc += wide * tl.reshape(z, (BK, 1)).to(tl.float32)
        else:
            acc = _dot(z, x, acc)
            if ASYNC and not INTERPRET:
                acc = _settled(acc)
        x_at += BK if K_UNIT else BK * ld

    if BR == 1:
        acc = tl.sum(acc, 0)[None, :]
    j = r_tile * BR + tl.arange(0, BR)
    if r_tile == 0:
        q_at = space + tl.load(row + tables.LOW_RANK.q) + chunk * channels.to(tl.int64) + c
        tl.store(q_at, tl.sum(q, 0), mask=c < channels)
    if STORE:
        store(row, space, acc, c, j, chunk, R_ALIGNED)
    else:
        factor = over_root_of_rank(row, gradient_factor(direction, grad_scale, None))
        c = c_tile * BC
        if BR * BC <= 64 * 128:
            adam_of(row, space, acc, c, j, r_tile, factor, b1, w1, b2, w2, eps, R_ALIGNED)
        elif BR * BC <= 128 * 128:  # in pieces: R, M and V of a whole tile would spill
            adam_of_halves(row, space, acc, c, j, r_tile, factor, b1, w1, b2, w2, eps, R_ALIGNED)
        else:
            left, right = _halves(acc)
            adam_of_quarters(row, space, left, c, j, r_tile, factor, b1, w1, b2, w2, eps, R_ALIGNED)
            c += BC // 2
            adam_of_quarters(
                row, space, right, c, j, r_tile, factor, b1, w1, b2, w2, eps, R_ALIGNED
            )


class Tiling(NamedTuple):
    """Which kernel a matrix takes: launches are grouped by this."""

    T: tl.dtype
    K_UNIT: bool
    ALIGNED: bool
    R_ALIGNED: bool
    BR: int
    BC: int
    BK: int
    ASYNC: bool
    PART: bool
    num_warps: int
    num_stages: int


def choose(layout: tables.Layout, asynchronous: bool) -> Tiling:
    """The tile of a matrix; ``asynchronous``: whether dots read shared memory (wgmma, tcgen05).

    128 channels share an entry of z, whose 14 slots are most of a turn's. wgmma and tcgen05 leave
    room for 256: on an H200 a step of LLaMA-7B at rank 256 is a third shorter for it. 128 x 128
    float32 sums take 64 registers of 256 threads; wgmma takes 64 rows of its left operand at once.
    Along K, whole 128-byte lines are best; where the sums leave no room for both operands of such a
    turn, half a line is what fits without spills.
    Rank 1 streams G through registers, 32 bytes per thread, in segments of 256 bytes or more.
    """
    rank, g, size = layout.rank, layout.g, layout.g.dtype.itemsize
    if rank == 1:
        tile = (1, 32 // size, 128, False) if g.k_unit else (1, 128, 16, False)
        launch = (4, 3)
    elif asynchronous and size == 2 and rank > 32:
        tile, launch = (min(128, triton.next_power_of_2(rank)), 256, 32, True), (8, 3)
    elif rank <= 64 or asynchronous:
        rows = min(128, max(16, triton.next_power_of_2(rank)))
        tile, launch = (rows, 128, 128 // size, False), (8, 3)
    else:
        tile, launch = (128, 128, 64 // size, False), (8, 4)
    part = layout.k_first is not None
    return Tiling(element(g.dtype), g.k_unit, g.aligned, layout.r_aligned, *tile, part, *launch)


def block(layout: tables.Layout, tiling: Tiling) -> int:
    """What the first contracted index of a part is rounded down to a multiple of: 16 divides it."""
    return tiling.BK


def split(layout: tables.Layout, tiling: Tiling, k: int) -> tuple[int, int]:
    """Contracted indices per chunk, and chunks: few tiles with a long K are cut along it.

    The matrix alone decides, so its bits do not depend on what else is in the launch. At most 32
    tiles of partial sums, 2 MB, are written; a chunk is a multiple of 512, the blocks of z.
    """
    k = max(k, 1)
    tiles = triton.cdiv(layout.channels, tiling.BC) * triton.cdiv(layout.rank, tiling.BR)
    chunks = max(1, min(32 // max(tiles, 1), k // 1024))
    chunk = triton.cdiv(triton.cdiv(k, chunks), 512) * 512
    return chunk, triton.cdiv(k, chunk)


def project(
    tiling: Tiling, store: bool, table: Tensor, items: Tensor, space: Tensor, clock: Tensor,
    signals: Signals, hyper: Hyper,
) -> None:  # fmt: skip
    """Projects every item's tile and writes each row's t; ``store`` leaves moments to combine."""
    *kernel, num_warps, num_stages = tiling
    _project[(len(items),)](
        table, items, space, clock, signals.grad_scale, signals.found_inf, *adam(hyper),
        hyper.update_proj_gap, *kernel, STORE=store, SIGNS=hyper.distribution == "rademacher",
        EXACT=hyper.exact_projection, FAST=FAST, num_warps=num_warps, num_stages=num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
