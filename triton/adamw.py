"""Adam's rule, which low-rank and dense parameters share, and the kernels of the dense ones.

M <- b1 M + (1 - b1) G,   V <- b2 V + (1 - b2) G^2,   N = M / (sqrt(V) + eps)
W <- (1 - lr wd) W - lr sqrt(1 - b2^t) / (1 - b1^t) N
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.triton_kernels import int8, moments
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.element import (
    finite,
    narrow,
    round_stochastically,
    widen,
)
from apollo_kernels.triton_kernels.philox import moment_bits, rounding_of_groups

F32, F64 = tl.float32, tl.float64


@triton.jit
def gradient_factor(direction, grad_scale, clip):
    """What every gradient is multiplied with: its sign, 1 / grad_scale and clip; both may be None.

    It is not finite where clip is not, and then nothing is updated.
    """
    if grad_scale is not None:
        direction = direction / tl.load(grad_scale)
    if clip is not None:
        direction = direction * tl.load(clip)
    return direction


@triton.jit
def update_moments(m, v, g, g2, b1, w1, b2, w2):
    """M and V after the gradient g, whose square is g2, and where that square is finite.

    An entry whose square is not finite keeps both. w1 = 1 - b1 and w2 = 1 - b2 come from the host,
    since float32 would lose three digits of 1 - 0.999.
    """
    good = finite(g2)
    new_m = tl.fma(g, w1, b1 * m)
    new_v = tl.fma(g2, w2, b2 * v)
    return tl.where(good, new_m, m), tl.where(good, new_v, v), good


@triton.jit
def normalized(m, v, eps):
    """N = M / (sqrt(V) + eps), and where that holds: elsewhere the denominator is 0 and N is 0."""
    denominator = tl.sqrt(v) + eps
    some = denominator != 0.0
    return m / tl.where(some, denominator, 1.0), some


@triton.jit
def load_rate(lr, lr_at):
    """The learning rate in float64: the number ``lr``, or what ``lr_at`` points at."""
    if lr_at is None:
        return tl.full((), lr, F64)
    else:
        return tl.full((), tl.load(lr_at), F64)


@triton.jit
def _one_minus_power(log_b, t):
    """1 - b^t; in float64, since powers near 1 cancel. One scalar per parameter."""
    return 1.0 - tl.exp(t.to(F64) * log_b)


@triton.jit
def step_size(rate, log_b1, log_b2, t, CORRECT: tl.constexpr):
    """The learning rate with Adam's bias correction of step t, in float64."""
    if CORRECT:
        rate = rate * tl.sqrt(_one_minus_power(log_b2, t)) / _one_minus_power(log_b1, t)
    return rate


@triton.jit
def kept_share(rate, weight_decay):
    """1 - lr wd as a sum of two float32, of which the second is above 0 where the sum is.

    With both of one sign, an infinite weight stays infinite (``decayed``), and float32's step near
    1, 6e-8, does not swallow a decay of 1e-7.
    """
    keep = 1.0 - rate * tl.full((), weight_decay, F64)
    high = keep.to(F32)
    below = (high.to(tl.int32, bitcast=True) - 1).to(F32, bitcast=True)
    high = tl.where((keep > 0.0) & (high.to(F64) >= keep), below, high)
    return high, tl.where(keep > 0.0, (keep - high.to(F64)).to(F32), 0.0)


@triton.jit
def decayed(w, high, low):
    """(1 - lr wd) W, rounded once more or less; exactly W where there is no decay."""
    return tl.fma(w, tl.broadcast_to(high, w.shape), w * low)


def adam(hyper: Hyper) -> tuple[float, ...]:
    """The gradient's sign, then b1, 1 - b1, b2, 1 - b2 and eps."""
    b1, b2 = map(float, hyper.betas)  # an integer would be compiled into the kernel
    return (-1.0 if hyper.maximize else 1.0), b1, 1 - b1, b2, 1 - b2, float(hyper.eps)


def rates(hyper: Hyper, device: torch.device) -> tuple[float | Tensor | None, ...]:
    """lr as a number, lr as a tensor if it is one on ``device``, weight decay, ln b1 and ln b2."""
    lr = hyper.lr
    lr, lr_at = (0.0, lr) if isinstance(lr, Tensor) and lr.device == device else (float(lr), None)
    logs = (math.log(b) if b > 0 else -math.inf for b in hyper.betas)
    return lr, lr_at, float(hyper.weight_decay), *logs


# Writes a few bytes per parameter: what every tile of _adamw needs. One warp, so that the step is
# read before it is written.
@triton.jit
def _begin(
    table, space, bad, counters, found_inf, lr, lr_at, weight_decay, log_b1, log_b2,
    CORRECT: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    record = space + 4 * number
    tl.store(record, 0.0)  # no tile writes anything, unless the end is reached
    if tables.is_skipped(found_inf):
        return
    row = tables.row_address(table, number, tables.DENSE_WIDTH)
    step_at = tables.load_pointer(row, tables.DENSE.step, tl.int64, False)
    t = tl.load(step_at) + 1
    tl.store(step_at, t)
    tl.store(bad + number, 0)
    tl.atomic_add(counters, 1)  # until a tile meets an element that is not finite
    rate = load_rate(lr, lr_at)
    high, low = kept_share(rate, weight_decay)
    tl.store(record, 1.0)
    tl.store(record + 1, step_size(rate, log_b1, log_b2, t, CORRECT).to(F32))
    tl.store(record + 2, high)
    tl.store(record + 3, low)


# Reads G, reads and writes W, M and V: 22 bytes per bf16 weight, 28 per float32 weight, 20 per int8
# weight with a bf16 gradient (GROUP > 0: how many share a grid, in rows of whole groups). Narrow
# moments take 8 bytes less in bf16, and 12 less in int8.
@triton.jit
def _adamw(
    table, items, space, bad, counters, grad_scale, clip, direction, b1, w1, b2, w2, eps,
    T: tl.constexpr, G_T: tl.constexpr, M_T: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, number, tile = tables.find_work(table, items, tables.DENSE_WIDTH)
    record = space + 4 * number
    if tl.load(record) == 0.0:
        return
    step, high, low = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    size = tables.load_number(row, tables.DENSE.size, ALIGNED)
    i = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    w_at = tables.load_pointer(row, tables.DENSE.weight, T, ALIGNED) + i
    g_at = tables.load_pointer(row, tables.DENSE.grad, G_T, ALIGNED) + i
    m_at = tables.load_pointer(row, tables.DENSE.exp_avg, M_T, ALIGNED) + i
    v_at = tables.load_pointer(row, tables.DENSE.exp_avg_sq, M_T, ALIGNED) + i
    g = widen(tl.load(g_at, mask=inside, other=0)) * gradient_factor(direction, grad_scale, clip)
    stored = tl.load(w_at, mask=inside, other=0)
    if GROUP:
        GROUPS: tl.constexpr = BLOCK // GROUP
        group = tile.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
        grid_at = tables.load_pointer(row, tables.DENSE.grid, tl.int32, False) + group
        grid = tl.load(grid_at, mask=group * GROUP < size, other=0)
        old = int8.dequantize(tl.reshape(stored, (GROUPS, GROUP)), grid, GROUP)
        w = tl.reshape(old, (BLOCK,))
    else:
        w = widen(stored)
    m, v = tl.load(m_at, mask=inside, other=0), tl.load(v_at, mask=inside, other=0)
    if M_T == tl.uint8:
        BLOCKS: tl.constexpr = BLOCK // moments.BLOCK
        block = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        some_inside = block * moments.BLOCK < size
        m_unit_at = tables.load_pointer(row, tables.DENSE.exp_avg_unit, F32, False) + block
        v_unit_at = tables.load_pointer(row, tables.DENSE.exp_avg_sq_unit, F32, False) + block
        m_unit = tl.load(m_unit_at, mask=some_inside, other=0.0)
        v_unit = tl.load(v_unit_at, mask=some_inside, other=0.0)
        m = moments.decode(tl.reshape(m, (BLOCKS, moments.BLOCK)), m_unit, True)
        v = moments.decode(tl.reshape(v, (BLOCKS, moments.BLOCK)), v_unit, False)
        m, v = tl.reshape(m, (BLOCK,)), tl.reshape(v, (BLOCK,))
    else:
        m, v = widen(m), widen(v)
    m, v, good = update_moments(m, v, g, g * g, b1, w1, b2, w2)
    n, some = normalized(m, v, eps)
    new = decayed(w, high, low) - step * tl.where(some, n, 0.0)
    # Selected, not masked: a mask that depends on data would cut the vector stores into elements.
    new = tl.where(good, new, w)
    first = tile.to(tl.int64) * BLOCK
    if GROUP or M_T != F32:
        key = tl.load(row + tables.DENSE.key)
        t = tl.load(tables.load_pointer(row, tables.DENSE.step, tl.int64, False))
    if GROUP:
        columns = tl.load(row + tables.DENSE.columns)
        of_whole = first + tl.load(row + tables.DENSE.first)
        bits = rounding_of_groups(key, t, of_whole, columns, GROUPS, GROUP)
        new = tl.reshape(new, (GROUPS, GROUP))
        codes, grid = int8.requantize(old, new, group * GROUP < size, grid, bits, GROUP)
        tl.store(w_at, tl.reshape(codes, (BLOCK,)), mask=inside)
        tl.store(grid_at, grid, mask=group * GROUP < size)
    else:
        tl.store(w_at, narrow(new, T), mask=inside)
    if M_T != F32:
        first += tl.load(row + tables.DENSE.first)
        m_bits, v_bits = moment_bits(key, t, first, BLOCK)
    if M_T == tl.uint8:
        m, v = tl.reshape(m, (BLOCKS, moments.BLOCK)), tl.reshape(v, (BLOCKS, moments.BLOCK))
        m_bits = tl.reshape(m_bits, (BLOCKS, moments.BLOCK))
        v_bits = tl.reshape(v_bits, (BLOCKS, moments.BLOCK))
        m, m_unit = moments.encode(m, m_unit, m_bits, True)
        v, v_unit = moments.encode(v, v_unit, v_bits, False)
        tl.store(m_unit_at, m_unit, mask=some_inside)
        tl.store(v_unit_at, v_unit, mask=some_inside)
        m, v = tl.reshape(m, (BLOCK,)), tl.reshape(v, (BLOCK,))
    elif M_T != F32:
        m = narrow(round_stochastically(moments.saturated(m), m_bits), M_T)
        v = narrow(round_stochastically(moments.saturated(v), v_bits), M_T)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    if tl.max((inside & (good == 0)).to(tl.int32), 0) != 0:
        alone = (tl.atomic_xchg(bad + number, 1) == 0).to(tl.int64)  # the parameter's first tile
        tl.atomic_add(counters, -alone)
        tl.atomic_add(counters + 2, alone)


class Tiling(NamedTuple):
    """Which kernel a dense parameter takes: BLOCK elements of 256 threads. Where moments are codes
    of a byte, 8 per thread are as many as registers hold."""

    T: tl.dtype
    G_T: tl.dtype
    M_T: tl.dtype
    ALIGNED: bool
    BLOCK: int = 4096
    GROUP: int = 0

    @classmethod
    def of(cls, weight: tl.dtype, grad: tl.dtype, moments: tl.dtype, aligned: bool, group: int = 0):
        return cls(weight, grad, moments, aligned, 2048 if moments == tl.uint8 else 4096, group)


def begin(table: Tensor, space: Tensor, bad: Tensor, signals: Signals, hyper: Hyper) -> None:
    """The rates of every row; advances step, and counts each row as updated."""
    _begin[(len(table),)](
        table, space, bad, signals.counters, signals.found_inf, *rates(hyper, table.device),
        CORRECT=hyper.correct_bias, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def adamw(
    tiling: Tiling, table: Tensor, items: Tensor, space: Tensor, bad: Tensor, signals: Signals,
    hyper: Hyper,
) -> None:  # fmt: skip
    """Updates every item's tile by the records that ``begin`` left."""
    _adamw[(len(items),)](
        table, items, space, bad, signals.counters, signals.grad_scale, signals.clip, *adam(hyper),
        **tiling._asdict(), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
